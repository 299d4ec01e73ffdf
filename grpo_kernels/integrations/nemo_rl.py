"""NeMo-RL's loss protocol, by its names: a callable of next-token log-probabilities and the batch.

Written against the protocol as it is documented (``nemo_rl.algorithms.loss.interfaces`` of release 0.6): NeMo-RL does
not install on a machine without a GPU, so that its own package is not part of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.ops.tokens.policy_loss import policy_loss

__all__ = ["ClippedPGLoss"]


class ClippedPGLoss:
    """NeMo-RL's ``ClippedPGLossFn`` through ``policy_loss``.

    Example:
        >>> loss_fn = ClippedPGLoss({"ratio_clip_max": 0.28, "reference_policy_kl_penalty": 0.0})

    Args:
        config: The options of ``GRPOLossConfig.nemo_rl``, by NeMo-RL's names.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``.
    """

    #: NeMo-RL's ``LossInputType.LOGPROB``.
    input_type = "logprob"

    def __init__(self, config: Mapping[str, Any], *, backend: str = "auto") -> None:
        self.config = GRPOLossConfig.nemo_rl(**config)
        self.backend = backend

    @property
    def loss_type(self) -> str:
        """NeMo-RL's ``LossType``: which of the global counts normalises."""
        return "token_level" if self.config.aggregation == "token-mean" else "sequence_level"

    def __call__(
        self,
        next_token_logprobs: Tensor,  # [B, T - 1]
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss's share of the global mean, and metrics.

        Args:
            next_token_logprobs: Under the policy being trained, of tokens 1 and on.
            data: ``advantages``, ``token_mask``, ``prev_logprobs``, ``generation_logprobs`` and, with a penalty,
                ``reference_policy_logprobs``, each ``[B, T]``, and ``sample_mask [B]``.
            global_valid_seqs, global_valid_toks: Counts over all processes and micro-batches of the step.
        """
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]

        def shifted(name: str) -> Tensor | None:
            return data[name][:, 1:] if name in data else None

        is_mean_of_sequences = self.config.aggregation != "token-mean"
        scale = 1.0
        if is_mean_of_sequences:
            scale = (mask.sum(-1) > 0).sum().item() / float(global_valid_seqs)
        loss, metrics = policy_loss(
            next_token_logprobs,
            data["advantages"][:, 1:],
            mask,
            old_logprobs=shifted("prev_logprobs"),
            ref_logprobs=shifted("reference_policy_logprobs"),
            sampling_logprobs=shifted("generation_logprobs"),
            num_items_in_batch=None if is_mean_of_sequences else global_valid_toks,
            loss_scale=scale,
            config=self.config,
            backend=self.backend,
        )
        names = {"kl": "kl_penalty", "clip_ratio/region_mean": "clip_fraction"}
        found = {ours: metrics[name].item() for name, ours in names.items() if name in metrics}
        return loss, {"loss": loss.item(), "num_valid_samples": float(data["sample_mask"].sum()), **found}
