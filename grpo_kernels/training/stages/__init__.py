"""Recipes of several stages, one folder each: training, sampling and measuring, each from what others left.

    output_dir: runs/r1-mini
    common: {dataset_name: addition-mixed}      # keys of every stage, as far as it has them
    stages:
      cold-start: {kind: sft, sft_steps: 400}                # from a fresh base, on the dataset's own traces
      grpo: {kind: grpo, model: cold-start, max_steps: 60}   # from another stage's model
      rejection: {kind: sample, model: grpo, prompts: 800, samples: 4, keep: {accuracy: 1, format: 1}}
      more: {kind: augment, data: rejection, ways: [start, goal]}
      sft: {kind: sft, data: more, sft_steps: 400}           # on what another stage kept or made
      student: {kind: distill, teacher: sft, hidden_size: 64, keep: {accuracy: 1}, sft_steps: 400}
      measured: {kind: eval, model: student, eval_samples: 16, ks: [1, 4, 16]}

A stage's folder has ``config.yaml``, by which it runs alone (a GRPO stage by ``grpo-kernels train``, without ``data``),
``metrics.jsonl``, ``samples.jsonl``, its checkpoint or its ``rows.jsonl``, and, once it is done, ``done.json``: it is
not run again then. ``used.json`` tells what it read, and it is refused where that has changed since: a stage that was
made anew, or a local model, dataset or reward function. A GRPO stage that was interrupted goes on from its newest
checkpoint; any other begins again, and ends the same.

A kind of stage is a dataclass of its keys, in ``KINDS``, and the function that runs it, in ``work.STAGE_RUNNERS``.
"""

# ruff: noqa: RUF009  (option returns a dataclasses.field)
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from grpo_kernels.rewards import resolve
from grpo_kernels.training.augmentation import WAYS
from grpo_kernels.training.checkpoint import list_checkpoints
from grpo_kernels.training.data.files import SUFFIXES
from grpo_kernels.training.options import (
    DatasetOptions,
    EvaluationOptions,
    ModelOptions,
    Options,
    RunOptions,
    SamplerOptions,
    SupervisedOptions,
    option,
    override_keys,
    parse,
    read_yaml,
    unknown_key,
)
from grpo_kernels.training.recipe import Recipe, recipe_path

#: Keys that name an earlier stage for its model, and the keys of a path in their place.
MODEL_PATHS = {"model": "model_name_or_path", "teacher": "teacher_model_name_or_path"}
#: Keys that name an earlier stage, and what that must leave.
SOURCES = {"model": "model", "data": "rows", "teacher": "model"}


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def _is_list_of(is_item: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, (list, tuple)) and len(values) > 0 and all(map(is_item, values))


_COUNT = (_is_count, "an integer of at least 1")
_SHARE = (lambda value: _is_number(value) and 0 <= value <= 1, "a number between 0 and 1")


@dataclass(kw_only=True)
class StageOptions(RunOptions, DatasetOptions):
    """The keys of every kind of stage, and what a kind declares.

    Raises:
        ValueError: A value is out of range, or a reward function is not there.
    """

    hidden = tuple(MODEL_PATHS)  # they name stages of a recipe
    kind: ClassVar[str]
    leaves: ClassVar[str | None] = None  # what a later stage can start from: "model" or "rows"
    not_read: ClassVar[tuple[str, ...]] = ()  # keys of its groups that have no effect on it
    not_zero: ClassVar[tuple[str, ...]] = ()  # keys that may be 0 for other kinds
    as_yaml: ClassVar[dict[str, tuple[Callable[[Any], bool], str]]] = {}  # keys of YAML values: check, and in words

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (is_valid, expected) in self.of_classes("as_yaml").items():
            value = getattr(self, name)
            if value is not None and not is_valid(value):
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        for key in ("keep", "reward_funcs", "check"):
            names = getattr(self, key, None) or ()
            for name in [names] if isinstance(names, str) else names:
                resolve(name, key=key)  # which imports what it names, before anything is written
        for name in self.not_zero:
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be at least 1 for kind {self.kind!r}")

    @classmethod
    def keys(cls) -> set[str]:
        """Those that have an effect."""
        return _names(cls) - set(cls.not_read)

    @classmethod
    def shared_keys(cls) -> set[str]:
        """Those of them that all stages can be given at once: not what names other stages or says what a kind does."""
        return cls.keys() - {*cls.of_classes("as_yaml"), *SOURCES, "teacher_model_name_or_path"}


@dataclass(kw_only=True)
class _ModelAndData(ModelOptions):
    """What earlier stages left."""

    model: str | None = option(None, "the stage whose model it starts from, not a fresh base")
    data: str | None = option(None, "rows: the stage that left them, or a file")


