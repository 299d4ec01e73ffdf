"""Arguments of the ops over tokens, beside the log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grpo_kernels.calls import Call
from grpo_kernels.loss.config import GRPOLossConfig, LossCode
from grpo_kernels.loss.fields import TokenFields
from grpo_kernels.loss.inputs import PolicyInputs


@dataclass(frozen=True)
class PolicyLossCall(Call):
    """The loss of sequences that are packed end to end: at ``offsets``, or all of equal length without.

    Without ``sequence_ids`` in the fields, each sequence is one completion.
    """

    fields: TokenFields
    offsets: Tensor | None  # [sequences + 1]
    sequences: int
    code: LossCode
    flags_infinite: bool  # whether tokens with an infinite loss are flagged

    @classmethod
    def of(cls, inputs: PolicyInputs, config: GRPOLossConfig) -> PolicyLossCall:
        """The call for all tokens of the inputs."""
        sequences = inputs.sequences
        offsets = sequences.offsets if sequences.packed else None
        return cls(inputs.fields, offsets, sequences.count, config.code(), True)
