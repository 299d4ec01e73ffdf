"""Tensors from cases: reproducible, in a given dtype, and the same values in fp64 for the baseline."""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.loss.sequences import Sequences
from grpo_kernels.ops.rows import reference
from testing.cases import Case

#: Ratios of the policies, well off every clip bound that the cases use (0.8, 1.2, 1.28; delta 1.6; 1).
_RATIOS = (0.55, 0.7, 0.9, 0.97, 1.1, 1.24, 1.45, 1.9)
_OF_THE_HEAD = ("weight", "bias", "reference_weight")
_DIRT = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Inputs:
    """All that any op may be given for a case. Tensors of the model are in the case's dtype, the others in fp32."""

    case: Case
    ids: Tensor
    mask: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Tensor
    logprobs: Tensor
    entropy: Tensor
    advantages: Tensor | None
    rewards: Tensor | None
    old: Tensor | None
    ref: Tensor | None
    sampling: Tensor | None
    rollout: Tensor | None
    num_items: float | Tensor | None
    cu_seqlens: Tensor | None
    reference_logits: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor
    divergence: Tensor
    ddivergence: Tensor
    dlogprobs: Tensor  # upstream gradients, for the ops that end in log-probabilities; some are 0
    dentropy: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field."""
        return {f.name: v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def double(self) -> Inputs:
        """The same values in fp64."""
        return self._map(lambda x: x.double() if x.is_floating_point() else x)

    def clone(self) -> Inputs:
        """The same values in memory of their own, laid out alike."""
        return self._map(lambda x: x.clone())

    def to(self, device: torch.device) -> Inputs:
        """The same values on a device, laid out alike: gaps and all."""

        def move(x: Tensor) -> Tensor:
            held = x.untyped_storage().size() // x.element_size()
            whole = x.detach().as_strided((held,), (1,), 0).to(device)
            return whole.as_strided(x.shape, x.stride(), x.storage_offset())

        return self._map(move)

    def _map(self, function: Any) -> Inputs:
        return dataclasses.replace(self, **{name: function(x) for name, x in self.tensors().items()})


def build(case: Case, dtype: torch.dtype, source: str = "logits", device: torch.device | str = "cpu") -> Inputs:
    """The inputs of a case, made on the device: the same values on every run there.

    Args:
        case: The recipe.
        dtype: Of hidden states, head, logits, log-probabilities and entropy.
        source: Where the op under test takes log-probabilities from: "logprobs", "logits" or "hidden". Old and
            reference log-probs lie around those.
        device: Where.
    """
    with torch.device(device):
        return _build(case, dtype, source, torch.Generator(device).manual_seed(zlib.crc32(case.name.encode())))


def _build(case: Case, dtype: torch.dtype, source: str, rng: torch.Generator) -> Inputs:
    shape = (case.batch, case.length) if case.lengths is None else (sum(case.lengths),)
    bounds = None if case.lengths is None else torch.tensor([0, *case.lengths]).cumsum(0)
    ids = torch.randint(case.vocab, shape, generator=rng)
    mask = _mask(case, shape, bounds, rng)
    sequences = Sequences.of(ids, bounds)
    logits, ids = _logits(case, ids, rng)
    hidden = _normal((*shape, case.hidden), rng)
    weight = _normal((case.vocab, case.hidden), rng) * (2 / case.hidden**0.5)
    if case.coarse:
        hidden, weight = ((16 * x).round() / 16 for x in (hidden, weight))
    tensors: dict[str, Any] = {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": _normal((case.vocab,), rng).to(dtype) if case.bias else None,
        "logits": logits.to(dtype),
        "logprobs": (-0.1 - 2 * _normal(shape, rng).abs()).to(dtype),
        "entropy": _normal(shape, rng).abs().to(dtype),
    }
    logprobs = _current_logprobs(case, tensors, ids, source)
    log_ratio = _log_ratio(case, sequences, mask != 0, rng)
    upstream = [_normal(shape, rng) * (torch.rand(shape, generator=rng) < 0.75) for _ in range(2)]
    tensors |= {
        "old": (logprobs - log_ratio).float() if case.old else None,
        "ref": (logprobs + 0.3 * _normal(shape, rng)).float() if case.ref else None,
        "sampling": (logprobs - log_ratio + 0.3 * _normal(shape, rng)).float() if case.sampling else None,
        "rollout": _rollout(case, shape, sequences.count, rng),
        "advantages": _advantages(case, shape, sequences.count, rng),
        "rewards": _normal((sequences.count,), rng) if case.advantages == "rewards" else None,
        "dlogprobs": upstream[0],
        "dentropy": upstream[1],
    }
    tensors |= _reference(case, tensors["logits"], rng)
    if case.on_bound:
        tensors["old"] = tensors["logprobs"].float() if source == "logprobs" else None
    if case.dirty:
        ids = torch.where(mask != 0, ids, -100)
        tensors = {name: x if name in _OF_THE_HEAD else _soil(x, mask != 0) for name, x in tensors.items()}
    if dtype == torch.float64:
        tensors = {name: x.double() if isinstance(x, Tensor) else x for name, x in tensors.items()}
    tensors = {name: _lay_out(x, case.layout) if isinstance(x, Tensor) else x for name, x in tensors.items()}
    if case.layout == "next":
        last = math.nan if case.dirty else 1.0
        for name in ("logits", "hidden", "reference_logits", "reference_hidden"):
            tensors[name] = torch.cat([tensors[name], torch.full_like(tensors[name][:, :1], last)], 1)
    num_items = torch.tensor(23.0) if case.num_items == "tensor" else case.num_items
    return Inputs(case=case, ids=ids, mask=mask, cu_seqlens=bounds, num_items=num_items, **tensors)  # type: ignore[arg-type]


def _normal(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng)


def _mask(case: Case, shape: tuple[int, ...], bounds: Tensor | None, rng: torch.Generator) -> Tensor:
    if case.mask == "zeros":
        return torch.zeros(shape)
    if case.mask == "holes":
        mask = torch.rand(shape, generator=rng) < 0.6
        starts = bounds[:-1] if bounds is not None else torch.arange(case.batch) * case.length
        mask.view(-1)[starts[starts < mask.numel()]] = True
        return mask
    mask = torch.ones(shape, dtype=torch.int64)
    if case.mask == "tail" and bounds is None:
        lengths = torch.randint(1, case.length + 1, (case.batch, 1), generator=rng)
        mask = (torch.arange(case.length) < lengths).to(torch.int64)
    if case.mask == "first":
        mask[0] = 0
    return mask


def _logits(case: Case, ids: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits, and the ids that fit them."""
    logits = 2 * _normal((*ids.shape, case.vocab), rng)
    if case.logits == "offset":
        logits += 1e4
    elif case.logits == "low":
        logits -= 150
    elif case.logits == "peaked":  # the token's own column, and in every other row another
        peak = torch.where(torch.arange(ids.numel()).view(ids.shape) % 2 == 0, ids, (ids + 1) % case.vocab)
        logits.scatter_(-1, peak[..., None], 30.0)
    elif case.logits == "holes":  # whole blocks of the row kernels among them
        logits[..., : min(4200, case.vocab // 2)] = -math.inf
        logits[torch.rand(logits.shape, generator=rng) < 0.3] = -math.inf
        logits.scatter_(-1, ids[..., None], 1.0)
    return logits, ids


def _reference(case: Case, logits: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    """Distributions near the policy's, from logits and from hidden states of another width."""
    tokens, vocab = logits.shape[:-1], logits.shape[-1]
    width = case.hidden // 2 + 1
    reference = logits.double() + _normal(tuple(logits.shape), rng) - 30
    if case.logits == "holes":  # not all where the policy has them
        is_hole = torch.rand(logits.shape, generator=rng) < 0.3
        is_hole[..., -1] = False  # a distribution is somewhere
        reference = torch.where(is_hole, -math.inf, reference.clamp(min=-40))
    return {
        "reference_logits": reference.to(logits.dtype),
        "reference_hidden": _normal((*tokens, width), rng).to(logits.dtype),
        "reference_weight": (_normal((vocab, width), rng) * (2 / width**0.5)).to(logits.dtype),
        "divergence": _normal(tokens, rng).abs(),
        "ddivergence": _normal(tokens, rng) * (torch.rand(tokens, generator=rng) < 0.75),
    }


def _current_logprobs(case: Case, tensors: dict[str, Any], ids: Tensor, source: str) -> Tensor:
    if source == "logprobs":
        return tensors["logprobs"].double()
    logits = tensors["logits"].double()
    if source == "hidden":
        logits = tensors["hidden"].double() @ tensors["weight"].double().mT
        if case.bias:
            logits = logits + tensors["bias"].double()
    temperature = case.config.temperature
    return reference.token_logprobs(logits, ids, None, temperature, case.softcap, case.logit_scale, ()).logprobs


def _log_ratio(case: Case, sequences: Sequences, mask: Tensor, rng: torch.Generator) -> Tensor:
    """Log-ratios off every bound: each token's own, and at sequence level their masked mean too."""
    ratios = torch.tensor(_RATIOS, dtype=torch.float64).log()
    if case.config.importance_sampling_level == "token":
        return ratios[torch.randint(len(_RATIOS), sequences.shape, generator=rng)]
    noise = torch.where(mask, 0.2 * _normal(tuple(sequences.shape), rng).double(), 0)
    mean = sequences.sum(noise) / sequences.sum(mask.double()).clamp(min=1)
    own = ratios[torch.randint(len(_RATIOS), (sequences.count,), generator=rng)]
    return noise + sequences.spread(own - mean)


def _rollout(case: Case, shape: tuple[int, ...], count: int, rng: torch.Generator) -> Tensor | None:
    if case.rollout is None:
        return None
    return torch.rand(shape if case.rollout == "token" else (count, 1), generator=rng) * 2


def _advantages(case: Case, shape: tuple[int, ...], count: int, rng: torch.Generator) -> Tensor | None:
    if case.advantages == "rewards":
        return None
    if case.advantages == "zero":
        return torch.zeros(count)
    advantages = _normal(shape if case.advantages == "token" else (count,), rng)
    if case.advantages == "some":
        advantages[torch.arange(count) % 4 != 0] = 0
    return advantages


def _soil(values: Any, mask: Tensor) -> Any:
    """NaN and infinities where masked, in whatever is given per token."""
    if not isinstance(values, Tensor) or values.shape[: mask.dim()] != mask.shape:
        return values
    dirt = torch.tensor(_DIRT)[torch.arange(mask.numel()) % len(_DIRT)].view(mask.shape).to(values.dtype)
    spread = (...,) + (None,) * (values.dim() - mask.dim())
    return torch.where(mask[spread], values, dirt[spread])


def _lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values within a larger tensor of NaN, or with the last two dimensions swapped in memory."""
    if layout == "strided":
        dims = min(values.dim(), 2)  # a dense first dimension of three: its stride is beyond what the others span
        inner = tuple(slice(1, 1 + size) for size in values.shape[-dims:])
        return torch.nn.functional.pad(values, (1, 2) * dims, value=math.nan)[(..., *inner)]
    if layout == "transposed" and values.dim() >= 2:
        return values.mT.contiguous().mT
    return values
