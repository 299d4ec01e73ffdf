"""The reference against the real TRL trainer: its own ``_compute_loss`` and advantages, not a transcription."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import GRPOLossConfig, group_advantages, policy_loss
from grpo_kernels.testing.calls import BACKENDS
from grpo_kernels.testing.cases import VARIANT_CASES, Case
from grpo_kernels.testing.inputs import Inputs, build

trl = pytest.importorskip("trl")

NOT_OURS = {"policy_loss", "entropy_coef"}  # the loss without its bonus, and a hyper-parameter
CASES = (
    *VARIANT_CASES,
    Case("on_policy", old=False, config=GRPOLossConfig(beta=0.1)),
    Case("on_policy_sequence", old=False, config=GRPOLossConfig(beta=0.1, importance_sampling_level="sequence")),
    Case("one_completion_masked", mask="first", config=GRPOLossConfig(loss_type="grpo", beta=0.1)),
    Case("one_completion_masked_sequence", mask="first", config=GRPOLossConfig(importance_sampling_level="sequence")),
    Case("all_masked", mask="zeros", config=GRPOLossConfig(loss_type="bnpo", beta=0.1)),
    Case("mask_holes", mask="holes", batch=7, length=9, config=GRPOLossConfig(beta=0.1)),
    Case("token_advantages", advantages="token", config=GRPOLossConfig(beta=0.1)),
    Case("token_advantages_sequence", advantages="token", config=GRPOLossConfig(importance_sampling_level="sequence")),
    Case("rollout_token", rollout="token", config=GRPOLossConfig(beta=0.1)),
    Case("rollout_sequence", rollout="sequence", config=GRPOLossConfig(beta=0.1)),
    Case("few_items", num_items=0.5),
    Case("on_clip_bound", on_bound=True, config=GRPOLossConfig(epsilon_low=0, epsilon_high=0)),
    Case("zero_advantage", advantages="zero", config=GRPOLossConfig(beta=0.1)),
)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {str(i): i + 2 for i in range(10)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=12,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    )
    folder: Path = tmp_path_factory.mktemp("trl")
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=3,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1 2", "3"]}),
        processing_class=_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def _configure(trainer: Any, config: GRPOLossConfig, has_rollout_weights: bool) -> None:
    low, high = config.ratio_bounds
    trainer.loss_type = config.loss_type
    trainer.importance_sampling_level = config.importance_sampling_level
    trainer.epsilon_low, trainer.epsilon_high = 1 - low, high - 1
    trainer.args.delta = config.delta
    trainer.beta = config.beta
    trainer.args.use_bias_correction_kl = config.use_bias_correction_kl
    trainer.entropy_coef = config.entropy_coef
    trainer._entropy_bonus_enabled = config.entropy_coef != 0
    trainer.max_completion_length = config.max_completion_length
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = has_rollout_weights


def _trl(trainer: Any, inputs: Inputs, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss and logged metrics of TRL's own method, given what its model would have computed."""
    _configure(trainer, inputs.case.config, inputs.rollout is not None)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, entropy, None)
    trainer._metrics["train"].clear()
    mask = inputs.mask.long()
    items = inputs.num_items if inputs.num_items is not None else mask.sum()
    batch = {
        "prompt_ids": inputs.ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": inputs.ids,
        "completion_mask": mask,
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old,
        "ref_per_token_logps": inputs.ref,
        "importance_sampling_ratio": inputs.rollout,
        "num_items_in_batch": torch.as_tensor(items, dtype=torch.float64),
    }
    try:
        loss = trainer._compute_loss(trainer.model, batch)
    finally:
        del trainer._get_per_token_logps_and_entropies
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items() if name not in NOT_OURS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_gradients_and_metrics_are_trls(trainer: Any, case: Case, backend: str) -> None:
    inputs = build(case, torch.float64, "logprobs")
    expected_leaves = [x.detach().requires_grad_() for x in (inputs.logprobs, inputs.entropy)]
    expected, logged = _trl(trainer, inputs, *expected_leaves)
    expected.backward()
    leaves = [x.detach().requires_grad_() for x in (inputs.logprobs, inputs.entropy)]
    loss, metrics = policy_loss(
        leaves[0],
        inputs.advantages,
        inputs.mask,
        entropy=leaves[1],
        old_logprobs=inputs.old,
        ref_logprobs=inputs.ref,
        rollout_is_weights=inputs.rollout,
        num_items_in_batch=inputs.num_items,
        config=case.config,
        backend=backend,
    )
    loss.backward()
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(loss, expected, **close)
    for ours, theirs in zip(leaves, expected_leaves, strict=True):
        torch.testing.assert_close(
            *(torch.zeros_like(x) if x.grad is None else x.grad for x in (ours, theirs)), **close
        )
    assert set(metrics) == set(logged)
    for name, value in metrics.items():
        if case.name == "token_advantages_sequence" and name.startswith("clip_ratio/"):
            continue  # a sequence has one ratio, and ours counts it once; TRL counts it once a token there
        theirs = torch.tensor(logged[name], dtype=torch.float64).nan_to_num()
        torch.testing.assert_close(value, theirs, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


NAN = float("nan")
REWARDS = {
    "plain": [[0.0], [1.0], [0.5], [0.25], [3.0], [-1.0], [2.0], [2.5]],
    "missing": [[0.0], [NAN], [0.5], [0.25], [NAN], [NAN], [NAN], [2.5]],
    "none_scored": [[NAN]] * 4 + [[1.0], [2.0], [3.0], [4.0]],
    "two_functions": [[0.0, 1.0], [1.0, 0.5], [0.5, 2.0], [0.25, 0.0], [3.0, 1.0], [-1.0, 4.0], [2.0, 0.5], [2.5, 1.5]],
    "two_functions_missing": [[0.0, NAN], [NAN, 0.5], [NAN, NAN], [0.25, 0.0], [3.0, 1.0], [-1.0, NAN], [2.0, 0.5],
                              [2.5, 1.5]],
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("name", REWARDS)
def test_advantages_are_trls(trainer: Any, name: str, scale_rewards: str, aggregation: str, backend: str) -> None:
    rewards = torch.tensor(REWARDS[name])
    weights = torch.tensor([1.0, 0.5])[: rewards.shape[1]]
    _configure(trainer, GRPOLossConfig(), False)
    trainer.max_completion_length = 3
    trainer.scale_rewards, trainer.multi_objective_aggregation = scale_rewards, aggregation
    trainer.reward_funcs = [None] * rewards.shape[1]
    trainer.reward_func_names = [f"function_{k}" for k in range(rewards.shape[1])]
    trainer.reward_weights = weights
    trainer._calculate_rewards = lambda *_: rewards.clone()
    prompts = [{"prompt": "1 2"}] * 4 + [{"prompt": "3"}] * 4
    expected = trainer._generate_and_score_completions(prompts)["advantages"]
    got = group_advantages(
        rewards, 4, scale_rewards=scale_rewards, reward_weights=weights, aggregation=aggregation, backend=backend
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
