"""What a stage is told: its own keys beside a recipe's, from the YAML file of several stages or one stage alone.

``beta``, which both have, is that of the divergence in a "distill" stage and the penalty's weight in any other.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from grpo_kernels.rewards import resolve
from grpo_kernels.training.arguments import given_keys, read_yaml
from grpo_kernels.training.augmentation import WAYS
from grpo_kernels.training.data.files import SUFFIXES
from grpo_kernels.training.recipe import Recipe, recipe_path, with_overrides

#: The kinds of stage, with the keys of each.
KEYS = {
    "sft": ("model", "data"),
    "grpo": ("model", "data"),
    "sample": ("model", "data", "prompts", "samples", "keep"),
    "augment": ("data", "ways", "num_rows"),
    "distill": ("model", "data", "prompts", "samples", "keep", "teacher", "teacher_model_name_or_path", "beta",
                "lmbda"),
    "eval": ("model", "ks"),
}  # fmt: skip
_RUN = ("output_dir", "overwrite_output_dir", "seed", "num_threads", "device", "disable_tqdm", "report_to", "project",
        "run_name", "dataset_name", "dataset_config", "dataset_split", "eval_dataset_split", "num_eval_prompts",
        "prompt_column", "answer_column")  # fmt: skip
_SAMPLED = (*_RUN, "hidden_size", "model_name_or_path", "dtype", "attn_implementation", "trust_remote_code",
            "prompt_template", "system_prompt", "chat_template_kwargs", "max_prompt_length", "max_completion_length",
            "eval_batch_size")  # fmt: skip
_MEASURED = (*_SAMPLED, "reward_funcs", "check", "eval_samples")
_SUPERVISED = ("sft_steps", "sft_batch_size", "sft_learning_rate")
_TRAINED = (*_MEASURED, *_SUPERVISED, "gradient_accumulation_steps")
#: By kind, the keys of a recipe that it reads. Others it refuses, but in ``common`` and what holds for every stage.
RECIPE_KEYS: dict[str, tuple[str, ...]] = {
    "sft": _TRAINED,
    "grpo": tuple(key.name for key in fields(Recipe) if key.name not in ("resume", *_SUPERVISED)),
    "sample": (*_SAMPLED, "num_completions_to_print"),
    "augment": _RUN,
    "distill": (*_TRAINED, "temperature", "backend", "num_completions_to_print"),
    "eval": _MEASURED,
}
TRAINING = ("sft", "grpo", "distill")  # kinds that leave a model
_ROLES = {"model": TRAINING, "teacher": TRAINING, "data": ("sample", "augment")}  # keys that name an earlier stage


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a recipe.

    Args:
        name: Also its folder's.
        kind: "sft" trains on traces, "grpo" on rewards, "distill" on a teacher; "sample" keeps completions that earn
            enough, "augment" makes problems of worked ones, "eval" measures.
        recipe: All else, with this stage's ``output_dir``.

    Raises:
        ValueError: The kind is unknown, an argument has no effect on it, or does not fit.
    """

    name: str
    kind: str
    recipe: Recipe
    model: str | None = field(default=None, metadata={"help": "the stage whose model it starts from, not a fresh base"})
    data: str | None = field(default=None, metadata={"help": "rows: the stage that left them, or a .jsonl file"})
    prompts: int = field(default=200, metadata={"help": "training problems to sample for"})
    samples: int = field(default=4, metadata={"help": "completions of each"})
    keep: dict[str, float] | None = field(
        default=None, metadata={"help": "the least to earn, by reward function: '{accuracy: 1, format: 1}'"}
    )
    ways: Sequence[str] = field(default=WAYS, metadata={"help": "of augmentation: '[start, goal, hindsight]'"})
    num_rows: int | None = field(default=None, metadata={"help": "new rows of each way at most"})
    teacher: str | None = field(default=None, metadata={"help": "the stage whose model teaches"})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "any model as the teacher"})
    beta: float | None = field(
        default=None,
        metadata={"help": "to learn the teacher's distributions: 0 by forward KL, 1 by reverse KL, 0.5 by JSD"},
    )
    lmbda: float = field(default=0.0, metadata={"help": "share of steps on the student's own samples; needs beta"})
    ks: Sequence[int] | None = field(
        default=None, metadata={"help": "of pass@k and cons@k; by default 1, eval_samples"}
    )

    def __post_init__(self) -> None:
        if self.kind not in KEYS:
            self._refuse(f"kind must be one of {', '.join(KEYS)}, got {self.kind!r}")
        for key in fields(self)[3:]:
            if key.name not in KEYS[self.kind] and getattr(self, key.name) != key.default:
                self._refuse(f"{key.name} has no effect on kind {self.kind!r}")
        for name, (is_good, expected) in _CHECKS.items():
            if name in KEYS[self.kind] and not is_good(getattr(self, name)):
                self._refuse(f"{name} must be {expected}, got {getattr(self, name)!r}")
        named = [("keep", name) for name in self.keep or {}] + [("reward_funcs", name) for name in self._rewards()]
        named += [("check", self.recipe.check)] if self.recipe.check else []
        for key, name in named:
            resolve(name, key=key)  # which imports what it names, before anything is written
        if self.kind == "sample" and not self.keep:
            self._refuse("keep must say what a completion must earn")
        if self.kind in ("sft", "distill") and not self.recipe.sft_steps:
            self._refuse(f"sft_steps must be at least 1 for kind {self.kind!r}")
        if self.kind == "distill":
            self._check_distillation()
        if self.kind == "eval":
            if self.recipe.num_eval_prompts == 0:
                self._refuse("num_eval_prompts must be at least 1 for kind 'eval'")
            if self.ks is not None and max(self.ks) > self.recipe.eval_samples:
                self._refuse(f"ks must be at most eval_samples ({self.recipe.eval_samples}), got {max(self.ks)}")

    def _rewards(self) -> list[str]:
        return self.recipe.reward_funcs if "reward_funcs" in RECIPE_KEYS[self.kind] else []

    def _check_distillation(self) -> None:
        if (self.teacher is None) == (self.teacher_model_name_or_path is None):
            self._refuse("either teacher or teacher_model_name_or_path must be given")
        if self.beta is None and self.lmbda:
            self._refuse(f"lmbda needs a beta, got {self.lmbda!r} without one")
        if self.data is not None and (self.beta is None or self.keep is not None):
            what = "keep" if self.beta is not None else "teacher"
            self._refuse(f"{what} has no effect on rows of data, which are not sampled")

    def _refuse(self, problem: str) -> None:
        raise ValueError(f"stage {self.name!r}: {problem}")

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    def written(self, recipe: Recipe, **resolved: str) -> dict[str, Any]:
        """The stage as a file of it alone has it: a recipe's keys and its own, earlier stages by what they left."""
        own = {name: getattr(self, name) for name in KEYS[self.kind] if name not in ("model", "teacher")}
        known = {name: value for name, value in asdict(recipe).items() if name in RECIPE_KEYS[self.kind]}
        found = (asdict(recipe) if self.kind == "grpo" else known) | own | resolved
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


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
    stages: list[Stage] = []
    for stage_name, values in content["stages"].items():
        where = f"{path}: stage {stage_name}"
        if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
            raise ValueError(f"{where}: expected keys and values with a kind, got {values!r}")
        if "model" in values and "model_name_or_path" in values:
            raise ValueError(f"{where}: either model or model_name_or_path can be given, got both")
        _check_keys(where, values["kind"], values)
        values = values | {"output_dir": str(root / stage_name)}
        stages.append(_stage(where, stage_name, values, content["common"], overrides))
        for role, kinds in _ROLES.items():
            earlier = getattr(stages[-1], role)
            fitting = [before.name for before in stages[:-1] if before.kind in kinds]
            if earlier is not None and earlier not in fitting and not (role == "data" and is_file(earlier)):
                raise ValueError(f"{where}: {role} must be one of {fitting}, got {earlier!r}")
    return root, stages


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


