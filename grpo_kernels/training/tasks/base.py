"""What the built-in tasks share: rows and their split, imperfect traces, the tokenizer, the tiny model.

A *problem* is a tuple that says all of a question. Its *core* is what its other wordings share with it: problems of one
core are held out together. A *trace* is the worked solution in full, as a completion writes it.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

Row = dict[str, Any]
Problem = tuple[Any, ...]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
OPENING_WORDS = ("<pad>", "<eos>", "<unk>", *TAGS)
CHAT_WORDS = ("<system>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Goal(NamedTuple):
    """A result on the way to a problem's answer, asked for by itself."""

    prompt: str
    answer: str
    completion: str  # the trace as far as the result, and the result as the answer


class SyntheticTask(ABC):
    """Questions with exact answers, worked in steps, over a few dozen words.

    A task has no state, so one instance serves everybody.
    """

    name: ClassVar[str]  # the recipe's dataset_name
    words: ClassVar[tuple[str, ...]]  # the vocabulary, in the order of the token ids
    step_words: ClassVar[tuple[str, ...]]  # each begins a step of the reasoning
    slip_rate: ClassVar[float] = 0.35  # of the cold start's traces
    broken_tag_rate: ClassVar[float] = 0.25

    @abstractmethod
    def problems(self, rng: random.Random) -> list[Problem]:
        """One problem of each core, in an order drawn from ``rng``."""

    @abstractmethod
    def core(self, problem: Problem) -> Hashable:
        """What the wordings of one question share."""

    @abstractmethod
    def prompt(self, problem: Problem) -> str:
        """The question."""

    @abstractmethod
    def answer(self, problem: Problem) -> str:
        """The exact answer, as rewards compare it: without white space."""

    @abstractmethod
    def trace(self, problem: Problem, rng: random.Random | None = None) -> str:
        """The worked solution; with ``rng``, one step is wrong, later steps follow it, and so the answer is wrong."""

    @abstractmethod
    def parse_prompt(self, text: str) -> Problem | None:
        """The problem that a text asks, whatever stands around the question; None if it asks none of this task."""

    @abstractmethod
    def read_trace(self, trace: str, problem: Problem) -> Problem | None:
        """The problem whose numbers or names a trace copies, whether or not it works on them rightly.

        Args:
            trace: A completion, single spaces between its words.
            problem: What was asked; it supplies what the trace has no need to copy.
        """

    @abstractmethod
    def goals(self, problem: Problem) -> list[Goal]:
        """The results on the way to the answer."""

    def wordings(self, rng: random.Random, problem: Problem) -> list[Problem]:
        """The problems of one core that a training set has; a held-out set has the first alone."""
        return [problem]

    def columns(self) -> Row:
        """What every row has beside its prompt and its answer."""
        return {}

    def build_rows(self, seed: int, num_eval: int, num_traces: int = 1000) -> tuple[list[Row], list[Row]]:
        """Training and held-out problems. No wording of a held-out problem is in the training set.

        Args:
            seed: Of the split and of the traces' errors.
            num_eval: Held-out problems.
            num_traces: Training rows that carry an imperfect worked ``completion`` for the cold start.

        Returns:
            Rows with ``prompt``, ``answer`` and what ``columns`` names, and ``completion`` in the first ``num_traces``
            training rows.
        """
        rng = random.Random(seed)
        cores = self.problems(rng)
        held_out = [self.wordings(rng, problem)[0] for problem in cores[:num_eval]]
        train = [wording for problem in cores[num_eval:] for wording in self.wordings(rng, problem)]
        train_rows = [self.row(problem) for problem in train]
        for row, problem in zip(train_rows[:num_traces], train, strict=False):
            row["completion"] = self.imperfect_trace(rng, problem)
        return train_rows, [self.row(problem) for problem in held_out]

    def row(self, problem: Problem) -> Row:
        """A problem as a row, without a completion."""
        return {"prompt": self.prompt(problem), "answer": self.answer(problem), **self.columns()}

    def imperfect_trace(self, rng: random.Random, problem: Problem) -> str:
        """A trace with a slip at ``slip_rate``, and without one of its tags at ``broken_tag_rate``."""
        text = self.trace(problem, rng if rng.random() < self.slip_rate else None)
        if rng.random() < self.broken_tag_rate:
            text = " ".join(text.replace(rng.choice(TAGS), "").split())
        return text

    def parse_trace(self, trace: str, problem: Problem) -> Problem | None:
        """The problem of which a completion is the whole, right solution, be it the one that was asked or another.

        Args:
            trace: A completion.
            problem: What was asked.
        """
        text = " ".join(trace.split())
        found = self.read_trace(text, problem)
        return found if found is not None and self.trace(found) == text else None

    def key(self, row: Row) -> Hashable:
        """Equal for rows that must not be on both sides of a split: the problem's core, else the prompt itself."""
        problem = self.parse_prompt(row["prompt"])
        return " ".join(row["prompt"].split()) if problem is None else self.core(problem)

    def is_worked(self, row: Row) -> bool:
        """Whether a row's completion is a right solution of its own question in every step."""
        problem = self.parse_prompt(row["prompt"])
        return problem is not None and self.parse_trace(row["completion"], problem) == problem

    def boundaries(self, completion: str) -> list[int]:
        """Where a completion's steps end, as offsets into it."""
        return step_boundaries(completion, self.step_words)

    def intermediates(self, row: Row) -> list[Row]:
        """Rows that ask for what the solution of ``row`` finds on its way; none if its prompt is no whole question."""
        problem = self.parse_prompt(row["prompt"])
        if problem is None or self.prompt(problem) != row["prompt"]:
            return []
        return [goal._asdict() for goal in self.goals(problem)]

    def restate(self, row: Row) -> Row | None:
        """The question that a row's completion solves rightly, as a row; None if there is no other than its own."""
        problem = self.parse_prompt(row["prompt"])
        found = None if problem is None else self.parse_trace(row["completion"], problem)
        return None if found is None or found == problem else self.row(found)

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


def reply(reasoning: str, answer: str) -> str:
    """Reasoning and answer in the form that the tasks are trained to: single spaces, each part in its tag."""
    return f"<think> {reasoning} </think> <answer> {answer} </answer>"


def spaced(number: int | str) -> str:
    """A number's digits with spaces between them, each a word."""
    return " ".join(str(number))


def other(rng: random.Random, value: int, choices: Sequence[int]) -> int:
    """One of the choices that is not ``value``."""
    return rng.choice([choice for choice in choices if choice != value])


def one_digit_off(number: int) -> list[int]:
    """The numbers of as many digits that differ from ``number`` in one digit."""
    places = [10**i for i in range(len(str(number)))]
    changed = [number + (digit - number // place % 10) * place for place in places for digit in range(10)]
    return [n for n in changed if n >= places[-1] and n != number]
