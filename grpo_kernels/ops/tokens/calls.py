"""What the ops over tokens are given beside the log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grpo_kernels.calls import Call
from grpo_kernels.loss.config import GRPOLossConfig, LossCode
from grpo_kernels.loss.fields import TokenFields
from grpo_kernels.loss.inputs import PolicyInputs


@dataclass(frozen=True)
class PolicyLossCall(Call):
    """The loss of sequences that lie end to end: at ``offsets``, or each with as many tokens as the others.

    A token without one of ``sequence_ids`` is of the completion that is its sequence.
    """

    fields: TokenFields
    offsets: Tensor | None  # [sequences + 1]
    sequences: int
    code: LossCode
    keeps_infinite: bool  # whether a token without a bound is flagged

    @classmethod
    def of(cls, inputs: PolicyInputs, config: GRPOLossConfig) -> PolicyLossCall:
        """Of all tokens, sequence by sequence."""
        sequences = inputs.sequences
        offsets = sequences.offsets if sequences.packed else None
        return cls(inputs.fields, offsets, sequences.count, config.code(), True)
