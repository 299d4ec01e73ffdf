"""What commands are told: groups of keys under TRL's names, of which a recipe and every kind of stage are made."""

# ruff: noqa: RUF009  (option returns a dataclasses.field)
from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from grpo_kernels.training.arguments import mapping
from grpo_kernels.training.data.templates import PromptFormat, check_template

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
    """The model, and how it is asked."""

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
