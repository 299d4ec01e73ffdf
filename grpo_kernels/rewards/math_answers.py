"""Answers as mathematics: read in full, and compared exactly, where math-verify's ``verify`` rounds to six decimals."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended import is_expr_of_only_symbols
from latex2sympy2_extended.logic import And
from sympy.core.relational import Relational

from grpo_kernels.rewards.answer_places import after_hashes, answer_text, last_box
from grpo_kernels.rewards.math_formula import UNEVALUATED, parse_formula, parts_of, solutions
from grpo_kernels.rewards.math_text import AnswerText, split_answer

_LONGEST = 2000  # characters of an answer
_DIGITS = 50  # to which irrational values have to agree, besides those of the integers in them
_MOST_DIGITS = 20_000
_POINTS = ["0.3713", "-0.8329", "5.3117", "-17.7139", "1234.5671", "-98765.4321"]  # where formulas have to agree

_TEXT_COMMAND = re.compile(r"[\s$]*\\(?:text\w*|mathrm|mathbf|mbox)\s*\{[^{}]*\}[\s$.]*")
_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")  # which says nothing: 3 4 is not 34
_PUNCTUATION = re.compile(r"[().,:;!?\"'*`\[\]{}]+")
_ANNOUNCEMENT = re.compile(
    r"\s*(?:(?:so|thus|therefore|hence|the|final|correct|right|die|la|le|richtige|bonne)\s+)*"
    r"(?:(?:answer|option|choice|antwort|respuesta|opción|réponse)[\s:]*"
    r"(?:(?:is|the|correct|option|choice|ist|es|est|correcta)\b[\s:]*)*|(?:(?:故|所以|正确|答案|选项|选|選|应|为|是)[\s:]*)+)",
    re.IGNORECASE,
)
# A choice alone, or with what it says; one that words deny or join to another is none.
_CHOICE = re.compile(r"(?:\(\s*([A-J])\s*\)|([A-J])(?:[.:)]|\s*\Z))[\s.:)]*(.*)|([A-J])\s+\(([^()]*)\)\s*", re.DOTALL)
_NO_CHOICE = re.compile(
    r"\b(?:wrong|incorrect|false|maybe|perhaps|not\s+(?:right|correct|the)|isn['’]t)\b|[不错錯]"
    r"|(?<![A-Za-z])(?:\([A-Ja-j]\)|[A-Ja-j][).:](?!\d))|(?:\b(?:or|and|is|was)|,)\s+[A-J]\b|\A(?:(?:is|was|[A-HJ])\b|[,&/+=-])",
)
_UNORDERED = (sympy.FiniteSet, sympy.Union, And)
_STEPS = (sympy.floor, sympy.ceiling, sympy.Mod)  # points do not tell them apart


class MathAnswer(NamedTuple):
    """An answer as it was read, in full."""

    text: str  # without white space and markup
    words: str  # the text in lower case, without punctuation
    choice: str  # B of "Option B", "(B)" and "B. Paris"; empty where it is none
    parts: AnswerText  # of the text, or of what the choice says
    as_formula: Any = (
        None  # the text as a formula, letters of units and words as factors; None if that cannot be parsed
    )
    without_unit: Any = None  # without a unit and words around it; None as above, or where these are no mere words

    @property
    def value(self) -> Any:
        return self.as_formula if self.without_unit is None else self.without_unit


def read_gold(text: str) -> MathAnswer | None:
    """The ``answer`` column's answer; None where there is nothing to compare."""
    text = after_hashes(text)
    box = last_box(text)
    gold = read_answer(box.text if box else text)
    is_one_text = len(gold.words.split()) == 1 or _TEXT_COMMAND.fullmatch(text)
    return gold if gold.text and (not gold.parts.is_words or is_one_text) else None


def read_completion(text: str) -> MathAnswer | None:
    """A completion's answer; None where it gives none."""
    answer = answer_text(text)
    return None if answer is None else read_answer(answer)


