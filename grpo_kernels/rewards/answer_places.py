"""Where a completion's answer stands: in an element, behind hashes, in its last box or its last formula in LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from grpo_kernels.rewards.math_text import closing_bracket

_LONGEST = 2000  # characters in a box, or in several that are joined
_ELEMENT = re.compile(r"<answer\s*>((?:(?!</?answer\s*>).)*)</answer\s*>", re.DOTALL | re.IGNORECASE)
_HEADING = re.compile(r"\W*(?:the )?(?:final )?(?:answer|result|solution)\W*", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+(?P<bare>-?\w+))")
_BETWEEN_BOXES = re.compile(r"[\s$*]*(?:(?:,|;|,?\s*(?:and|or)\b)[\s$*]*)?(?:[a-zA-Z]\s*=\s*)?")
_PERCENT = re.compile(r"[\s$]{0,5}(\\?%)")
_FORMULA = re.compile(
    r"(?:\$\$(?:(?!\$\$).)+\$\$|\\\((?:(?!\\[()]).)+\\\)|\\\[(?:(?!\\[\[\]]).)+\\\]"
    r"|(?<![\\\d$])\$(?:\\\$|[^$\n])+\$(?!\d))(?:[\s$]{0,5}\\?%)?",
    re.DOTALL,
)
_BETWEEN_FORMULAS = re.compile(r"\s*(?:\\?%\s*)?(?:,|,?\s*(?:and|or)\b)\s*")
_ANNOUNCED = re.compile(r"answer[^$]{0,50}\Z", re.IGNORECASE)

_NOT = r"(?:\b(?:not|never|cannot)|n['’]t)"
_IT = r"(?:(?:which|that|this|it)\s*)?"
_WRONG = (
    r"(?:an?\s|the\s)?\s*(?:wrong|incorrect|false|invalid|impossible|extraneous|too\s(?:small|large|big|high|low))\b"
)
_RIGHT = r"(?:an?\s|the\s)?\s*(?:right|correct|valid|possible|true|(?:final\s|correct\s)?(?:answer|solution))\b"
# Words that end where an answer begins, and deny it or say less than that it is the answer;
_DENIED_BEFORE = re.compile(
    rf"""(?:{_NOT}\}}?(?:\s(?:be|equal(?:\sto)?))?|不是
    |(?:{_NOT}|\b(?:false|impossible))\s(?:(?:the\scase|true|believe|think)\s)?(?:that\s)?(?:the\s(?:final\s)?)?answer\sis
    |\b(?:wrong|incorrect)\s(?:answer|result|value)\s(?:is|of)
    |\b(?:at\sleast|at\smost|(?:less|more|greater|fewer|larger|smaller)\sthan|multiple\sof)
    |\b(?:either|between|almost|nearly|up\sto))[\s$*`]*\Z""",
    re.IGNORECASE | re.VERBOSE,
)
# words that begin where it ends, in its sentence, or in it or the next one, also behind "Wait," and the like.
_DENIED_AFTER = re.compile(
    rf"""[\s$*`)\]]*(?:\((?:wrong|incorrect|false|rejected|extraneous)\b
    |\?[\s$*`]*(?:no|nope|wait|not)\b|[.,;!]*\s*no[\s,.!]+wait\b
    |,?\s*(?:and|or|或|和)\s+(?:maybe\s+)?\$?(?:-?\d|more\b|less\b|fewer\b)
    |[.,;!?]*[\s$*`]*(?:(?:but|no|nope|hmm|oh|oops|sorry|actually|wait)\b[\s,.!]*)*(?:
        {_IT}(?:is|['’]s|was|would\sbe|seems)\s{_WRONG}
        |{_IT}(?:(?:is|['’]s|was)\snot|(?:is|was)n['’]t|cannot\sbe|can['’]t\sbe)\s{_RIGHT}
        |{_IT}(?:does(?:\snot|n['’]t)\swork|fails)\b
        |I\sdo(?:\snot|n['’]t)\s(?:think|believe)\b
        |(?:I\smade\s)?(?:a\smistake|an\serror)\b|correction\b|(?:it|the\sanswer)\sshould\sbe\b))""",
    re.IGNORECASE | re.VERBOSE,
)

# Mathematics next to a box, which is then a part of a formula.
_PART_BEFORE = re.compile(
    r"(?:[+/^]|[\w)}$\s][<>]|(?<=[$\s(])-|\\(?:cdot|times|div|pm|ne|neq|[lg]eq?|[lg]t|frac\{))\s*\Z"
)
_PART_AFTER = re.compile(
    r"\s*(?:[+*/_]\s*[\w\\(]|\^(?!\s*\{?\s*\\circ)|\\(?:pi|sqrt|cdot|times|div|pm|over)\b|\.\d|\}\s*\{"
    r"|\$?\s*(?:dozen|hundred|thousand|million|billion|trillion)s?\b)"
)


class Place(NamedTuple):
    """A part of a text that may be its answer."""

    text: str  # what stands there, without a box around it
    start: int
    end: int


def answer_text(completion: str) -> str | None:
    """The text of a completion's answer, looked for as ``math_accuracy_reward`` says; None where there is none."""
    element = answer_element(completion)
    if element is not None:
        return after_hashes(element)
    text = _after_thinking(completion)
    hashes = text.rfind("####")
    box = last_box(text)
    if hashes >= 0 and not (box and "\n" in text[hashes : box.end]):
        return after_hashes(text)
    candidates = _boxes(text) if box else _last_formula(text)
    return next((place.text for place in candidates if not _is_denied(text, place)), None)


def answer_element(completion: str) -> str | None:
    """What the last complete ``<answer>`` element holds, or None if there is none."""
    elements = _ELEMENT.findall(_after_thinking(completion))
    return elements[-1] if elements else None


def after_hashes(text: str) -> str:
    """What stands between the last ``####`` and the end of its line; the whole text if there is none.

    Below a heading as "#### Final Answer" it is the next line.
    """
    _, hashes, answer = text.rpartition("####")
    if not hashes:
        return text
    line, _, rest = answer.strip().partition("\n")
    return rest.strip().partition("\n")[0] if rest.strip() and _HEADING.fullmatch(line) else line


def last_box(text: str) -> Place | None:
    r"""What stands in the last ``\boxed``, with those before it that a comma, "and" or "or" joins to it.

    Example:
        >>> last_box(r"We get \boxed{3}. So x is \boxed{4} or \boxed{5}.").text
        '4, 5'
    """
    return next(_boxes(text), None)


def _after_thinking(text: str) -> str:
    """What stands after the last ``</think>``; the whole text if nothing does."""
    said = text.rpartition("</think>")[2]
    return said if said.strip() else text


def _boxes(text: str) -> Iterator[Place]:
    """What stands in each box, from the last to the first; none where the last one is not closed."""
    return _joined(text, _single_boxes(text), _BETWEEN_BOXES, ", ")


def _single_boxes(text: str) -> Iterator[Place]:
    for box in reversed(list(_BOX.finditer(text))):
        if box["bare"]:
            yield Place(box["bare"], *box.span())
            continue
        end = closing_bracket(text, box.end(), "{}", box.end() + _LONGEST)
        if end is None:
            return
        percent = _PERCENT.match(text, end + 1)
        yield Place(text[box.end() : end] + (percent[1] if percent else ""), box.start(), end + 1)


def _joined(text: str, places: Iterable[Place], between: re.Pattern[str], joint: str = "") -> Iterator[Place]:
    """Places from the last to the first, as one where nothing but ``between`` separates them."""
    joined: Place | None = None
    for place in places:
        if joined and 0 <= joined.start - place.end < 100 and len(joined.text) < _LONGEST:
            gap = text[place.end : joined.start]
            if between.fullmatch(gap):
                joined = Place(place.text + (joint or gap) + joined.text, place.start, joined.end)
                continue
        if joined:
            yield joined
        joined = place
    if joined:
        yield joined


def _last_formula(text: str) -> list[Place]:
    """The last formula in LaTeX, or list of them; one that the word answer announces before others."""
    singles = [Place(match[0], *match.span()) for match in _FORMULA.finditer(text)]
    formulas = list(_joined(text, reversed(singles), _BETWEEN_FORMULAS))
    for i, place in enumerate(formulas):
        end_before = formulas[i + 1].end if formulas[i + 1 :] else 0
        if _ANNOUNCED.search(text[max(place.start - 60, end_before) : place.start]):
            return [place]
    return formulas[:1]


def _is_denied(text: str, place: Place) -> bool:
    """Whether what stands around a place says that it is not the answer, or not all of it."""
    before, after = text[max(0, place.start - 80) : place.start], text[place.end : place.end + 80]
    before, after = (re.sub(r"[^\S\n]+", " ", part) for part in (before, after))
    is_part = _BOX.match(text, place.start) and (_PART_BEFORE.search(before) or _PART_AFTER.match(after))
    return bool(is_part or _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after))
