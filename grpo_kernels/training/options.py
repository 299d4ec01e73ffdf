"""The options of commands: groups of keys under TRL's names, from which a recipe and every kind of stage are built.

They are read from a YAML file and the command line, whose values win.
"""

# ruff: noqa: RUF009  (option returns a dataclasses.field)
from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from transformers import HfArgumentParser

from grpo_kernels.training.data.templates import PromptFormat, check_template, mapping

#: What keys of other trainers are called here.
_LOGGER = logging.getLogger(__name__)
_ELSEWHERE = {
    "lr": "learning_rate", "num_train_epochs": "max_steps", "warmup_ratio": "warmup_steps", "epsilon_low": "epsilon",
    "resume_from_checkpoint": "resume", "train_batch_size": "per_device_train_batch_size", "num_samples":
    "num_generations", "max_new_tokens": "max_completion_length", "model": "model_name_or_path", "dataset":
    "dataset_name", "epochs": "max_steps", "kl_coef": "beta",
}  # fmt: skip
_NEAR = 0.75  # how alike a key must be to be what was meant, from 0 to 1
#: argparse's own takes -1e-05, as Python writes it, for an option.
NEGATIVE = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_Kind = TypeVar("_Kind", bound="Options")
MAPPINGS = ("chat_template_kwargs",)  # keys whose values are mappings, or texts of them


def option(default: Any, help_text: str) -> Any:
    """A field with a help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


@dataclass(kw_only=True)
class Options:
    """A group of keys with their defaults, help and checks.

    Raises:
        ValueError: A value is out of range.
    """

    least: ClassVar[dict[str, float]] = {}  # by key, its smallest value
    hidden: ClassVar[tuple[str, ...]] = ()  # keys that no command line has

    def __post_init__(self) -> None:
        for name, value in self.of_classes("least").items():
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), value)

    @classmethod
    def of_classes(cls, table: str) -> dict[str, Any]:
        """A table of the class and of all that it is made of."""
        tables = [vars(base).get(table, {}) for base in cls.__mro__]
        return {name: value for entries in reversed(tables) for name, value in entries.items()}


@dataclass(kw_only=True)
class RunOptions(Options):
    """The run: where it goes, and what it runs on."""

    least: ClassVar = {"num_threads": 1}

    output_dir: str = option("runs/grpo", "checkpoints, metrics.jsonl and curves.png go here")
    overwrite_output_dir: bool = option(False, "replace the checkpoints and metrics of an earlier run there")
    seed: int = option(0, "of the model's initialisation, the data order and the sampling")
    num_threads: int | None = option(None, "torch's threads; a tiny model is fastest with 1")
    device: str = option("auto", 'a torch device, or "auto": CUDA where there is one')
    disable_tqdm: bool = option(False, "no progress bar")
    report_to: list[str] = option(["none"], "trackers: tensorboard, wandb, trackio, ...; all that are installed; none")
    project: str = option("grpo-kernels", "what the trackers call the project")
    run_name: str | None = option(None, "what they call the run; by default the last part of output_dir")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output_dir = os.path.expanduser(self.output_dir)


@dataclass(kw_only=True)
class DatasetOptions(Options):
    """The dataset."""

    least: ClassVar = {"num_eval_prompts": 0}

    dataset_name: str = option(
        "addition",
        "a built-in task (addition, addition-mixed), a .jsonl file, a folder, a name on the Hub or reasoning_gym/NAME",
    )
    dataset_config: str | None = option(
        None, "the configuration of a dataset that has several; of reasoning_gym/NAME options in JSON"
    )
    dataset_split: str = option("train", "the split to train on")
    eval_dataset_split: str | None = option(None, "the held-out split; by default rows taken out of dataset_split")
    num_eval_prompts: int | None = option(
        None, "held-out problems; 0: none; by default 200, of a dataset's training rows a fifth at most"
    )
    prompt_column: str | None = option(None, "what the dataset calls prompt; by default that, or question")
    answer_column: str | None = option(None, "what it calls answer")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dataset_name = os.path.expanduser(self.dataset_name)


@dataclass(kw_only=True)
class ModelOptions(Options):
    """The model, its prompts and the lengths of its completions."""

    least: ClassVar = {"max_prompt_length": 1, "max_completion_length": 1, "eval_batch_size": 1}

    hidden_size: int = option(96, "of a built-in task's own model")
    model_name_or_path: str | None = option(None, "any AutoModelForCausalLM; by default the built-in task's own")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "the dtype to load the model in")
    trust_remote_code: bool = option(False, "run the code that comes with the model: code of whoever uploaded it")
    attn_implementation: str | None = option(
        None, "sdpa, eager, flash_attention_2; by default the last if it can run, else what the model's class takes"
    )
    prompt_template: str | None = option(None, 'none, r1_zero, chat, or a text with "{prompt}" in it')
    system_prompt: str | None = option(None, "put before every prompt of a model that has a chat template")
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, "what its chat template is given: '{enable_thinking: false}'; a row's column of that name wins"
    )
    max_prompt_length: int | None = option(None, "leave out longer prompts, and those that leave no room")
    max_completion_length: int = option(256, "tokens to sample at most")
    eval_batch_size: int = option(256, "completions to sample at once in an evaluation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is not None:
            self.model_name_or_path = os.path.expanduser(self.model_name_or_path)
        if self.chat_template_kwargs is not None:
            self.chat_template_kwargs = mapping("chat_template_kwargs", self.chat_template_kwargs)
        check_template(self.prompt_template)

    @property
    def prompt_format(self) -> PromptFormat:
        """How prompts are rendered."""
        return PromptFormat(self.prompt_template, self.system_prompt, self.chat_template_kwargs)


@dataclass(kw_only=True)
class SamplerOptions(Options):
    """Who samples: the model itself, transformers' continuous batching, or a vLLM server."""

    least: ClassVar = {"vllm_server_port": 1, "vllm_group_port": 1}

    use_transformers_continuous_batching: bool = option(False, "sample by transformers' generate_batch")
    transformers_continuous_batching_config: str | None = option(None, "JSON for its ContinuousBatchingConfig")
    use_vllm: bool = option(False, "sample by a server, which is sent the weights")
    vllm_mode: Literal["server"] = option("server", "the one of TRL's modes that there is")
    vllm_server_base_url: str | None = option(None, "http://host:port; by default of the next two")
    vllm_server_host: str = option("0.0.0.0", "where the server runs")
    vllm_server_port: int = option(8000, "its port")
    vllm_server_timeout: float = option(240.0, "seconds for it to come up, and for every answer but completions")
    vllm_generation_timeout: float = option(1800.0, "seconds for the completions of a prompt")
    vllm_group_port: int = option(51216, "of the trainer, for the weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise ValueError("use_transformers_continuous_batching must be False with use_vllm=True, got True")
        for name in ("vllm_server_timeout", "vllm_generation_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and greater than 0, got {getattr(self, name)}")
        self.continuous_batching_options()

    def server_options(self) -> dict[str, Any]:
        """Where the vLLM server is, and how long to wait for it."""
        return {
            "base_url": self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}",
            "timeout": self.vllm_server_timeout,
            "generation_timeout": self.vllm_generation_timeout,
            "group_port": self.vllm_group_port,
        }

    def continuous_batching_options(self) -> dict[str, Any]:
        """For transformers' ``ContinuousBatchingConfig``."""
        text = self.transformers_continuous_batching_config or "{}"
        try:
            options = json.loads(text)
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise ValueError(f"transformers_continuous_batching_config must be a JSON object, got {text!r}")
        return options


