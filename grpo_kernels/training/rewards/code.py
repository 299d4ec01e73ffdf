"""Reward for programs that pass their tests, run in the sandbox."""

from __future__ import annotations

import json
import keyword
import os
import re
import secrets
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from grpo_kernels.training import sandbox
from grpo_kernels.training.rewards.completions import completion_text
from grpo_kernels.training.rewards.parameters import check_integer, check_number

# A tag in quotes or in a code span of its own is spoken of, not used.
_TAG = re.compile(r"(?!(?<!```)(?<=[\"'`])</?\w+>[\"'`])(</?(?:think|answer)>)")
_PYTHON = re.compile(r"i?py(?:thon)?[\d.]*|.*\.py")
_DIRECTIVES = ("code", "code-block", "code-cell", "sourcecode")  # {code-block} python
_PROMPT = re.compile(r">>>( |$)|In \[\d+\]:|[$%] ")  # of a transcript
_KEYWORDS = {*keyword.kwlist, *keyword.softkwlist}
_DEFINED = re.compile(r"^(?:async\s+)?(?:def|class)\s+(\w+)", re.MULTILINE)
_NEIGHBOURS = re.compile(r"\b([^\W\d]\w*)[ \t]+(?=([^\W\d]\w*))")
_RUN = r"`{3,}|~{3,}"
# Strings, comments and runs of fence characters; a string may be open at the end of its line or of the text.
_LEXEME = re.compile(
    r"""\#[^\n]*|(?P<triple>\"{3}|'{3})(?:\\.|(?!(?P=triple)).)*(?P<end>(?P=triple)|\Z)"""
    r"""|(?P<quote>["'])(?:\\.|(?!(?P=quote))[^\\\n])*(?P<stop>(?P=quote)|\\?$)|(?P<run>""" + _RUN + ")",
    re.DOTALL | re.MULTILINE,
)
_TRIES = 64  # of parsing one completion again: each costs a pass over it

# Runs a program and then a test in its namespace. The marker, which says that the test was reached and held, comes by
# standard input, so that neither an early exit nor the text of this script helps a program that passes no test.
_CHECK = """\
import json, os, sys, types
case = json.load(sys.stdin)
solution = sys.modules["solution"] = types.ModuleType("solution")
exec(compile(case["program"], "solution.py", "exec"), solution.__dict__)
exec(compile(case["test"], "test.py", "exec"), solution.__dict__)
os.write(1, case["marker"].encode())
"""


class _Block(NamedTuple):
    label: str | None  # "python", "" without a label, None for anything else
    program: str
    is_closed: bool
    next_line: int


class _Segment(NamedTuple):
    tag: str  # the one before it, "" at the start
    text: str


def extract_program(completion: str | Sequence[dict[str, Any]]) -> str | None:
    """The program of a completion, dedented and without white space lines around it; None if there is none.

    Looked for in this order:

    1. fenced blocks of the last ``<answer>``,
    2. the last ``<answer>`` as it is, if it has no fenced block and reads as code,
    3. fenced blocks outside the reasoning,
    4. the last ``<answer>`` as it is, if it has no fenced block.

    An ``<answer>`` without an end tag goes to the end of the text. The reasoning never counts: what stands in
    ``<think>``, with or without its end tag, and all that precedes a ``</think>`` without a beginning. Tags in a
    string of a program are part of the program.

    Fences are those of CommonMark, indented as deep as you like, in lists and quotes, and also one that ends on a line
    of code or is not closed. Of several blocks the last one labelled as Python counts (``python``, ``py``, ``Python3``,
    ``{.python}``, ``main.py`` and the like), else the last without a label, one that reads as code before others.
    One that only calls what the block before it defines, as an example of use, does not count.
    Blocks with other labels, empty ones and transcripts (``>>> x``) are no programs. A fence in a string or comment of
    a Python block, a docstring say, does not end it.

    Raises:
        ImportError: markdown-it-py is not installed.

    Example:
        >>> extract_program("<think>Try x = 0.</think>\\n<answer>\\n~~~py\\nx = 1\\n~~~\\n</answer>")
        'x = 1'
    """
    text = re.sub(r"\r\n?", "\n", completion_text(completion)).removeprefix("\ufeff")
    segments = _without_reasoning(_split_at_tags(text))
    answers = [s.text for s in segments if s.tag == "<answer>" and s.text.strip()]
    in_answer = _blocks(answers[-1]) if answers else []
    program = _program_of(in_answer)
    if program is not None:
        return program
    bare = _bare_program(answers[-1]) if answers and not in_answer else None
    if bare is not None and _reads_as_code(bare):
        return bare
    fenced = _program_of([block for s in segments for block in _blocks(s.text)])
    return bare if fenced is None else fenced


