"""Named cases: what can stand in the inputs of an op, one peculiarity a case, and the variants of the loss."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.options import DIVERGENCES, KL_ESTIMATORS, KL_GRADIENTS, ROLLOUT_CORRECTIONS


@dataclass(frozen=True)
class Case:
    """A recipe for inputs; ``testing.inputs.build`` makes the tensors.

    Args:
        name: What is peculiar about it.
        batch, length, vocab, hidden: B, T, V, H.
        lengths: Tokens of each completion of a packed batch, instead of ``batch`` and ``length``.
        config: The loss.
        layout: "dense"; "next" ``[B, T + 1, ...]``; "strided", a batch stride beyond ``T V`` and an offset;
            "transposed", where not even the last dimension is dense.
        logits: "normal"; "offset" by 1e4; "low", all under -100; "peaked", one column far above; "holes", columns of
            -inf beside the token's own.
        mask: "ones"; "tail", completions of unequal length; "holes", tokens left out in the middle; "zeros"; "first",
            the first completion left out whole.
        dirty: NaN, inf and id -100 stand under the mask, and in the position past the last.
        advantages: "sequence", "token", "zero", "some" (three of four are zero), or "rewards" to be grouped by two.
        scale_rewards: With "rewards".
        old, ref, sampling: Whether old, reference and the sampler's log-probs are given. Ratios of old lie well off the
            clip bounds.
        rollout: None, "token" or "sequence".
        num_items: None, a number, or "tensor".
        loss_scale, softcap, logit_scale, bias: As the ops take them.
        divergence: Which one the ops of divergences take; None says that the case tells nothing new of them.
        soft: The divergence has a temperature of its own, and the reference a transform.
        coarse: Hidden states and head are multiples of 1/16, so that logits are exact in any order of sums: for a
            transform so steep that a logit's rounding decides its gradient.
        on_bound: The ratio is exactly 1 and so are the clip bounds.
        grad_output: What the loss's backward is started with.
    """

    name: str
    batch: int = 4
    length: int = 5
    vocab: int = 37
    hidden: int = 16
    lengths: tuple[int, ...] | None = None
    config: GRPOLossConfig = field(default_factory=GRPOLossConfig)
    layout: str = "dense"
    logits: str = "normal"
    mask: str = "tail"
    dirty: bool = False
    advantages: str = "sequence"
    scale_rewards: str = "group"
    old: bool = True
    ref: bool = True
    sampling: bool = False
    rollout: str | None = None
    num_items: float | str | None = None
    loss_scale: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    bias: bool = False
    divergence: str | None = None
    soft: bool = False
    coarse: bool = False
    on_bound: bool = False
    grad_output: float = 1.0

    def __str__(self) -> str:
        return self.name


#: What the ops of divergences are given of the cases of shapes, layouts and values, in turn.
_DIVERGENCES = ("js", "reverse_kl", "forward_kl")
_KL = GRPOLossConfig(beta=0.1, epsilon_high=0.28)
_SEQUENCE = GRPOLossConfig(beta=0.1, importance_sampling_level="sequence")
_ENTROPY = GRPOLossConfig(beta=0.1, entropy_coef=0.05)
_COOLED = GRPOLossConfig(temperature=0.7, entropy_coef=0.05)
_ON_BOUND = GRPOLossConfig(epsilon_low=0.0, epsilon_high=0.0)

#: Shapes, layouts and values.
INPUT_CASES = (
    Case("plain", config=_KL),
    Case("one_token", length=1, mask="ones", config=_KL),
    Case("one_row", batch=1, length=1, mask="ones", config=_KL),
    Case("one_completion", batch=1, length=5, mask="ones", config=_KL),
    Case("odd_length", batch=3, length=7, config=_KL),
    Case("vocab_1", vocab=1, config=_KL),
    Case("vocab_2", vocab=2, config=_KL),
    Case("vocab_prime", vocab=4099, batch=2, config=_KL),
    Case("vocab_block", vocab=4096, batch=2, config=_ENTROPY),
    Case("vocab_past_block", vocab=2049, batch=2, config=_ENTROPY),
    Case("next_token_layout", layout="next", config=_ENTROPY),
    Case("next_token_layout_sequence", layout="next", config=_SEQUENCE),
    Case("strided", layout="strided", config=_ENTROPY),
    Case("strided_sequence", layout="strided", config=_SEQUENCE),
    Case("transposed", layout="transposed", config=_ENTROPY),
    Case("transposed_sequence", layout="transposed", config=_SEQUENCE),
    Case("mask_holes", mask="holes", config=_ENTROPY),
    Case("mask_holes_sequence", mask="holes", config=_SEQUENCE),
    Case("one_completion_masked", mask="first", config=_KL),
    Case("one_completion_masked_sequence", mask="first", config=_SEQUENCE),
    Case("one_completion_masked_grpo", mask="first", config=GRPOLossConfig(loss_type="grpo")),
    Case("dirty_mask", mask="holes", dirty=True, rollout="token", advantages="token", config=_ENTROPY),
    Case("dirty_mask_sequence", mask="holes", dirty=True, rollout="token", advantages="token", config=_SEQUENCE),
    Case("dirty_next_token", mask="tail", dirty=True, layout="next", config=_ENTROPY),
    Case("all_masked", mask="zeros", config=_ENTROPY),
    Case("all_masked_dirty", mask="zeros", dirty=True, config=_ENTROPY),
    Case("all_masked_sequence", mask="zeros", config=_SEQUENCE),
    Case("all_masked_grpo", mask="zeros", config=GRPOLossConfig(loss_type="grpo")),
    Case("logits_offset", logits="offset", config=_ENTROPY),
    Case("logits_low", logits="low", config=_ENTROPY),
    Case("logits_peaked", logits="peaked", config=_ENTROPY),
    Case("logits_peaked_vocab", logits="peaked", vocab=5003, batch=2, config=_ENTROPY),
    Case("logits_holes", logits="holes", config=_ENTROPY),
    Case("logits_holes_block", logits="holes", vocab=6000, batch=2, config=_ENTROPY),
    Case("softcap", softcap=3.0, config=_ENTROPY),
    Case("softcap_saturated", softcap=0.5, logit_scale=20.0, coarse=True, config=_ENTROPY),
    Case("logit_scale", logit_scale=0.0625, config=_KL),
    Case("temperature", config=GRPOLossConfig(temperature=0.7, beta=0.1, entropy_coef=0.05)),
    Case("transform_all", softcap=5.0, logit_scale=1.5, config=GRPOLossConfig(temperature=1.3, entropy_coef=0.05)),
    Case("bias", bias=True, config=_ENTROPY),
    Case("bias_sequence", bias=True, config=_SEQUENCE),
)

INPUT_CASES = tuple(
    replace(case, divergence=_DIVERGENCES[n % len(_DIVERGENCES)], soft=n % 2 == 1) for n, case in enumerate(INPUT_CASES)
)

#: What the loss is given beside log-probabilities.
LOSS_CASES = (
    Case("on_policy", old=False, ref=False),
    Case("on_policy_kl", old=False, config=_KL),
    Case("on_policy_sequence", old=False, config=_SEQUENCE),
    Case("on_clip_bound", on_bound=True, ref=False, config=_ON_BOUND),
    Case("on_clip_bound_delta", on_bound=True, ref=False, config=GRPOLossConfig(epsilon_low=0, delta=1.0)),
    Case("zero_advantage", advantages="zero", ref=False),
    Case("zero_advantage_kl", advantages="zero", config=_KL),
    Case("zero_advantage_entropy", advantages="zero", ref=False, config=GRPOLossConfig(entropy_coef=0.05)),
    Case("some_advantages", advantages="some", batch=8, ref=False),
    Case("token_advantages", advantages="token", config=_KL),
    Case("token_advantages_sequence", advantages="token", config=_SEQUENCE),
    Case("rewards", advantages="rewards", config=_KL),
    Case("rewards_unscaled", advantages="rewards", scale_rewards="none"),
    Case("rollout_token", rollout="token", config=_KL),
    Case("rollout_sequence", rollout="sequence", config=_KL),
    Case("rollout_sequence_level", rollout="token", config=_SEQUENCE),
    Case("num_items_number", num_items=31.0),
    Case("num_items_tensor", num_items="tensor"),
    Case("num_items_below_one", num_items=0.25),
    Case("loss_scale", loss_scale=1024.0, config=_ENTROPY),
    Case("loss_scale_sequence", loss_scale=1024.0, config=_SEQUENCE),
    Case("grad_output", grad_output=-0.375, config=_ENTROPY),
    Case("grad_output_sequence", grad_output=-0.375, config=_SEQUENCE),
    Case("negative_entropy_coef", config=GRPOLossConfig(entropy_coef=-0.05)),
    Case("packed", lengths=(3, 7, 1, 5), config=_KL),
    Case("packed_one", lengths=(6,), config=_ENTROPY),
    Case("packed_empty_completion", lengths=(3, 0, 4), config=GRPOLossConfig(loss_type="grpo")),
    Case("packed_sequence", lengths=(3, 7, 1, 5), rollout="sequence", config=_SEQUENCE),
    Case("packed_of_single_tokens", lengths=(1, 1, 1), rollout="sequence", config=_SEQUENCE),
    Case("packed_token_advantages", lengths=(2, 6, 3), advantages="token", mask="holes", config=_ENTROPY),
    Case("packed_dirty", lengths=(4, 6, 3), mask="holes", dirty=True, config=_ENTROPY),
    Case("packed_grpo", lengths=(3, 7, 1, 5), config=GRPOLossConfig(loss_type="grpo", beta=0.1)),
    Case("packed_strided", lengths=(3, 7, 2), layout="strided", config=_ENTROPY),
)

#: Vocabularies of models in use, a few rows each: Llama 3, DeepSeek V3, Qwen2.5.
VOCABULARY_CASES = tuple(
    Case(f"vocab_{vocab}", batch=1, length=3, vocab=vocab, hidden=8, config=_ENTROPY, divergence="js")
    for vocab in (128256, 129280, 151936)
)


def _variant(loss_type: str, level: str, kl: str, delta: float | None, entropy: float) -> Case:
    config = GRPOLossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_high=0.28,
        delta=delta,
        beta=0.0 if kl == "none" else 0.1,
        use_bias_correction_kl=kl == "corrected",
        entropy_coef=entropy,
        max_completion_length=8 if loss_type == "dr_grpo" else None,
    )
    name = f"{loss_type}-{level}-kl_{kl}-{'delta' if delta else 'no_delta'}-{'entropy' if entropy else 'no_entropy'}"
    return Case(name, batch=6, config=config, num_items=17.0 if loss_type == "dapo" else None)


def pairwise(*axes: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Few rows of a product in which any two values of any two axes stand together, the most new pairs first."""

    def pairs(row: tuple[int, ...]) -> set[tuple[Any, Any]]:
        return set(itertools.combinations(enumerate(row), 2))

    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))
    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(chosen[-1])
    return [tuple(axis[index] for axis, index in zip(axes, row, strict=True)) for row in chosen]


