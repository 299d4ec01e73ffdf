"""Who computes the GRPO loss or its log-probabilities: each by its own functions, at equal settings.

A provider names, for each task of ``problems.py`` that it serves, a loader of a function from a problem to the loss
(epsilon 0.2, averaged over tokens) or to log-probs. Where a package has log-probs alone, torch computes the loss.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from naive import loss_of_logprobs, naive_logprobs
from problems import Function, Problem
from tables import OURS
from torch import Tensor

from grpo_kernels import backends, grpo_loss, linear_grpo_loss, linear_token_logprobs, token_logprobs

#: Log-probs [N] of hidden states [N, H], a head [V, H] and ids [N].
Head = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Log-probs [N] of logits [N, V] and ids [N].
Rows = Callable[[Tensor, Tensor], Tensor]
#: Our kernels for a GPU, as the names of providers and settings end.
GPU_BACKENDS = {"triton": "Triton", "cuda": "CUDA"}


@dataclass(frozen=True)
class Provider:
    """A way to do some of the tasks.

    Args:
        name: As tables call it.
        tasks: By task, what loads the function; it raises where it cannot run.
        package: What must be installed.
        device: "cuda" or "cpu" for one that runs there alone.
        in_place: Whether it writes its gradient over the logits.
        padded: Whether it takes logits [B, T + 1, V] and leaves the last position unread.
        compiles: Whether the first call of a shape compiles.
        needs_torch: A function of ``torch.nn.functional`` that not every torch has.
        needs_backend: Ours whose kernels must run there.
    """

    name: str
    tasks: Mapping[str, Callable[[], Function]]
    package: str | None = None
    device: str | None = None
    in_place: bool = False
    padded: bool = False
    compiles: bool = False
    needs_torch: str = ""
    needs_backend: str = "torch"

    def missing(self, device: str) -> str:
        """Why it cannot run on a kind of device; empty if it can."""
        if self.package is not None and importlib.util.find_spec(self.package.replace("-", "_")) is None:
            return f"{self.package} is not installed"
        if self.device not in (None, device):
            return f"it runs on {self.device} alone"
        if self.needs_torch and not hasattr(torch.nn.functional, self.needs_torch):
            return f"torch {torch.__version__} has no {self.needs_torch}"
        return backends.unsupported_reason("grpo_loss", self.needs_backend, torch.device(device)) or ""

    def version(self) -> str:
        """Of its package; empty where torch is all it needs, or a source tree does not say."""
        try:
            return "" if self.package is None else version(_DISTRIBUTIONS.get(self.package, self.package))
        except PackageNotFoundError:
            return ""


_DISTRIBUTIONS = {"quack": "quack-kernels", "liger_kernel": "liger-kernel"}


def _of_head(load: Callable[[], Head]) -> dict[str, Callable[[], Function]]:
    """The tasks of a head that gives log-probs."""

    def logprobs() -> Function:
        head = load()

        def function(problem: Problem) -> Tensor:
            found = head(problem.hidden.flatten(0, 1), problem.weight, problem.ids.flatten())
            return found.view(problem.ids.shape)

        return function

    def loss() -> Function:
        function = logprobs()
        return lambda problem: loss_of_logprobs(function(problem), problem.old, problem.advantages, problem.mask)

    return {"hidden": loss, "logprobs": logprobs, "upstream": logprobs}


def _of_rows(load: Callable[[], Rows]) -> dict[str, Callable[[], Function]]:
    """The task of a function from logits to log-probs."""

    def loss() -> Function:
        rows = load()

        def function(problem: Problem) -> Tensor:
            found = rows(problem.logits.flatten(0, 1), problem.ids.flatten())
            return loss_of_logprobs(found.view(problem.ids.shape), problem.old, problem.advantages, problem.mask)

        return function

    return {"logits": loss}


def _naive_head() -> Head:
    return lambda x, w, ids: naive_logprobs(x @ w.t(), ids)


def _compiled_head() -> Head:
    return torch.compile(_naive_head(), dynamic=False)


def _compiled_rows() -> Rows:
    return torch.compile(naive_logprobs, dynamic=False)


def _torch_head() -> Head:
    function = torch.nn.functional.linear_cross_entropy  # torch 2.13 and newer
    return lambda x, w, ids: -function(x, w, ids, reduction="none")


def _trl_head() -> Head:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    names = ("log_probs", "entropy")  # what its GRPO trainer asks for
    return lambda x, w, ids: ChunkedLogProbFunction.apply(x, w, None, ids, 1.0, CHUNK, None, 1.0, names)[0]


def _trl_rows() -> Rows:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def _trl_triton_rows() -> Rows:
    from trl.kernels import selective_log_softmax_and_entropy

    return lambda logits, ids: selective_log_softmax_and_entropy(logits, ids)[0]


def _liger() -> Function:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")

    def loss(problem: Problem) -> Tensor:
        given = (problem.hidden, problem.weight, problem.ids, problem.mask, problem.advantages)
        return module(*given, old_per_token_logps=problem.old)[0]

    return loss


def _liger_triton() -> Function:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(problem: Problem) -> Tensor:
        return triton_grpo_loss(
            problem.logits, problem.old, None, problem.ids, problem.advantages, problem.mask, temperature=1.0,
            beta=0.0, eps_low=0.2, eps_high=0.2, inplace=True, loss_type="bnpo", reduce=True,
        )[0]  # fmt: skip

    return loss


def _verl_head() -> Head:
    # the file alone: verl itself imports ray, a server's worth of packages, where this needs torch
    path = Path(importlib.util.find_spec("verl").origin).parent / "utils" / "experimental" / "torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    module = loaded.FusedLinearForPPO()
    return lambda x, w, ids: module(x, w, ids)[0]


def _verl_triton_head() -> Head:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda x, w, ids: linear_cross_entropy(x, w, ids, 1.0, "none")[0]


def _cce_head(**options: object) -> Head:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, w, ids: -linear_cross_entropy(x, w, ids, reduction="none", **options)


def _quack_rows() -> Rows:
    from quack.cross_entropy import cross_entropy

    return lambda logits, ids: -cross_entropy(logits, ids, reduction="none", inplace_backward=True)


def _flash_rows() -> Rows:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits, ids: -cross_entropy_loss(logits, ids, inplace_backward=True)[0]


def _ours_loss(backend: str, inplace: bool = True) -> Function:
    def loss(problem: Problem) -> Tensor:
        given = (problem.logits, problem.ids, problem.advantages, problem.mask)
        return grpo_loss(*given, old_logprobs=problem.old, inplace=inplace, backend=backend).loss

    return loss


def _ours_linear(backend: str, workspace_share: float = 1.0, logits_dtype: torch.dtype | None = None) -> Function:
    """``workspace_share``: of the logits' bytes that the workspace may take on a CPU."""

    def loss(problem: Problem) -> Tensor:
        given = (problem.hidden, problem.weight, problem.ids, problem.advantages, problem.mask)
        bytes_ = int(workspace_share * problem.ids.numel() * problem.weight.shape[0] * 4)
        options = {} if problem.hidden.device.type == "cuda" else {"workspace_bytes": bytes_}
        options |= {"old_logprobs": problem.old, "logits_dtype": logits_dtype}
        return linear_grpo_loss(*given, backend=backend, **options).loss

    return loss


