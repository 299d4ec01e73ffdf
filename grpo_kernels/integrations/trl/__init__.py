"""TRL through these kernels: one line before training, or one trainer.

    from grpo_kernels.integrations.trl import apply
    apply()

TRL computes its losses; what changes is the function under its fused head, which GRPO, RLOO, SFT, DPO, KTO and async
GRPO share, the rows that this head is given, and the divergence of its distillation. PEFT, DDP, FSDP2, ZeRO-3, MoE,
vision models, softcaps, logit scales, biases and metrics are TRL's own, since nothing above the head is replaced.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType, TracebackType
from typing import Any

import torch

try:
    import trl
    from trl import GRPOTrainer
    from trl.trainer import utils as trl_utils
except ImportError as error:
    raise ImportError(f"grpo_kernels.integrations.trl needs TRL, tested with 1.15 and 1.16: {error}") from error

if not hasattr(trl_utils, "_ChunkedLogProbFunction") or not hasattr(trl_utils, "add_fused_lm_head"):
    raise ImportError(
        f"TRL {trl.__version__} has no fused head to take over (trl.trainer.utils.add_fused_lm_head, which came with "
        "1.15): tested with 1.15 and 1.16"
    )

from grpo_kernels import backends
from grpo_kernels.integrations.trl import checks as checks
from grpo_kernels.integrations.trl.checks import DIVERGENCE_ARGUMENTS, HEAD_ARGUMENTS
from grpo_kernels.integrations.trl.head import Counts, Expected, Settings, head_divergence, head_logprobs
from grpo_kernels.integrations.trl.loss import expected_loss, fill_of, scored_tokens
from grpo_kernels.named_arguments import check_keywords

__all__ = ["Applied", "Counts", "FusedGRPOTrainer", "Settings", "apply", "unapply"]

#: Of this process, by ``apply``; and of what runs within a ``FusedGRPOTrainer``.
_APPLIED: list[Settings] = []
_WITHIN: ContextVar[Settings | None] = ContextVar("settings", default=None)
_EXPECTED: ContextVar[Expected | None] = ContextVar("expected", default=None)


def _settings() -> Settings | None:
    return _WITHIN.get() or (_APPLIED[-1] if _APPLIED else None)


def _serves(device: torch.device) -> bool:
    settings = _settings()
    return settings is not None and settings.backend_on(device) != "torch"


class _Dispatch:
    """Stands where TRL looks one of its functions up.

    TRL's own runs where nothing is applied, where no kernel serves, and where a call has what only TRL knows.
    """

    names: tuple[str, ...]

    def __init__(self, original: Any) -> None:
        self.original = original
        self.signature = checks.HeadSignature(original, self.names)

    @torch.compiler.disable
    def apply(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        settings = _settings()
        if settings is None:
            return self.original.apply(*args, **kwargs)
        values = self.signature.bind(args, kwargs)
        if not _serves(values[self.names[0]].device):
            return self.original.apply(*args, **kwargs)
        unknown = self.unknown(values)
        if unknown:
            _leave_to_trl(self.original, unknown)
            return self.original.apply(*args, **kwargs)
        return self.serve(settings, values)

    def unknown(self, values: dict[str, Any]) -> tuple[str, ...]:
        return self.signature.unknown(values)

    def serve(self, settings: Settings, values: dict[str, Any]) -> tuple[Any, ...]:
        raise NotImplementedError


def _leave_to_trl(function: Any, unknown: tuple[str, ...]) -> None:
    """Says so once, and expects no gradient of a later head of this loss: what was expected was this one's."""
    _say_once(
        f"TRL {trl.__version__}'s own {function.__name__} runs where {', '.join(unknown)} is given, for which this "
        "package has no kernels"
    )
    expected = _EXPECTED.get()
    if expected is not None and torch.is_grad_enabled():
        expected.is_used = True


class _Head(_Dispatch):
    names = HEAD_ARGUMENTS

    def unknown(self, values: dict[str, Any]) -> tuple[str, ...]:
        others = [f"the output {name!r}" for name in values["outputs"] if name not in checks.HEAD_OUTPUTS]
        return (*self.signature.unknown(values), *others)

    def serve(self, settings: Settings, values: dict[str, Any]) -> tuple[Any, ...]:
        inputs = [values[name] for name in HEAD_ARGUMENTS if name != "outputs"]
        return head_logprobs(settings, _EXPECTED.get(), *inputs, tuple(values["outputs"]))