@dataclass(kw_only=True)
class EvaluationOptions(Options):
    """What is measured."""

    least: ClassVar = {"eval_samples": 1}

    reward_funcs: list[str] = option(["accuracy", "format"], 'reward functions: built-in names, or "module:function"')
    check: str | None = option(
        None, "the one that is 1 where an answer is right; by default the first that judges, or the first of one's own"
    )
    eval_samples: int = option(4, "completions per held-out problem at temperature 1")


@dataclass(kw_only=True)
class SupervisedOptions(Options):
    """Supervised steps: a cold start before GRPO, a stage, a student's."""

    least: ClassVar = {"sft_steps": 0, "sft_batch_size": 1, "sft_learning_rate": 0, "gradient_accumulation_steps": 1}

    sft_steps: int = option(0, "supervised steps, on rows that have a completion column")
    sft_batch_size: int = option(32, "examples in a supervised step")
    sft_learning_rate: float = option(1e-3, "its peak learning rate, decayed linearly")
    gradient_accumulation_steps: int = option(1, "micro-batches in an optimizer step, a supervised one too")


def at_least(name: str, value: float, least: float) -> None:
    """Raises ValueError where a value is smaller."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def parse(
    kind: type[_Kind], where: str, content: Mapping[str, Any], overrides: Sequence[str], *, command: str
) -> _Kind:
    """Options of keys and values, and command-line overrides, which argparse checks and converts.

    Args:
        kind: Of the options.
        where: Names the content in errors.
        content: Keys and values, as a YAML file has them.
        overrides: ``["--key", "value", ...]``, which win.
        command: Whose help ``--help`` shows.
    """
    given = override_keys(overrides)
    for key in given:
        if key not in {"help", *(known.name for known in fields(kind))}:
            raise ValueError(f"command line: {unknown_key(kind, key, command)}")
    if "reward_funcs" in given and content.get("reward_weights"):
        if "reward_weights" not in given:
            _LOGGER.warning("%s: its reward_weights are of its own reward_funcs and are left out: all weigh 1", where)
        content = {key: value for key, value in content.items() if key != "reward_weights"}
    parser = HfArgumentParser(
        kind,
        prog=f"grpo-kernels {command}",
        usage="%(prog)s [--recipe NAME_OR_FILE] [--debug] [--key value ...]",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser._negative_number_matcher = NEGATIVE
    as_yaml = kind.of_classes("as_yaml")
    for action in parser._actions:
        if action.dest in kind.hidden:
            action.help = argparse.SUPPRESS
        if action.dest in as_yaml:
            action.type, action.nargs, action.choices, action.metavar = _yaml_value, None, None, "YAML"
    lists = {key.name for key in fields(kind) if "list[" in str(key.type) and key.name not in as_yaml}
    arguments = _arguments(kind, where, content, as_yaml, command)
    try:
        parsed, unknown = parser.parse_args_into_dataclasses(
            [*arguments, *with_yaml_lists(overrides, lists)], return_remaining_strings=True, look_for_args_file=False
        )
    except argparse.ArgumentError as error:
        raise ValueError(f"{'command line' if overrides else 'recipe'}: {error}") from error
    if unknown:
        raise ValueError(f"command line: expected --key value, got {unknown[0]!r}")
    return parsed


def _yaml_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected YAML, got {text!r}") from error


def _arguments(
    kind: type[Options], where: str, content: Mapping[str, Any], as_yaml: Collection[str], command: str
) -> list[str]:
    """A file's keys as command-line arguments, for argparse to check and convert (YAML reads 1e-4 as text)."""
    known = {key.name for key in fields(kind)}
    arguments: list[str] = []
    for key, value in content.items():
        if key not in known:
            raise ValueError(f"{where}: {unknown_key(kind, str(key), command)}")
        if key in as_yaml:
            arguments.append(f"--{key}={yaml.safe_dump(value, default_flow_style=True)}")
        elif isinstance(value, dict) and key in MAPPINGS:
            arguments.append(f"--{key}={json.dumps(value)}")
        elif isinstance(value, dict):
            raise ValueError(f"{where}: {key} must be a single value or a list, got a mapping")
        elif isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{key}={value}")
    return arguments


