"""Where a completion's answer stands: in its last box, or in its last formula in LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_LONGEST = 2000  # characters in a box, or in several that are joined
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*(?P<brace>\{)|\s+(?P<bare>-?\w+))")
_BETWEEN_BOXES = re.compile(r"[\s$*]*(?:(?:,|;|,?\s*(?:and|or)\b)[\s$*]*)?(?:[a-zA-Z]\s*=\s*)?")
_PERCENT = re.compile(r"[\s$]{0,5}(\\?%)")
_OPENING = re.compile(r"\$\$|(?<![\\\d])\$|\\\(|\\\[")
_CLOSING = {"$$": "$$", r"\(": r"\)", r"\[": r"\]"}
_INLINE = re.compile(r"(?:\\\$|[^$\n])+\$(?!\d)")
_BETWEEN_FORMULAS = re.compile(r"\s*(?:\\?%\s*)?(?:,|,?\s*(?:and|or)\b)\s*")
_ANNOUNCED = re.compile(r"answer[^$]{0,50}\Z", re.IGNORECASE)
_NOT = r"(?:\b(?:not|never|cannot)|n['’]t)"
_WRONG = (
    r"(?:an?\s|the\s)?\s*(?:wrong|incorrect|false|invalid|impossible|extraneous|too\s(?:small|large|big|high|low))\b"
)
_RIGHT = r"(?:an?\s|the\s)?\s*(?:right|correct|valid|possible|true|(?:final\s|correct\s)?(?:answer|solution))\b"
_NUMBER_WORD = r"(?:dozen|hundred|thousand|million|billion|trillion)s?\b"

# Words that end where an answer begins, and deny it or say less than that it is the answer.
_BEFORE = (
    rf"{_NOT}\}}?(?:\s(?:be|equal(?:\sto)?))?",  # it is not 5
    r"不是",
    rf"(?:{_NOT}|\b(?:false|impossible))\s(?:(?:the\scase|true|believe|think)\s)?(?:that\s)?(?:the\s(?:final\s)?)?answer\sis",
    r"\b(?:wrong|incorrect)\s(?:answer|result|value)\s(?:is|of)",
    r"\b(?:at\sleast|at\smost|(?:less|more|greater|fewer|larger|smaller)\sthan|multiple\sof)",
    r"\b(?:either|between|almost|nearly|up\sto)",
)
# Words that begin where an answer ends: in its sentence,
_SAME_SENTENCE = (
    r"\((?:wrong|incorrect|false|rejected|extraneous)\b",
    r"\?[\s$*`]*(?:no|nope|wait|not)\b",  # 5? No, 6
    r"[.,;!]*\s*no[\s,.!]+wait\b",
    r",?\s*(?:and|or|或|和)\s+(?:maybe\s+)?\$?(?:-?\d|more\b|less\b|fewer\b)",  # 5 or 6
)
# and in the same sentence or the next one, also behind "Wait," and the like.
_NEXT_SENTENCE = (
    rf"(?:(?:which|that|this|it)\s*)?(?:is|['’]s|was|would\sbe|seems)\s{_WRONG}",
    rf"(?:(?:which|that|this|it)\s*)?(?:(?:is|['’]s|was)\snot|(?:is|was)n['’]t|cannot\sbe|can['’]t\sbe)\s{_RIGHT}",
    r"(?:(?:which|that|this|it)\s)?(?:does(?:\snot|n['’]t)\swork|fails)\b",
    r"I\sdo(?:\snot|n['’]t)\s(?:think|believe)\b",
    r"(?:I\smade\s)?(?:a\smistake|an\serror)\b",
    r"correction\b",
    r"(?:it|the\sanswer)\sshould\sbe\b",
)
_HESITATION = r"(?:(?:but|no|nope|hmm|oh|oops|sorry|actually|wait)\b[\s,.!]*)*"
_DENIED_BEFORE = re.compile(rf"(?:{'|'.join(_BEFORE)})[\s$*`]*\Z", re.IGNORECASE)
_DENIED_AFTER = re.compile(
    rf"[\s$*`)\]]*(?:{'|'.join(_SAME_SENTENCE)}|[.,;!?]*[\s$*`]*{_HESITATION}(?:{'|'.join(_NEXT_SENTENCE)}))",
    re.IGNORECASE,
)

# Mathematics next to a box, which is then a part of a formula.
_OPERATOR_BEFORE = r"[+/^]|[\w)}$\s][<>]|(?<=[$\s(])-|\\(?:cdot|times|div|pm|ne|neq|[lg]eq?|[lg]t|frac\{)"
_OPERATOR_AFTER = r"[+*/_]\s*[\w\\(]|\^(?!\s*\{?\s*\\circ)|\\(?:pi|sqrt|cdot|times|div|pm|over)\b|\.\d|\}\s*\{"
_PART_BEFORE = re.compile(rf"(?:{_OPERATOR_BEFORE})\s*\Z")
_PART_AFTER = re.compile(rf"\s*(?:{_OPERATOR_AFTER}|\$?\s*{_NUMBER_WORD})")


class Place(NamedTuple):
    """A part of a text that may be its answer."""

    text: str  # what stands there, without a box around it
    start: int
    end: int


def boxes(text: str) -> Iterator[Place]:
    r"""What stands in each ``\boxed``, from the last to the first; none where the last one is not closed.

    Boxes that a comma, "and" or "or" joins are one place.

    Example:
        >>> [place.text for place in boxes(r"We get \boxed{3}. So x is \boxed{4} or \boxed{5}.")]
        ['4, 5', '3']
    """
    joined: Place | None = None
    for opening in reversed(list(_BOX.finditer(text))):
        place = _box(text, opening)
        if place is None:
            break
        if joined is None:
            joined = place
        elif len(joined.text) < _LONGEST and _BETWEEN_BOXES.fullmatch(text, place.end, joined.start):
            joined = Place(f"{place.text}, {joined.text}", place.start, joined.end)
        else:
            yield joined
            joined = place
    if joined is not None:
        yield joined


def last_box(text: str) -> Place | None:
    """The last of ``boxes``."""
    return next(boxes(text), None)


def last_formula(text: str) -> Place | None:
    """The last formula in LaTeX, or list of them; one that the word answer announces before others."""
    last = announced = None
    for place in _lists(text):
        start = max(place.start - 60, last.end if last else 0)
        announced = place if _ANNOUNCED.search(text[start : place.start]) else announced
        last = place
    return announced or last


def is_denied(text: str, place: Place) -> bool:
    """Whether what stands around a place says that it is not the answer, or not all of it."""
    before, after = text[max(0, place.start - 80) : place.start], text[place.end : place.end + 80]
    before, after = (re.sub(r"[^\S\n]+", " ", part) for part in (before, after))
    is_box = text.startswith("\\", place.start) and not text.startswith(("\\(", "\\["), place.start)
    is_part = is_box and (_PART_BEFORE.search(before) or _PART_AFTER.match(after))
    return bool(is_part or _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after))


def _box(text: str, opening: re.Match[str]) -> Place | None:
    """What stands in a box; None where it is not closed."""
    if opening["bare"]:
        return Place(opening["bare"], opening.start(), opening.end())
    depth = 1
    for i in range(opening.end(), min(len(text), opening.end() + _LONGEST)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            percent = _PERCENT.match(text, i + 1)
            content = text[opening.end() : i] + (percent[1] if percent else "")
            return Place(content, opening.start(), i + 1)
    return None


def _lists(text: str) -> Iterator[Place]:
    """The formulas of a text, each with those that a comma, "and" or "or" joins to it."""
    joined: Place | None = None
    for start, end in _formulas(text):
        if joined and start - joined.end < 100 and _BETWEEN_FORMULAS.fullmatch(text, joined.end, start):
            joined = Place(text[joined.start : end], joined.start, end)
            continue
        if joined:
            yield joined
        joined = Place(text[start:end], start, end)
    if joined:
        yield joined


def _formulas(text: str) -> Iterator[tuple[int, int]]:
    """Where each formula in LaTeX begins and ends, found in one pass."""
    missing: set[str] = set()  # delimiters that do not come again
    position = 0
    while opening := _OPENING.search(text, position):
        delimiter, position = opening[0], opening.end()
        if delimiter == "$":
            inline = _INLINE.match(text, position)
            end = inline.end() if inline else -1
        else:
            closing = _CLOSING[delimiter]
            end = -1 if closing in missing else text.find(closing, position + 1)
            missing.update([closing] if end < 0 else [])
            end += 2 if end >= 0 else 0
        if end >= 0:
            percent = _PERCENT.match(text, end)
            position = percent.end() if percent else end
            yield opening.start(), position