@dataclass(kw_only=True)
class _Rejection(Options):
    """Rejection sampling."""

    as_yaml: ClassVar = {
        "prompts": _COUNT,
        "samples": _COUNT,
        "keep": (
            lambda keep: isinstance(keep, dict) and all(type(k) is str and _is_number(v) for k, v in keep.items()),
            "a mapping of reward functions to numbers",
        ),
    }
    prompts: int = option(200, "training problems to sample for")
    samples: int = option(4, "completions of each")
    keep: dict[str, float] | str | None = option(None, "least to earn, by reward function: '{accuracy: 1, format: 1}'")
    num_completions_to_print: int = option(2, "sample completions to keep of each batch")


@dataclass(kw_only=True)
class SFT(StageOptions, _ModelAndData, EvaluationOptions, SupervisedOptions):
    """Trains on traces: the dataset's own, or rows with a prompt and a completion."""

    kind, leaves, not_zero = "sft", "model", ("sft_steps",)


@dataclass(kw_only=True)
class GRPO(StageOptions, _ModelAndData, Recipe):
    """Trains on rewards, and measures what came of it."""

    kind, leaves = "grpo", "model"
    not_read = ("resume", "sft_steps", "sft_batch_size", "sft_learning_rate")


@dataclass(kw_only=True)
class Sample(StageOptions, _ModelAndData, SamplerOptions, _Rejection):
    """Keeps completions that earn enough, as rows to train on."""

    kind, leaves = "sample", "rows"
    check: ClassVar = None
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
class Augment(StageOptions):
    """Makes problems of worked ones."""

    kind, leaves = "augment", "rows"
    reward_funcs: ClassVar = ("accuracy",)  # rows must have an answer
    check: ClassVar = None
    as_yaml: ClassVar = {
        "ways": (lambda ways: _is_list_of(WAYS.__contains__, ways), f"a list of some of {', '.join(WAYS)}"),
        "num_rows": _COUNT,
    }
    data: str | None = option(None, "rows: the stage that left them, or a file")
    ways: list[str] = option(list(WAYS), "of augmentation: '[start, goal, hindsight]'")
    num_rows: int | None = option(None, "new rows of each way at most")


@dataclass(kw_only=True)
class Distill(StageOptions, _ModelAndData, EvaluationOptions, SupervisedOptions, _Rejection):
    """Trains a student on a teacher's samples, or on its distributions over tokens."""

    kind, leaves, not_zero = "distill", "model", ("sft_steps",)
    as_yaml: ClassVar = {"beta": _SHARE, "lmbda": _SHARE}
    teacher: str | None = option(None, "the stage whose model teaches")
    teacher_model_name_or_path: str | None = option(None, "any model as the teacher")
    beta: float | None = option(None, "to learn the teacher's distributions: 0 forward KL, 1 reverse KL, 0.5 JSD")
    lmbda: float = option(0.0, "share of steps on the student's own samples; needs beta")
    temperature: float = option(1.0, "of the student's own samples and of both distributions")
    backend: str = option("auto", "the grpo_kernels backend, or auto")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.teacher is None) == (self.teacher_model_name_or_path is None):
            raise ValueError("either teacher or teacher_model_name_or_path must be given")
        if self.beta is None and self.lmbda:
            raise ValueError(f"lmbda needs a beta, got {self.lmbda!r} without one")
        if self.data is not None and (self.beta is None or self.keep is not None):
            key = "teacher" if self.beta is None else "keep"
            raise ValueError(f"{key} has no effect on rows of data, which are not sampled")


@dataclass(kw_only=True)
class Eval(StageOptions, ModelOptions, SamplerOptions, EvaluationOptions):
    """Measures."""

    kind, not_zero = "eval", ("num_eval_prompts",)
    as_yaml: ClassVar = {"ks": (lambda ks: _is_list_of(_is_count, ks), "a list of integers of at least 1")}
    model: str | None = option(None, "the stage whose model is measured")
    ks: list[int] | None = option(None, "of pass@k and cons@k; by default 1, eval_samples")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ks is not None and max(self.ks) > self.eval_samples:
            raise ValueError(f"ks must be at most eval_samples ({self.eval_samples}), got {max(self.ks)}")


def _names(kind: type[Options]) -> set[str]:
    return {key.name for key in fields(kind)}


KINDS: dict[str, type[StageOptions]] = {kind.kind: kind for kind in (SFT, GRPO, Sample, Augment, Distill, Eval)}
_ALL_KEYS = set().union(*map(_names, KINDS.values()))


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


