"""Whether TRL looks its head up where this package replaces it: by feature and by name, never by version."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from inspect import BoundArguments, Parameter, Signature, signature
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
import trl
from trl.trainer import utils as trl_utils

TESTED = "1.15.0 and 1.16.0"
#: The arguments that are served, by TRL's names.
HEAD_ARGUMENTS = (
    "hidden", "weight", "bias", "targets", "temperature", "final_logit_softcapping", "logit_scale", "outputs",
)  # fmt: skip
DIVERGENCE_ARGUMENTS = (
    "student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias", "beta",
    "temperature", "student_logit_scale", "student_final_logit_softcapping", "teacher_logit_scale",
    "teacher_final_logit_softcapping",
)  # fmt: skip
#: What a head is asked for: TRL's names, in the order of what it returns.
HEAD_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
#: The method of ``GRPOTrainer`` in which its models score tokens.
SCORING = "_get_per_token_logps_and_entropies"
#: How TRL's own function divides its work: without effect on a result.
_WITHOUT_EFFECT = ("chunk_size",)
_COLLECTING = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
#: Where the trainer of AsyncGRPO lies: as a stable one, and as an experimental one.
ASYNC_GRPO = ("trl.trainer.async_grpo_trainer", "trl.experimental.async_grpo.async_grpo_trainer")


class HeadSignature:
    """The arguments of one of TRL's functions: those that are served, in any order, and further ones.

    Args:
        function: TRL's, with a ``forward``.
        names: The arguments that are served.
    """

    def __init__(self, function: Any, names: tuple[str, ...]) -> None:
        parameters = list(signature(function.forward).parameters.values())
        if parameters and parameters[0].name not in names:
            parameters = parameters[1:]  # autograd's context
        self.signature = Signature(parameters)
        known = {p.name for p in parameters if p.kind not in _COLLECTING}
        self.missing = tuple(name for name in names if name not in known)
        self.further = tuple(p.name for p in parameters if p.name not in (*names, *_WITHOUT_EFFECT))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a call by name, TRL's defaults among them."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def unknown(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The further arguments that a call uses: neither None nor the default."""
        return tuple(name for name in self.further if _is_used(values[name], self.signature.parameters[name]))

    def arguments(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call of TRL's function: of other arguments the default, or None where there is none."""
        given = {}
        for parameter in self.signature.parameters.values():
            if parameter.kind not in _COLLECTING:
                default = None if parameter.default is Parameter.empty else parameter.default
                given[parameter.name] = values.get(parameter.name, default)
        bound = BoundArguments(self.signature, given)  # type: ignore[arg-type]  # a dict, ordered
        return bound.args, bound.kwargs


def _is_used(value: Any, parameter: Parameter) -> bool:
    if parameter.kind is Parameter.VAR_POSITIONAL:
        return any(x is not None for x in value)
    if parameter.kind is Parameter.VAR_KEYWORD:
        return any(x is not None for x in value.values())
    if value is None or value is parameter.default:
        return False
    return not (isinstance(value, bool | int | float | str) and value == parameter.default)


def _names_in(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


def check_hooks(divergence: ModuleType) -> None:
    """Raises RuntimeError unless TRL looks its head up where it is replaced, with the arguments that are served.

    Further arguments are no error: a call that uses one is TRL's own. Numbers are compared when a backend is known:
    ``check_numbers``.
    """
    found = []
    for module, name, arguments in (
        (trl_utils, "_ChunkedLogProbFunction", HEAD_ARGUMENTS),
        (divergence, "ChunkedDivergenceFunction", DIVERGENCE_ARGUMENTS),
    ):
        function = getattr(module, name, None)
        if function is None:
            found.append(f"{module.__name__} has no {name}")
            continue
        absent = [member for member in ("forward", "apply") if not hasattr(function, member)]
        if absent:
            found.append(f"{name} has no {' and no '.join(absent)}")
            continue
        head = HeadSignature(function, arguments)
        if head.missing:
            got = ", ".join(head.signature.parameters)
            found.append(f"{name} takes {got}, not {', '.join(arguments)}: it lacks {', '.join(head.missing)}")
    names = _names_in(trl_utils.add_fused_lm_head.__code__)
    if "_ChunkedLogProbFunction" not in names:
        found.append("add_fused_lm_head does not look _ChunkedLogProbFunction up")
    if hasattr(trl_utils, "_use_triton") and "_use_triton" not in names:
        found.append("add_fused_lm_head does not look _use_triton up")
    if found:
        raise RuntimeError(f"TRL {trl.__version__} is not as expected (tested with {TESTED}): {'; '.join(found)}")


def check_trainer(trainer: type) -> None:
    """Raises RuntimeError unless ``FusedGRPOTrainer`` overrides what scores tokens."""
    if not hasattr(trainer, SCORING):
        raise RuntimeError(
            f"TRL {trl.__version__} has no GRPOTrainer.{SCORING} (tested with {TESTED}), so that FusedGRPOTrainer "
            "would leave scores to TRL; apply() serves every trainer"
        )


def compare_numbers(head: Any, device: torch.device) -> None:
    """Raises RuntimeError unless the head that stands for TRL's has its results and gradients on a small problem."""
    generator, fp32 = torch.Generator("cpu").manual_seed(0), {"dtype": torch.float32, "device": "cpu"}
    hidden, weight, bias, upstream = (
        torch.randn(shape, generator=generator, **fp32).to(device) for shape in ((8, 16), (37, 16), (37,), (8,))
    )
    others = {
        "targets": torch.arange(8, device=device), "temperature": 0.7, "chunk_size": 32768,
        "final_logit_softcapping": 5.0, "logit_scale": 0.5, "outputs": HEAD_OUTPUTS,
    }  # fmt: skip
    results = []
    for function in (head.original, head):
        leaf = {
            name: x.clone().requires_grad_() for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias))
        }
        args, kwargs = head.signature.arguments(leaf | others)
        try:
            found = function.apply(*args, **kwargs)
        except Exception as error:
            whose = "TRL's own head" if function is head.original else "this package's head"
            raise RuntimeError(
                f"{whose} does not run on {device} with TRL {trl.__version__}, so that nothing can be compared: {error}"
            ) from error
        if len(found) != len(HEAD_OUTPUTS):
            raise RuntimeError(
                f"the head of TRL {trl.__version__} returns {len(found)} values, not {', '.join(HEAD_OUTPUTS)} (tested "
                f"with {TESTED})"
            )
        torch.autograd.backward([found[0], found[1]], [upstream, -upstream])
        results.append([*found, *(x.grad for x in leaf.values())])
    names = (*HEAD_OUTPUTS, "dhidden", "dweight", "dbias")
    for name, theirs, ours in zip(names, *results, strict=True):
        if not torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5):
            error = (ours.double() - theirs.double()).abs().max().item()
            raise RuntimeError(
                f"TRL {trl.__version__} computes another {name} than this package (largest difference {error:.3g}; "
                f"tested with {TESTED})"
            )


def async_grpo_modules() -> list[ModuleType]:
    """The modules of AsyncGRPO's trainer in this TRL: the stable one, the experimental one, or both."""
    modules = []
    for name in ASYNC_GRPO:
        if name not in sys.modules and not _is_installed(name):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError as error:  # what it needs beside TRL
            logging.getLogger(__name__).info("%s cannot be imported, so nothing in it is replaced: %s", name, error)
            continue
        if "add_fused_lm_head" not in vars(module) and not names_of(trl_utils._ChunkedLogProbFunction, module):
            logging.getLogger(__name__).warning(
                "%s of TRL %s uses no head that is known here: TRL's own functions run in it", name, trl.__version__
            )
        modules.append(module)
    return modules


def _is_installed(name: str) -> bool:
    """Whether TRL has such a file. To ask imports no package on the way to it, since some warn of it."""
    *folders, last = name.split(".")[1:]
    return PathFinder.find_spec(last, [str(Path(path, *folders)) for path in trl.__path__]) is not None


def names_of(function: Any, module: ModuleType) -> list[str]:
    """The global names by which a module has a function."""
    return [name for name, value in vars(module).items() if value is function]