def _ours_head(backend: str, logits_share: int | None = None) -> Function:
    """``logits_share``: of the logits that are saved for the backward; None leaves it to the default."""

    def logprobs(problem: Problem) -> Tensor:
        options = {}
        if logits_share is not None:
            options = {"max_logits_bytes": logits_share * problem.ids.numel() * problem.weight.shape[0] * 4}
        return linear_token_logprobs(problem.hidden, problem.weight, problem.ids, backend=backend, **options).logprobs

    return logprobs


def _ours_rows(backend: str) -> Function:
    def loss(problem: Problem) -> Tensor:
        found = token_logprobs(problem.logits, problem.ids, inplace_backward=True, backend=backend).logprobs
        return loss_of_logprobs(found, problem.old, problem.advantages, problem.mask)

    return loss


#: Ours on a CPU: the name of a provider, and the backend that it asks for.
OURS_ON_CPU = {OURS: "auto"}
#: Ours on a GPU, each backend by its own name: "auto" would be one of them once more.
OURS_ON_GPU = {f"{OURS}, {label}": backend for backend, label in GPU_BACKENDS.items()}


def providers(ours: Mapping[str, str] = OURS_ON_CPU) -> tuple[Provider, ...]:
    """All of them, ours last; ``ours``: backends by the names of providers."""
    return (
        Provider("naive PyTorch", _of_head(_naive_head) | _of_rows(lambda: naive_logprobs)),
        Provider("torch.compile of naive", _of_head(_compiled_head) | _of_rows(_compiled_rows), compiles=True),
        Provider("torch linear_cross_entropy", _of_head(_torch_head), needs_torch="linear_cross_entropy"),
        Provider("TRL", _of_head(_trl_head), "trl"),
        Provider("TRL, selective_log_softmax", _of_rows(_trl_rows), "trl", "cpu"),
        Provider("TRL, Triton", _of_rows(_trl_triton_rows), "trl", "cuda"),
        Provider("Liger", {"hidden": _liger}, "liger_kernel", compiles=True),
        Provider("Liger, Triton", {"logits": _liger_triton}, "liger_kernel", "cuda", in_place=True, padded=True),
        Provider("verl", _of_head(_verl_head), "verl"),
        Provider("verl, Triton", _of_head(_verl_triton_head), "verl", "cuda"),
        Provider("cut-cross-entropy", _of_head(_cce_head), "cut_cross_entropy", "cuda"),
        Provider(
            "cut-cross-entropy, unfiltered", _of_head(partial(_cce_head, filter_eps=None)), "cut_cross_entropy", "cuda"
        ),
        Provider(
            "cut-cross-entropy, compiled",
            _of_head(partial(_cce_head, impl="torch_compile")),
            "cut_cross_entropy",
            "cpu",
            compiles=True,
        ),
        Provider("quack", _of_rows(_quack_rows), "quack", "cuda", in_place=True),
        Provider("flash-attn", _of_rows(_flash_rows), "flash_attn", "cuda", in_place=True),
        Provider(
            f"{OURS}, torch",
            {
                "hidden": partial(_ours_linear, "torch"),
                "logprobs": partial(_ours_head, "torch"),
                "upstream": partial(_ours_head, "torch"),
            },
        ),
        *(provider for name, backend in ours.items() for provider in _ours(name, backend)),
    )


