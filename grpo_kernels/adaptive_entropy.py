"""An entropy bonus that adapts to the policy's entropy: a training loop updates its coefficient every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.validation import check_number


@check_keywords()
@dataclass
class AdaptiveEntropy:
    """Raises the coefficient of the entropy bonus while the entropy is at or below a target, and lowers it otherwise.

    Example:
        >>> bonus = AdaptiveEntropy(coef=0.01, target=0.5)
        >>> bonus.update(0.4)
        >>> bonus.config(GRPOLossConfig()).entropy_coef
        0.015

    The bonus is applied only if the last step's entropy was at or below the target: Skywork Open Reasoner 1
    (arXiv:2505.22312), with the names and defaults of TRL 1.16's ``use_adaptive_entropy``.

    Args:
        coef: The initial coefficient.
        target: The entropy to keep, in nats per token.
        delta: How much a step changes the coefficient.
        least, most: Bounds of the coefficient.
        last_entropy: The entropy of the last step; infinite before the first.

    Raises:
        ValueError: A number is negative or not finite, or ``least`` is above ``most``.
    """

    coef: float = 0.0
    target: float = 0.2
    delta: float = 0.005
    least: float = 0.0
    most: float = 1.0
    last_entropy: float = math.inf

    def __post_init__(self) -> None:
        for name in ("coef", "target", "delta", "least", "most"):
            value = getattr(self, name)
            check_number(name, value)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
        if self.least > self.most:
            raise ValueError(f"least must be at most most={self.most!r}, got {self.least!r}")

    def config(self, config: GRPOLossConfig) -> GRPOLossConfig:
        """``config`` with this step's coefficient; the same for every micro-batch of a step."""
        return replace(config, entropy_coef=self.coef if self.last_entropy <= self.target else 0.0)

    def update(self, entropy: float) -> None:
        """Ends a step with the mean entropy of its tokens over all micro-batches and processes: ``metrics["entropy"]``.

        Raises:
            ValueError: It is not finite.
        """
        if not math.isfinite(entropy):
            raise ValueError(f"entropy must be finite, got {entropy!r}")
        step = self.delta if entropy <= self.target else -self.delta
        self.coef = max(self.least, self.coef + step) if step < 0 else min(self.most, self.coef + step)
        self.last_entropy = entropy