def unknown_key(kind: type[Options], key: str, command: str = "train") -> str:
    """What is said of a key that there is not, with the nearest one."""
    near = [_ELSEWHERE[key]] if key in _ELSEWHERE else []
    near += difflib.get_close_matches(key, [f.name for f in fields(kind)], n=1, cutoff=_NEAR)
    hint = f"the nearest known key is {near[0]!r}" if near else f"grpo-kernels {command} --help lists the keys"
    return f"unknown key {key!r}; {hint}"


def with_yaml_lists(overrides: Sequence[str], lists: Collection[str]) -> list[str]:
    """Command-line arguments in which ``--key '[a, b]'``, of a key in ``lists``, is ``--key a b``."""
    arguments: list[str] = []
    key = ""  # of the last option
    for argument in overrides:
        value = argument
        if argument.startswith("--"):
            key = _key(argument)
            if "=" in argument and key in lists:
                option, _, value = argument.partition("=")
                arguments.append(option)
        arguments += _list_items(key, value) if key in lists and value.startswith("[") else [value]
    return arguments


def override_keys(overrides: Sequence[str]) -> list[str]:
    """The keys of ``["--key", "value", "--key=value", ...]``."""
    return [_key(text) for text in overrides if text.startswith("--")]


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; raises ValueError, with its name, where it cannot be read or has others."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeysLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    return content


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's own would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"found the key {twice[0]!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _key(option: str) -> str:
    return option[2:].partition("=")[0].replace("-", "_")


def _list_items(key: str, text: str) -> list[str]:
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"command line: {key} must be a list in YAML, got {text!r}") from error
    if not isinstance(values, list) or any(isinstance(value, (list, dict)) for value in values):
        raise ValueError(f"command line: {key} must be a list of single values, got {text!r}")
    return [str(value) for value in values]