def load_stage(kind: str, name: str | None, overrides: Sequence[str] = ()) -> Stage:
    """One stage by itself, as ``grpo-kernels sft`` and the like run it.

    "eval" takes the file that trained: keys of training are passed over, and it writes to ``eval`` in the run's folder.

    Args:
        kind: One of ``KEYS``.
        name: A YAML file of keys and values; None for the defaults alone.
        overrides: ``["--key", "value", ...]``, which win over the file; values of the stage's own keys are YAML.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is unknown or a value does not fit.
    """
    try:
        given, rest = stage_parser(kind).parse_known_args(list(overrides))
    except argparse.ArgumentError as error:
        raise ValueError(f"command line: {error}") from error
    content = {} if name is None else read_yaml(recipe_path(name))
    content = {"output_dir": f"runs/{kind}"} | (_measuring(content) if kind == "eval" else content)
    _check_keys(name or "command line", kind, content)
    _check_keys("command line", kind, given_keys(rest))
    stage = _stage(name or "command line", kind, content | vars(given) | {"kind": kind}, {}, rest)
    for role in ("model", "teacher"):
        if getattr(stage, role) is not None:
            path = "model_name_or_path" if role == "model" else "teacher_model_name_or_path"
            raise ValueError(f"{role} names a stage of a recipe, and there is none: use {path}")
    if stage.data is not None and not is_file(stage.data):
        raise ValueError(f"data must be a file ({', '.join(SUFFIXES)}), got {stage.data!r}")
    return stage