def _split_at_tags(text: str) -> list[_Segment]:
    """The text between tags, each with the tag before it."""
    pieces = _TAG.split(text)
    segments = [_Segment("", pieces[0])]
    tries = _TRIES
    for tag, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        before = segments[-1].text
        in_string = False
        if tries > 0 and re.search(_RUN, before):
            tries -= 1
            blocks = _blocks(before)
            in_string = bool(blocks) and not blocks[-1].is_closed and _ends_in_string(blocks[-1].program)
        if in_string:
            segments[-1] = segments[-1]._replace(text=before + tag + piece)
        else:
            segments.append(_Segment(tag, piece))
    return segments


def _without_reasoning(segments: list[_Segment]) -> list[_Segment]:
    kept: list[_Segment] = []
    thinking: list[_Segment] | None = None  # since a <think> that is open
    was_closed = False
    for segment in segments:
        if segment.tag == "<think>":
            thinking = thinking or []
        elif segment.tag == "</think>":
            if thinking is None and not was_closed:
                kept = []
            thinking, was_closed = None, True
        (kept if thinking is None else thinking).append(segment)
    answered = [i for i, segment in enumerate(thinking or []) if segment.tag == "<answer>"]
    return kept + (thinking or [])[answered[0] :] if answered else kept


def _program_of(blocks: list[_Block]) -> str | None:
    programs = [b for b in blocks if b.program.strip() and not _PROMPT.match(b.program.lstrip())]
    for label in ("python", ""):
        chosen = [b.program for b in programs if b.label == label]
        if chosen:
            as_code = chosen if label else [p for p in chosen if _reads_as_code(p)]
            return _without_usage(as_code or chosen)
    return None


def _without_usage(programs: list[str]) -> str:
    """The last program but for those that only call what one before them defines, and cannot run without it."""
    *earlier, last = programs
    defined = {name for program in earlier for name in _DEFINED.findall(program)}
    is_usage = not _DEFINED.search(last) and any(re.search(rf"\b{name}\s*\(", last) for name in defined)
    return _without_usage(earlier) if is_usage else last


def _bare_program(text: str) -> str | None:
    """Text without a fenced block; a code span without its backticks, which no program has at its ends."""
    program = _dedented(text)
    if program.startswith("`"):
        program = re.sub(r"^(?:python\d*|py)\s+", "", program.strip("`\n "), flags=re.IGNORECASE)
    return program if program and not _PROMPT.match(program) else None


def _reads_as_code(text: str) -> bool:
    """Whether a text has something of a program in it, and nowhere two names side by side, as prose has."""
    code = _LEXEME.sub(lambda m: m[0] if m["run"] else '""', text)
    return re.search(r"[=(\[:]|\bimport\b", code) is not None and not any(
        not {first, second} & _KEYWORDS for first, second in _NEIGHBOURS.findall(code)
    )


def _blocks(text: str) -> list[_Block]:
    """The fenced blocks of Markdown. Where one ends is for Python to say, unless its label is another language's."""
    lines = text.split("\n")
    blocks: list[_Block] = []
    start = 0
    for _ in range(_TRIES):
        tokens = _markdown().parse("\n".join(lines[start:]))
        for token in (t for t in tokens if t.type == "fence"):
            first, last = (start + number for number in token.map)
            blocks.append(_block(lines, first, last, token.markup, _label(token.info)))
            if blocks[-1].next_line != last:
                start = blocks[-1].next_line
                break  # what follows has to be parsed anew
        else:
            return blocks
    return blocks


def _block(lines: list[str], first: int, last: int, markup: str, label: str | None) -> _Block:
    """The block that is opened on line ``first`` and goes up to ``last`` for Markdown."""
    opening = _unquoted(lines[first], ">" in lines[first].partition(markup)[0])
    quoted, indent = opening is not lines[first], opening.index(markup)
    own = [_unquoted(line, quoted) for line in lines[first + 1 : last]]
    written = (_unquoted(line, quoted) for line in lines[first + 1 :])
    indent = min(indent, next((_indent(line) for line in written if line.strip()), indent))  # less than the fence's
    own = [line[min(indent, _indent(line)) :] for line in own]
    is_closed = bool(own) and re.fullmatch(rf"\s*{markup}+\s*", own[-1]) is not None
    if label is None:
        return _Block(label, "", is_closed, last)
    body, reach = own[: len(own) - is_closed], last
    while True:
        code = "\n".join(own)
        found = next((run for run in _LEXEME.finditer(code) if (run["run"] or "").startswith(markup)), None)
        if found is not None:
            break
        if reach == len(lines):
            return _Block(label, _dedented("\n".join(body)), is_closed, last)
        further = [_unquoted(line, quoted) for line in lines[reach : 2 * reach]]  # a string hides the end
        own += [line[min(indent, _indent(line)) :] for line in further]
        reach = min(2 * reach, len(lines))
    line = first + 1 + code.count("\n", 0, found.start())
    rest = code[found.end() :].partition("\n")[0]
    starts_line = not code[: found.start()].rpartition("\n")[2].strip()
    if re.match(rf"\s*(?:{_RUN})", rest):  # closed and opened on one line
        lines[line] = rest.strip()
    elif not (starts_line and (re.match(r"[\w{.]", rest) or (rest.strip() and _label(rest) == "python"))):
        line += 1
    return _Block(label, _dedented(code[: found.start()]), True, line)


