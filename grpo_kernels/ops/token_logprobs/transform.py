"""The logit transform as it crosses into registered ops."""

from __future__ import annotations

from typing import NamedTuple

from grpo_kernels.ops.validation import check_transform


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