class _Divergence(_Dispatch):
    """The same for distillation."""

    names = DIVERGENCE_ARGUMENTS

    def serve(self, settings: Settings, values: dict[str, Any]) -> tuple[Any, ...]:
        return head_divergence(settings, *(values[name] for name in DIVERGENCE_ARGUMENTS))


#: What was replaced: module, name, what was there, and what is there now.
_REPLACED: list[tuple[Any, str, Any, Any]] = []


def _replace(owner: Any, name: str, value: Any) -> None:
    _REPLACED.append((owner, name, getattr(owner, name), value))
    setattr(owner, name, value)


def _install() -> None:
    """Puts dispatching functions where TRL looks its own up: without ``apply`` or a trainer of ours they are TRL's."""
    if _REPLACED:
        return
    divergence = _divergence_module()
    checks.check_hooks(divergence)
    head = _Head(trl_utils._ChunkedLogProbFunction)
    async_grpo = checks.async_grpo_modules()
    _replace(trl_utils, "_ChunkedLogProbFunction", head)
    _replace(divergence, "ChunkedDivergenceFunction", _Divergence(divergence.ChunkedDivergenceFunction))
    for module in async_grpo:
        for name in checks.names_of(head.original, module):  # where its trainer does not take TRL's fused head
            _replace(module, name, head)
    for module in (trl_utils, divergence, *async_grpo):
        if module.__name__ != "trl.kernels.chunked_divergence":  # not the kernels' own question
            original = getattr(module, "_use_triton", None)
            if original is not None:  # TRL 1.15 scores the positions that count on every device
                _replace(module, "_use_triton", lambda device, original=original: _serves(device) or original(device))


def _divergence_module() -> ModuleType:
    """Where distillation looks its divergence up: its trainer's module or, in TRL 1.15, the kernels'."""
    from trl.kernels import chunked_divergence
    from trl.trainer import distillation_trainer

    is_imported = hasattr(distillation_trainer, "ChunkedDivergenceFunction")
    return distillation_trainer if is_imported else chunked_divergence


def _served_device() -> torch.device:
    """Where heads will run: a GPU that kernels serve, or the CPU.

    Raises:
        RuntimeError: None does.
    """
    devices = [torch.device(kind) for kind in ("cuda", "xpu") if torch.get_device_module(kind).is_available()]
    for device in (*devices, torch.device("cpu")):
        if _serves(device):
            return device
    reasons = "; ".join(
        f"{backend}: {backends.unsupported_reason('linear_token_logprobs', backend, device)}"
        for backend in backends.BACKENDS
        if backend != "torch"
    )
    raise RuntimeError(f"no kernels run here, TRL's own functions would: {reasons}")


def check_numbers(settings: Settings) -> None:
    """Raises RuntimeError unless a small problem has TRL's results, its gradients among them, where heads will run."""
    token, precision = _WITHIN.set(settings), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(False), torch.enable_grad():
            checks.compare_numbers(trl_utils._ChunkedLogProbFunction, _served_device())
    finally:
        torch.set_float32_matmul_precision(precision)
        _WITHIN.reset(token)


