"""Fenced blocks and the tags between them, read from a completion in time linear in its length.

No parser of Markdown reads them: a fence in a string of a program ends nothing, models put fences behind words, and
what a policy writes that has collapsed takes such parsers time quadratic in its length.
"""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

#: The tags around a model's reasoning. Those that begin with "<" count in any case; "[think]" may index a list.
REASONING_TAGS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("assistantanalysis", "assistantfinal"),  # gpt-oss without its special tokens
    ("<|channel>thought", "<channel|>"),  # Gemma
)
ANSWER_TAGS = ("<answer>", "</answer>")

# The first pair stands for all of them in a Segment.
_KINDS = {tag.lower(): first for pair in REASONING_TAGS for tag, first in zip(pair, REASONING_TAGS[0], strict=True)}
_TAG_PATTERNS = [
    rf"(?i:{re.escape(tag)})" if tag.startswith("<") else (r"(?<![\w\])])" if tag == "[THINK]" else "") + re.escape(tag)
    for pair in REASONING_TAGS
    for tag in pair
]
# A tag in quotes or in a code span of its own is spoken of, not used.
_TAG = rf"(?!(?<!```)(?<=[\"'`])</?\w+>[\"'`])(?:{'|'.join([*ANSWER_TAGS, *_TAG_PATTERNS])})"
_SPECIAL_TOKEN = r"<[|｜][^|｜<>\n]{1,40}[|｜]>|</s>|\[/PYTHON\]|<(?:eos|end_of_turn)>(?=\s*$)"
_LONGEST_SPECIAL_TOKEN = 44
# A string with both its ends; escapes may be line breaks.
_QUOTED = (
    r'"{3}[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"{3}'
    r"|'{3}[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'{3}"
    r'|"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
    r"|'[^'\\\n]*(?:\\.[^'\\\n]*)*'"
)
_LEXEME = re.compile(rf"(?P<quoted>{_QUOTED})|\#[^\n]*|\\.", re.DOTALL)
_RUN = r"`{3,}|~{3,}"
# What programs stand behind without a fence: Llama's token for code to run, and CodeLlama's tag.
_START = r"(?:<\|python_tag\|>|(?m:^)[ \t]*\[PYTHON\])(?!\s*(?:```|~~~))"
_LABEL = r"(?:i?py(?:thon)?|pypy)[\d.]*"

_MARK = re.compile(rf"(?P<run>{_RUN})|(?P<start>{_START})|(?P<tag>{_TAG})")
# What ends a program where strings and comments hide it, and where they do not.
_CODE_MARK = re.compile(
    rf"{_QUOTED}|\#[^\n]*|\\.|(?P<run>{_RUN})|(?P<tag>{_TAG})|(?P<token>{_SPECIAL_TOKEN})", re.DOTALL | re.MULTILINE
)
_LINE_MARK = re.compile(
    rf"(?P<run>{_RUN})[ \t]*(?:(?i:{_LABEL})[ \t]*)?$|(?P<tag>{_TAG})|(?P<token>{_SPECIAL_TOKEN})$",
    re.MULTILINE,
)
_LAST_TOKEN = re.compile(rf"(?:{_SPECIAL_TOKEN})\Z")

_PYTHON = re.compile(rf"{_LABEL}|.*\.py")
_LINE = re.compile(r"[^\n]*")
_WORD = re.compile(r"[\w.+#/-]+")
_DIRECTIVES = ("code", "code-block", "code-cell", "sourcecode")  # {code-block} python
_STATEMENT = (
    r"(?:(?:async\s+)?def\s+\w+\s*\(|class\s+\w+\s*[(:]|import\s+\w|from\s+[\w.]+\s+import\b|for\s.*\bin\b"
    r"|(?:while|if|with)\s.*:|try\s*:|print\s*\(|@\w|\w+\s=\s)"
)
_CODE_IN_INFO = re.compile(rf"\s*(?:python3?(?={_STATEMENT})|{_LABEL}\s+(?={_STATEMENT}))", re.IGNORECASE)
_CODE = re.compile(rf"\s*(?={_STATEMENT})")
_ATTACHED = re.compile(r"[\w{.]")
_WORD_IN_INFO = re.compile(r"[ \t]*[\w.+#=:{}-]*[ \t]*")
_BEFORE_FENCE = re.compile(r"(?:[\s>]|[-*+]\s|\d{1,9}[.)]|<[^<>\n]*>)*")
_QUOTED_LINE = re.compile(r"[\s\d*+.)-]*>")
_QUOTED_LINES = re.compile(r"(?:\n[ \t]*>[^\n]*)*+")
_LONGEST_PREFIX = 200  # characters before a fence that are looked at
_LONGEST_INFO = 400  # and behind it
_LONGEST_PROGRAM = 50_000  # characters of a text that is parsed
_TRIES = 8  # of looking beyond the first line that may end a program: each may read all that is left