@lru_cache(maxsize=4096)
def read_answer(text: str) -> MathAnswer:
    """Reads a text that is an answer. What is not mathematics from its first character to its last stays None.

    So does a text too long to be an answer, which would take too long to read. Of a text that ends in a box and words
    the box is the answer.
    """
    text = re.sub(r"[^\S\n]+", " ", text).strip()
    is_long = len(text) > _LONGEST
    parts = AnswerText(text, None, is_words=True) if is_long else split_answer(text)
    latex = parts.latex
    choice, said = ("", "") if is_long else _choice_of(latex)
    if choice:  # what it says may be an answer, but its letter is no formula
        parts = split_answer(said) if said else AnswerText(latex, None, is_words=parts.is_words)
    without_unit = None if parts.formula is None else parse_formula(parts.formula)
    as_formula = without_unit
    if parts.formula != parts.latex or not parts.is_formula:
        as_formula = parse_formula(parts.latex) if parts.is_formula else None
    words = " ".join(_PUNCTUATION.sub(" ", latex).split()).casefold()
    words = _ANNOUNCEMENT.sub("", words, count=1) or words
    answer = MathAnswer(_SPACE.sub("", latex), words, choice, parts, as_formula, without_unit)
    box = last_box(text) if answer.value is None else None
    return answer if box is None or re.search(r"[\d\\$]", text[box.end :]) else read_answer(box.text)


def _choice_of(latex: str) -> tuple[str, str]:
    """B and 12 of "Option B" that says 12; two empty texts where there is no choice."""
    announcement = _ANNOUNCEMENT.match(latex)
    choice = _CHOICE.fullmatch(latex, announcement.end() if announcement else 0)
    said = (choice[3] or choice[5] or "") if choice else ""
    return ("", "") if choice is None or _NO_CHOICE.search(said) else (choice[1] or choice[2] or choice[4], said)


def same_answer(gold: MathAnswer, answer: MathAnswer) -> bool:
    """Whether two answers are the same text or equal as mathematics, and have no different units."""
    unit, other_unit = gold.parts.unit, answer.parts.unit
    has_other_unit = bool(unit and other_unit and unit != other_unit)
    if gold.text and gold.text == answer.text:
        return not has_other_unit
    if gold.choice or gold.parts.is_words:
        is_same = gold.words == answer.words or bool(gold.choice and gold.choice == answer.choice)
        if is_same or answer.choice or gold.value is None:
            return is_same
    try:
        if gold.as_formula is not None and answer.as_formula is not None and equal(gold.as_formula, answer.as_formula):
            return True
        if has_other_unit or gold.value is None or answer.without_unit is None:
            return False
        if gold.parts.is_letter_unit and not other_unit:
            return False
        if {unit, other_unit} != {"%", ""}:
            return equal(gold.value, answer.without_unit)
        percent, value = (gold.value, answer.value) if unit else (answer.value, gold.value)
        return equal(percent, value) or (isinstance(percent, sympy.Expr) and equal(percent / 100, value))
    except Exception:  # sympy raises whatever it likes, and no completion may end a training
        return False


def spelling_of_answer(answer: MathAnswer) -> str | None:
    """One text for answers that are the same; None where not all of an answer was read."""
    if answer.choice or answer.parts.is_words:
        return answer.choice.casefold() or answer.words
    try:
        return None if answer.value is None else spelling(answer.value)
    except Exception:  # as above
        return None


def equal(a: Any, b: Any) -> bool:
    """Whether two formulas are equal: sets in any order, equations up to a factor, numbers exactly.

    A decimal also equals a number that it is the correct rounding of, to six or more decimals and significant digits.
    """
    a, b = _without_steps(a), _without_steps(b)
    if _is_statement(a) != _is_statement(b):  # x = 5 and 5, but not x = 5 and y = 5
        a, b = _value_of(a), _value_of(b)
    if isinstance(a, sympy.FiniteSet) != isinstance(b, sympy.FiniteSet):
        a, b = (sympy.FiniteSet(x) if isinstance(x, sympy.Expr) else x for x in (a, b))
    if _is_expression(a) and _is_expression(b):
        return _equal_expressions(a, b)
    if type(a) is not type(b) and type(a) is type(getattr(b, "reversed", None)):
        b = b.reversed  # 3 > x as x < 3
    if type(a) is type(b) and _equal_parts(a, b):
        return True
    solved = [x if isinstance(x, sympy.Set) else solutions(x) for x in (a, b)]
    if None not in solved and not (isinstance(a, sympy.Set) and isinstance(b, sympy.Set)):
        has_one_symbol = a.free_symbols == b.free_symbols or isinstance(a, sympy.Set) or isinstance(b, sympy.Set)
        return has_one_symbol and equal(*solved)
    if isinstance(a, Relational) and type(a) is type(b):
        return _is_multiple(a, b)
    return a == b


