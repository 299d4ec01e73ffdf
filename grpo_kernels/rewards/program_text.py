"""The program that a completion gives for an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo_kernels.rewards.code_blocks import (
    ANSWER_TAGS,
    REASONING_END,
    REASONING_START,
    Block,
    Segment,
    dedented,
    split_at_tags,
    without_language_line,
)
from grpo_kernels.rewards.completions import completion_text
from grpo_kernels.rewards.python_outline import Outline, outline, reads_as_code

_PROMPT = re.compile(r">>>( |$)|In \[\d+\]:|[$%] ")  # of a transcript
_SOLUTION = "Solution"  # LeetCode's class: what stands before it may be the types that it is given
_MOST_BLOCKS = 1000  # each is parsed


class _Program(NamedTuple):
    text: str
    is_certain: bool  # more than an expression, a value or prose


def extract_program(completion: str | Sequence[dict[str, Any]]) -> str | None:
    """The program of a completion, dedented and without white space lines around it; None if there is none.

    Looked for in this order:

    1. fenced blocks of the last ``<answer>``,
    2. the last ``<answer>`` as it is, if it has no fenced block,
    3. fenced blocks outside the reasoning.

    A text that is only an expression, as ``[1, 2]`` or ``O(n)``, or that is no Python, gives way to a program further
    down. An ``<answer>`` without an end tag goes to the end of the text. The reasoning never counts: what stands in
    ``<think>`` or the like (``code_blocks.REASONING_TAGS``), with or without its end tag, and all that precedes an end
    tag without a beginning. Tags in a string or comment of a program are part of the program.

    Fences are those of CommonMark, indented as deep as you like, in lists and quotes, and also one that ends on a line
    of code, is not closed, or stands behind words. ``[PYTHON]`` at the start of a line and ``<|python_tag|>`` open a
    block, too. Of several blocks the last one labelled as Python counts (``python``, ``py``, ``Python3``, ``pypy3``,
    ``{.python}``, ``main.py`` and the like), else the last without a label. Those that are only an expression,
    constants, imports, functions without a body or statements on names that nothing defines come after all others, and
    so do examples and tests: blocks that use what one before them defines and redefine none of it but tests
    (``test_x``, a ``TestCase``, ``main``). Those that neither define nor print anything come after those that do. Lines
    of the program that stand once more in a block below do not replace it. Blocks with other labels, empty ones and
    transcripts (``>>> x``) are no programs; one labelled ``markdown`` is looked into if there is none outside. Of more
    than 1000 blocks the last ones count. A fence in a string or comment of a block, a docstring say, does not end it.
    Special tokens (``<|im_end|>``, ``[/PYTHON]``) end a block and are no part of it.

    Example:
        >>> extract_program("<think>Try x = 0.</think>\\n<answer>\\n~~~py\\nx = 1\\n~~~\\n</answer>")
        'x = 1'
    """
    text = re.sub(r"\r\n?", "\n", completion_text(completion)).removeprefix("\ufeff")
    segments = _without_reasoning(split_at_tags(text))
    answers = [s for s in segments if s.tag == ANSWER_TAGS[0] and (s.blocks or s.text.strip())]
    in_answer = bare = None
    if answers and answers[-1].blocks:
        in_answer = _program_of(answers[-1].blocks)
    elif answers:
        bare = _bare_program(answers[-1].text)
    fenced = _program_of([block for segment in segments for block in segment.blocks])
    programs = [program for program in (in_answer, bare, fenced) if program is not None]
    last_resorts = [program for program in (in_answer, fenced, bare) if program is not None]
    chosen = next((program for program in programs if program.is_certain), None) or next(iter(last_resorts), None)
    return None if chosen is None else chosen.text


def _without_reasoning(segments: list[Segment]) -> list[Segment]:
    kept: list[Segment] = []
    thinking: list[Segment] | None = None  # since a tag that is open
    was_closed = False
    for segment in segments:
        if segment.tag == REASONING_START:
            thinking = thinking or []
        elif segment.tag == REASONING_END:
            if thinking is None and not was_closed:
                kept = []
            thinking, was_closed = None, True
        (kept if thinking is None else thinking).append(segment)
    answered = [i for i, segment in enumerate(thinking or []) if segment.tag == ANSWER_TAGS[0]]
    return kept + (thinking or [])[answered[0] :] if answered else kept


def _program_of(blocks: list[Block]) -> _Program | None:
    blocks = [b for b in blocks if b.label is not None and b.program.strip()]
    blocks = [b for b in blocks if not _PROMPT.match(b.program.lstrip())][-_MOST_BLOCKS:]
    outlines = [outline(block.program) for block in blocks]
    defined: set[str] = set()  # by the blocks before that can run alone
    best, best_rank, best_lines = None, None, ""
    for i, (block, block_outline) in enumerate(zip(blocks, outlines, strict=True)):
        is_usage = (i > 0 and block_outline.runs_tests) or (
            not defined.isdisjoint(block_outline.needed)
            and _SOLUTION not in block_outline.definitions
            and defined.isdisjoint(block_outline.definitions - block_outline.tests)
        )
        if not is_usage:
            defined |= block_outline.definitions
        strength = 0 if is_usage else _strength(block.label, block_outline)
        is_python = block.label == "python"
        rank = (
            strength > 0,
            not block.is_in_markdown,
            strength,
            is_python,
            is_python or reads_as_code(block.program),
        )
        lines = _lines(block.program)
        if best_rank is None or rank > best_rank or (rank == best_rank and lines not in best_lines):
            best, best_rank, best_lines = _Program(block.program, strength > 0), rank, lines
    return best


def _lines(program: str) -> str:
    """The lines of a program, each between line breaks, without indents and empty ones."""
    return "\n".join(["", *(line.strip() for line in program.split("\n") if line.strip()), ""])


def _strength(label: str | None, of_program: Outline) -> int:
    """3 for a program, 2 for one without effect, 1 for what may be one, 0 for an expression or prose."""
    is_python = label == "python"
    if of_program.has_statement or (is_python and not of_program.is_parsed and of_program.definitions):
        return 2 + of_program.has_effect
    return int(of_program.may_be_program or (not of_program.is_parsed and (is_python or bool(of_program.definitions))))


def _bare_program(text: str) -> _Program | None:
    """Text without a fenced block; a code span without its backticks, which no program has at its ends."""
    program = dedented(text)
    if program.startswith("`"):
        program = re.sub(r"^(?:python\d*|py)\s+", "", program.strip("`\n "), flags=re.IGNORECASE)
    program = without_language_line(program)
    if not program or _PROMPT.match(program):
        return None
    return _Program(program, _strength("", outline(program)) > 0)