class Block(NamedTuple):
    label: str | None  # "python", "" without a label, "markdown", None for anything else
    program: str
    is_in_markdown: bool  # of a block that is labelled so


class Segment(NamedTuple):
    """What stands between two tags."""

    tag: str  # the one before it, "" at the start
    texts: list[str]  # outside blocks
    blocks: list[Block]


class _Fence(NamedTuple):
    markup: str
    label: str | None
    body_start: int
    indent: int  # of what follows the first line, where that has code


def split_at_tags(text: str) -> list[Segment]:
    """The segments of a text, without the special tokens at its end.

    Where a program ends is for Python to say: strings and comments hide fences, tags and special tokens.
    """
    end = len(text)
    while end > 0:
        token = _LAST_TOKEN.search(text, max(0, end - _LONGEST_SPECIAL_TOKEN), end)
        if token is None and not text[end - 1].isspace():
            break
        end = end - 1 if token is None else token.start()
    return _Scanner(text[:end]).segments


def dedented(program: str, first: int = 0) -> str:
    """A program whose first line begins at its start, without white space lines around it.

    ``first`` is the indent of the lines below where the first one has none.
    """
    program = re.sub(r"\A(?:[ \t]*\n)+", "", program.rstrip())
    margin = _indent(program.partition("\n")[0]) or first
    if not margin:
        return program
    return "\n".join(line[min(margin, _indent(line)) :] for line in program.split("\n"))


def without_language_line(program: str) -> str:
    """A program without a first line that only names its language."""
    first, _, rest = program.partition("\n")
    return dedented(rest) if rest.strip() and _PYTHON.fullmatch(first.strip().lower()) else program


class _Scanner:
    def __init__(self, text: str) -> None:
        self.segments = [Segment("", [], [])]
        self._tries = _TRIES
        self._scan(text, markdown=None, in_quote=False)

    def _scan(self, text: str, markdown: str | None, in_quote: bool) -> None:
        """``markdown`` is the fence of a block that is labelled so and open."""
        position = text_start = floor = 0  # floor: where the tag or block before ends
        line_start, line_end = 0, -1
        while mark := _MARK.search(text, position):
            start, position = mark.span()
            if start > line_end:  # once a line, however long it is
                line_start = text.rfind("\n", 0, start) + 1
                line_end = _LINE.match(text, start).end()
            block, fence, closes_markdown, is_quoted = None, None, False, False
            if mark["start"]:
                fence = _Fence("```", "python", position, indent=0)
            elif mark["run"]:
                before = text[max(line_start, floor, start - _LONGEST_PREFIX) : start]
                is_quoted = not in_quote and _QUOTED_LINE.match(before) is not None
                span_end = _MARK.search(text, position, line_end)
                if span_end is not None and (span_end["run"] or "").startswith(mark["run"]):
                    position = span_end.end()
                    block = _block_on_one_line(text, mark, span_end, before, line_end)
                elif markdown and mark["run"].startswith(markdown) and not text[position:line_end].strip():
                    closes_markdown = True
                else:
                    fence = _opened(text, mark, before, line_end)
                if not (block or fence or closes_markdown):
                    continue
            self.segments[-1].texts.append(text[text_start:start])
            if mark["tag"]:
                self.segments.append(Segment(_KINDS.get(mark["tag"].lower(), mark["tag"]), [], []))
            elif block:
                self.segments[-1].blocks.append(block._replace(is_in_markdown=markdown is not None))
            elif closes_markdown:
                markdown = None
            elif is_quoted:
                position = _QUOTED_LINES.match(text, line_end).end()
                markers = rf"^[ \t]*(?:>[ \t]?){{1,{before.count('>')}}}"
                quote = re.sub(markers, "", text[start:position], flags=re.MULTILINE)
                self._scan(quote, markdown, in_quote=True)
            elif fence.label == "markdown" and markdown is None:
                markdown, position = fence.markup, line_end
            else:
                position = self._read_block(text, fence, is_in_markdown=markdown is not None)
            text_start = floor = position
        self.segments[-1].texts.append(text[text_start:])

    def _read_block(self, text: str, fence: _Fence, is_in_markdown: bool) -> int:
        """Adds the block that a fence opens, and returns where to read on."""
        is_python = fence.label in ("python", "")
        mark = self._end_of_program(text, fence) if is_python else _next(_LINE_MARK, text, fence)
        end = mark.start() if mark else len(text)
        if is_python:
            program = without_language_line(dedented(text[fence.body_start : end], fence.indent))
            self.segments[-1].blocks.append(Block(fence.label, program, is_in_markdown))
        if mark is None or mark["tag"]:
            return end
        if mark["token"]:
            return mark.end()
        rest = _LINE.match(text, mark.end("run"))[0]
        starts_line = not text[fence.body_start : end].rpartition("\n")[2].strip()
        is_next_fence = (starts_line and _ATTACHED.match(rest)) or (
            rest and _WORD_IN_INFO.fullmatch(rest) and _label(rest) == "python"
        )
        return end if is_next_fence else mark.end("run")

    def _end_of_program(self, text: str, fence: _Fence) -> re.Match[str] | None:
        """Strings and comments hide an end, unless what they are part of is no program and what is before it is."""

        def is_program_until(end: re.Match[str]) -> bool:
            return parsed(dedented(text[fence.body_start : end.start()])) is not None

        if not self._tries:
            return _next(_LINE_MARK, text, fence)
        mark = _next(_CODE_MARK, text, fence)
        first = _next(_LINE_MARK, text, fence, mark.start() if mark else None)
        if first is None or (mark is not None and (is_program_until(mark) or not is_program_until(first))):
            return mark
        self._tries -= 1
        return first


