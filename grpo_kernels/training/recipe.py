"""Recipes: everything a run of GRPO depends on, under TRL's names, read from a YAML file and the command line."""

# ruff: noqa: RUF009  (option returns a dataclasses.field)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar, Literal

from grpo_kernels import BACKENDS, GRPOLossConfig
from grpo_kernels.training.options import (
    DatasetOptions,
    EvaluationOptions,
    ModelOptions,
    RunOptions,
    SamplerOptions,
    SupervisedOptions,
    at_least,
    option,
    parse,
    read_yaml,
)


@dataclass(kw_only=True)
class Recipe(RunOptions, DatasetOptions, ModelOptions, SamplerOptions, EvaluationOptions, SupervisedOptions):
    """Everything a training run depends on.

    A *generation* samples ``per_device_train_batch_size * steps_per_generation`` completions. They are used
    ``num_iterations`` times, and one optimizer step takes ``gradient_accumulation_steps`` micro-batches of them.

    Raises:
        ValueError: A value is out of range, or the batch sizes do not divide.
    """

    least: ClassVar = {
        "max_steps": 1, "per_device_train_batch_size": 1, "steps_per_generation": 1, "num_iterations": 1,
        "logging_steps": 1, "save_steps": 1, "save_total_limit": 1, "lora_r": 1, "lora_alpha": 1,
        "max_generation_batches": 1, "pass_rate_samples": 1, "learning_rate": 0, "warmup_steps": 0, "weight_decay": 0,
        "max_grad_norm": 0, "num_completions_to_print": 0, "completions_steps": 0,
    }  # fmt: skip

    # the model
    bf16: bool = option(False, "compute in bfloat16 by autocast; the weights and their updates stay in dtype")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward: less memory, more time")
    use_peft: bool = option(False, "train LoRA adapters; the model without them is the reference")
    lora_r: int = option(16, "rank of the adapters")
    lora_alpha: int = option(32, "their scale, over the rank")
    lora_target_modules: list[str] = option(["all-linear"], "modules to adapt, the head never")
    router_aux_loss_coef: float | None = option(None, "weight of a mixture of experts' own loss; by default its own")
    packing: bool = option(False, "train on one row without padding; needs sdpa, eager or flash attention")

    # rewards and sampling
    reward_weights: list[float] | None = option(None, "one weight per reward function; by default 1")
    shuffle_rewards: bool = option(False, "control experiment: permute the rewards over the generation")
    num_generations: int = option(8, "completions per prompt: the group size")
    temperature: float = option(1.0, "of sampling, and of the log-probabilities in the loss")
    dynamic_sampling: bool = option(False, "sample further prompts in the place of groups whose rewards are all equal")
    max_generation_batches: int = option(10, "how often at most; then the groups that lack stay out of the loss")
    min_pass_rate: float | None = option(None, "train on problems that the model solves more often than this")
    max_pass_rate: float | None = option(None, "and on those that it solves less often than this")
    pass_rate_samples: int = option(8, "completions per problem to tell by")
    vllm_importance_sampling_correction: bool = option(True, "weigh by old log-probabilities over the server's")
    vllm_importance_sampling_mode: str = option(
        "sequence_mask", "token_truncate, token_mask, sequence_truncate, sequence_mask, geometric_mask"
    )
    vllm_importance_sampling_clip_min: float | None = option(None, "least weight that is not clipped or masked")
    vllm_importance_sampling_clip_max: float | None = option(3.0, "the largest; inf: none")

    # the loss
    loss_type: str = option("dapo", "grpo, bnpo, dr_grpo, dapo, ...: see GRPOLossConfig")
    importance_sampling_level: str = option("token", "token or sequence")
    epsilon: float = option(0.2, "lower clip range")
    epsilon_high: float | None = option(None, "upper clip range; by default epsilon")
    delta: float | None = option(None, "upper bound of the unclipped ratio")
    beta: float = option(0.0, "weight of the KL penalty; 0 needs no reference model")
    use_bias_correction_kl: bool = option(True, "multiply the KL estimate by the importance ratio")
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    scale_rewards: str = option("group", "the standard deviation to divide by: group (true), batch, or none (false)")
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize", "how several reward functions become one advantage"
    )
    mask_truncated_completions: bool = option(False, "leave completions without an end token out of the loss")

    # optimisation
    max_steps: int = option(100, "optimizer steps")
    per_device_train_batch_size: int = option(8, "completions in a micro-batch")
    steps_per_generation: int | None = option(None, "micro-batches in a generation; by default one optimizer step's")
    num_iterations: int = option(1, "times that a generation is used")
    learning_rate: float = option(1e-6, "peak learning rate of AdamW")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "how the learning rate goes on after the warm-up"
    )
    warmup_steps: int = option(0, "steps from 0 to the peak learning rate")
    weight_decay: float = option(0.0, "of AdamW")
    adam_beta1: float = option(0.9, "of AdamW")
    adam_beta2: float = option(0.999, "of AdamW")
    adam_epsilon: float = option(1e-8, "of AdamW")
    max_grad_norm: float = option(1.0, "gradient norm to clip to; 0 turns clipping off")

    # the run
    backend: str = option("auto", "the grpo_kernels backend, or auto")
    logging_steps: int = option(5, "optimizer steps between rows of the table")
    num_completions_to_print: int = option(2, "sample completions to print")
    completions_steps: int = option(20, "optimizer steps between printed completions; 0 turns them off")
    save_steps: int = option(50, "optimizer steps between checkpoints; the last step is always saved")
    save_total_limit: int = option(2, "checkpoints to keep")
    resume: bool = option(False, "go on from the newest checkpoint of output_dir, if there is one")

    def __post_init__(self) -> None:
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        super().__post_init__()
        _divides("gradient_accumulation_steps", self.gradient_accumulation_steps,
                 "steps_per_generation", self.steps_per_generation)  # fmt: skip
        _divides("num_generations", self.num_generations,
                 "per_device_train_batch_size * steps_per_generation", self.generation_batch_size)  # fmt: skip
        at_least("num_generations", self.num_generations, 2)  # a group of one has no spread
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights must have one weight per reward function ({len(self.reward_funcs)}), "
                f"got {len(self.reward_weights)}"
            )
        if self.backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {self.backend!r}")
        low, high = self.pass_rate_bounds
        if not low < high:
            raise ValueError(
                f"min_pass_rate must be less than max_pass_rate ({self.max_pass_rate}), got {self.min_pass_rate}"
            )
        self.scale_rewards = _SCALES.get(str(self.scale_rewards).lower(), self.scale_rewards)
        if self.scale_rewards not in _SCALES.values():
            raise ValueError(f"scale_rewards must be group, batch, none, true or false, got {self.scale_rewards!r}")
        self.loss_config()

    @property
    def generation_batch_size(self) -> int:
        """Completions sampled at once."""
        return self.per_device_train_batch_size * (self.steps_per_generation or 1)

    @property
    def prompts_per_generation(self) -> int:
        """Groups sampled at once."""
        return self.generation_batch_size // self.num_generations

    @property
    def pass_rate_bounds(self) -> tuple[float, float]:
        """Between which a problem's pass rate must lie."""
        low, high = self.min_pass_rate, self.max_pass_rate
        return float("-inf") if low is None else low, float("inf") if high is None else high

    @property
    def is_on_policy(self) -> bool:
        """Whether each generation serves one optimizer step, so that every importance ratio is 1."""
        return self.num_iterations == 1 and self.steps_per_generation == self.gradient_accumulation_steps

    def loss_config(self, *, corrected: bool | None = None) -> GRPOLossConfig:
        """The loss that the recipe asks for; raises ValueError where ``GRPOLossConfig`` does.

        Args:
            corrected: Whether the sampler gives log-probabilities to correct it by; by default whether it is vLLM.
        """
        correction, bound = {}, self.vllm_importance_sampling_clip_max
        if (self.use_vllm if corrected is None else corrected) and self.vllm_importance_sampling_correction:
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


#: What scale_rewards may be called; a YAML file's false, as Dr. GRPO's recipes have it, is "none".
_SCALES = {"group": "group", "true": "group", "batch": "batch", "none": "none", "false": "none"}


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
    path = None if name is None else recipe_path(name)
    content = {} if path is None else read_yaml(path)
    if "stages" in content:
        raise ValueError(f"{path} is a recipe of several stages: grpo-kernels recipe {name}")
    return parse(Recipe, str(path), content, overrides, command="train")
