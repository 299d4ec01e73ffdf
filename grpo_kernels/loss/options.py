"""The names that options have, and their numbers in kernels."""

from __future__ import annotations

from enum import IntEnum

#: Importance ratio clipped (or, as "surrogate", not), one at a token or at a sequence.
CLIPPED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "ppo", "clip_cov")
LOSS_TYPES = (*CLIPPED_LOSS_TYPES, "surrogate", "kl_cov", "cispo", "sapo", "vespo", "gmpo", "reinforce")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")
#: By name, as they cross into kernels; mirrored in policy_math.h, like the next.
KL_ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3, "mse": 1}
KL_GRADIENTS = {"naive": 0, "straight_through": 1, "importance_weighted": 2}
#: Exact divergences over the whole vocabulary, by the share of the reference in the mixture that they compare with.
DIVERGENCES = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": 0.5}
#: Means over tokens and sequences: verl's, which count no sequence without a token.
LOSS_AGG_MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
ROLLOUT_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask")


class Surrogate(IntEnum):
    """The per-token objective. Loss types that differ in their weights alone share one; mirrored in policy_math.h."""

    CLIP = 0  # of the ratio
    CISPO = 1  # of the log-probability, weighted by a clipped ratio
    SAPO = 2  # a sigmoid of the ratio
    LOGPROB = 3  # of the log-probability


class Level(IntEnum):
    """What an importance ratio is of; mirrored in policy_math.h."""

    TOKEN = 0
    SEQUENCE = 1
    SEQUENCE_TOKEN = 2  # a sequence's value, whose gradient each token has as if it were its own
    GEOMETRIC = 3  # a sequence's, of token ratios that are clipped first


class Option(IntEnum):
    """Position of each integer option in ``LossCode.options``; mirrored in policy_math.h."""

    SURROGATE = 0
    LEVEL = 1
    KL_ESTIMATOR = 2
    KL_GRADIENT = 3
    BIAS_CORRECTED_KL = 4


class Param(IntEnum):
    """Position of each real parameter in ``LossCode.params``; mirrored in policy_math.h."""

    RATIO_LOW = 0  # the clip range
    RATIO_HIGH = 1
    DELTA = 2  # infinity when absent, like the clamps
    BETA = 3
    TEMPERATURE_POS = 4  # of "sapo"
    TEMPERATURE_NEG = 5
    LOG_RATIO_CLAMP = 6
    KL_CLAMP = 7