#: Loss types that differ in their weights; level; KL; delta; entropy bonus.
_VARIANTS = (("grpo", "bnpo", "dr_grpo", "dapo"), ("token", "sequence"), ("none", "plain", "corrected"), (None, 1.6),
             (0.0, 0.05))  # fmt: skip
#: Every one of them, for what computes the loss alone.
ALL_VARIANT_CASES = tuple(_variant(*options) for options in itertools.product(*_VARIANTS))
#: For kernels, which are handed weights and never see the loss type.
VARIANT_CASES = tuple(_variant(*options) for options in pairwise(*_VARIANTS))


def _of_family(name: str, **options: object) -> Case:
    inputs = {key: options.pop(key) for key in ("advantages", "mask", "rollout", "sampling", "num_items", "old")
              if key in options}  # fmt: skip
    return Case(name, batch=6, config=GRPOLossConfig(**options), **inputs)  # type: ignore[arg-type]


_SEQUENCE_LEVEL = {"importance_sampling_level": "sequence"}
_SEQUENCE_TOKEN = {"importance_sampling_level": "sequence_token", "advantages": "token"}

#: The other objectives, divergences, masks and corrections.
FAMILY_CASES = (
    _of_family("luspo", loss_type="luspo", beta=0.1),
    _of_family("luspo-sequence", loss_type="luspo", **_SEQUENCE_LEVEL, beta=0.1),
    _of_family("ppo", loss_type="ppo", advantages="token", delta=1.6),
    _of_family("surrogate", loss_type="surrogate", beta=0.1),
    _of_family("surrogate-sequence", loss_type="surrogate", **_SEQUENCE_LEVEL),
    _of_family("reinforce", loss_type="reinforce", old=False),
    _of_family("reinforce-kl", loss_type="reinforce", beta=0.1, entropy_coef=0.05, num_items=17.0),
    _of_family("cispo", loss_type="cispo", epsilon_high=1.3),
    _of_family("cispo-sequence", loss_type="cispo", epsilon_high=1.3, **_SEQUENCE_LEVEL, beta=0.1),
    _of_family("cispo-both_bounds", loss_type="cispo", epsilon_high=1.2, cispo_ratio_low=0.8, rollout="token"),
    _of_family("sapo", loss_type="sapo", beta=0.1),
    _of_family("sapo-sequence", loss_type="sapo", **_SEQUENCE_LEVEL, sapo_temperature_neg=1.5),
    _of_family("vespo", loss_type="vespo", beta=0.1),
    _of_family("vespo-rollout", loss_type="vespo", rollout="token", vespo_k_pos=1.5, num_items=17.0),
    _of_family("vespo-on_policy", loss_type="vespo", old=False),
    _of_family("gmpo", loss_type="gmpo", epsilon_low=0.1, epsilon_high=0.2),
    _of_family("gmpo-kl", loss_type="gmpo", epsilon_low=0.1, beta=0.1, use_bias_correction_kl=False),
    _of_family("gmpo-corrected", loss_type="gmpo", epsilon_low=0.1, beta=0.1, mask="first"),
    _of_family("sequence_token", **_SEQUENCE_TOKEN),
    _of_family("sequence_token-kl", **_SEQUENCE_TOKEN, beta=0.1, entropy_coef=0.05),
    _of_family("clip_cov", loss_type="clip_cov", clip_cov_ratio=1.0, clip_cov_lb=0.1, beta=0.1),
    _of_family("kl_cov", loss_type="kl_cov", kl_cov_ratio=0.3, entropy_coef=0.05),
    _of_family("log_ratio_clamp", log_ratio_clamp=0.2, beta=0.1),
    _of_family("off_policy_mask", off_policy_mask_threshold=0.02, beta=0.1),
    _of_family("off_policy_mask-sampling", off_policy_mask_threshold=0.02, sampling=True, **_SEQUENCE_LEVEL),
    _of_family("top_entropy", top_entropy_quantile=0.3),
    _of_family("top_entropy-bonus", top_entropy_quantile=0.55, entropy_coef=0.05, beta=0.1, mask="holes"),
    *(
        _of_family(f"kl_{name}-{gradient}-{clamp}", beta=0.1, kl_estimator=name, kl_gradient=gradient, kl_clamp=clamp,
                   use_bias_correction_kl=False)
        for name in KL_ESTIMATORS for gradient in KL_GRADIENTS for clamp in (None, 0.03)
    ),
    *(_of_family(f"kl_{name}-corrected", beta=0.1, kl_estimator=name) for name in KL_ESTIMATORS),
    *(_of_family(f"exact_{name}", beta=0.1, kl_estimator=name, mask="holes") for name in DIVERGENCES),
    _of_family("exact-entropy", beta=0.1, kl_estimator="reverse_kl", entropy_coef=0.05, advantages="token"),
    _of_family("exact-sequence", beta=0.1, kl_estimator="js", **_SEQUENCE_LEVEL),
    _of_family("exact-on_policy", beta=0.1, kl_estimator="forward_kl", loss_type="reinforce", old=False),
    *(
        _of_family(f"rollout_{name}", rollout_correction=name, rollout_clip_min=0.6, rollout_clip_max=1.5, beta=0.1,
                   sampling=True)
        for name in ROLLOUT_CORRECTIONS
    ),
)  # fmt: skip

#: Found by a random search and kept.
FOUND_CASES = (
    Case("logits_offset_cooled", logits="offset", config=_COOLED),
    Case("logits_peaked_cooled", logits="peaked", config=_COOLED),
    Case("logits_peaked_cooled_block", logits="peaked", vocab=4097, batch=2, logit_scale=0.5, config=_COOLED),
    Case("logits_holes_cooled", logits="holes", vocab=5000, batch=2, logit_scale=0.3, config=_COOLED),
    Case("logits_holes_blocks", logits="holes", vocab=9000, batch=2, config=_ENTROPY, divergence="js"),
)

ALL_CASES = (*INPUT_CASES, *LOSS_CASES, *VOCABULARY_CASES, *VARIANT_CASES, *FAMILY_CASES, *FOUND_CASES)
