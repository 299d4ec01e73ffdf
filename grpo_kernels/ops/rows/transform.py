"""How rows of logits become distributions, as it crosses into registered ops."""

from __future__ import annotations

from typing import NamedTuple

from grpo_kernels.loss.config import mixture_of
from grpo_kernels.validation import check_transform


class Transform(NamedTuple):
    """``y = softcap tanh(scale z / softcap) / temperature``; softcap 0 means none."""

    temperature: float
    softcap: float
    logit_scale: float

    @classmethod
    def of(cls, temperature: float, softcap: float | None, logit_scale: float, prefix: str = "") -> Transform:
        """Validates the arguments of a public function, whose names begin with ``prefix``."""
        check_transform(temperature, softcap, logit_scale, prefix)
        return cls(float(temperature), float(softcap or 0.0), float(logit_scale))


#: ``Transform`` in the dispatcher's language.
TRANSFORM_SCHEMA = "float temperature, float softcap, float logit_scale"


class Comparison(NamedTuple):
    """How two rows of logits become distributions, and which divergence is taken, as it crosses into registered ops."""

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

    @classmethod
    def of(
        cls,
        divergence: str,
        mixture: float,
        own: Transform,
        divergence_temperature: float | None,
        reference_softcap: float | None,
        reference_logit_scale: float,
        prefix: str = "reference_",
    ) -> Comparison:
        """Validates the arguments of a public function; the reference's names begin with ``prefix``."""
        temperature = own.temperature if divergence_temperature is None else divergence_temperature
        check_transform(temperature, None, 1.0, "divergence_" * (prefix == "reference_"))
        reference = Transform.of(temperature, reference_softcap, reference_logit_scale, prefix)
        return cls(mixture_of(divergence, mixture), *own, *reference)


#: ``Comparison`` in the dispatcher's language.
COMPARISON_SCHEMA = (
    "float mixture, float temperature, float softcap, float logit_scale, float divergence_temperature, "
    "float reference_softcap, float reference_logit_scale"
)
