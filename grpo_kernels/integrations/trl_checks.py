"""Whether TRL looks its head up where this package replaces it: by feature, never by version."""

from __future__ import annotations

import inspect
from types import CodeType, ModuleType

import trl
from trl.trainer import utils as trl_utils

TESTED = "1.16.0"
_HEAD_ARGUMENTS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip
_DIVERGENCE_ARGUMENTS = (
    "student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias", "beta",
    "temperature", "student_logit_scale", "student_final_logit_softcapping", "teacher_logit_scale",
    "teacher_final_logit_softcapping",
)  # fmt: skip


def _names_in(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


def check_hooks(divergence: ModuleType) -> None:
    """Raises RuntimeError unless TRL looks its head up where it is replaced, with the arguments that are served.

    Numbers are compared when a backend is known: ``check_numbers``.
    """
    found = []
    for module, name, arguments in (
        (trl_utils, "_ChunkedLogProbFunction", _HEAD_ARGUMENTS),
        (divergence, "ChunkedDivergenceFunction", _DIVERGENCE_ARGUMENTS),
    ):
        function = getattr(module, name, None)
        if function is None:
            found.append(f"{module.__name__} has no {name}")
            continue
        got = tuple(inspect.signature(function.forward).parameters)[1:]
        if got != arguments:
            found.append(f"{name} takes {', '.join(got)}, not {', '.join(arguments)}")
    names = _names_in(trl_utils.add_fused_lm_head.__code__)
    if "_ChunkedLogProbFunction" not in names:
        found.append("add_fused_lm_head does not look _ChunkedLogProbFunction up")
    if hasattr(trl_utils, "_use_triton") and "_use_triton" not in names:
        found.append("add_fused_lm_head does not look _use_triton up")
    if found:
        raise RuntimeError(f"TRL {trl.__version__} is not as expected (tested with {TESTED}): {'; '.join(found)}")
