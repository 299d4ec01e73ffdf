"""Twenty steps of a stock GRPOTrainer of TRL's and of the loop, on the same completions: whatever both of them log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from grpo_kernels.loss.metrics import PolicyMetrics
from grpo_kernels.rewards import columns_of, score
from grpo_kernels.training.data.files import Row
from grpo_kernels.training.loop import Batch, GRPOLoop
from grpo_kernels.training.metrics import correction_metrics, correction_statistics
from grpo_kernels.training.models import build_optimizer
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.report import SampleRecord
from grpo_kernels.training.rollout import Rollout, completion_tokens, end_mask
from grpo_kernels.training.task import Task

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, VOCAB, LENGTH, END = 20, 24, 7, 1
PROMPTS = ["2 3 4", "5", "6 7", "8 9 10 11", "12 13", "14 2 5 8 11", "3", "20 21 22"]
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": LENGTH, "max_steps": STEPS,
    "learning_rate": 3e-3, "warmup_steps": 3, "weight_decay": 0.1, "max_grad_norm": 0.3, "beta": 0.0, "seed": 5,
}  # fmt: skip
TWICE = {"num_iterations": 2, "gradient_accumulation_steps": 2}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "accumulation": {"gradient_accumulation_steps": 4, "lr_scheduler_type": "cosine"},
    "kl": {"beta": 0.1, "gradient_accumulation_steps": 2},
    "kl-iterations": {"beta": 0.1, **TWICE, "epsilon": 0.05, "epsilon_high": 0.08},
    "several_steps_a_generation": {"beta": 0.1, **TWICE, "steps_per_generation": 4, "epsilon": 0.05},
    "grpo": {"loss_type": "grpo", "beta": 0.1, **TWICE, "mask_truncated_completions": True},
    "bnpo": {"loss_type": "bnpo", "num_iterations": 2},  # a mean over local tokens: without accumulation
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", **TWICE},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "learning_rate": 1e-3, **TWICE},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.1, **TWICE},
    "sapo": {"loss_type": "sapo", **TWICE},
    "vespo": {"loss_type": "vespo", "learning_rate": 1e-3, **TWICE},
    "normalize_then_sum": {"multi_objective_aggregation": "normalize_then_sum", "num_iterations": 2},
    "sequence": {"importance_sampling_level": "sequence", "epsilon": 3e-3, "scale_rewards": "batch", **TWICE},
    "entropy": {"entropy_coef": 0.05, "num_iterations": 2},  # its mean is over local tokens, as "bnpo"'s
    "entropy-grpo": {"loss_type": "grpo", "entropy_coef": 0.05, **TWICE},
    "delta": {"delta": 1.05, **TWICE, "temperature": 0.7},
}  # fmt: skip


def tokenizer_of() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": END} | {str(k): k for k in range(2, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def model_of(family: str) -> Any:
    """Qwen2 has biases and tied embeddings, Llama neither; Qwen3Moe has experts, whose own loss counts."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=family == "Qwen2", pad_token_id=0,
        eos_token_id=END, bos_token_id=None, initializer_range=0.1, **(EXPERTS if family == "Qwen3Moe" else {}),
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Completions:
    """Drawn once per generation, the same for whoever asks: of unequal lengths, some cut off at the limit."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(3)

    def __call__(self, count: int) -> list[list[int]]:
        ids = torch.randint(2, VOCAB, (count, LENGTH), generator=self._generator).tolist()
        lengths = torch.randint(0, LENGTH + 1, (count,), generator=self._generator).tolist()
        return [[*row[:n], END] if n < LENGTH else row for row, n in zip(ids, lengths, strict=True)]


def remainder_of_tokens(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
) -> list[float]:
    """Multiples of a half, whose mean in a group is exact: TRL leaves its rounding where all are alike, as for "5"."""
    return [1.5 if prompt == "5" else 0.5 * (sum(ids) % 5) for prompt, ids in zip(prompts, completion_ids, strict=True)]


def length(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Abstains now and then, and for "5" always."""
    pairs = zip(prompts, completion_ids, strict=True)
    return [None if prompt == "5" or len(ids) == 4 else len(ids) / 8 for prompt, ids in pairs]


