"""A GRPOTrainer of TRL on a random model with a real vocabulary; as a script, the peak of memory of its step."""

from __future__ import annotations

import argparse
import contextlib
import tempfile

import torch
from memory import Peak
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from grpo_kernels.integrations import trl as drop_in


def build_model(layers: int, hidden_size: int, vocab: int, tied: bool = False) -> Qwen2ForCausalLM:
    """Random weights; the head is what the size of a step's tensors comes from."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        vocab_size=vocab,
        intermediate_size=4 * hidden_size,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Qwen2ForCausalLM(config)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Three words; every other token is unknown to it, which matters to no step."""
    from tokenizers import Tokenizer, models

    words = models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def reward(completions: list[str], **_: object) -> list[float]:
    """By the completion's place in the batch, so that every group has a spread."""
    return [float(i % 3) for i in range(len(completions))]


def build_trainer(folder: str, model: Qwen2ForCausalLM, completion_length: int, max_steps: int = 1) -> GRPOTrainer:
    """Eight completions of one prompt a step, fp32, on the CPU."""
    from datasets import Dataset

    arguments = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=8, num_generations=8,
        max_completion_length=completion_length, gradient_accumulation_steps=1, steps_per_generation=1,
        max_steps=max_steps, save_strategy="no", logging_steps=1, learning_rate=1e-6, disable_tqdm=True,
    )  # fmt: skip
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=build_tokenizer(),
    )


class LossStep:
    """``compute_loss`` and its backward: prompts and completions of 64 tokens, a fifth of the latter masked."""

    def __init__(self, folder: str, model: Qwen2ForCausalLM) -> None:
        self.trainer = build_trainer(folder, model, completion_length=64)
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()
        vocab, lengths = model.config.vocab_size, torch.tensor([64, 32, 58, 40, 64, 51, 60, 41])[:, None]
        self.inputs = {
            "prompt_ids": torch.randint(2, vocab, (8, 64)),
            "prompt_mask": torch.ones(8, 64, dtype=torch.int64),
            "completion_ids": torch.randint(2, vocab, (8, 64)),
            "completion_mask": (torch.arange(64) < lengths).to(torch.int64),
            "num_items_in_batch": lengths.sum().float(),
        }
        self.dense = torch.randn(8)
        self.quarter = self.dense * (torch.arange(8) < 2)

    def __call__(self, advantages: Tensor) -> None:
        self.trainer.model.zero_grad(set_to_none=True)
        self.trainer.compute_loss(self.trainer.model, self.inputs | {"advantages": advantages}).backward()

    def with_kernels(self, advantages: Tensor, speculate: bool = True) -> None:
        with drop_in.apply(speculate=speculate):
            self(advantages)


def main() -> None:
    parser = argparse.ArgumentParser(description="prints the bytes that a step adds to the model's own at its peak")
    parser.add_argument("--ours", action="store_true", help="with the kernels")
    parser.add_argument("--model", type=int, nargs=3, required=True, metavar=("LAYERS", "HIDDEN", "VOCAB"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        step = LossStep(folder, build_model(*options.model))
        with Peak() as peak:
            (step.with_kernels if options.ours else step)(step.dense)
    print(peak.bytes)


if __name__ == "__main__":
    main()
