"""The program that a completion gives for an answer."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo_kernels.rewards import code_blocks
from grpo_kernels.rewards.code_blocks import Block, Segment
from grpo_kernels.rewards.completions import completion_text

_PROMPT = re.compile(r"\s*(?:>>>( |$)|In \[\d+\]:|[$%] )")  # of a transcript
_SOLUTION = "Solution"  # LeetCode's class: what stands before it may be the types that it is given
_MOST_BLOCKS = 1000  # each is parsed

_KEYWORDS = {*keyword.kwlist, *keyword.softkwlist}
_NEIGHBOURS = re.compile(r"\b([^\W\d]\w*)[ \t]+(?=([^\W\d]\w*))")
# With a body that is more than comments and strings.
_DEFINED = re.compile(r'^(?:async\s+)?(?:def|class)\s+(\w+).*\n(?:[ \t]*(?:""[ \t]*)?\n)*[ \t]+[^\s"]', re.MULTILINE)
_CALLED = re.compile(r"(?<!\.)\b(\w+)\s*\(")
_TEST = re.compile(
    r"_*(?:tests?|check|verify|example|demo|run_\w*|main)(?![a-z])|_*tests?_?\w*|\w*_tests?$", re.IGNORECASE
)
_OUTPUTS = ("print", "exec", "stdout", "write")
_PREDEFINED = {*dir(builtins), "__file__"}
_TEST_RUNNERS = {"doctest", "pytest", "unittest"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_MAY_BE_PROGRAM = (ast.Assign, ast.Import, ast.ImportFrom, *_DEFINITIONS)
_NO_STATEMENT = (ast.AnnAssign, ast.Pass, ast.Return, ast.Import, ast.ImportFrom)
_NAMED = (*_DEFINITIONS, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)


class _Program(NamedTuple):
    text: str
    is_certain: bool  # more than an expression, a value or prose


def extract_program(completion: str | Sequence[dict[str, Any]]) -> str | None:
    """The program of a completion, dedented and without white space lines around it; None if there is none.

    Looked for in this order:

    1. fenced blocks of the last ``<answer>``,
    2. the last ``<answer>`` as it is, if it has no fenced block,
    3. fenced blocks outside the reasoning.

    The reasoning never counts: what stands in ``<think>`` or the like (``code_blocks.REASONING_TAGS``), with or without
    its end tag, and all that precedes an end tag without a beginning. An ``<answer>`` may lack its end tag. A text that
    is only an expression, as ``[1, 2]`` or ``O(n)``, or that is no Python, gives way to a program further down.

    Fences are those of CommonMark, indented as deep as you like, in lists and quotes, and also one that ends on a line
    of code, is not closed, or stands behind words; ``[PYTHON]`` at the start of a line and ``<|python_tag|>`` open a
    block, too. Special tokens (``<|im_end|>``, ``[/PYTHON]``) end it; no fence or tag in a string or comment does.

    Of several blocks, 1000 at most, the last one labelled as Python counts (``python``, ``py``, ``Python3``, ``pypy3``,
    ``{.python}``, ``main.py`` and the like), else the last without a label, unless its lines stand in that before it.
    Blocks that neither define nor print anything come after those that do. After all others come expressions,
    constants, imports, functions without a body, statements on names that nothing defines, and examples and tests:
    blocks that use what one before them defines and redefine none of it but tests (``test_x``, a ``TestCase``,
    ``main``). Blocks with other labels, empty ones and transcripts (``>>> x``) are no programs; one labelled
    ``markdown`` is looked into if there is none outside.

    Example:
        >>> extract_program("<think>Try x = 0.</think>\\n<answer>\\n~~~py\\nx = 1\\n~~~\\n</answer>")
        'x = 1'
    """
    text = re.sub(r"\r\n?", "\n", completion_text(completion)).removeprefix("\ufeff")
    segments = _without_reasoning(code_blocks.split_at_tags(text))
    answers = [s for s in segments if s.tag == code_blocks.ANSWER_TAGS[0] and (s.blocks or "".join(s.texts).strip())]
    in_answer = _program_of(answers[-1].blocks) if answers else None
    bare = _bare_program("".join(answers[-1].texts)) if answers and not answers[-1].blocks else None
    fenced = _program_of([block for segment in segments for block in segment.blocks])
    certain = [program for program in (in_answer, bare, fenced) if program and program.is_certain]
    last_resorts = [program for program in (in_answer, fenced, bare) if program]
    return next((program.text for program in certain + last_resorts), None)


def _without_reasoning(segments: list[Segment]) -> list[Segment]:
    kept: list[Segment] = []
    reasoning: list[Segment] | None = None  # since a tag that is open
    was_closed = False
    for segment in segments:
        if segment.tag == code_blocks.REASONING_TAGS[0][0]:
            reasoning = reasoning or []
        elif segment.tag == code_blocks.REASONING_TAGS[0][1]:
            if reasoning is None and not was_closed:
                kept = []
            reasoning, was_closed = None, True
        (kept if reasoning is None else reasoning).append(segment)
    answers = [i for i, segment in enumerate(reasoning or []) if segment.tag == code_blocks.ANSWER_TAGS[0]]
    return kept + (reasoning or [])[answers[0] :] if answers else kept


def _program_of(blocks: list[Block]) -> _Program | None:
    blocks = [b for b in blocks if b.label is not None and b.program.strip() and not _PROMPT.match(b.program)]
    defined: set[str] = set()  # by the blocks before that can run alone
    best, best_rank, best_lines = None, None, ""
    for i, block in enumerate(blocks[-_MOST_BLOCKS:]):
        is_python = block.label == "python"
        strength, runs_tests, definitions, tests, needed = _outline(block.program, is_python)
        is_usage = (i > 0 and runs_tests) or (
            not defined.isdisjoint(needed) and _SOLUTION not in definitions and defined.isdisjoint(definitions - tests)
        )
        if is_usage:
            strength = 0
        else:
            defined |= definitions
        is_code = is_python or _reads_as_code(block.program)
        rank = (strength > 0, not block.is_in_markdown, strength, is_python, is_code)
        # Its lines, each between line breaks, without indents and empty ones.
        lines = "\n".join(["", *(line.strip() for line in block.program.split("\n") if line.strip()), ""])
        if best_rank is None or rank > best_rank or (rank == best_rank and lines not in best_lines):
            best, best_rank, best_lines = _Program(block.program, strength > 0), rank, lines
    return best


def _bare_program(text: str) -> _Program | None:
    """Text without a fenced block; a code span without its backticks, which no program has at its ends."""
    program = code_blocks.dedented(text)
    if program.startswith("`"):
        program = re.sub(r"^(?:python\d*|py)\s+", "", program.strip("`\n "), flags=re.IGNORECASE)
    program = code_blocks.without_language_line(program)
    if not program or _PROMPT.match(program):
        return None
    return _Program(program, _outline(program, is_python=False).strength > 0)


class _Outline(NamedTuple):
    """The top level of a program; of a text that does not parse, what its lines look like.

    Functions and classes without a body, as a template has them, define nothing. The strength is 3 for a program; 2 for
    one that neither defines nor prints anything; 1 for imports, constants, definitions without a body, an excerpt that
    uses names which nothing defines, and what may be a program with a fault; 0 for an expression and for prose.
    """

    strength: int
    runs_tests: bool  # that stand elsewhere
    definitions: set[str]
    tests: set[str]  # definitions that test or show others
    needed: set[str]  # names that are used and not defined


def _outline(text: str, is_python: bool) -> _Outline:
    """The outline of a text, which may be labelled as Python."""
    tree = code_blocks.parsed(text)
    if tree is None:
        code = code_blocks.without_strings(text)
        definitions = set(_DEFINED.findall(code))
        strength = 3 if is_python and definitions else int(is_python or bool(definitions))
        tests = set(filter(_TEST.match, definitions))
        return _Outline(strength, False, definitions, tests, {*_CALLED.findall(code)} - definitions)
    body = [node for node in tree.body if not _is_stub(node)]
    defining = [node for node in body if isinstance(node, _DEFINITIONS)]
    tests = {
        node.name
        for node in defining
        if _TEST.match(node.name) or "TestCase" in map(_last_name, getattr(node, "bases", ()))
    }
    lambdas = [node for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)]
    definitions = {node.name for node in defining}
    definitions.update(target.id for node in lambdas for target in node.targets if isinstance(target, ast.Name))
    needed = _needed(body) - definitions
    has_statement = any(map(_is_statement, body))
    is_excerpt = has_statement and not definitions and not needed <= _PREDEFINED
    if has_statement and not is_excerpt:
        strength = 3 if definitions or any(map(_prints, body)) else 2
    else:
        strength = int(is_excerpt or any(isinstance(node, _MAY_BE_PROGRAM) for node in tree.body))
    runs_tests = definitions <= tests and any(_TEST_RUNNERS & _packages(node) for node in body)
    return _Outline(strength, runs_tests, definitions, tests, needed)


def _reads_as_code(text: str) -> bool:
    """Whether a text has something of a program in it, and nowhere two names side by side, as prose has."""
    code = code_blocks.without_strings(text)
    return re.search(r"[=(\[:]|\bimport\b", code) is not None and all(
        {first, second} & _KEYWORDS for first, second in _NEIGHBOURS.findall(code)
    )


def _is_stub(node: ast.stmt) -> bool:
    """Whether a function or class has no more in it than ``pass``, ``...``, strings and NotImplementedError."""
    return isinstance(node, _DEFINITIONS) and all(
        isinstance(part, ast.Pass)
        or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        or (isinstance(part, ast.Raise) and _last_name(getattr(part.exc, "func", part.exc)) == "NotImplementedError")
        or _is_stub(part)
        for part in node.body
    )


def _prints(node: ast.stmt) -> bool:
    return any(_last_name(part) in _OUTPUTS for part in ast.walk(node))


def _is_statement(node: ast.stmt) -> bool:
    """Whether it is more than an expression, an annotation, an import or a constant."""
    if isinstance(node, ast.Expr):
        return _prints(node)
    if isinstance(node, ast.Assign):
        return any(isinstance(part, ast.Name | ast.Call) for part in ast.walk(node.value))
    return not isinstance(node, _NO_STATEMENT)


def _packages(node: ast.AST) -> set[str]:
    """What a statement imports, or imports from."""
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return {module.split(".")[0] for module in modules}


def _needed(body: list[ast.stmt]) -> set[str]:
    """The names that are loaded and nowhere bound, or imported from a module that is not Python's own."""
    loaded: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, _NAMED):
            bound.add(node.name or "")
        elif isinstance(node, ast.Import) or (
            isinstance(node, ast.ImportFrom) and _packages(node) <= sys.stdlib_module_names
        ):
            if any(alias.name == "*" for alias in node.names):
                return set()
            bound.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
    return loaded - bound


def _last_name(node: ast.AST | None) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
