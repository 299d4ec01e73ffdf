"""What each kind of stage is told, from the YAML file of several stages or of one alone."""

# ruff: noqa: RUF009  (option returns a dataclasses.field)
from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from grpo_kernels.rewards import resolve
from grpo_kernels.training.augmentation import WAYS
from grpo_kernels.training.data.files import SUFFIXES
from grpo_kernels.training.options import (
    DatasetOptions,
    EvaluationOptions,
    ModelOptions,
    Options,
    RunOptions,
    SamplerOptions,
    SupervisedOptions,
    given_keys,
    option,
    parse,
    read_yaml,
    unknown_key,
)
from grpo_kernels.training.recipe import Recipe, recipe_path


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list_of(is_good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, (list, tuple)) and len(values) > 0 and all(map(is_good, values))


def _is_threshold_table(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(map(_is_number, value.values()))
        and all(isinstance(name, str) for name in value)
    )


_COUNT = (_is_count, "an integer of at least 1")
_SHARE = (lambda value: _is_number(value) and 0 <= value <= 1, "a number between 0 and 1")


@dataclass(kw_only=True)
class StageOptions(Options):
    """The keys of a stage.

    Raises:
        ValueError: A value is out of range, or a reward function is not there.
    """

    hidden = ("model", "teacher")  # they name stages of a recipe
    kind: ClassVar[str]
    roles: ClassVar[tuple[str, ...]] = ()  # keys that name an earlier stage
    not_read: ClassVar[tuple[str, ...]] = ()  # keys of its groups that have no effect on it
    as_yaml: ClassVar[dict[str, tuple[Callable[[Any], bool], str]]] = {}  # keys of YAML values: what is good, in words

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (is_good, expected) in self.of_classes("as_yaml").items():
            value = getattr(self, name)
            if value is not None and not is_good(value):
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        named = [("keep", name) for name in getattr(self, "keep", None) or {}]
        named += [("reward_funcs", name) for name in getattr(self, "reward_funcs", ())]
        named += [("check", self.check)] if getattr(self, "check", None) else []
        for key, name in named:
            resolve(name, key=key)  # which imports what it names, before anything is written

    @classmethod
    def keys(cls) -> set[str]:
        """Those that have an effect."""
        return _keys_of(cls) - set(cls.not_read)

    @classmethod
    def shared_keys(cls) -> set[str]:
        """Those of them that all stages can be given at once: not what names other stages or says what a kind does."""
        return cls.keys() - {*cls.of_classes("as_yaml"), *cls.roles, "teacher_model_name_or_path"}


@dataclass(kw_only=True)
class _Kept(Options):
    """Rejection sampling."""

    as_yaml: ClassVar = {
        "prompts": _COUNT,
        "samples": _COUNT,
        "keep": (_is_threshold_table, "a mapping of reward functions to numbers"),
    }

    prompts: int = option(200, "training problems to sample for")
    samples: int = option(4, "completions of each")
    keep: dict[str, float] | str | None = option(
        None, "the least to earn, by reward function: '{accuracy: 1, format: 1}'"
    )
    num_completions_to_print: int = option(2, "sample completions to keep of each batch")


@dataclass(kw_only=True)
class SFT(StageOptions, RunOptions, DatasetOptions, ModelOptions, EvaluationOptions, SupervisedOptions):
    """Trains on traces: the dataset's own, or rows with a prompt and a completion."""

    kind = "sft"
    roles = ("model", "data")
    model: str | None = option(None, "the stage whose model it starts from, not a fresh base")
    data: str | None = option(None, "rows: the stage that left them, or a file")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self)


@dataclass(kw_only=True)
class GRPO(StageOptions, Recipe):
    """Trains on rewards, and measures what came of it."""

    kind = "grpo"
    roles = ("model", "data")
    not_read = ("resume", "sft_steps", "sft_batch_size", "sft_learning_rate")
    model: str | None = option(None, "the stage whose model it starts from, not a fresh base")
    data: str | None = option(None, "rows: the stage that left them, or a file")


