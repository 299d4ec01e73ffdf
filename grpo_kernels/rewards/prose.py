"""The prose of a completion: without code, formulas and whatever else is in no language."""

from __future__ import annotations

import re

_OPENING = re.compile(r"(?P<fence>`{3,}|~{3,})|`|\$\$|(?<!\\)\$|\\[(\[]|\\begin\{(?P<environment>\w+\*?)\}")
# A code span, or what may be a formula: as in Pandoc, no digit follows it.
_SPAN = re.compile(r"`[^`\n]*`|\$(?P<formula>(?:\\.|[^$\\\n])+)\$(?!\d)")
_CLOSING = {r"\(": r"\)", r"\[": r"\]"}
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})?")
_WORDS_IN_A_ROW = re.compile(r"[^\W\d_]{2,}(?:[\s,]+[^\W\d_]{2,}){2}")
_NOT_PROSE = re.compile(
    r"\\[A-Za-z]+|</?\w+>|https?://\S+|(?<![A-Za-z\d_])[A-Za-z\d_]*[\d_][A-Za-z\d_]*|\b[a-z]+[A-Z][A-Za-z]*"
)


def prose_of(text: str) -> str:
    """A text without code, formulas, LaTeX commands, tags, addresses, camelCase names and words with digits in them.

    What stands between two prices in dollars is no formula.
    """
    return _NOT_PROSE.sub(" ", _without_code_and_formulas(text))


def _without_code_and_formulas(text: str) -> str:
    prose: list[str] = []
    unclosed: set[str] = set()
    copied = position = 0
    while opening := _OPENING.search(text, position):
        position = opening.end()
        end = _end_of(opening, unclosed)
        if end is not None:
            prose.append(text[copied : opening.start()])
            copied = position = end
    return " ".join([*prose, text[copied:]])


def _end_of(opening: re.Match[str], unclosed: set[str]) -> int | None:
    """Where the code or the formula ends that a sign opens, None if it opens none.

    What closes nothing in the rest of the text is put in ``unclosed``: looking for it again would take quadratic time.
    """
    text, sign = opening.string, opening.group()
    if sign in ("`", "$"):
        span = _SPAN.match(text, opening.start())
        if span is None or (sign == "$" and _is_between_prices(span["formula"])):
            return None
        return span.end()
    closing = rf"\end{{{opening['environment']}}}" if opening["environment"] else _CLOSING.get(sign, sign)
    end = -1 if closing in unclosed else text.find(closing, opening.end())
    if end >= 0:
        return end + len(closing)
    unclosed.add(closing)
    return len(text) if opening["fence"] else None


def _is_between_prices(text: str) -> bool:
    """Whether what stands between two dollars is prose: with a space at one end alone, or with words in a row."""
    return text[0].isspace() != text[-1].isspace() or _WORDS_IN_A_ROW.search(_COMMAND.sub(" ", text)) is not None
