"""The transforms from logits to distributions, in the form for registered ops."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kernels.calls import Call
from grpo_kernels.loss.config import reference_share
from grpo_kernels.validation import check_transform


@dataclass(frozen=True)
class Transform(Call):
    """``y = softcap tanh(logit_scale z / softcap) / temperature``; softcap 0 means none."""

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
    """The transforms of the policy's and the reference's logits, and the divergence between them."""

    mixture: float
    temperature: float
    softcap: float
    logit_scale: float
    divergence_temperature: float
    reference_softcap: float
    reference_logit_scale: float

    @property
    def transform(self) -> Transform:
        """The policy's, for log-probabilities."""
        return Transform(self.temperature, self.softcap, self.logit_scale)

    @property
    def divergence_transform(self) -> Transform:
        """The policy's, for the divergence."""
        return Transform(self.divergence_temperature, self.softcap, self.logit_scale)

    @property
    def reference_transform(self) -> Transform:
        """The reference's."""
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
        """Validates the arguments of a public function; those of the reference begin with ``prefix``."""
        temperature = policy.temperature if divergence_temperature is None else divergence_temperature
        check_transform(temperature, None, 1.0, "divergence_" if prefix == "reference_" else "")
        reference = Transform.of(temperature, reference_softcap, reference_logit_scale, prefix)
        return cls.between(reference_share(divergence, mixture), policy, reference)

    @classmethod
    def between(cls, mixture: float, policy: Transform, reference: Transform) -> Comparison:
        """A comparison of validated transforms. The divergence is at the reference's temperature."""
        return cls(
            mixture,
            policy.temperature,
            policy.softcap,
            policy.logit_scale,
            reference.temperature,
            reference.softcap,
            reference.logit_scale,
        )