def _next(pattern: re.Pattern[str], text: str, fence: _Fence, end: int | None = None) -> re.Match[str] | None:
    """The first tag, special token or closing fence."""
    for mark in pattern.finditer(text, fence.body_start, len(text) if end is None else end):
        if mark.lastgroup in ("tag", "token") or (mark["run"] or "").startswith(fence.markup):
            return mark
    return None


def _opened(text: str, mark: re.Match[str], before: str, line_end: int) -> _Fence | None:
    """The block that a run of fence characters opens, if it opens one."""
    info_start, info_end = mark.end(), min(line_end, mark.end() + _LONGEST_INFO)
    info = text[info_start:info_end]
    code = _CODE_IN_INFO.match(info)
    label = "python" if code else _label(info)
    if label is None and (code := _CODE.match(info)):
        label = ""
    starts_line = _BEFORE_FENCE.fullmatch(before) is not None
    is_behind_words = mark["run"][0] == "`" and (
        (label == "python" and code is not None) or _WORD_IN_INFO.fullmatch(info) is not None
    )
    if not (starts_line or is_behind_words):
        return None
    body_start = min(line_end + 1, len(text)) if code is None else info_start + code.end()
    return _Fence(mark["run"], label, body_start, len(before) if code and before.isspace() else 0)


def _block_on_one_line(text: str, mark: re.Match[str], end: re.Match[str], before: str, line_end: int) -> Block | None:
    """A block that is opened and closed on one line, if it is more than a code span."""
    content = text[mark.end() : end.start()]
    glued = _CODE_IN_INFO.match(content)
    if glued or _label(content) == "python":
        program = content[glued.end() :] if glued else re.sub(r"^\s*\S+", "", content)
        return Block("python", program.strip(), False) if program.strip() else None
    is_line = _BEFORE_FENCE.fullmatch(before) is not None and not text[end.end() : line_end].strip()
    return Block("", content.strip(), False) if is_line and parsed(content.strip()) else None


def _label(info: str) -> str | None:
    """ "python", "" without a label, "markdown", None for any other."""
    words = _WORD.findall(info.lower())
    in_braces = info.lstrip().startswith("{")
    words = [word.strip(".") for word in words] if in_braces else words
    words = words[1:] if words and words[0] in _DIRECTIVES else words
    if any(map(_PYTHON.fullmatch, words if in_braces else words[:1])):
        return "python"
    return "" if not words else "markdown" if words[0] in ("markdown", "md") else None


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def parsed(text: str) -> ast.Module | None:
    """The syntax tree of a program, None if it is none."""
    if len(text) > _LONGEST_PROGRAM:
        return None
    # Python warns of escapes it does not know.
    code = _LEXEME.sub(lambda m: re.sub(r"(?s)\\.", "", m[0]) if m["quoted"] else m[0], text)
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of deep nesting
        return None


def without_strings(text: str) -> str:
    """A program without comments, and with empty strings."""
    return _LEXEME.sub('""', text)
