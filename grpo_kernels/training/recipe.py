"""Recipes: one dataclass of hyper-parameters under TRL's names, read from a YAML file and the command line."""

# ruff: noqa: RUF009  (_option returns a dataclasses.field)
from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from grpo_kernels import BACKENDS, GRPOLossConfig
from grpo_kernels.training.arguments import NEGATIVE, given_keys, mapping, read_yaml, with_yaml_lists
from grpo_kernels.training.data.templates import PromptFormat, check_template


def _option(default: Any, help_text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


@dataclass(kw_only=True)
class Recipe:
    """Everything a training run depends on.

    A *generation* samples ``per_device_train_batch_size * steps_per_generation`` completions. They are used
    ``num_iterations`` times, and one optimizer step takes ``gradient_accumulation_steps`` micro-batches of them.

    Raises:
        ValueError: A value is out of range, or the batch sizes do not divide.
    """

    # the task
    dataset_name: str = _option(
        "addition",
        "a built-in task (addition, subtraction, comparison, logic), a .jsonl file, a folder, or a name on the Hub",
    )
    dataset_config: str | None = _option(None, "the configuration of a dataset that has several")
    dataset_split: str = _option("train", "the split to train on")
    eval_dataset_split: str | None = _option(None, "the held-out split; by default rows taken out of dataset_split")
    num_eval_prompts: int | None = _option(
        None, "held-out problems; 0: none; by default 200, of a dataset's training rows a fifth at most"
    )
    prompt_column: str | None = _option(None, "what the dataset calls prompt; by default that, or question")
    answer_column: str | None = _option(None, "what it calls answer")
    hidden_size: int = _option(96, "of a built-in task's own model")
    model_name_or_path: str | None = _option(None, "any AutoModelForCausalLM; by default the built-in task's own")
    dtype: Literal["float32", "bfloat16", "float16"] = _option("float32", "the dtype to load the model in")
    bf16: bool = _option(False, "compute in bfloat16 by autocast; the weights and their updates stay in dtype")
    trust_remote_code: bool = _option(False, "run the code that comes with the model: code of whoever uploaded it")
    attn_implementation: str | None = _option(
        None, "sdpa, eager, flash_attention_2; by default the last if it can run, else what the model's class takes"
    )
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward: less memory, more time")
    use_peft: bool = _option(False, "train LoRA adapters; the model without them is the reference")
    lora_r: int = _option(16, "rank of the adapters")
    lora_alpha: int = _option(32, "their scale, over the rank")
    lora_target_modules: list[str] = _option(["all-linear"], "modules to adapt, the head never")
    prompt_template: str | None = _option(None, 'none, r1_zero, chat, or a text with "{prompt}" in it')
    system_prompt: str | None = _option(None, "put before every prompt of a model that has a chat template")
    chat_template_kwargs: dict[str, Any] | str | None = _option(
        None, "what its chat template is given: '{enable_thinking: false}'; a row's column of that name wins"
    )
    reward_funcs: list[str] = _option(["accuracy", "format"], 'reward functions: built-in names, or "module:function"')
    check: str | None = _option(
        None, "the one that is 1 where an answer is right; by default the first that judges, or the first of one's own"
    )
    reward_weights: list[float] | None = _option(None, "one weight per reward function; by default 1")
    shuffle_rewards: bool = _option(False, "control experiment: permute the rewards over the generation")

    # the supervised cold start
    sft_steps: int = _option(0, "supervised steps before GRPO, on rows that have a completion column")
    sft_batch_size: int = _option(32, "examples in a supervised step")
    sft_learning_rate: float = _option(1e-3, "peak learning rate of the cold start, decayed linearly")

    # sampling
    num_generations: int = _option(8, "completions per prompt: the group size")
    max_completion_length: int = _option(256, "tokens to sample at most")
    temperature: float = _option(1.0, "of sampling, and of the log-probabilities in the loss")
    max_prompt_length: int | None = _option(None, "leave out longer prompts, and those that leave no room")
    dynamic_sampling: bool = _option(False, "sample further prompts in the place of groups whose rewards are all equal")
    max_generation_batches: int = _option(10, "how often at most; then the groups that lack stay out of the loss")
    min_pass_rate: float | None = _option(None, "train on problems that the model solves more often than this")
    max_pass_rate: float | None = _option(None, "and on those that it solves less often than this")
    pass_rate_samples: int = _option(8, "completions per problem to tell by")
    use_transformers_continuous_batching: bool = _option(False, "sample by transformers' generate_batch")
    transformers_continuous_batching_config: str | None = _option(None, "JSON for its ContinuousBatchingConfig")

    # sampling by a vLLM server
    use_vllm: bool = _option(False, "sample by a server, which is sent the weights")
    vllm_mode: Literal["server"] = _option("server", "the one of TRL's modes that there is")
    vllm_server_base_url: str | None = _option(None, "http://host:port; by default of the next two")
    vllm_server_host: str = _option("0.0.0.0", "where the server runs")
    vllm_server_port: int = _option(8000, "its port")
    vllm_server_timeout: float = _option(240.0, "seconds for it to come up, and for every answer but completions")
    vllm_generation_timeout: float = _option(1800.0, "seconds for the completions of a prompt")
    vllm_group_port: int = _option(51216, "of the trainer, for the weights; 0 takes a free one, for gloo")
    vllm_importance_sampling_correction: bool = _option(True, "weigh by old log-probabilities over the server's")
    vllm_importance_sampling_mode: str = _option(
        "sequence_mask", "token_truncate, token_mask, sequence_truncate, sequence_mask, geometric_mask"
    )
    vllm_importance_sampling_clip_min: float | None = _option(None, "least weight that is not clipped or masked")
    vllm_importance_sampling_clip_max: float | None = _option(3.0, "the largest; inf: none")

    # the loss
    loss_type: str = _option("dapo", "grpo, bnpo, dr_grpo, dapo, ...: see GRPOLossConfig")
    importance_sampling_level: str = _option("token", "token or sequence")
    epsilon: float = _option(0.2, "lower clip range")
    epsilon_high: float | None = _option(None, "upper clip range; by default epsilon")
    delta: float | None = _option(None, "upper bound of the unclipped ratio")
    beta: float = _option(0.0, "weight of the KL penalty; 0 needs no reference model")
    use_bias_correction_kl: bool = _option(True, "multiply the KL estimate by the importance ratio")
    entropy_coef: float = _option(0.0, "weight of the entropy bonus")
    scale_rewards: str = _option("group", "the standard deviation to divide by: group (true), batch, or none (false)")
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = _option(
        "sum_then_normalize", "how several reward functions become one advantage"
    )
    mask_truncated_completions: bool = _option(False, "leave completions without an end token out of the loss")

    router_aux_loss_coef: float | None = _option(None, "weight of a mixture of experts' own loss; by default its own")
    packing: bool = _option(False, "train on one row without padding; needs sdpa, eager or flash attention")

    # optimisation
    max_steps: int = _option(100, "optimizer steps")
    per_device_train_batch_size: int = _option(8, "completions in a micro-batch")
    gradient_accumulation_steps: int = _option(1, "micro-batches in an optimizer step, a supervised one too")
    steps_per_generation: int | None = _option(None, "micro-batches in a generation; by default one optimizer step's")
    num_iterations: int = _option(1, "times that a generation is used")
    learning_rate: float = _option(1e-6, "peak learning rate of AdamW")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = _option(
        "linear", "how the learning rate goes on after the warm-up"
    )
    warmup_steps: int = _option(0, "steps from 0 to the peak learning rate")
    weight_decay: float = _option(0.0, "of AdamW")
    adam_beta1: float = _option(0.9, "of AdamW")
    adam_beta2: float = _option(0.999, "of AdamW")
    adam_epsilon: float = _option(1e-8, "of AdamW")
    max_grad_norm: float = _option(1.0, "gradient norm to clip to; 0 turns clipping off")

    # the run
    output_dir: str = _option("runs/grpo", "checkpoints, metrics.jsonl and curves.png go here")
    overwrite_output_dir: bool = _option(False, "replace the checkpoints and metrics of an earlier run there")
    seed: int = _option(0, "of the model's initialisation, the data order and the sampling")
    num_threads: int | None = _option(None, "torch's threads; a tiny model is fastest with 1")
    device: str = _option("auto", 'a torch device, or "auto": CUDA where there is one')
    backend: str = _option("auto", "the grpo_kernels backend, or auto")
    logging_steps: int = _option(5, "optimizer steps between rows of the table")
    num_completions_to_print: int = _option(2, "sample completions to print")
    completions_steps: int = _option(20, "optimizer steps between printed completions; 0 turns them off")
    save_steps: int = _option(50, "optimizer steps between checkpoints; the last step is always saved")
    save_total_limit: int = _option(2, "checkpoints to keep")
    resume: bool = _option(False, "go on from the newest checkpoint of output_dir, if there is one")
    eval_samples: int = _option(4, "completions per held-out problem at temperature 1")
    eval_batch_size: int = _option(256, "completions to sample at once in an evaluation")
    disable_tqdm: bool = _option(False, "no progress bar")
    report_to: list[str] = _option(["none"], "trackers: tensorboard, wandb, trackio, ...; all that are installed; none")
    project: str = _option("grpo-kernels", "what the trackers call the project")
    run_name: str | None = _option(None, "what they call the run; by default the last part of output_dir")

    def __post_init__(self) -> None:
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        for name in _AT_LEAST_ONE:
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("dataset_name", "model_name_or_path", "output_dir"):
            if getattr(self, name) is not None:
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        for name in _AT_LEAST_ZERO:
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 0)
        _divides("gradient_accumulation_steps", self.gradient_accumulation_steps,
                 "steps_per_generation", self.steps_per_generation)  # fmt: skip
        _divides("num_generations", self.num_generations,
                 "per_device_train_batch_size * steps_per_generation", self.generation_batch_size)  # fmt: skip
        _at_least("num_generations", self.num_generations, 2)  # a group of one has no spread
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights must have one weight per reward function ({len(self.reward_funcs)}), "
                f"got {len(self.reward_weights)}"
            )
        if self.backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {self.backend!r}")
        self._check_sampling()
        self.scale_rewards = _SCALES.get(str(self.scale_rewards).lower(), self.scale_rewards)
        if self.scale_rewards not in _SCALES.values():
            raise ValueError(f"scale_rewards must be group, batch, none, true or false, got {self.scale_rewards!r}")
        if self.chat_template_kwargs is not None:
            self.chat_template_kwargs = mapping("chat_template_kwargs", self.chat_template_kwargs)
        check_template(self.prompt_template)
        self.loss_config()

    def _check_sampling(self) -> None:
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise ValueError("use_transformers_continuous_batching must be False with use_vllm=True, got True")
        for name in ("vllm_server_timeout", "vllm_generation_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and greater than 0, got {getattr(self, name)}")
        if not self.pass_rate_bounds[0] < self.pass_rate_bounds[1]:
            raise ValueError(
                f"min_pass_rate must be less than max_pass_rate ({self.max_pass_rate}), got {self.min_pass_rate}"
            )
        if self.transformers_continuous_batching_config is not None:
            _check_json_object("transformers_continuous_batching_config", self.transformers_continuous_batching_config)

    @property
    def generation_batch_size(self) -> int:
        """Completions sampled at once."""
        return self.per_device_train_batch_size * (self.steps_per_generation or 1)

    @property
    def prompts_per_generation(self) -> int:
        """Groups sampled at once."""
        return self.generation_batch_size // self.num_generations

    @property
    def prompt_format(self) -> PromptFormat:
        """How prompts are rendered."""
        return PromptFormat(self.prompt_template, self.system_prompt, self.chat_template_kwargs)

    @property
    def is_on_policy(self) -> bool:
        """Whether each generation serves one optimizer step, so that every importance ratio is 1."""
        return self.num_iterations == 1 and self.steps_per_generation == self.gradient_accumulation_steps

    @property
    def pass_rate_bounds(self) -> tuple[float, float]:
        """Between which a problem's pass rate must lie."""
        low, high = self.min_pass_rate, self.max_pass_rate
        return float("-inf") if low is None else low, float("inf") if high is None else high

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
        return json.loads(self.transformers_continuous_batching_config or "{}")

    def loss_config(self) -> GRPOLossConfig:
        """The loss that the recipe asks for; raises ValueError where ``GRPOLossConfig`` does."""
        correction, bound = {}, self.vllm_importance_sampling_clip_max
        if self.use_vllm and self.vllm_importance_sampling_correction:
            correction = {
                "rollout_correction": self.vllm_importance_sampling_mode,
                "rollout_clip_min": self.vllm_importance_sampling_clip_min,
                "rollout_clip_max": None if bound == float("inf") else bound,
            }
        return GRPOLossConfig(
            **correction,
            loss_type=self.loss_type,
            importance_sampling_level=self.importance_sampling_level,
            epsilon_low=self.epsilon,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            beta=self.beta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            temperature=self.temperature,
            entropy_coef=self.entropy_coef,
            max_completion_length=self.max_completion_length,
        )