def load_stages(name: str, overrides: Sequence[str] = ()) -> tuple[Path, list[Stage]]:
    """The output folder and the stages of a YAML file, or of a recipe that ships.

    ``overrides`` is ``["--key", "value", ...]`` for every stage; ``--output_dir`` is the folder of them all.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: A key is unknown, a value does not fit, or a stage is named that does not come before.
    """
    path = recipe_path(name)
    content = {"output_dir": f"runs/{path.stem}", "common": {}} | read_yaml(path)
    _check_content(path, content)
    stages: list[Stage] = []
    for where, keys in ((path, content["common"]), ("command line", override_keys(overrides))):
        for key in keys:
            if key not in _ALL_KEYS:
                raise ValueError(f"{where}: {unknown_key(Recipe, str(key))}")
    for stage_name, values in content["stages"].items():
        where = f"{path}: stage {stage_name}"
        if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
            raise ValueError(f"{where}: expected keys and values with a kind, got {values!r}")
        if values["kind"] not in KINDS:
            raise ValueError(f"{where}: kind must be one of {', '.join(KINDS)}, got {values['kind']!r}")
        if "model" in values and "model_name_or_path" in values:
            raise ValueError(f"{where}: either model or model_name_or_path can be given, got both")
        kind = KINDS[values.pop("kind")]
        common = {key: value for key, value in content["common"].items() if key in kind.shared_keys()}
        options = common | values | {"output_dir": content["output_dir"]}
        stage = _stage(where, stage_name, kind, options, _shared(overrides, kind))
        root = stage.folder  # by the last word, the command line's
        stage.options.output_dir = str(root / stage_name)
        for key, product in SOURCES.items():
            source = getattr(stage.options, key, None)
            earlier = [before.name for before in stages if before.options.leaves == product]
            if source is not None and source not in earlier and not (key == "data" and is_file(source)):
                raise ValueError(f"{where}: {key} must be one of {earlier}, got {source!r}")
        stages.append(stage)
    return root, stages


def load_stage(kind_name: str, name: str | None, overrides: Sequence[str] = ()) -> Stage:
    """One stage by itself, as ``grpo-kernels sft`` and the like run it.

    ``overrides``, ``["--key", "value", ...]``, win over the YAML file ``name``; without one there are the defaults.
    "eval" takes the file that trained: keys of training are passed over, and it writes to ``eval`` in the run's folder,
    as it does wherever the file's ``output_dir`` has checkpoints.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is unknown or a value does not fit.
    """
    kind, where = KINDS[kind_name], name or "command line"
    content = {} if name is None else read_yaml(recipe_path(name))
    keys_of_training = content.keys() & (_names(Recipe) - kind.keys())
    if kind is Eval and name is not None:
        folder = Path(content.get("output_dir", Recipe().output_dir)).expanduser()
        content = {key: value for key, value in content.items() if key not in keys_of_training}
        if keys_of_training or ("output_dir" in content and list_checkpoints(folder)):
            content["output_dir"] = str(folder / "eval")
    stage = _stage(where, kind_name, kind, {"output_dir": f"runs/{kind_name}"} | content, overrides)
    for key, path in MODEL_PATHS.items():
        if getattr(stage.options, key, None) is not None:
            raise ValueError(f"{key} names a stage of a recipe, and there is none: use {path}")
    data = getattr(stage.options, "data", None)
    if data is not None and not is_file(data):
        raise ValueError(f"data must be a file ({', '.join(SUFFIXES)}), got {data!r}")
    return stage


def is_file(data: str) -> bool:
    """Whether a stage's ``data`` is a file, not a stage."""
    return data.lower().endswith(SUFFIXES)


def _stage(where: str, name: str, kind: type[StageOptions], content: dict[str, Any], overrides: Sequence[str]) -> Stage:
    for source, keys in ((where, content), ("command line", override_keys(overrides))):
        idle = [key for key in keys if key in _ALL_KEYS - kind.keys()]
        if idle:
            raise ValueError(f"{source}: {', '.join(idle)} has no effect on kind {kind.kind!r}")
    try:
        return Stage(name, parse(kind, where, content, overrides, command=kind.kind))
    except ValueError as error:
        says_where = str(error).startswith((where, "command line"))
        raise ValueError(str(error) if says_where else f"stage {name!r}: {error}") from error


def _check_content(path: Path, content: dict[str, Any]) -> None:
    """Raises ValueError where a file of several stages has other keys or values, or a name that no folder can have."""
    kinds = {"output_dir": (str, "a text"), "common": (dict, "a mapping"), "stages": (dict, "a mapping")}
    unknown = [str(key) for key in content if key not in kinds]
    if unknown or not content.get("stages"):
        raise ValueError(f"{path}: expected output_dir, common and stages, got {', '.join(unknown) or 'no stages'}")
    for key, (kind, expected) in kinds.items():
        if not isinstance(content[key], kind):
            raise ValueError(f"{path}: {key} must be {expected}, got {content[key]!r:.80}")
    for name in content["stages"]:
        is_name = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..", "summary.jsonl")
        if not is_name or Path(name).name != name:
            raise ValueError(f"{path}: the name of a stage must be a text that can name its folder, got {name!r:.80}")
    for key, values in (("common", content["common"]), *content["stages"].items()):
        if isinstance(values, dict) and "output_dir" in values:
            raise ValueError(f"{path}: output_dir has no effect in {key}: the folder of all stages is named beside it")


def _shared(overrides: Sequence[str], kind: type[StageOptions]) -> list[str]:
    """Of ``["--key", "value", ...]`` the keys that the kind shares with others, with their values."""
    shared: list[str] = []
    is_shared = False
    for text in overrides:
        if text.startswith("--"):
            is_shared = override_keys([text])[0] in kind.shared_keys()
        shared += [text] if is_shared else []
    return shared