@dataclass(kw_only=True)
class Sample(StageOptions, RunOptions, DatasetOptions, ModelOptions, SamplerOptions, _Kept):
    """Keeps completions that earn enough, as rows to train on."""

    kind = "sample"
    roles = ("model", "data")
    check: ClassVar = None

    model: str | None = option(None, "the stage whose model it samples from, not a fresh base")
    data: str | None = option(None, "problems: the stage that left them, or a file")

    @property
    def reward_funcs(self) -> list[str]:
        """Those that say what is kept."""
        return list(self.keep or {})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keep:
            raise ValueError("keep must say what a completion must earn")


@dataclass(kw_only=True)
class Augment(StageOptions, RunOptions, DatasetOptions):
    """Makes problems of worked ones."""

    kind = "augment"
    roles = ("data",)
    reward_funcs: ClassVar = ("accuracy",)  # rows must have an answer
    check: ClassVar = None
    as_yaml: ClassVar = {
        "ways": (_is_list_of(lambda way: way in WAYS), f"a list of some of {', '.join(WAYS)}"),
        "num_rows": _COUNT,
    }

    data: str | None = option(None, "rows: the stage that left them, or a file")
    ways: list[str] = option(list(WAYS), "of augmentation: '[start, goal, hindsight]'")
    num_rows: int | None = option(None, "new rows of each way at most")


@dataclass(kw_only=True)
class Distill(
    StageOptions, RunOptions, DatasetOptions, ModelOptions, EvaluationOptions, SupervisedOptions, _Kept
):  # fmt: skip
    """Trains a student on a teacher's samples, or on its distributions over tokens."""

    kind = "distill"
    roles = ("model", "data", "teacher")
    as_yaml: ClassVar = {"beta": _SHARE, "lmbda": _SHARE}

    model: str | None = option(None, "the stage whose model it starts from, not a fresh base")
    data: str | None = option(None, "rows: the stage that left them, or a file")
    teacher: str | None = option(None, "the stage whose model teaches")
    teacher_model_name_or_path: str | None = option(None, "any model as the teacher")
    beta: float | None = option(
        None, "to learn the teacher's distributions: 0 by forward KL, 1 by reverse KL, 0.5 by JSD"
    )
    lmbda: float = option(0.0, "share of steps on the student's own samples; needs beta")
    temperature: float = option(1.0, "of the student's own samples and of both distributions")
    backend: str = option("auto", "the grpo_kernels backend, or auto")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self)
        if (self.teacher is None) == (self.teacher_model_name_or_path is None):
            raise ValueError("either teacher or teacher_model_name_or_path must be given")
        if self.beta is None and self.lmbda:
            raise ValueError(f"lmbda needs a beta, got {self.lmbda!r} without one")
        if self.data is not None and (self.beta is None or self.keep is not None):
            what = "keep" if self.beta is not None else "teacher"
            raise ValueError(f"{what} has no effect on rows of data, which are not sampled")


@dataclass(kw_only=True)
class Eval(StageOptions, RunOptions, DatasetOptions, ModelOptions, SamplerOptions, EvaluationOptions):
    """Measures."""

    kind = "eval"
    roles = ("model",)
    as_yaml: ClassVar = {"ks": (_is_list_of(_is_count), "a list of integers of at least 1")}

    model: str | None = option(None, "the stage whose model is measured")
    ks: list[int] | None = option(None, "of pass@k and cons@k; by default 1, eval_samples")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_eval_prompts == 0:
            raise ValueError("num_eval_prompts must be at least 1 for kind 'eval'")
        if self.ks is not None and max(self.ks) > self.eval_samples:
            raise ValueError(f"ks must be at most eval_samples ({self.eval_samples}), got {max(self.ks)}")


