"""A task of your own: two-digit subtraction, with worked steps for a supervised start, as a .jsonl and a tiny model.

    python examples/synthetic_task.py runs/subtraction
    grpo-kernels train --recipe addition --dataset_name runs/subtraction/rows.jsonl \\
        --model_name_or_path runs/subtraction/model --output_dir runs/subtraction/run

In two minutes on a CPU, held-out accuracy at temperature 1 rises from .595 to .920 (seed 0).

A row has a ``prompt`` and what reward functions read: ``accuracy`` compares the text of ``<answer>`` with the column
``answer``. Rows with a ``completion`` are what ``--sft_steps`` trains on. They are wrong at times, so that there is
something left to learn from rewards.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_kernels.training.addition import build_model

WORDS = ("<pad>", "<eos>", "<unk>", "<think>", "</think>", "<answer>", "</answer>")
WORDS += (*"0123456789", "-", "=", "units", "borrow", "tens")
SLIP_RATE = 0.35  # of the worked rows, whose answer is wrong


def trace(a: int, b: int, rng: random.Random | None = None) -> str:
    """The worked difference; with ``rng`` one digit is wrong, and later steps follow it."""
    slip = None if rng is None else rng.choice(("units", "borrow", "tens"))
    borrow = int(a % 10 < b % 10)
    units = (a - b) % 10
    if slip == "units":
        units = (units + rng.randrange(1, 10)) % 10
    if slip == "borrow":
        borrow = 1 - borrow
    tens = abs(a // 10 - b // 10 - borrow)
    if slip == "tens":
        tens = (tens + rng.randrange(1, 10)) % 10
    reasoning = f"units {a % 10} - {b % 10} = {units} borrow {borrow} tens {a // 10} - {b // 10} - {borrow} = {tens}"
    answer = f"{tens} {units}" if tens else str(units)
    return f"<think> {reasoning} </think> <answer> {answer} </answer>"


def build_rows(seed: int, num_traces: int = 1000) -> list[dict[str, str]]:
    """Every difference of two numbers from 10 to 99 that is at least 0; the first ``num_traces`` have a completion."""
    rng = random.Random(seed)
    pairs = [(a, b) for b in range(10, 100) for a in range(b, 100)]
    rng.shuffle(pairs)
    rows = []
    for number, (a, b) in enumerate(pairs):
        row = {"prompt": f"{a // 10} {a % 10} - {b // 10} {b % 10} =", "answer": str(a - b)}
        if number < num_traces:
            row["completion"] = trace(a, b, rng if rng.random() < SLIP_RATE else None)
        rows.append(row)
    return rows


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every word of the task."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes ``rows.jsonl`` and the folder ``model``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    tokenizer = build_tokenizer()
    for part in (build_model(tokenizer, args.seed), tokenizer):
        part.save_pretrained(args.folder / "model")
    lines = [json.dumps(row) + "\n" for row in build_rows(args.seed)]
    (args.folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