_LISTS = frozenset(key.name for key in fields(Recipe) if "list[" in str(key.type))
_MAPPINGS = ("chat_template_kwargs",)
#: What keys of other trainers are called here.
_ELSEWHERE = {
    "lr": "learning_rate", "num_train_epochs": "max_steps", "warmup_ratio": "warmup_steps", "epsilon_low": "epsilon",
    "resume_from_checkpoint": "resume", "train_batch_size": "per_device_train_batch_size", "num_samples":
    "num_generations", "max_new_tokens": "max_completion_length", "model": "model_name_or_path", "dataset":
    "dataset_name", "epochs": "max_steps", "kl_coef": "beta",
}  # fmt: skip
_NEAR = 0.75  # how alike a key must be to be what was meant, from 0 to 1

_AT_LEAST_ONE = (
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations",
    "max_completion_length", "sft_batch_size", "logging_steps", "save_steps", "save_total_limit", "eval_samples",
    "eval_batch_size", "lora_r", "lora_alpha", "max_generation_batches", "pass_rate_samples", "vllm_server_port",
    "num_threads", "max_prompt_length",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "learning_rate", "sft_learning_rate", "sft_steps", "warmup_steps", "weight_decay", "max_grad_norm",
    "num_eval_prompts", "num_completions_to_print", "completions_steps", "vllm_group_port",
)  # fmt: skip