REWARDS = {"remainder_of_tokens": remainder_of_tokens, "length": length}


def of_trl(model: Path, folder: Path, options: dict[str, Any]) -> list[dict[str, float]]:
    """What its own trainer logs at each step; only what would sample is replaced."""
    arguments = trl.GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_strategy="no",
        disable_tqdm=True, shuffle_dataset=False, reward_weights=[1.0, 0.5], model_init_kwargs={"dtype": "float32"},
        **options,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=str(model), reward_funcs=list(REWARDS.values()), args=arguments, processing_class=tokenizer_of(),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )  # fmt: skip
    completions = Completions()
    trainer._generate_single_turn = lambda prompt_ids, *_, **__: (completions(len(prompt_ids)), None)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


class Given(GRPOLoop):
    """The loop on the completions that TRL is given, in TRL's order of prompts."""

    completions: Completions

    def collect(self) -> tuple[Batch, dict[str, float], list[SampleRecord]]:
        rows = [row for row in self._in_order() for _ in range(self.recipe.num_generations)]
        encoded = self.tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(completion) for completion in self.completions(len(rows))], batch_first=True
        )
        mask = end_mask(ids, [END]) * (ids != 0)
        rollout = Rollout(encoded["input_ids"], encoded["attention_mask"], ids, mask)
        columns = columns_of(rows, completion_tokens(rollout))
        rewards = score(self.reward_functions, [row["prompt"] for row in rows], [""] * len(rows), columns)
        return self._make_batch(rollout, rewards), self._reward_metrics(rewards) | self._length_metrics(rollout), []

    def _in_order(self) -> list[Row]:
        count = self.recipe.prompts_per_generation
        first = self.row_order.drawn
        self.row_order.drawn += count
        return [self.rows[k % len(self.rows)] for k in range(first, first + count)]


def of_the_loop(model: Any, options: dict[str, Any]) -> list[dict[str, float]]:
    recipe = Recipe(device="cpu", num_eval_prompts=0, reward_funcs=list(REWARDS), reward_weights=[1.0, 0.5], **options)
    rows = [{"prompt": prompt, "answer": ""} for prompt in PROMPTS]
    loop = Given(Task(model, tokenizer_of(), rows, [], REWARDS), recipe)
    loop.completions = Completions()
    return [step.metrics for step in loop.steps()]


def of_micro_batches(parts: Sequence[PolicyMetrics]) -> PolicyMetrics:
    """In the place of ``PolicyMetrics.combined``: means over micro-batches, as TRL takes them."""
    return {name: torch.stack([part[name] for part in parts]).double().mean() for name in parts[0]}  # type: ignore


def same_order(count: int, **_: Any) -> Tensor:
    """In the place of both shuffles of a generation: groups and lengths are mixed, and it is known how."""
    return torch.arange(count).view(2, -1).T.reshape(-1).roll(3)


CLIPPED = ("kl-iterations", "several_steps_a_generation", "grpo", "bnpo", "dr_grpo", "sequence", "delta")
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8, "router_aux_loss_coef": 0.5,
}  # fmt: skip
QUICK = ("defaults", "kl-iterations", "several_steps_a_generation", "grpo", "dr_grpo", "sequence")
assert set(QUICK) <= CASES.keys()


@pytest.mark.parametrize(
    "name, family",
    [pytest.param(name, "Qwen2", marks=() if name in QUICK else pytest.mark.full) for name in CASES]
    + [pytest.param(name, "Llama", marks=() if name == "accumulation" else pytest.mark.full) for name in CASES]
    + [pytest.param("kl-iterations", "Qwen3Moe", marks=pytest.mark.full)],
)
def test_twenty_steps_are_those_of_trls_trainer(
    name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, model = COMMON | CASES[name], model_of(family)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch, "randperm", same_order)
    monkeypatch.setattr(PolicyMetrics, "combined", of_micro_batches)
    expected = of_trl(tmp_path / "model", tmp_path, options)
    found = of_the_loop(model, options)
    assert len(found) == len(expected) == STEPS
    for key in ("loss", "grad_norm", "learning_rate"):
        worst = max(abs(ours[key] - theirs[key]) for ours, theirs in zip(found, expected, strict=True))
        assert worst <= 1e-5, f"{key}: {worst}"
    assert_all_that_both_log_is_the_same(found, expected, options)
    if name in CLIPPED:
        assert max(step["clip_ratio/region_mean"] for step in found) > 0.1
    if options["beta"]:
        assert max(step["kl"] for step in found) > 0.01