class Applied:
    """What ``apply`` returns: ends with a ``with`` block, and counts expected gradients. Blocks may be nested."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def counts(self) -> Counts:
        """How often the gradient that a head had formed in its forward was the one that came."""
        return self.settings.counts

    def __repr__(self) -> str:
        return f"Applied({self.settings})"

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _APPLIED[:] = [settings for settings in _APPLIED if settings is not self.settings]
        if not _APPLIED:
            unapply()


@check_keywords(owner="apply_grpo_kernels_to_trl")
def apply(
    *,
    speculate: bool = True,
    max_logits_bytes: int | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> Applied:
    """Runs TRL's heads through these kernels, in this process, from now on: trainers built before included.

    The numbers stay TRL's up to the rounding of fp32, and every option and metric stays TRL's own. Of several
    calls the last one's options hold. As a context manager it ends with its block, and the options before it hold
    again; ``unapply`` ends them all.

    A call of TRL's head that uses an argument or an output that is not known here, as of a newer TRL, runs TRL's own
    function; the log says so once.

    Args:
        speculate: Form the head's gradients in the forward where ``GRPOTrainer``'s loss is known before it: a third of
            the head's backward less. The gradient that comes is compared with the expected one, at the cost of one
            sync; another one is served by projecting again.
        max_logits_bytes: Elsewhere: keep as many logits as fit from the forward to the backward; see
            ``linear_token_logprobs``.
        workspace_bytes: Bound of the head's memory; see ``linear_token_logprobs``.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``; "torch" leaves TRL's own functions in place.

    Raises:
        ValueError: An option is out of its range.
        RuntimeError: TRL's head is not as expected, or computes other numbers on a small problem; nothing is replaced.
    """
    settings = Settings(speculate, max_logits_bytes, workspace_bytes, backend)
    _install_and_check(settings)
    if not any(name == "compute_loss" for _, name, _, _ in _REPLACED):
        _replace(GRPOTrainer, "compute_loss", _publishing_before(GRPOTrainer.compute_loss))
    _APPLIED.append(settings)
    return Applied(settings)


def _install_and_check(settings: Settings) -> None:
    is_new = not _REPLACED
    try:
        _install()
        check_numbers(settings)
    except BaseException:
        if is_new:
            unapply()
        raise


def unapply() -> None:
    """Ends every ``apply`` and leaves TRL as it was; what somebody else has replaced since stays.

    A ``FusedGRPOTrainer`` installs the hooks again when it is next used, and they are inert for other trainers.
    """
    _APPLIED.clear()
    while _REPLACED:
        owner, name, original, ours = _REPLACED.pop()
        if owner.__dict__.get(name) is ours:
            setattr(owner, name, original)


def _publishing_before(compute_loss: Any) -> Any:
    @functools.wraps(compute_loss)
    def publishing(self: GRPOTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        settings = _settings()
        if settings is None or _WITHIN.get() is not None:  # a trainer of ours has said it
            return compute_loss(self, model, inputs, *args, **kwargs)
        with _publishing(self, inputs, settings.speculate):
            return compute_loss(self, model, inputs, *args, **kwargs)

    return publishing


#: TRL's own, which say what is expected of a head; a trainer that has others says nothing.
_TRLS = {name: getattr(GRPOTrainer, name, None) for name in ("_compute_loss", checks.SCORING)}


def _has_trls_loss(trainer: Any) -> bool:
    """Whether the loss, and what asks the head for its rows, are TRL's, for this very trainer."""
    for name, original in _TRLS.items():
        if original is None:
            _say_once(f"nothing is expected of a loss: TRL {trl.__version__} has no GRPOTrainer.{name}")
            return False
        function = getattr(getattr(trainer, name), "__func__", None)
        ours = FusedGRPOTrainer.__dict__.get(name, original)
        if function not in (original, ours) or original.__module__ != GRPOTrainer.__module__:
            return False
    return True


@contextmanager
def _publishing(trainer: Any, inputs: Any, speculate: bool) -> Iterator[None]:
    """Within it a head is told which of its rows the loss reads and, if asked for, which gradient to expect."""
    expected = None
    if torch.is_grad_enabled() and _has_trls_loss(trainer):
        try:
            mask, rows = scored_tokens(inputs)
            expected = Expected(mask.flatten()[rows], fill_of(inputs, rows), None)
            if speculate:
                expected.loss = expected_loss(trainer, inputs, mask, rows)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # TRL allows what is refused here
            _say_once(f"gradients are not formed before they are asked for: {type(error).__name__}: {error}")
    token = _EXPECTED.set(expected)
    try:
        yield
    finally:
        _EXPECTED.reset(token)


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


class FusedGRPOTrainer(GRPOTrainer):
    """TRL's ``GRPOTrainer`` with its heads through these kernels, and no effect on any other trainer.

    Args:
        *args, **kwargs: Those of ``GRPOTrainer``.
        kernels: The options, as ``apply`` takes them; None means its defaults.

    Raises:
        RuntimeError: As for ``apply``.
        TypeError: The head is quantised.
    """

    def __init__(self, *args: Any, kernels: Settings | None = None, **kwargs: Any) -> None:
        self.kernels = Settings() if kernels is None else kernels
        checks.check_trainer(GRPOTrainer)
        _install_and_check(self.kernels)
        super().__init__(*args, **kwargs)
        weight = self.model.get_output_embeddings().weight
        if not weight.is_floating_point():
            raise TypeError(f"the head must be floating point, not quantised: got {weight.dtype}")

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """``GRPOTrainer.compute_loss``, unchanged."""
        _install()
        token = _WITHIN.set(self.kernels)
        try:
            with _publishing(self, inputs, self.kernels.speculate):
                return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            _WITHIN.reset(token)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        _install()
        token = _WITHIN.set(self.kernels)
        try:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        finally:
            _WITHIN.reset(token)