def _equal_parts(a: Any, b: Any) -> bool:
    """Whether each part of one equals the other's: in order, or in any of sets and chains of statements."""
    parts, rest = parts_of(a), parts_of(b)
    if len(parts) != len(rest):
        return False
    if not isinstance(a, _UNORDERED):
        return bool(parts) and all(map(equal, parts, rest))
    for part in parts:
        match = next((i for i, other in enumerate(rest) if equal(part, other)), None)
        if match is None:
            return False
        rest.pop(match)
    return True


def spelling(a: Any) -> str:
    """One text for all formulas that are equal: exact for rationals, 30 digits for other numbers and at ``_POINTS``."""
    solved = solutions(_value_of(a))
    a = _value_of(a) if solved is None else solved
    if a.is_Rational and max(abs(a.p), a.q) > 10**4000:  # Python's limit for decimal digits is 4300
        return f"{int(a.p):#x}/{int(a.q):#x}"
    if _is_expression(a) and not a.is_Rational and not a.is_Symbol:
        values = _values(a, a.free_symbols, _DIGITS)
        names = sorted(map(str, a.free_symbols))
        return str(a) if values is None else ", ".join([*names, *(str(sympy.N(value, 30)) for value in values)])
    a = a.reversed if isinstance(a, (sympy.Gt, sympy.Ge)) else a
    parts = [spelling(part) for part in parts_of(a)]
    if isinstance(a, _UNORDERED):
        parts.sort()
    if isinstance(a, sympy.FiniteSet) and len(parts) == 1:
        return parts[0]
    return f"{type(a).__name__}({', '.join(parts)})" if parts else str(a)


def _is_expression(a: Any) -> bool:
    return isinstance(a, sympy.Expr) and not isinstance(a, sympy.MatrixBase)


def _is_statement(a: Any) -> bool:
    return isinstance(a, (Relational, And)) or (isinstance(a, sympy.FiniteSet) and any(map(_is_statement, a.args)))


def _value_of(a: Any) -> Any:
    """What an equation says that a name is, or else the formula itself."""
    assigned = _assigned(a)
    return a if assigned is None else assigned


def _without_steps(a: Any) -> Any:
    """``x = 5`` of ``x = 2 + 3 = 5``, and 5 of ``2 + 3 = 5``."""
    assigned = None if isinstance(a, sympy.FiniteSet) else _assigned(a)
    if assigned is None:
        return a
    first = parts_of(a)[0].lhs if isinstance(a, And) else a.lhs
    return sympy.Eq(first, assigned, evaluate=False) if is_expr_of_only_symbols(first) else assigned


def _assigned(a: Any) -> Any:
    """5 of ``x = 5``, ``f(x) = 5`` and ``2 + 3 = 5``; None where a is no such equation."""
    if isinstance(a, And) and all(isinstance(x, sympy.Eq) for x in parts_of(a)):
        first, *_, last = parts_of(a)
        is_value = _assigned(sympy.Eq(first.lhs, last.rhs, evaluate=False)) is not None
        return last.rhs if is_value and all(equal(x.rhs, last.rhs) for x in parts_of(a)[:-1]) else None
    if isinstance(a, sympy.FiniteSet) and a.args and all(isinstance(x, sympy.Eq) for x in a.args):
        values = [_assigned(x) for x in a.args]
        one_name = len({x.lhs for x in a.args}) == 1
        return sympy.FiniteSet(*values) if one_name and None not in values else None
    if not isinstance(a, sympy.Eq):
        return None
    if is_expr_of_only_symbols(a.lhs):
        return a.rhs
    is_worked_out = isinstance(a.lhs, sympy.Expr) and isinstance(a.rhs, sympy.Expr) and not a.lhs.free_symbols
    return a.rhs if is_worked_out and _equal_expressions(a.lhs, a.rhs) else None