KINDS: dict[str, type[StageOptions]] = {kind.kind: kind for kind in (SFT, GRPO, Sample, Augment, Distill, Eval)}
TRAINING = ("sft", "grpo", "distill")  # kinds that leave a model
_LEFT_BY = {"model": TRAINING, "teacher": TRAINING, "data": ("sample", "augment")}


class Stage(NamedTuple):
    """One stage of a recipe; its name is its folder's."""

    name: str
    options: Any  # one of ``KINDS``

    @property
    def kind(self) -> str:
        return self.options.kind

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir)

    def written(self, options: Any, **resolved: str) -> dict[str, Any]:
        """The stage as a file of it alone has it: earlier stages by what they left, in the place of their names."""
        not_read = {"model", "teacher"} if self.kind == "grpo" else {"model", "teacher", *self.options.not_read}
        known = {name: value for name, value in asdict(options).items() if name not in not_read}
        return known | resolved


def load_stages(name: str, overrides: Sequence[str] = ()) -> tuple[Path, list[Stage]]:
    """The output folder and the stages of a YAML file, or of a recipe that ships.

    Args:
        name: A file, or the name of a recipe that ships.
        overrides: ``["--key", "value", ...]`` for every stage; ``--output_dir`` is the folder of them all.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: A key is unknown, a value does not fit, or a stage is named that does not come before.
    """
    path = recipe_path(name)
    content = {"output_dir": f"runs/{path.stem}", "common": {}} | read_yaml(path)
    _check_content(path, content)
    root, overrides = _output_dir(content["output_dir"], overrides)
    _check_known(str(path), content["common"])
    _check_known("command line", given_keys(overrides))
    stages: list[Stage] = []
    for stage_name, values in content["stages"].items():
        where = f"{path}: stage {stage_name}"
        if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
            raise ValueError(f"{where}: expected keys and values with a kind, got {values!r}")
        if values["kind"] not in KINDS:
            raise ValueError(f"{where}: kind must be one of {', '.join(KINDS)}, got {values['kind']!r}")
        if "model" in values and "model_name_or_path" in values:
            raise ValueError(f"{where}: either model or model_name_or_path can be given, got both")
        kind = KINDS[values.pop("kind")]
        _check_effect(where, kind, values)
        common = {key: value for key, value in content["common"].items() if key in kind.shared_keys()}
        options = common | values | {"output_dir": str(root / stage_name)}
        stages.append(_stage(where, stage_name, kind, options, _shared(overrides, kind)))
        for role in kind.roles:
            earlier = getattr(stages[-1].options, role)
            fitting = [before.name for before in stages[:-1] if before.kind in _LEFT_BY[role]]
            if earlier is not None and earlier not in fitting and not (role == "data" and is_file(earlier)):
                raise ValueError(f"{where}: {role} must be one of {fitting}, got {earlier!r}")
    return root, stages


def load_stage(kind_name: str, name: str | None, overrides: Sequence[str] = ()) -> Stage:
    """One stage by itself, as ``grpo-kernels sft`` and the like run it.

    "eval" takes the file that trained: keys of training are passed over, and it writes to ``eval`` in the run's folder.

    Args:
        kind_name: One of ``KINDS``.
        name: A YAML file of keys and values; None for the defaults alone.
        overrides: ``["--key", "value", ...]``, which win over the file; values of the stage's own keys are YAML.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is unknown or a value does not fit.
    """
    kind, where = KINDS[kind_name], name or "command line"
    content = {} if name is None else read_yaml(recipe_path(name))
    if kind is Eval:
        kept = {key: value for key, value in content.items() if key not in _keys_of(Recipe) - kind.keys()}
        if len(kept) < len(content):
            kept["output_dir"] = str(Path(kept.get("output_dir", Recipe().output_dir)) / "eval")
        content = kept
    _check_effect(where, kind, content)
    _check_effect("command line", kind, given_keys(overrides))
    stage = _stage(where, kind_name, kind, {"output_dir": f"runs/{kind_name}"} | content, overrides)
    for role, path in (("model", "model_name_or_path"), ("teacher", "teacher_model_name_or_path")):
        if getattr(stage.options, role, None) is not None:
            raise ValueError(f"{role} names a stage of a recipe, and there is none: use {path}")
    data = getattr(stage.options, "data", None)
    if data is not None and not is_file(data):
        raise ValueError(f"data must be a file ({', '.join(SUFFIXES)}), got {data!r}")
    return stage