def _measuring(content: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation reads of a recipe that trains."""
    training = {key.name for key in fields(Recipe)} - set(RECIPE_KEYS["eval"])
    kept = {key: value for key, value in content.items() if key not in training}
    if len(kept) < len(content):
        kept["output_dir"] = str(Path(kept.get("output_dir", Recipe().output_dir)) / "eval")
    return kept


def stage_parser(kind: str) -> argparse.ArgumentParser:
    """Of a stage's own keys on the command line; those of the recipe it leaves."""
    parser = argparse.ArgumentParser(
        prog=f"grpo-kernels {kind}",
        usage="%(prog)s [--recipe NAME_OR_FILE] [--debug] [--key value ...]",
        epilog="Besides, every key of grpo-kernels train --help.",
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
    )
    for key in fields(Stage):
        if key.name in KEYS[kind] and key.name not in ("model", "teacher"):
            names = dict.fromkeys((f"--{key.name}", f"--{key.name.replace('_', '-')}"))
            parser.add_argument(*names, type=_value, metavar="VALUE", help=key.metadata["help"])
    return parser


def _check_keys(where: str, kind: str, keys: Iterable[str]) -> None:
    """Raises ValueError where a key of a recipe has no effect on a kind of stage."""
    of_recipe = {key.name for key in fields(Recipe)}
    idle = [key for key in keys if key in of_recipe and key not in (*KEYS.get(kind, keys), *RECIPE_KEYS.get(kind, ()))]
    if idle:
        raise ValueError(f"{where}: {', '.join(idle)} has no effect on kind {kind!r}")


def is_file(data: str) -> bool:
    """Whether a stage's ``data`` is a file, not a stage."""
    return data.lower().endswith(SUFFIXES)


def _stage(where: str, name: str, values: dict[str, Any], common: dict[str, Any], overrides: Sequence[str]) -> Stage:
    """A stage of its keys, and of those that are in every stage's recipe."""
    own = {key.name for key in fields(Stage)[3:]}
    of_recipe = {key.name for key in fields(Recipe)}
    given = {key: values[key] for key in values if key in KEYS.get(values["kind"], own) or key in own - of_recipe}
    rest = {key: value for key, value in values.items() if key not in given and key != "kind"}
    return Stage(name=name, kind=values["kind"], recipe=with_overrides(where, common | rest, overrides), **given)


def _output_dir(root: str, overrides: Sequence[str]) -> tuple[Path, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output_dir", "--output-dir", default=root)
    try:
        given, rest = parser.parse_known_args(list(overrides))
    except argparse.ArgumentError as error:
        raise ValueError(f"command line: {error}") from error
    return Path(given.output_dir), rest


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected YAML, got {text!r}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_listed(is_good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, (list, tuple)) and len(values) > 0 and all(map(is_good, values))


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


#: Of each key, what is good and how a message says it.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{name: (_is_text, "a name") for name in ("model", "data", "teacher", "teacher_model_name_or_path")},
    "prompts": (_is_count, "an integer of at least 1"),
    "samples": (_is_count, "an integer of at least 1"),
    "num_rows": (lambda value: value is None or _is_count(value), "an integer of at least 1"),
    "keep": (
        lambda value: (
            value is None
            or (
                isinstance(value, dict)
                and all(map(_is_number, value.values()))
                and all(isinstance(name, str) for name in value)
            )
        ),
        "a mapping of reward functions to numbers",
    ),
    "ways": (_is_listed(lambda way: way in WAYS), f"a list of some of {', '.join(WAYS)}"),
    "beta": (lambda value: value is None or _is_share(value), "a number between 0 and 1"),
    "lmbda": (_is_share, "a number between 0 and 1"),
    "ks": (lambda value: value is None or _is_listed(_is_count)(value), "a list of integers of at least 1"),
}
