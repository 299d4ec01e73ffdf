"""The built-in task: two-digit addition, reasoned digit by digit, for a tiny model that starts from random weights."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WORDS = [
    "<pad>", "<eos>", "<unk>", "<think>", "</think>", "<answer>", "</answer>", *"0123456789", "+", "=",
    "units", "tens", "carry",
]  # fmt: skip

SLIP_RATE = 0.35
BROKEN_TAG_RATE = 0.25
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the task's two dozen words, padding on the left."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 of a quarter million parameters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def build_rows(seed: int, num_eval: int, num_traces: int = 1000) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out problems. A held-out pair is in the training set in neither order.

    Args:
        seed: Of the split and of the traces' errors.
        num_eval: Held-out problems.
        num_traces: Training rows that carry an imperfect worked ``completion`` for the cold start.

    Returns:
        Rows with ``prompt`` and ``answer``, and ``completion`` in the first ``num_traces`` training rows.
    """
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(pairs)
    held_out = [_row(*_either_order(rng, pair)) for pair in pairs[:num_eval]]
    train = [_row(*_either_order(rng, pair)) for pair in pairs[num_eval:]]
    for row in train[:num_traces]:
        row["completion"] = _imperfect_trace(rng, *row.pop("operands"))
    for row in [*train[num_traces:], *held_out]:
        del row["operands"]
    return train, held_out


def trace(a: int, b: int, rng: random.Random | None = None) -> str:
    """The worked sum of two two-digit numbers; with ``rng``, one written digit is wrong and later steps follow it."""
    slip = -1 if rng is None else rng.randrange(3)

    def written(value: int, position: int) -> int:
        return rng.choice([d for d in range(10) if d != value]) if rng is not None and slip == position else value

    (a_tens, a_units), (b_tens, b_units) = divmod(a, 10), divmod(b, 10)
    carry, units = divmod(a_units + b_units, 10)
    units = written(units, 0)
    if slip == 1:
        carry = 1 - carry
    hundreds, tens = divmod(a_tens + b_tens + carry, 10)
    tens = written(tens, 2)
    answer = f"1 {tens} {units}" if hundreds else f"{tens} {units}"
    return (
        f"<think> units {a_units} + {b_units} = {units} carry {carry} "
        f"tens {a_tens} + {b_tens} + {carry} = {f'1 {tens}' if hundreds else tens} </think> "
        f"<answer> {answer} </answer>"
    )


def _row(a: int, b: int) -> dict[str, Any]:
    return {"prompt": f"{a // 10} {a % 10} + {b // 10} {b % 10} =", "answer": str(a + b), "operands": (a, b)}


def _either_order(rng: random.Random, pair: tuple[int, int]) -> tuple[int, int]:
    return pair if rng.random() < 0.5 else (pair[1], pair[0])


def _imperfect_trace(rng: random.Random, a: int, b: int) -> str:
    text = trace(a, b, rng if rng.random() < SLIP_RATE else None)
    if rng.random() < BROKEN_TAG_RATE:
        text = " ".join(text.replace(rng.choice(_TAGS), "").split())
    return text