def _unquoted(line: str, quoted: bool) -> str:
    return re.sub(r"^\s*(?:>[ \t]?)+", "", line) if quoted else line


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _label(info: str) -> str | None:
    """ "python", "" without a label, None for any other."""
    words = re.findall(r"[\w.+#/-]+", info.lower())
    words = [word.strip(".") if info.lstrip().startswith("{") else word for word in words]
    words = words[1:] if words and words[0] in _DIRECTIVES else words
    if not words:
        return ""
    names = words if info.lstrip().startswith("{") else words[:1]
    return "python" if any(_PYTHON.fullmatch(name) for name in names) else None


def _dedented(program: str) -> str:
    program = re.sub(r"\A(?:[ \t]*\n)+|\s+\Z", "", program)
    return textwrap.dedent(program) if program[:1].isspace() else program


def _ends_in_string(code: str) -> bool:
    lexemes = list(_LEXEME.finditer(code))
    return bool(lexemes) and lexemes[-1].end() == len(code) and "" in (lexemes[-1]["end"], lexemes[-1]["stop"])


@cache
def _markdown() -> Any:
    """A parser that finds fences everywhere: also indented as code would be, and after a line that is a tag."""
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ImportError("programs are read out of Markdown by markdown-it-py: pip install markdown-it-py") from error
    return MarkdownIt("commonmark").disable(["code", "html_block", "reference", "inline"])


@dataclass(frozen=True)
class CodeReward:
    """The share of the tests that the completion's program passes, each in a sandbox of its own.

    The column ``tests`` has a list per completion, of two kinds of tests. A string is Python that raises if the
    program is wrong (assertions), run in the namespace of the program, whose ``__name__`` is then not ``__main__``.
    A mapping ``{"input": ..., "output": ...}`` is what the program reads and must print, up to white space at the ends
    of lines and of the text. Without a program the reward is 0, without tests it abstains.

    An assertion runs in one process with the program it judges: a program that exits early or prints what it likes
    gains nothing, but one that looks for the test in the interpreter's memory, or returns objects equal to
    everything, can cheat. A test by input and output has no such hole.

    Args:
        seconds: Wall time of one test.
        cpu_seconds: CPU time of each of its processes.
        memory_bytes: Address space of each of its processes.
        workers: Tests that run at once; by default one per CPU.

    Raises:
        ValueError: A parameter is out of range; when called, a test is of neither kind.
        RuntimeError: When called, there is no sandbox on this machine.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 * 2**20
    workers: int | None = None

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, low=0.1)
        check_integer("cpu_seconds", self.cpu_seconds, 1)
        check_integer("memory_bytes", self.memory_bytes, 2**20)
        if self.workers is not None:
            check_integer("workers", self.workers, 1)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, tests: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        cases = [_checked(value, i) for i, value in enumerate(tests)]
        programs = [extract_program(c) for c in completions]
        with ThreadPoolExecutor(self.workers or os.cpu_count()) as pool:
            futures = [
                [] if program is None else [pool.submit(self._passes, program, test) for test in of_one]
                for program, of_one in zip(programs, cases, strict=True)
            ]
            passed = [sum(future.result() for future in of_one) for of_one in futures]
        return [n / len(of_one) if of_one else None for n, of_one in zip(passed, cases, strict=True)]

    def _passes(self, program: str, test: str | dict[str, str]) -> bool:
        limits = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "memory_bytes": self.memory_bytes}
        if isinstance(test, str):
            marker = secrets.token_hex(16)
            case = json.dumps({"program": program, "test": test, "marker": marker})
            outcome = sandbox.run(_CHECK, case, **limits)
            return outcome.status == "ok" and marker in outcome.stdout
        outcome = sandbox.run(program, test["input"], **limits)
        return outcome.status == "ok" and _lines(outcome.stdout) == _lines(test["output"])


def _checked(cases: Any, index: int) -> list[str | dict[str, str]]:
    if cases is None:
        return []
    if not isinstance(cases, (list, tuple)) or not all(map(_is_test, cases)):
        raise ValueError(
            f'tests must be lists of assertions or of {{"input": str, "output": str}}, got {cases!r:.80} '
            f"for completion {index}"
        )
    return list(cases)


def _is_test(case: Any) -> bool:
    if isinstance(case, dict):
        return isinstance(case.get("input"), str) and isinstance(case.get("output"), str)
    return isinstance(case, str)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
