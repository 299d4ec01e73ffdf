"""How rows of logits become distributions, as it crosses into registered ops."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kernels.calls import Call
from grpo_kernels.loss.config import mixture_of
from grpo_kernels.validation import check_transform


@dataclass(frozen=True)
class Transform(Call):
    """``y = softcap tanh(scale z / softcap) / temperature``; softcap 0 means none."""

    temperature: float
    softcap: float
    logit_scale: float

    @classmethod
    def of(cls, temperature: float, softcap: float | None, logit_scale: float, prefix: str = "") -> Transform:
        """Validates the arguments of a public function, whose names begin with ``prefix``."""
        check_transform(temperature, softcap, logit_scale, prefix)
        return cls(float(temperature), float(softcap or 0.0), float(logit_scale))


@dataclass(frozen=True)
class Comparison(Call):
    """How two rows of logits become distributions, and which divergence is taken."""

    mixture: float
    temperature: float
    softcap: float
    logit_scale: float
    divergence_temperature: float
    reference_softcap: float
    reference_logit_scale: float

    @property
    def transform(self) -> Transform:
        """Of the policy's logits, for its log-probabilities."""
        return Transform(self.temperature, self.softcap, self.logit_scale)

    @property
    def divergence_transform(self) -> Transform:
        """Of the policy's logits, for the divergence."""
        return Transform(self.divergence_temperature, self.softcap, self.logit_scale)

    @property
    def reference_transform(self) -> Transform:
        """Of the reference's logits."""
        return Transform(self.divergence_temperature, self.reference_softcap, self.reference_logit_scale)

    @classmethod
    def of(
        cls,
        divergence: str,
        mixture: float,
        policy: Transform,
        divergence_temperature: float | None,
        reference_softcap: float | None,
        reference_logit_scale: float,
        prefix: str = "reference_",
    ) -> Comparison:
        """Validates the arguments of a public function; the reference's names begin with ``prefix``."""
        temperature = policy.temperature if divergence_temperature is None else divergence_temperature
        check_transform(temperature, None, 1.0, "divergence_" if prefix == "reference_" else "")
        reference = Transform.of(temperature, reference_softcap, reference_logit_scale, prefix)
        return cls.between(mixture_of(divergence, mixture), policy, reference)

    @classmethod
    def between(cls, mixture: float, policy: Transform, reference: Transform) -> Comparison:
        """Of validated parts; the divergence is taken at the reference's temperature."""
        return cls(
            mixture,
            policy.temperature,
            policy.softcap,
            policy.logit_scale,
            reference.temperature,
            reference.softcap,
            reference.logit_scale,
        )
