"""TRL's head and its trainer's step, with and without these kernels: 510 positions of which 200 count."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interleaved import Comparison, compare
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils as trl_utils

from grpo_kernels import GRPOLossConfig
from grpo_kernels.integrations import trl as drop_in
from grpo_kernels.integrations.trl_head import Expected
from grpo_kernels.ops.linear_grpo_loss.speculation import ExpectedLoss
from grpo_kernels.ops.policy_loss.inputs import PolicyInputs

HIDDEN, VOCAB = 896, 151936  # Qwen2.5-0.5B
GEMMS = "three bare GEMMs on the counted rows"


def test_head(benchmark: BenchmarkFixture, report: list[Comparison], quick: bool) -> None:
    torch.manual_seed(0)
    positions, counted, groups = (102, 40, 8) if quick else (510, 200, 8)
    hidden = torch.randn(positions, HIDDEN) * 0.3
    weight = torch.randn(VOCAB, HIDDEN) * 0.05
    targets = torch.randint(0, VOCAB, (positions,))
    mask = torch.zeros(positions, dtype=torch.bool)
    mask[torch.randperm(positions)[:counted]] = True
    rows = hidden[mask]
    advantages = torch.randn(groups)[torch.arange(counted) * groups // counted]  # of 8 completions of equal length
    quarter = advantages * (torch.arange(counted) < counted // 4)

    def gemms() -> None:
        logits = rows @ weight.t()
        _ = logits @ weight, logits.t() @ rows

    def step(head: Callable[..., Any], select: bool, advantages: Tensor, expect: bool = False) -> None:
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        given, ids = (x[mask], targets[mask]) if select else (x, targets)
        token = drop_in._EXPECTED.set(_expected(advantages) if expect else None)
        try:
            logprobs, *_ = head(given, w, None, ids, 1.0, 32768, None, 1.0, ("log_probs", "entropy"))
        finally:
            drop_in._EXPECTED.reset(token)
        logprobs = logprobs if select else logprobs[mask]
        ratio = torch.exp(logprobs - logprobs.detach())
        (-(torch.minimum(ratio, ratio.clamp(0.8, 1.2)) * advantages).sum() / counted).backward()

    def _expected(advantages: Tensor) -> Expected:
        ids, every = torch.zeros(1, counted, dtype=torch.int64), torch.ones(1, counted)
        inputs = PolicyInputs.of(
            ids, torch.float32, advantages[None], every, num_items_in_batch=None, cu_seqlens=None, loss_scale=1.0,
            config=GRPOLossConfig(), debug=False,
        )  # fmt: skip
        loss = ExpectedLoss.of(inputs, GRPOLossConfig(), torch.arange(counted))
        return Expected(every[0] != 0, None, loss)

    stock = trl_utils._ChunkedLogProbFunction
    with drop_in.apply() as applied:
        ours = trl_utils._ChunkedLogProbFunction.apply
        settings = drop_in.Settings(max_logits_bytes=1 << 30)

        def retaining(*arguments: Any) -> Any:
            token = drop_in._WITHIN.set(settings)
            try:
                return ours(*arguments)
            finally:
                drop_in._WITHIN.reset(token)

        comparison = Comparison(
            f"TRL's head, forward and backward, {counted} of {positions} positions, H={HIDDEN} V={VOCAB} float32",
            GEMMS,
            {} if quick else {"ours": 1.15, "ours, a quarter live": 0.75},
        )
        compare(
            benchmark,
            comparison,
            {
                GEMMS: gemms,
                "stock TRL: every position": lambda: step(stock.apply, False, advantages),
                "TRL's function, counted rows": lambda: step(stock.apply, True, advantages),
                "ours, projected again": lambda: step(ours, True, advantages),
                "ours, logits retained": lambda: step(retaining, True, advantages),
                "ours": lambda: step(ours, True, advantages, expect=True),
                "ours, a quarter live, projected again": lambda: step(ours, True, quarter),
                "ours, a quarter live": lambda: step(ours, True, quarter, expect=True),
            },
            {},
            rounds=2 if quick else 5,
        )
        assert applied.counts.hits > 0 == applied.counts.misses
    report.append(comparison)


def _trainer(folder: str, quick: bool) -> GRPOTrainer:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 4099} if quick else {
        "hidden_size": HIDDEN, "num_hidden_layers": 4, "vocab_size": VOCAB}  # fmt: skip
    config = Qwen2Config(
        intermediate_size=4 * sizes["hidden_size"], num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=256, **sizes,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    arguments = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=8, num_generations=8,
        max_completion_length=64, gradient_accumulation_steps=1, steps_per_generation=1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=Qwen2ForCausalLM(config),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def test_compute_loss(benchmark: BenchmarkFixture, report: list[Comparison], quick: bool) -> None:
    """``GRPOTrainer.compute_loss`` and its backward: prompts and completions of 64, a fifth of the latter masked."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(folder, quick)
        vocab = trainer.model.config.vocab_size
        batch, length = 8, 64
        lengths = torch.tensor([64, 32, 58, 40, 64, 51, 60, 41])[:, None]  # four fifths of 8 x 64
        inputs = {
            "prompt_ids": torch.randint(2, vocab, (batch, length)),
            "prompt_mask": torch.ones(batch, length, dtype=torch.int64),
            "completion_ids": torch.randint(2, vocab, (batch, length)),
            "completion_mask": (torch.arange(length) < lengths).to(torch.int64),
            "num_items_in_batch": lengths.sum().float(),
        }
        dense = torch.randn(batch)
        quarter = dense * (torch.arange(batch) < 2)

        def step(advantages: Tensor) -> None:
            trainer.model.zero_grad(set_to_none=True)
            trainer.compute_loss(trainer.model, inputs | {"advantages": advantages}).backward()

        def with_kernels(advantages: Tensor, **options: Any) -> None:
            with drop_in.apply(**options):
                step(advantages)

        config = trainer.model.config
        comparison = Comparison(
            f"GRPOTrainer.compute_loss and backward, 8 x (64 + 64) tokens, {config.num_hidden_layers} layers, "
            f"H={config.hidden_size} V={vocab} float32",
            "stock TRL",
            {} if quick else {"ours": 1 / 1.8},
        )
        compare(
            benchmark,
            comparison,
            {
                "stock TRL": lambda: step(dense),
                "ours, without speculation": lambda: with_kernels(dense, speculate=False),
                "ours": lambda: with_kernels(dense),
                "stock TRL, a quarter live": lambda: step(quarter),
                "ours, a quarter live": lambda: with_kernels(quarter),
            },
            {},
            rounds=2 if quick else 3,
        )
        report.append(comparison)