#: What scale_rewards may be called; a YAML file's false, as Dr. GRPO's recipes have it, is "none".
_SCALES = {"group": "group", "true": "group", "batch": "batch", "none": "none", "false": "none"}


def _at_least(name: str, value: float, minimum: int) -> None:
    if not value >= minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _check_json_object(name: str, text: str) -> None:
    try:
        is_object = isinstance(json.loads(text), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise ValueError(f"{name} must be a JSON object, got {text!r}")


def _divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        raise ValueError(f"{divisor_name} ({divisor}) must divide {name} ({value})")


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path to a YAML file, or the name of one that ships with the package.

    Raises:
        FileNotFoundError: There is no such recipe; the message lists those that ship.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(str(resources.files("grpo_kernels.training") / "recipes"))
    candidate = shipped / f"{name}.yaml"
    if path.name == name and candidate.is_file():
        return candidate
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
    raise FileNotFoundError(f"no recipe {name!r}: neither a file nor one of the recipes that ship ({names})")


def load_recipe(name: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies command-line overrides.

    Args:
        name: A packaged recipe's name or a YAML file; None for the defaults alone.
        overrides: ``["--key", "value", ...]``, which win over the file.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: A key is unknown (the message names the nearest known one) or a value does not fit.
    """
    if name is None:
        return _parsed([], overrides)
    path = recipe_path(name)
    content = read_yaml(path)
    if "stages" in content:
        raise ValueError(f"{path} is a recipe of several stages: grpo-kernels recipe {name}")
    return with_overrides(str(path), content, overrides)


def with_overrides(where: str, content: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of keys and values, and command-line overrides; ``where`` names it in errors, as for ``load_recipe``."""
    if "reward_funcs" in given_keys(overrides):  # the weights of the file's functions are not theirs
        content = {key: value for key, value in content.items() if key != "reward_weights"}
    return _parsed(_arguments(where, content), overrides)


def _parsed(arguments: list[str], overrides: Sequence[str]) -> Recipe:
    parser = HfArgumentParser(
        Recipe,
        usage="grpo-kernels train [--recipe NAME_OR_FILE] [--debug] [--key value ...]",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser._negative_number_matcher = NEGATIVE
    try:
        recipe, unknown = parser.parse_args_into_dataclasses(
            [*arguments, *with_yaml_lists(overrides, _LISTS)], return_remaining_strings=True, look_for_args_file=False
        )
    except argparse.ArgumentError as error:
        raise ValueError(f"recipe: {error}") from error
    if unknown:
        key = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        raise ValueError(f"command line: {_unknown_key(key)}")
    return recipe


def _arguments(where: str, content: dict[str, Any]) -> list[str]:
    """A file's keys as command-line arguments, for argparse to check and convert (YAML reads 1e-4 as text)."""
    known = {f.name for f in fields(Recipe)}
    arguments: list[str] = []
    for key, value in content.items():
        if key not in known:
            raise ValueError(f"{where}: {_unknown_key(str(key))}")
        if isinstance(value, dict) and key in _MAPPINGS:
            arguments.append(f"--{key}={json.dumps(value)}")
            continue
        if isinstance(value, dict):
            raise ValueError(f"{where}: {key} must be a single value or a list, got a mapping")
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{key}={value}")
    return arguments


def _unknown_key(key: str) -> str:
    near = [_ELSEWHERE[key]] if key in _ELSEWHERE else []
    near += difflib.get_close_matches(key, [f.name for f in fields(Recipe)], n=1, cutoff=_NEAR)
    hint = f"the nearest known key is {near[0]!r}" if near else "grpo-kernels train --help lists the keys"
    return f"unknown key {key!r}; {hint}"