def is_file(data: str) -> bool:
    """Whether a stage's ``data`` is a file, not a stage."""
    return data.lower().endswith(SUFFIXES)


def _stage(where: str, name: str, kind: type[StageOptions], content: dict[str, Any], overrides: Sequence[str]) -> Stage:
    try:
        return Stage(name, parse(kind, where, content, overrides, command=kind.kind))
    except ValueError as error:
        is_named = str(error).startswith((where, "command line"))
        raise ValueError(str(error) if is_named else f"stage {name!r}: {error}") from error


def _keys_of(kind: type[Options]) -> set[str]:
    return {key.name for key in fields(kind)}


_ALL_KEYS = set().union(*map(_keys_of, KINDS.values()))


def _check_known(where: str, keys: Iterable[str]) -> None:
    """Raises ValueError where no kind of stage has a key."""
    for key in keys:
        if key not in _ALL_KEYS:
            raise ValueError(f"{where}: {unknown_key(Recipe, str(key))}")


def _check_effect(where: str, kind: type[StageOptions], keys: Iterable[str]) -> None:
    """Raises ValueError where keys of other kinds have no effect on this one."""
    idle = [key for key in keys if key in _ALL_KEYS - kind.keys()]
    if idle:
        raise ValueError(f"{where}: {', '.join(idle)} has no effect on kind {kind.kind!r}")


def _shared(overrides: Sequence[str], kind: type[StageOptions]) -> list[str]:
    """Of ``["--key", "value", ...]`` the keys that the kind has, with their values."""
    kept: list[str] = []
    is_kept = False
    for text in overrides:
        if text.startswith("--"):
            is_kept = given_keys([text])[0] in kind.shared_keys()
        kept += [text] if is_kept else []
    return kept


def _check_steps(options: Any) -> None:
    if not options.sft_steps:
        raise ValueError(f"sft_steps must be at least 1 for kind {options.kind!r}")


def _check_content(path: Path, content: dict[str, Any]) -> None:
    """Raises ValueError where a file of several stages has other keys or values, or a name that no folder can have."""
    unknown = [str(key) for key in content if key not in ("output_dir", "common", "stages")]
    if unknown or not content.get("stages"):
        raise ValueError(f"{path}: expected output_dir, common and stages, got {', '.join(unknown) or 'no stages'}")
    for key, kind in (("output_dir", str), ("common", dict), ("stages", dict)):
        if not isinstance(content[key], kind):
            expected = "a text" if kind is str else "a mapping"
            raise ValueError(f"{path}: {key} must be {expected}, got {content[key]!r:.80}")
    for name in content["stages"]:
        is_name = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..", "summary.jsonl")
        if not is_name or Path(name).name != name:
            raise ValueError(f"{path}: the name of a stage must be a text that can name its folder, got {name!r:.80}")
    for where, values in (("common", content["common"]), *content["stages"].items()):
        if isinstance(values, dict) and "output_dir" in values:
            raise ValueError(
                f"{path}: output_dir has no effect in {where}: the folder of all stages is named beside it"
            )


def _output_dir(root: str, overrides: Sequence[str]) -> tuple[Path, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output_dir", "--output-dir", default=root)
    try:
        given, rest = parser.parse_known_args(list(overrides))
    except argparse.ArgumentError as error:
        raise ValueError(f"command line: {error}") from error
    return Path(given.output_dir), rest