def _ours(name: str, backend: str) -> tuple[Provider, ...]:
    """A backend in its settings, the plain one last."""
    needs = {} if backend == "auto" else {"needs_backend": backend}
    every = {
        "logits": partial(_ours_loss, backend),
        "hidden": partial(_ours_linear, backend),
        "logprobs": partial(_ours_head, backend),
        "upstream": partial(_ours_head, backend),
    }
    half = {"hidden": partial(_ours_linear, backend, logits_dtype=torch.bfloat16)}
    eighth = {"hidden": partial(_ours_linear, backend, 1 / 8)}
    rows = {"logits": partial(_ours_rows, backend)}

    def saved(share: int) -> dict[str, Callable[[], Function]]:
        return {"upstream": partial(_ours_head, backend, share)}

    return (
        Provider(f"{name}, fresh gradient", {"logits": partial(_ours_loss, backend, inplace=False)}, **needs),
        Provider(f"{name}, logits retained", saved(1), device="cuda", **needs),
        Provider(f"{name}, projected again", saved(0), device="cpu", **needs),
        Provider(f"{name}, token_logprobs", rows, in_place=True, **needs),
        Provider(f"{name}, bf16 logits", half, device="cuda", **needs),
        *([Provider(f"{name}, 1/8 workspace", eighth, device="cpu")] if backend == "auto" else []),
        Provider(name, every, in_place=True, **needs),
    )
