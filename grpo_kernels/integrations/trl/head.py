"""TRL's fused head and its divergence, by TRL's arguments, through these kernels.

Both gather a head that DeepSpeed's ZeRO-3 has partitioned again in the backward, as TRL's own functions do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils as trl_utils

from grpo_kernels import backends
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.ops.head.buffers import NeededGradients
from grpo_kernels.ops.head.gemm import writes_fp32
from grpo_kernels.ops.head.inputs import HeadOptions, check_bounds
from grpo_kernels.ops.head.linear_grpo_loss import LinearLossCall
from grpo_kernels.ops.head.linear_token_divergence import LinearDivergenceCall, LinearTokenDivergence
from grpo_kernels.ops.head.linear_token_logprobs import LinearTokenLogprobs, statistics_call
from grpo_kernels.ops.head.reference_model import Reference
from grpo_kernels.ops.head.speculation import ExpectedLoss, SpeculatedLogprobs
from grpo_kernels.ops.rows.calls import DivergenceCall, StatisticsCall
from grpo_kernels.ops.rows.token_logprobs import outputs_code
from grpo_kernels.ops.rows.transform import Comparison, Transform

#: TRL's name of what is always there; the others are ours.
_ALWAYS = "log_probs"
#: What a head's output can be differentiated through.
_SPECULATED = frozenset(("log_probs", "entropy"))


@dataclass
class Counts:
    """What became of expected gradients: those that came, and those that did not; and of how many rows they were."""

    hits: int = 0
    misses: int = 0
    rows: int = 0
    live: Tensor | int = 0  # on the head's device: reading it waits

    @property
    def live_share(self) -> float:
        """Share of the rows whose policy term was not known to be 0: what the head's backward is paid for. A sync."""
        return float(self.live) / max(self.rows, 1)

    def add_rows(self, is_live: Tensor) -> None:
        self.rows += is_live.numel()
        self.live = is_live.count_nonzero() + self.live

    def add(self, is_hit: bool) -> None:
        self.hits += is_hit
        self.misses += not is_hit


@dataclass(frozen=True)
class Settings:
    """How TRL's head runs: see ``grpo_kernels.integrations.trl.apply``."""

    speculate: bool = True
    max_logits_bytes: int | None = None
    workspace_bytes: int | None = None
    backend: str = "auto"
    counts: Counts = field(default_factory=Counts, compare=False)

    def __post_init__(self) -> None:
        check_bounds(self.workspace_bytes, self.max_logits_bytes)
        if self.backend not in ("auto", *backends.BACKENDS):
            names = ", ".join(map(repr, backends.BACKENDS))
            raise ValueError(f"backend must be 'auto' or one of {names}, got {self.backend!r}")

    def backend_on(self, device: torch.device, rows: Callable[[], RowClass] | None = None) -> str:
        """The backend of a head there; "torch" where TRL's own function is to run."""
        return backends.resolve("linear_token_logprobs", self.backend, device, rows)


@dataclass
class Expected:
    """What a trainer that is about to run its model says of the loss: used by the first head that can.

    Args:
        mask: Of the tokens that the head is asked for, which the loss reads, ``[N]``.
        fill: What stands for the log-probability of the others, ``[N]``: TRL takes ratios there before it masks them.
        loss: What is expected of the tokens, or None.
    """

    mask: Tensor
    fill: Tensor | None
    loss: ExpectedLoss | None
    is_used: bool = False

    def filled(self, logprobs: Tensor) -> Tensor:
        """The log-probabilities, with ``fill`` where the loss reads none."""
        mask = self.mask.to(logprobs.device)
        fill = torch.zeros_like(logprobs) if self.fill is None else self.fill.to(logprobs.device, logprobs.dtype)
        return torch.where(mask, logprobs, fill)


