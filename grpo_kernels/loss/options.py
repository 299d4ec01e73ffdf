"""The names of options, and their codes in kernels."""

from __future__ import annotations

from enum import IntEnum

from grpo_kernels.loss.aggregation import AGGREGATIONS, CLIPPED_LOSSES

LOSS_TYPES = (*CLIPPED_LOSSES, "surrogate", "kl_cov", "cispo", "sapo", "vespo", "gmpo", "reinforce")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")
#: Codes in kernels; mirrored in policy_math.h, like the next.
KL_ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3, "mse": 1}
KL_GRADIENTS = {"naive": 0, "straight_through": 1, "importance_weighted": 2}
#: Exact divergences over the whole vocabulary, with the share of the reference in their mixture.
DIVERGENCES = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": 0.5}
#: Means over tokens and sequences: verl's, which count no sequence without a token.
LOSS_AGG_MODES = tuple(AGGREGATIONS)
ROLLOUT_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask")


class Surrogate(IntEnum):
    """The per-token objective. Loss types that differ only in their weights share one; mirrored in policy_math.h."""

    CLIP = 0  # of the ratio
    CISPO = 1  # of the log-probability, weighted by a clipped ratio
    SAPO = 2  # a sigmoid of the ratio
    LOGPROB = 3  # of the log-probability


class Level(IntEnum):
    """Over what an importance ratio is taken; mirrored in policy_math.h."""

    TOKEN = 0
    SEQUENCE = 1
    SEQUENCE_TOKEN = 2  # the value of a sequence; its gradient is that of the token's own log-probability
    GEOMETRIC = 3  # the geometric mean over a sequence of clipped token ratios


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
