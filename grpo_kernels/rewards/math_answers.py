"""Answers as mathematics: read in full, and compared exactly, where math-verify's ``verify`` rounds to six decimals."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended import is_expr_of_only_symbols
from latex2sympy2_extended.logic import And
from sympy.core.relational import Relational

from grpo_kernels.rewards.math_formula import UNEVALUATED, parse_formula, solutions
from grpo_kernels.rewards.math_text import AnswerText, split_answer

_LONGEST = 2000  # characters of an answer
_DIGITS = 50  # to which irrational values have to agree, besides those of the integers in them
_MOST_DIGITS = 20_000
_POINTS = ["0.3713", "-0.8329", "5.3117", "-17.7139", "1234.5671", "-98765.4321"]  # where formulas have to agree

_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")  # which says nothing: 3 4 is not 34
_PUNCTUATION = re.compile(r"[().,:;!?\"'*`\[\]{}]+")
_ANNOUNCEMENT = re.compile(
    r"\s*(?:(?:so|thus|therefore|hence|the|final|correct|right|die|la|le|richtige|bonne)\s+)*"
    r"(?:(?:answer|option|choice|antwort|respuesta|opción|réponse)[\s:]*"
    r"(?:(?:is|the|correct|option|choice|ist|es|est|correcta)\b[\s:]*)*|(?:(?:故|所以|正确|答案|选项|选|選|应|为|是)[\s:]*)+)",
    re.IGNORECASE,
)
# A choice alone, or with what it says; one that words deny or join to another is none.
_CHOICE = re.compile(
    r"(?:\(\s*([A-J])\s*\)|([A-J])(?:[.:)]|\s*\Z))[\s.:)]*(?P<rest>.*)|([A-J])\s+\((?P<inner>[^()]*)\)\s*", re.DOTALL
)
_NO_CHOICE = re.compile(
    r"\b(?:wrong|incorrect|false|maybe|perhaps|not\s+(?:right|correct|the)|isn['’]t)\b|[不错錯]"
    r"|(?<![A-Za-z])(?:\([A-Ja-j]\)|[A-Ja-j][).:](?!\d))|(?:\b(?:or|and|is|was)|,)\s+[A-J]\b|\A(?:(?:is|was|[A-HJ])\b|[,&/+=-])",
)
_STEPS = (sympy.floor, sympy.ceiling, sympy.Mod)  # points do not tell them apart


class MathAnswer(NamedTuple):
    """An answer as it was read, in full."""

    text: str  # without white space and markup
    as_formula: Any  # the text as a formula, letters of units and words as factors; None where that cannot be parsed
    without_unit: Any  # without a unit and words around it; None as above, or where these are no mere words
    unit: str
    is_letter_unit: bool
    words: str  # the text in lower case, without punctuation
    choice: str  # B of "Option B", "(B)" and "B. Paris"; empty where it is none
    is_words: bool  # it is nothing but words

    @property
    def value(self) -> Any:
        return self.as_formula if self.without_unit is None else self.without_unit


@lru_cache(maxsize=4096)
def read_answer(text: str) -> MathAnswer:
    """Reads a text that is an answer. What is not mathematics from its first character to its last stays None.

    So does a text too long to be an answer, which would take too long to read.
    """
    text = re.sub(r"[^\S\n]+", " ", text).strip()
    if len(text) > _LONGEST:
        return MathAnswer(_SPACE.sub("", text), None, None, "", False, text, "", True)
    parts = split_answer(text)
    latex = parts.latex
    choice, said = _choice_of(latex)
    if choice:  # what it says may be an answer, but its letter is no formula
        parts = split_answer(said) if said else AnswerText(latex, None, is_words=parts.is_words)
    words = " ".join(_PUNCTUATION.sub(" ", latex).split()).casefold()
    without_unit = None if parts.formula is None else parse_formula(parts.formula)
    as_formula = None
    if parts.is_formula:
        as_formula = without_unit if parts.formula == parts.latex else parse_formula(parts.latex)
    return MathAnswer(
        text=_SPACE.sub("", latex),
        as_formula=as_formula,
        without_unit=without_unit,
        unit=parts.unit,
        is_letter_unit=parts.is_letter_unit,
        words=_ANNOUNCEMENT.sub("", words, count=1) or words,
        choice=choice,
        is_words=parts.is_words,
    )


def same_answer(gold: MathAnswer, answer: MathAnswer) -> bool:
    """Whether two answers are the same text or equal as mathematics, and have no different units."""
    try:
        return _same_answer(gold, answer)
    except Exception:  # sympy raises whatever it likes, and no completion may end a training
        return False


def _same_answer(gold: MathAnswer, answer: MathAnswer) -> bool:
    has_other_unit = bool(gold.unit and answer.unit and gold.unit != answer.unit)
    if gold.text and gold.text == answer.text:
        return not has_other_unit
    if gold.choice or gold.is_words:
        is_same = gold.words == answer.words or bool(gold.choice and gold.choice == answer.choice)
        if is_same or answer.choice or gold.value is None:
            return is_same
    if gold.as_formula is not None and answer.as_formula is not None and equal(gold.as_formula, answer.as_formula):
        return True
    if has_other_unit or gold.value is None or answer.without_unit is None or (gold.is_letter_unit and not answer.unit):
        return False
    if {gold.unit, answer.unit} == {"%", ""}:
        percent, other = (gold, answer) if gold.unit else (answer, gold)
        return equal(percent.value, other.value) or equal(_scaled(percent.value), other.value)
    return equal(gold.value, answer.without_unit)


def _choice_of(latex: str) -> tuple[str, str]:
    """B and 12 of "Option B" that says 12; two empty texts where there is no choice."""
    announcement = _ANNOUNCEMENT.match(latex)
    choice = _CHOICE.fullmatch(latex[announcement.end() :] if announcement else latex)
    said = choice and (choice["rest"] or choice["inner"] or "")
    if choice is None or _NO_CHOICE.search(said):
        return "", ""
    return choice[1] or choice[2] or choice[4], said


def spelling_of_answer(answer: MathAnswer) -> str | None:
    """One text for answers that are the same; None where not all of an answer was read."""
    if answer.choice or answer.is_words:
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
        a, b = (x if _assigned(x) is None else _assigned(x) for x in (a, b))
    if isinstance(a, (Relational, And)) or isinstance(b, (Relational, And)):
        return _equal_relations(a, b)
    if isinstance(a, sympy.FiniteSet) or isinstance(b, sympy.FiniteSet):
        a, b = (x if isinstance(x, (sympy.Set, sympy.Tuple)) else sympy.FiniteSet(x) for x in (a, b))
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(equal, a.flat(), b.flat()))
    if isinstance(a, sympy.Set) and isinstance(b, sympy.Set):
        return _equal_sets(a, b)
    if isinstance(a, sympy.Tuple) and isinstance(b, sympy.Tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return _equal_expressions(a, b)
    return a == b


def spelling(a: Any) -> str:
    """One text for all formulas that are equal: exact for rationals, 30 digits for other numbers and at ``_POINTS``."""
    assigned = _assigned(a)
    if assigned is not None:
        return spelling(assigned)
    if isinstance(a, (Relational, And)):
        return _spelled_relation(a)
    if isinstance(a, sympy.FiniteSet) and len(a) > 1:
        return "{" + ", ".join(sorted(map(spelling, a.args))) + "}"
    if isinstance(a, sympy.FiniteSet) and len(a) == 1:
        return spelling(a.args[0])
    if isinstance(a, sympy.Tuple):
        return "(" + ", ".join(map(spelling, a)) + ")"
    if isinstance(a, sympy.MatrixBase):
        return f"{a.shape}" + ", ".join(map(spelling, a.flat()))
    if a.is_Rational and max(abs(a.p), a.q) > 10**4000:  # Python's limit for decimal digits is 4300
        return f"{int(a.p):#x}/{int(a.q):#x}"
    if isinstance(a, sympy.Expr) and not a.is_Rational and not a.is_Symbol:
        names = ", ".join(sorted(map(str, a.free_symbols)))
        values = [str(sympy.N(_zero(value), 30)) for value in _values(a, a.free_symbols, _DIGITS) or []]
        return f"{names}: {', '.join(values)}" if names and values else (values or [str(a)])[0]
    return str(a)


def _spelled_relation(a: Any) -> str:
    solved = solutions(a)
    if solved is not None:
        return str(solved)
    if isinstance(a, And):
        return " and ".join(sorted(map(_spelled_relation, a._unsorted_args)))
    a = a.reversed if isinstance(a, (sympy.Gt, sympy.Ge)) else a
    return f"{type(a).__name__}({spelling(a.lhs)}; {spelling(a.rhs)})"


def _scaled(percent: Any) -> Any:
    return percent / 100 if isinstance(percent, sympy.Expr) else percent


def _is_statement(a: Any) -> bool:
    return isinstance(a, (Relational, And)) or (isinstance(a, sympy.FiniteSet) and any(map(_is_statement, a.args)))


def _without_steps(a: Any) -> Any:
    """``x = 5`` of ``x = 2 + 3 = 5``, and 5 of ``2 + 3 = 5``."""
    if _assigned(a) is None or isinstance(a, sympy.FiniteSet):
        return a
    first = a._unsorted_args[0].lhs if isinstance(a, And) else a.lhs
    return sympy.Eq(first, _assigned(a), evaluate=False) if is_expr_of_only_symbols(first) else _assigned(a)


def _assigned(a: Any) -> Any:
    """5 of ``x = 5``, ``f(x) = 5`` and ``2 + 3 = 5``; None where a is no such equation."""
    if isinstance(a, And) and all(isinstance(x, sympy.Eq) for x in a._unsorted_args):
        last = a._unsorted_args[-1].rhs
        steps = [x.rhs for x in a._unsorted_args[:-1]]
        first = _assigned(sympy.Eq(a._unsorted_args[0].lhs, last, evaluate=False))
        return last if first is not None and all(equal(x, last) for x in steps) else None
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


def _equal_relations(a: Any, b: Any) -> bool:
    if isinstance(a, And) and isinstance(b, And):
        return len(a._unsorted_args) == len(b._unsorted_args) and _match(a._unsorted_args, b._unsorted_args)
    solved = [x if isinstance(x, sympy.Set) else solutions(x) for x in (a, b)]
    if None not in solved:
        is_same_symbol = a.free_symbols == b.free_symbols or isinstance(a, sympy.Set) or isinstance(b, sympy.Set)
        return is_same_symbol and _equal_sets(*solved)
    if not (isinstance(a, Relational) and isinstance(b, Relational)):
        return False
    b = b.reversed if type(a) is not type(b) else b
    if type(a) is not type(b):
        return False
    if equal(a.lhs, b.lhs) and equal(a.rhs, b.rhs):
        return True
    if not all(isinstance(side, sympy.Expr) for side in (a.lhs, a.rhs, b.lhs, b.rhs)):
        return False
    return _is_multiple(a.lhs - a.rhs, b.lhs - b.rhs, any_sign=isinstance(a, (sympy.Eq, sympy.Ne)))


def _is_multiple(a: Any, b: Any, any_sign: bool) -> bool:
    """Whether one expression is a constant other than zero times the other; a positive one unless of any sign."""
    symbols = a.free_symbols | b.free_symbols
    left, right = _values(a, symbols, _DIGITS), _values(b, symbols, _DIGITS)
    if left is None or right is None or _zero(left[0]) == 0 or _zero(right[0]) == 0:
        return False
    ratio = left[0] / right[0]
    products = [_agree(x, ratio * y, _DIGITS - 10) for x, y in zip(left, right, strict=True)]
    return all(products) and bool(any_sign or ratio > 0)


def _equal_sets(a: Any, b: Any) -> bool:
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        ends = (a.left_open, a.right_open) == (b.left_open, b.right_open)
        return bool(ends and equal(a.start, b.start) and equal(a.end, b.end))
    if type(a) is type(b) and isinstance(a, (sympy.FiniteSet, sympy.Union)):
        return len(a.args) == len(b.args) and _match(a.args, b.args)
    return a == b


def _match(left: Any, right: Any) -> bool:
    """Whether each of left equals one of right that no other equals."""
    rest = list(right)
    for a in left:
        match = next((i for i, b in enumerate(rest) if equal(a, b)), None)
        if match is None:
            return False
        rest.pop(match)
    return True


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
    integers = [n for x in (a, b) for rational in x.atoms(sympy.Rational) for n in (rational.p, rational.q)]
    digits = _DIGITS + sum(int(n).bit_length() // 3 for n in integers) + _digits_of_powers(a) + _digits_of_powers(b)
    if digits > _MOST_DIGITS:
        return False
    left, right = _values(a, symbols, digits), _values(b, symbols, digits)
    return (
        left is not None
        and right is not None
        and all(_agree(*pair, digits - 10) for pair in zip(left, right, strict=True))
    )


def _digits_of_powers(a: Any) -> int:
    """How many decimal digits the irrational powers of a constant may have before the point, at most."""
    powers = [x for x in a.atoms(sympy.Pow) if x.exp.is_Integer and x.base.is_number and not x.base.is_Rational]
    return sum(int(abs(x.exp) * abs(sympy.log(abs(sympy.N(x.base)), 10))) + 1 for x in powers if sympy.N(x.base) != 0)


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
        values.append(value)
    return values


def _agree(a: Any, b: Any, digits: int) -> bool:
    """Whether two values agree to so many digits."""
    a, b = _zero(a), _zero(b)
    return a == b or bool(abs(a - b) * 10**digits < abs(a) + abs(b))


def _zero(value: Any) -> Any:
    """0 for a value of one bit, which evalf gives what cancels out."""
    return sympy.S.Zero if getattr(value, "_prec", 53) == 1 else value