def _gathering(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The function with its backward under TRL's gathering context."""

    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        heads = [x for x in ctx.saved_tensors if isinstance(x, torch.nn.Parameter)]
        with trl_utils.maybe_gather_lm_head_ctx(*heads):
            return function.backward(ctx, *upstream)

    return type(function.__name__, (function,), {"backward": staticmethod(backward)})


_LOGPROBS, _SPECULATION, _DIVERGENCE = map(_gathering, (LinearTokenLogprobs, SpeculatedLogprobs, LinearTokenDivergence))


def _dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What TRL computes in, autocast's dtype or the hidden states', and fp32 logits where a GEMM writes them."""
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise TypeError(f"the head must be floating point, not quantised: got {weight.dtype} and {hidden.dtype}")
    device = hidden.device
    compute = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    writes = device.type == "cpu" or writes_fp32(device)
    return compute, accumulation_dtype(compute) if writes else compute


def head_logprobs(
    settings: Settings,
    expected: Expected | None,
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> tuple[Tensor | None, ...]:
    """Log-probability, entropy, log sum of squared probabilities, mean logit, is top 1; None where not asked for."""
    device = hidden.device
    options = HeadOptions(*_dtypes(hidden, weight), settings.workspace_bytes)
    backend = settings.backend_on(device, partial(RowClass.of_head, weight))
    transform = Transform.of(temperature, softcap, logit_scale)
    needs = NeededGradients.of(hidden, weight, bias)
    wanted = tuple(name for name in outputs if name != _ALWAYS)
    ids = targets.to(torch.int64).contiguous()
    mask = None
    if needs.any and expected is not None and not expected.is_used and expected.mask.shape == ids.shape:
        expected.is_used = True
        # fp16 gradients would be rounded before a scaler's factor comes
        may_underflow = torch.float16 in (options.compute_dtype, hidden.dtype, weight.dtype)
        if expected.loss is not None and _SPECULATED.issuperset(outputs) and not may_underflow:
            loss = expected.loss.to(device, options.arithmetic_dtype)
            settings.counts.add_rows(loss.fields.has_policy_term())
            options.check_bound(backend, weight, bias, hidden)
            call = LinearLossCall(options, ids, loss.fields, loss.code, transform, needs, None)
            found = _SPECULATION.apply(hidden, weight, bias, call, backend, settings.counts.add)
            return expected.filled(found[0]), found[1] if "entropy" in wanted else None, None, None, None
        mask = expected.mask.to(device)
    rows = StatisticsCall(ids, mask, transform, outputs_code(wanted))
    call = statistics_call(hidden, weight, bias, rows, options, settings.max_logits_bytes, True, backend)
    found = _LOGPROBS.apply(hidden, weight, bias, call, backend)
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    logprobs = found[0] if mask is None else expected.filled(found[0])  # type: ignore[union-attr]
    return logprobs, *(x if name in wanted else None for name, x in zip(names, found[1:], strict=True))


def head_divergence(
    settings: Settings,
    student_hidden: Tensor,  # [N, H]
    student_weight: Tensor,  # [V, H]
    student_bias: Tensor | None,
    teacher_hidden: Tensor,  # [N, H']
    teacher_weight: Tensor,  # [V, H']
    teacher_bias: Tensor | None,
    beta: float,
    temperature: float,
    student_logit_scale: float,
    student_softcap: float | None,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Divergence of each token, and the student's entropy, which carries no gradient in TRL."""
    options = HeadOptions(*_dtypes(student_hidden, student_weight), settings.workspace_bytes)
    teacher_dtype, _ = _dtypes(teacher_hidden, teacher_weight)
    backend = settings.backend_on(student_hidden.device, partial(RowClass.of_head, student_weight))
    comparison = Comparison.between(
        float(beta),
        Transform.of(temperature, student_softcap, student_logit_scale),
        Transform.of(temperature, teacher_softcap, teacher_logit_scale),
    )
    reference = Reference(None, teacher_hidden, teacher_weight, teacher_bias, teacher_dtype)
    ids = torch.zeros(student_hidden.shape[0], dtype=torch.int64, device=student_hidden.device)
    rows = DivergenceCall(ids, None, None, None, None, comparison)
    options.check_bound(backend, student_weight, student_bias, student_hidden, models=2)
    call = LinearDivergenceCall(options, reference, rows, NeededGradients(False, False, False))
    _, entropy, divergence = _DIVERGENCE.apply(student_hidden, student_weight, student_bias, call, backend)
    return divergence, entropy.detach()
