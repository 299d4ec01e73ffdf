"""What a text has of a Python program, without running it."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import sys
from dataclasses import dataclass

#: A string with both its ends; escapes may be line breaks.
QUOTED = (
    r'"{3}[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"{3}'
    r"|'{3}[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'{3}"
    r'|"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
    r"|'[^'\\\n]*(?:\\.[^'\\\n]*)*'"
)
_LEXEME = re.compile(rf"(?P<quoted>{QUOTED})|\#[^\n]*|\\.", re.DOTALL)
_ESCAPE = re.compile(r"\\.", re.DOTALL)
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
_TEST_RUNNERS = ("doctest", "pytest", "unittest")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_MAY_BE_PROGRAM = (ast.Assign, ast.Import, ast.ImportFrom, *_DEFINITIONS)
_NAMED = (*_DEFINITIONS, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
_LONGEST = 50_000  # characters of a text that is parsed


@dataclass(frozen=True)
class Outline:
    """The top level of a program.

    Functions and classes without a body, as a template has them, count for nothing. ``definitions`` are the others,
    ``tests`` those of them that test or show others, and ``needed`` the
    names that it uses and does not define. Of a text that does not parse they are what its lines look like.
    """

    is_parsed: bool
    has_statement: bool  # more than expressions, annotations, imports and constants, and every name is defined
    has_effect: bool  # it defines or prints something
    may_be_program: bool  # an excerpt, imports, constants or definitions without a body
    runs_tests: bool  # that stand elsewhere
    definitions: frozenset[str]
    tests: frozenset[str]
    needed: frozenset[str]


def outline(text: str) -> Outline:
    tree = _parsed(text)
    if tree is None:
        code = _without_strings(text)
        definitions = frozenset(_DEFINED.findall(code))
        tests = frozenset(name for name in definitions if _TEST.match(name))
        called = frozenset(_CALLED.findall(code))
        return Outline(False, False, bool(definitions), False, False, definitions, tests, called - definitions)
    body = [node for node in tree.body if not _is_stub(node)]
    definitions: set[str] = set()
    tests: set[str] = set()
    for node in body:
        if isinstance(node, _DEFINITIONS):
            definitions.add(node.name)
            if _TEST.match(node.name) or (isinstance(node, ast.ClassDef) and "TestCase" in map(_last_name, node.bases)):
                tests.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            definitions.update(target.id for target in node.targets if isinstance(target, ast.Name))
    needed = _needed(body) - definitions
    has_statement = any(_is_statement(node) for node in body)
    is_excerpt = has_statement and not definitions and not needed <= _PREDEFINED
    modules = {name.split(".")[0] for node in body for name in _imported(node)}
    return Outline(
        is_parsed=True,
        has_statement=has_statement and not is_excerpt,
        has_effect=bool(definitions) or any(_prints(node) for node in body),
        may_be_program=is_excerpt or any(isinstance(node, _MAY_BE_PROGRAM) for node in tree.body),
        runs_tests=definitions <= tests and not modules.isdisjoint(_TEST_RUNNERS),
        definitions=frozenset(definitions),
        tests=frozenset(tests),
        needed=frozenset(needed),
    )


def parses(text: str) -> bool:
    return _parsed(text) is not None


def reads_as_code(text: str) -> bool:
    """Whether a text has something of a program in it, and nowhere two names side by side, as prose has."""
    code = _without_strings(text)
    return re.search(r"[=(\[:]|\bimport\b", code) is not None and not any(
        not {first, second} & _KEYWORDS for first, second in _NEIGHBOURS.findall(code)
    )


def _parsed(text: str) -> ast.Module | None:
    if len(text) > _LONGEST:
        return None
    # Python warns of escapes it does not know.
    code = _LEXEME.sub(lambda lexeme: _ESCAPE.sub("", lexeme[0]) if lexeme["quoted"] else lexeme[0], text)
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of deep nesting
        return None


def _without_strings(text: str) -> str:
    return _LEXEME.sub('""', text)


def _is_stub(node: ast.stmt) -> bool:
    """Whether a function or class has no more in it than ``pass``, ``...``, strings and NotImplementedError."""
    return isinstance(node, _DEFINITIONS) and all(
        isinstance(part, ast.Pass)
        or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        or (isinstance(part, ast.Raise) and part.exc is not None and _is_not_implemented(part.exc))
        or _is_stub(part)
        for part in node.body
    )


def _is_not_implemented(error: ast.expr) -> bool:
    return _last_name(error.func if isinstance(error, ast.Call) else error) == "NotImplementedError"


def _prints(node: ast.stmt) -> bool:
    return any(_last_name(part) in _OUTPUTS for part in ast.walk(node))


def _is_statement(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return _prints(node)
    if isinstance(node, ast.Assign):
        return any(isinstance(part, ast.Name | ast.Call) for part in ast.walk(node.value))
    return not isinstance(node, ast.AnnAssign | ast.Pass | ast.Return | ast.Import | ast.ImportFrom)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


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
        elif isinstance(node, ast.Import) or (_imported(node) and _is_own(_imported(node)[0])):
            if any(alias.name == "*" for alias in node.names):
                return set()
            bound.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
    return loaded - bound


def _is_own(module: str) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
