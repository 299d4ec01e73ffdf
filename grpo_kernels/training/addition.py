"""The built-in tasks, by the name that a recipe gives as ``dataset_name``: two-digit sums, worked digit by digit.

A *problem* is the pair of numbers to add. A *trace* is the worked sum in full, as a completion writes it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

Row = dict[str, Any]
Problem = tuple[int, int]  # from 10 to 99 each

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SPECIAL_WORDS = ("<pad>", "<eos>", "<unk>", *TAGS)
CHAT_WORDS = ("<system>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STEPS = ("units", "carry", "tens")  # each word begins a step of a trace
SLIP_RATE = 0.35  # of the imperfect traces
BROKEN_TAG_RATE = 0.25
_QUESTION = re.compile(r"(?<!\S)(\d) (\d) \+ (\d) (\d) =")
_OPERANDS = re.compile(r"<think> units (\d) \+ (\d) = \d carry \d tens (\d) \+ (\d) \+ \d = ")


class Addition:
    """``7 8 + 4 5 =``. Both orders of a sum are one problem where rows are held out."""

    name: ClassVar[str] = "addition"
    words: ClassVar[tuple[str, ...]] = (*SPECIAL_WORDS, *"0123456789", "+", "=", "units", "tens", "carry")
    step_words: ClassVar[tuple[str, ...]] = STEPS

    def build_rows(self, seed: int, num_eval: int, num_traces: int = 1000) -> tuple[list[Row], list[Row]]:
        """Training and held-out rows with ``prompt`` and ``answer``. No sum is in both, in either order.

        Args:
            seed: Of the split and of the traces' errors.
            num_eval: Held-out rows.
            num_traces: The first so many training rows have an imperfect ``completion``, for a cold start.
        """
        rng = random.Random(seed)
        pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
        rng.shuffle(pairs)
        problems = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in pairs]
        held_out, train = (
            [self.row(problem) for problem in part] for part in (problems[:num_eval], problems[num_eval:])
        )
        for row, problem in zip(train[:num_traces], problems[num_eval:], strict=False):
            row["completion"] = self.imperfect_trace(problem, rng)
        return train, held_out

    def row(self, problem: Problem) -> Row:
        """A problem as a row, without a completion."""
        return {"prompt": self.prompt(problem), "answer": str(sum(problem))}

    def prompt(self, problem: Problem) -> str:
        """The question, with every digit a word."""
        a, b = problem
        return f"{a // 10} {a % 10} + {b // 10} {b % 10} ="

    def trace(self, problem: Problem, rng: random.Random | None = None) -> str:
        """The worked sum; with ``rng``, one step is wrong, later steps follow it, and so the answer is wrong."""
        slip = None if rng is None else rng.choice(STEPS)
        (a_tens, a_units), (b_tens, b_units) = (divmod(number, 10) for number in problem)
        carry, units = divmod(a_units + b_units, 10)
        if slip == "units":
            units = _another_digit(units, rng)
        if slip == "carry":
            carry = 1 - carry
        hundreds, tens = divmod(a_tens + b_tens + carry, 10)
        if slip == "tens":
            tens = _another_digit(tens, rng)
        total = f"1 {tens}" if hundreds else str(tens)
        return _completion(
            f"units {a_units} + {b_units} = {units} carry {carry} tens {a_tens} + {b_tens} + {carry} = {total}",
            f"{total} {units}",
        )

    def imperfect_trace(self, problem: Problem, rng: random.Random) -> str:
        """A trace with a wrong step at ``SLIP_RATE``, and without one of its tags at ``BROKEN_TAG_RATE``."""
        text = self.trace(problem, rng if rng.random() < SLIP_RATE else None)
        if rng.random() < BROKEN_TAG_RATE:
            text = " ".join(text.replace(rng.choice(TAGS), "").split())
        return text

    def parse_prompt(self, text: str) -> Problem | None:
        """The problem that a text asks, whatever stands around the question; None if it asks none."""
        return _problem(_QUESTION.search(text), 1, 2, 3, 4)

    def parse_trace(self, trace: str) -> Problem | None:
        """The problem of which a completion is the worked sum, right in every step; None if there is none."""
        text = " ".join(trace.split())
        problem = _problem(_OPERANDS.match(text), 3, 1, 4, 2)
        return problem if problem is not None and self.trace(problem) == text else None

    def key(self, row: Row) -> Hashable:
        """Equal for rows that must not be on both sides of a split: the sorted problem, else the prompt itself."""
        problem = self.parse_prompt(row["prompt"])
        return " ".join(row["prompt"].split()) if problem is None else tuple(sorted(problem))

    def is_worked(self, row: Row) -> bool:
        """Whether a row's completion solves its own question, right in every step."""
        problem = self.parse_prompt(row["prompt"])
        return problem is not None and self.parse_trace(row["completion"]) == problem

    def boundaries(self, completion: str) -> list[int]:
        """Where a completion's steps end, as offsets into it."""
        return step_boundaries(completion, self.step_words)

    def intermediates(self, row: Row) -> list[Row]:
        """Rows that ask for the unit and for the carry of a row's sum; none if the prompt is more than a question."""
        problem = self.parse_prompt(row["prompt"])
        if problem is None or self.prompt(problem) != row["prompt"]:
            return []
        a_units, b_units = (number % 10 for number in problem)
        carry, units = divmod(a_units + b_units, 10)
        reasoning = f"units {a_units} + {b_units} = {units}"
        results = {"units": (units, reasoning), "carry": (carry, f"{reasoning} carry {carry}")}
        return [
            {"prompt": f"{step} {row['prompt']}", "answer": str(result), "completion": _completion(steps, str(result))}
            for step, (result, steps) in results.items()
        ]

    def restate(self, row: Row) -> Row | None:
        """The question that a row's completion solves, as a row; None if that is its own or there is none."""
        asked, solved = self.parse_prompt(row["prompt"]), self.parse_trace(row["completion"])
        return None if asked is None or solved is None or asked == solved else self.row(solved)

    def build_tokenizer(self, *, chat: bool = False) -> PreTrainedTokenizerFast:
        """A word-level tokenizer over the task's words, padding on the left.

        Args:
            chat: Add three words, one for each role, after the others, and a chat template that uses them.
        """
        words = (*self.words, *CHAT_WORDS) if chat else self.words
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            eos_token="<eos>",
            unk_token="<unk>",
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )
        if chat:
            tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer


class MixedAddition(Addition):
    """Addition whose imperfect traces put French words for about half of the words in about half of the traces.

    Problems and split are those of ``addition`` at the same seed. Every row names the words that its reasoning should
    keep to, in the column ``target_words``: the English ones, and the digits and signs, which any language has.
    """

    name = "addition-mixed"
    french: ClassVar[dict[str, str]] = {"units": "unités", "tens": "dizaines", "carry": "retenue"}
    words = (*Addition.words, *french.values())
    step_words = (*STEPS, *french.values())
    target_words = tuple(word for word in Addition.words if word not in SPECIAL_WORDS)
    mixed_rate = 0.5  # of the traces
    mixed_word_rate = 0.5  # of the words of a mixed trace

    def row(self, problem: Problem) -> Row:
        return {**super().row(problem), "target_words": list(self.target_words)}

    def imperfect_trace(self, problem: Problem, rng: random.Random) -> str:
        """A trace with a wrong step, a broken tag and French words, each at its rate."""
        text = super().imperfect_trace(problem, rng)
        if rng.random() >= self.mixed_rate:
            return text
        return " ".join(
            self.french[word] if word in self.french and rng.random() < self.mixed_word_rate else word
            for word in text.split()
        )

    def parse_trace(self, trace: str) -> Problem | None:
        """As for addition, whatever the language of each word."""
        english = {french: word for word, french in self.french.items()}
        return super().parse_trace(" ".join(english.get(word, word) for word in trace.split()))

    def is_worked(self, row: Row) -> bool:
        """Whether a completion is right in every step, and in one language."""
        return super().is_worked(row) and not set(row["completion"].split()) & set(self.french.values())


TASKS: dict[str, Addition] = {task.name: task for task in (Addition(), MixedAddition())}


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, *, hidden_size: int = 96) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 of two layers: a quarter million parameters, or fewer for a small student.

    Args:
        tokenizer: Says the size of the vocabulary and the special tokens.
        seed: Of the initialisation.
        hidden_size: A multiple of 8: four heads of an even width.

    Raises:
        ValueError: The hidden size is no multiple of 8.
    """
    if hidden_size < 8 or hidden_size % 8:
        raise ValueError(f"hidden_size must be a multiple of 8 and at least 8, got {hidden_size}")
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def step_boundaries(completion: str, step_words: Sequence[str] = ()) -> list[int]:
    """Where the steps of a completion's reasoning end, as offsets into it, in order.

    A step ends before a word that begins the next one, or, without such words, at the end of a sentence or a line. The
    last ends before ``</think>``.

    Args:
        completion: The text; without one whole ``<think>`` element it has no steps.
        step_words: Words that begin a step, alone between white space.

    Example:
        >>> [f"<think> a b c d </think>"[:i] for i in step_boundaries("<think> a b c d </think>", ["a", "c"])]
        ['<think> a b', '<think> a b c d']
    """
    start, end = completion.find("<think>"), completion.find("</think>")
    if start < 0 or end < start:
        return []
    start += len("<think>")
    if step_words:
        pattern = rf"(?<!\S)(?:{'|'.join(map(re.escape, step_words))})(?!\S)"
    else:
        pattern = r"\n|(?<=[.!?])\s"
    cuts = [start + match.start() for match in re.finditer(pattern, completion[start:end])]
    ends = {len(completion[:cut].rstrip()) for cut in [*cuts, end]}
    return sorted(cut for cut in ends if cut > start)


def _completion(reasoning: str, answer: str) -> str:
    return f"<think> {reasoning} </think> <answer> {answer} </answer>"


def _another_digit(digit: int, rng: random.Random) -> int:
    return rng.choice([other for other in range(10) if other != digit])


def _problem(match: re.Match[str] | None, a_tens: int, a_units: int, b_tens: int, b_units: int) -> Problem | None:
    """The problem whose digits are these groups of a match; None without one, or if a number begins with 0."""
    if match is None or "0" in match.group(a_tens, b_tens):
        return None
    return int(match[a_tens] + match[a_units]), int(match[b_tens] + match[b_units])