def _is_multiple(a: Any, b: Any) -> bool:
    """Whether two equations or inequalities are the same up to a factor: a positive one, of equations any but 0."""
    if not all(isinstance(side, sympy.Expr) for side in (*a.args, *b.args)):
        return False
    symbols = a.free_symbols | b.free_symbols
    left, right = (_values(x.lhs - x.rhs, symbols, _DIGITS) for x in (a, b))
    if not (left and right and left[0] and right[0]):
        return False
    ratio = left[0] / right[0]
    products = [_agree(x, ratio * y, _DIGITS - 10) for x, y in zip(left, right, strict=True)]
    return all(products) and bool(isinstance(a, (sympy.Eq, sympy.Ne)) or ratio > 0)


def _equal_expressions(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if a.is_infinite or b.is_infinite or a.has(*UNEVALUATED) or b.has(*UNEVALUATED):
        return False
    symbols = a.free_symbols | b.free_symbols
    if symbols and (a.has(*_STEPS) or b.has(*_STEPS)):
        return False
    if not symbols and (_is_rounding(a, b) or _is_rounding(b, a)):
        return True
    if a.is_Rational and b.is_Rational:
        return False
    digits = _DIGITS + _digits_before_point(a) + _digits_before_point(b)
    if digits > _MOST_DIGITS:
        return False
    left, right = _values(a, symbols, digits), _values(b, symbols, digits)
    return bool(left and right) and all(_agree(x, y, digits - 10) for x, y in zip(left, right, strict=True))


def _digits_before_point(a: Any) -> int:
    """How many decimal digits the integers and the irrational powers of an expression may have, at most."""
    integers = [n for rational in a.atoms(sympy.Rational) for n in (rational.p, rational.q)]
    powers = [x for x in a.atoms(sympy.Pow) if x.exp.is_Integer and x.base.is_number and not x.base.is_Rational]
    bases = [(x.exp, abs(sympy.N(x.base))) for x in powers]
    return sum(int(n).bit_length() // 3 for n in integers) + sum(
        int(abs(exponent * sympy.log(base, 10))) + 1 for exponent, base in bases if base
    )


def _is_rounding(decimal: Any, exact: Any) -> bool:
    """Whether a decimal of six or more places and significant digits rounds a number that has no end."""
    places = next((n for n in range(6, 60) if decimal.is_Rational and (10**n) % decimal.q == 0), None)
    if places is None or decimal.q == 1 or abs(decimal) * 10**places < 10**5 or not exact.is_real:
        return False
    has_end = exact.is_Rational and 10**300 % exact.q == 0
    return not has_end and bool(abs(sympy.N(exact - decimal, 30)) * 2 * 10**places <= 1)


def _values(a: Any, symbols: set[Any], digits: int) -> list[Any] | None:
    """An expression's values at ``_POINTS``, or the value of a constant; None where there are none."""
    powers = [power for power in a.atoms(sympy.Pow, sympy.exp) if power.exp.free_symbols]
    if any(inner in powers for power in powers for inner in power.exp.atoms(sympy.Pow, sympy.exp)):
        return None  # of x^(x^x), which fill the memory
    if a.has(*UNEVALUATED):
        return None
    names = sorted(symbols, key=str)
    values = []
    for i in range(len(_POINTS) if names else 1):
        point = {name: sympy.Rational(_POINTS[(i + k) % len(_POINTS)]) + k for k, name in enumerate(names)}
        value = a.evalf(digits, subs=point)
        if not value.is_number or value.has(sympy.nan, sympy.zoo):
            return None
        cancels_out = getattr(value, "_prec", 53) == 1  # as evalf says: a value of one bit
        values.append(sympy.S.Zero if cancels_out else value)
    return values


def _agree(a: Any, b: Any, digits: int) -> bool:
    """Whether two values agree to so many digits."""
    return a == b or bool(abs(a - b) * 10**digits < abs(a) + abs(b))