#: What TRL logs and the loop does not: its own names for the same, and the parts of an entropy bonus.
OF_TRL_ALONE = {"epoch", "policy_loss", "entropy_coef", "total_flos", "train_loss", "step"}


def assert_all_that_both_log_is_the_same(
    found: list[dict[str, float]], expected: list[dict[str, float]], options: dict[str, Any]
) -> None:
    left_out = {"step_time"}  # two clocks
    if options.get("scale_rewards") == "batch" or "multi_objective_aggregation" in options:
        left_out |= {"frac_reward_zero_std"}  # TRL's is of the batch
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.keys() - ours.keys() <= OF_TRL_ALONE, theirs.keys() - ours.keys()
        for key in ours.keys() & theirs.keys() - left_out:  # TRL logs a generation's at its first step
            if theirs[key] is None:
                assert math.isnan(ours[key]), key
                continue
            assert abs(ours[key] - theirs[key]) <= 1e-5 * max(1, abs(theirs[key])), (key, ours[key], theirs[key])
    shown = {key for theirs in expected for key in theirs}
    assert shown >= {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "completions/clipped_ratio",
        "entropy",
        "num_tokens",
    }
    assert {step["frac_reward_zero_std"] for step in found} > {0.0}
    assert 0 < max(step["completions/clipped_ratio"] for step in found) <= 1


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_samplers_metrics_are_trls(mode: str, truncated: bool, tmp_path: Path) -> None:
    """TRL's own generation, as if a vLLM server had sampled, which left some tokens unscored."""
    bounds = {"vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": 2.0}
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=8,
        num_generations=4, max_completion_length=LENGTH, vllm_importance_sampling_mode=mode,
        mask_truncated_completions=truncated, **bounds,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model_of("Llama"), reward_funcs=remainder_of_tokens, args=arguments, processing_class=tokenizer_of(),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )  # fmt: skip
    trainer.use_vllm, rng, completions = True, torch.Generator().manual_seed(0), Completions()

    def sampled(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], list[list[list[float]]]]:
        ids = completions(len(prompt_ids))
        logprobs = [(-3.2 + 0.3 * torch.randn(len(row), generator=rng)).tolist() for row in ids]
        logprobs[0][0] = logprobs[3][-1] = math.nan
        return ids, logprobs

    trainer._generate_single_turn = sampled
    trainer.model.train()
    rows = [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(4)]
    output = trainer._generate_and_score_completions(rows)
    theirs = {k: v[0] for k, v in trainer._metrics["train"].items() if k.startswith("sampling/")}
    config = Recipe(use_vllm=True, vllm_importance_sampling_mode=mode, **bounds).loss_config()
    mask, old = output["completion_mask"], output["old_per_token_logps"]
    assert (mask.sum(dim=1) == 0).any() == truncated
    found = correction_metrics(correction_statistics(old, output["sampling_per_token_logps"], mask, config))
    if truncated and mode.startswith("sequence"):  # TRL gives a completion without a token a ratio of 1
        theirs = {name: value for name, value in theirs.items() if "importance" not in name}
    assert found.keys() >= theirs.keys() and len(theirs) > 1
    assert {name: found[name] for name in theirs} == pytest.approx(theirs, rel=1e-5)


def test_weight_decay_passes_by_what_transformers_trainer_passes_by() -> None:
    model = model_of("Qwen2")
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    optimizer = build_optimizer(model, learning_rate=1e-6, weight_decay=0.1, betas=(0.9, 0.999), epsilon=1e-8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [({names[id(p)] for p in group["params"]}, group["weight_decay"]) for group in optimizer.param_groups]
    every = set(names.values())
    assert found == [(every & decayed, 0.1), (every - decayed, 0.0)]
    assert any("norm" in name for name in found[1][0]) and any("bias" in name for name in found[1][0])
