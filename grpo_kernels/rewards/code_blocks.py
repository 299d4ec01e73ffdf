"""Fenced blocks and the tags between them, read from a completion in time linear in its length.

No parser of Markdown reads them: a fence in a string of a program ends nothing, models put fences behind words, and
what a policy writes that has collapsed takes such parsers time quadratic in its length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from grpo_kernels.rewards.python_outline import QUOTED, parses

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
REASONING_START, REASONING_END = REASONING_TAGS[0]  # stand for all of them in a Segment

_KINDS = {tag.lower(): REASONING_TAGS[0][i] for pair in REASONING_TAGS for i, tag in enumerate(pair)}


def _tag_pattern(tag: str) -> str:
    if tag.startswith("<"):
        return f"(?i:{re.escape(tag)})"
    is_like_an_index = re.match(r"\[\w", tag) is not None
    return (r"(?<![\w\])])" if is_like_an_index else "") + re.escape(tag)


_TAG_PATTERNS = [_tag_pattern(tag) for pair in REASONING_TAGS for tag in pair]
# A tag in quotes or in a code span of its own is spoken of, not used.
_TAG = rf"(?!(?<!```)(?<=[\"'`])</?\w+>[\"'`])(?:{'|'.join([*ANSWER_TAGS, *_TAG_PATTERNS])})"
_SPECIAL_TOKEN = r"<[|｜][^|｜<>\n]{1,40}[|｜]>|</s>|\[/PYTHON\]|<(?:eos|end_of_turn)>(?=\s*$)"
_LONGEST_SPECIAL_TOKEN = 44
_RUN = r"`{3,}|~{3,}"
# What programs stand behind without a fence: Llama's token for code to run, and CodeLlama's tag.
_START = r"(?:<\|python_tag\|>|(?m:^)[ \t]*\[PYTHON\])(?!\s*(?:```|~~~))"
_LABEL = r"(?:i?py(?:thon)?|pypy)[\d.]*"

_MARK = re.compile(rf"(?P<run>{_RUN})|(?P<start>{_START})|(?P<tag>{_TAG})")
# What ends a program where strings and comments hide it, and where they do not.
_CODE_MARK = re.compile(
    rf"{QUOTED}|\#[^\n]*|\\.|(?P<run>{_RUN})|(?P<tag>{_TAG})|(?P<token>{_SPECIAL_TOKEN})", re.DOTALL | re.MULTILINE
)
_LINE_MARK = re.compile(
    rf"(?P<run>{_RUN})[ \t]*(?:(?i:{_LABEL})[ \t]*)?$|(?P<tag>{_TAG})|(?P<token>{_SPECIAL_TOKEN})$",
    re.MULTILINE,
)
_LAST_TOKEN = re.compile(rf"(?:{_SPECIAL_TOKEN})\Z")

_PYTHON = re.compile(rf"{_LABEL}|.*\.py")
_WORD = re.compile(r"[\w.+#/-]+")
_MARKDOWN = ("markdown", "md")
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
_NEXT_QUOTED_LINE = re.compile(r"\n[ \t]*>[^\n]*")
_LONGEST_PREFIX = 200  # characters before a fence that are looked at
_LONGEST_INFO = 400  # and behind it
_TRIES = 8  # of looking beyond the first line that may end a program: each may read all that is left


class Block(NamedTuple):
    label: str | None  # "python", "" without a label, "markdown", None for anything else
    program: str
    is_in_markdown: bool  # of a block that is labelled so


@dataclass
class Segment:
    """What stands between two tags."""

    tag: str  # the one before it, "" at the start
    text: str = ""  # outside blocks
    blocks: list[Block] = field(default_factory=list)


class _Fence(NamedTuple):
    markup: str
    label: str | None
    body_start: int
    indent: int  # of what follows the first line
    has_code: bool  # on its own line


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
    scanner = _Scanner()
    scanner.scan(text[:end])
    return scanner.segments


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
    def __init__(self) -> None:
        self.segments = [Segment("")]
        self._tries = _TRIES
        self._texts: list[str] = []

    def scan(self, text: str) -> None:
        self._scan(text, markdown=None, in_quote=False)
        self._end_segment()

    def _scan(self, text: str, markdown: str | None, in_quote: bool) -> None:
        """``markdown`` is the fence of a block that is labelled so and open."""
        position = text_start = floor = 0  # floor: where the tag or block before ends
        line_start, line_end = 0, -1
        while mark := _MARK.search(text, position):
            start, position = mark.span()
            if start > line_end:  # once a line, however long it is
                line_start = text.rfind("\n", 0, start) + 1
                newline = text.find("\n", start)
                line_end = len(text) if newline < 0 else newline
            if mark["tag"]:
                self._texts.append(text[text_start:start])
                self._end_segment()
                self.segments.append(Segment(_KINDS.get(mark["tag"].lower(), mark["tag"])))
                text_start = floor = position
                continue
            if mark["start"]:
                self._texts.append(text[text_start:start])
                fence = _Fence("```", "python", position, indent=0, has_code=False)
                text_start = floor = position = self._read_block(text, fence, is_in_markdown=markdown is not None)
                continue
            before = text[max(line_start, floor, start - _LONGEST_PREFIX) : start]
            is_quoted = not in_quote and _QUOTED_LINE.match(before) is not None
            span_end = _MARK.search(text, position, line_end)
            if span_end is not None and (span_end["run"] or "").startswith(mark["run"]):
                position = span_end.end()
                block = _block_on_one_line(text, mark, span_end, before, line_end)
                if block is None:
                    continue
                self._texts.append(text[text_start:start])
                self.segments[-1].blocks.append(block._replace(is_in_markdown=markdown is not None))
            elif markdown and mark["run"].startswith(markdown) and not text[position:line_end].strip():
                self._texts.append(text[text_start:start])
                markdown = None
            else:
                fence = _opened(text, mark, before, line_end)
                if fence is None:
                    continue
                self._texts.append(text[text_start:start])
                if is_quoted:
                    quote_end = _quote_end(text, line_end)
                    self._scan(_unquoted(text[start:quote_end], before.count(">")), markdown, in_quote=True)
                    position = quote_end
                elif fence.label == "markdown" and markdown is None:
                    markdown, position = fence.markup, line_end
                else:
                    position = self._read_block(text, fence, is_in_markdown=markdown is not None)
            text_start = floor = position
        self._texts.append(text[text_start:])

    def _end_segment(self) -> None:
        self.segments[-1].text = "".join(self._texts)
        self._texts.clear()

    def _read_block(self, text: str, fence: _Fence, is_in_markdown: bool) -> int:
        """Adds the block that a fence opens, and returns where to read on."""
        is_python = fence.label in ("python", "")
        mark = self._end_of_program(text, fence) if is_python else _next(_LINE_MARK, text, fence, len(text))
        end = len(text) if mark is None else mark.start()
        if is_python:
            program = dedented(text[fence.body_start : end], fence.indent if fence.has_code else 0)
            self.segments[-1].blocks.append(Block(fence.label, without_language_line(program), is_in_markdown))
        if mark is None or mark["tag"]:
            return end
        if mark["token"]:
            return mark.end()
        run_end = mark.end("run")
        newline = text.find("\n", run_end)
        rest = text[run_end : len(text) if newline < 0 else newline]
        starts_line = not text[fence.body_start : end].rpartition("\n")[2].strip()
        is_next_fence = (starts_line and _ATTACHED.match(rest)) or (
            rest and _WORD_IN_INFO.fullmatch(rest) and _label(rest) == "python"
        )
        return end if is_next_fence else run_end

    def _end_of_program(self, text: str, fence: _Fence) -> re.Match[str] | None:
        """Strings and comments hide an end, unless what they are part of is no program and what is before it is."""
        if not self._tries:
            return _next(_LINE_MARK, text, fence, len(text))
        mark = _next(_CODE_MARK, text, fence, len(text))
        end = len(text) if mark is None else mark.start()
        first = _next(_LINE_MARK, text, fence, end)
        if first is None or (mark is not None and parses(dedented(text[fence.body_start : end]))):
            return mark
        if mark is not None and not parses(dedented(text[fence.body_start : first.start()])):
            return mark
        self._tries -= 1
        return first


def _next(pattern: re.Pattern[str], text: str, fence: _Fence, end: int) -> re.Match[str] | None:
    """The first tag, special token or closing fence."""
    for mark in pattern.finditer(text, fence.body_start, end):
        if mark.lastgroup in ("tag", "token") or (mark["run"] or "").startswith(fence.markup):
            return mark
    return None


def _opened(text: str, mark: re.Match[str], before: str, line_end: int) -> _Fence | None:
    """The block that a run of fence characters opens, if it opens one."""
    info_start, info_end = mark.end(), min(line_end, mark.end() + _LONGEST_INFO)
    info = text[info_start:info_end]
    code = _CODE_IN_INFO.match(info)
    label = "python" if code else _label(info)
    if code is None and label is None:
        code = _CODE.match(info)
        label = None if code is None else ""
    starts_line = _BEFORE_FENCE.fullmatch(before) is not None
    is_behind_words = mark["run"][0] == "`" and (
        (label == "python" and code is not None) or _WORD_IN_INFO.fullmatch(info) is not None
    )
    if not (starts_line or is_behind_words):
        return None
    body_start = min(line_end + 1, len(text)) if code is None else info_start + code.end()
    return _Fence(mark["run"], label, body_start, len(before) if before.isspace() else 0, code is not None)


def _block_on_one_line(text: str, mark: re.Match[str], end: re.Match[str], before: str, line_end: int) -> Block | None:
    """A block that is opened and closed on one line, if it is more than a code span."""
    content = text[mark.end() : end.start()]
    label = _label(content)
    glued = _CODE_IN_INFO.match(content)
    if label == "python" or glued:
        program = content[glued.end() :] if glued else re.sub(r"^\s*\S+", "", content)
        return Block("python", program.strip(), False) if program.strip() else None
    is_line = _BEFORE_FENCE.fullmatch(before) is not None and not text[end.end() : line_end].strip()
    return Block("", content.strip(), False) if is_line and parses(content.strip()) else None


def _label(info: str) -> str | None:
    """ "python", "" without a label, "markdown", None for any other."""
    words = _WORD.findall(info.lower())
    in_braces = info.lstrip().startswith("{")
    words = [word.strip(".") for word in words] if in_braces else words
    words = words[1:] if words and words[0] in _DIRECTIVES else words
    if not words:
        return ""
    names = words if in_braces else words[:1]
    if any(_PYTHON.fullmatch(name) for name in names):
        return "python"
    return "markdown" if names[0] in _MARKDOWN else None


def _quote_end(text: str, line_end: int) -> int:
    """Where the lines end that begin with ">", from the one that ends at ``line_end``."""
    while (more := _NEXT_QUOTED_LINE.match(text, line_end)) is not None:
        line_end = more.end()
    return line_end


def _unquoted(text: str, depth: int) -> str:
    return re.sub(rf"^[ \t]*(?:>[ \t]?){{1,{depth}}}", "", text, flags=re.MULTILINE)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
