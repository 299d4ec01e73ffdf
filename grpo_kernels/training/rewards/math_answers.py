"""Answers as mathematics: parsed to the last character by latex2sympy2, which math-verify brings, and compared exactly.

math-verify's own ``parse`` takes the first part of a text that it understands, and its ``verify`` rounds numbers to six
decimals; either would pay for wrong answers.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended import is_expr_of_only_symbols
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from latex2sympy2_extended.logic import And
from sympy.core.relational import Relational

from grpo_kernels.training.rewards.math_text import split_answer

_MAX_LENGTH = 1000  # characters of a formula
_MAX_DEPTH = 12  # of its brackets: the parser tries ways to read each
_MAX_BITS = 100_000  # of a number: 2004! has 19,000
_DIGITS = 50  # to which irrational values have to agree, besides those of the integers in them
_POINTS = ["0.3713", "-0.8329", "5.3117", "-17.7139", "1234.5671", "-98765.4321"]  # where formulas have to agree

_PLAIN = re.compile(r"([+-]?)\s*(\d{1,4000}(?:\.\d{0,4000})?|\.\d{1,4000})(?:\s*/\s*(\d{1,4000}))?")
_FRACTION = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")
_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")  # which says nothing: 3 4 is not 34
_PUNCTUATION = re.compile(r"[().,:;!?\"'*`\[\]{}]+")
_ANNOUNCEMENT = re.compile(
    r"\A(?:so |thus |therefore )?(?:the )?(?:final |correct |right )?(?:answer|option|choice)(?: is)? "
)
_CHOICE = re.compile("[A-J]|[(][A-J][)]")
_TOO_LARGE = re.compile(r"\^\{?-?\d{6}|\d{5,}\s*\)?!|!\s*\)*!|\\binom\s*\{\d{5}|\^\{?\d+\^\{?\d+\^|\^\{\d+\^\{?\d{2,}")
_UNEVALUATED = (
    sympy.Integral,
    sympy.Sum,
    sympy.Product,
    sympy.Limit,
    sympy.Derivative,
    sympy.core.function.AppliedUndef,
)
_STEPS = (sympy.floor, sympy.ceiling, sympy.Mod, sympy.factorial, sympy.gamma, sympy.binomial)  # points do not tell


class MathAnswer(NamedTuple):
    """An answer as it was read, in full."""

    text: str  # without white space and markup
    whole: Any  # the text as a formula, letters of units and words as factors; None where that cannot be parsed
    bare: Any  # without a unit and words around it; None as above, or where these are no mere words
    unit: str
    is_letter_unit: bool
    words: str  # the text in lower case, without punctuation
    is_words: bool  # it is nothing but words

    @property
    def value(self) -> Any:
        return self.whole if self.bare is None else self.bare


class _Reader(_Latex2Sympy):
    """latex2sympy2 with exact decimals, which takes nothing for a product or a mixed number that is none."""

    def parse_number(self, text: str) -> sympy.Rational:
        return sympy.Rational(text.replace(",", ""))

    def convert_atom(self, atom: Any) -> Any:
        if atom.number_subexpr() and atom.number_subexpr().subexpr():
            raise ValueError("the base of a number would go unread")
        return super().convert_atom(atom)

    def convert_postfix_list(self, arr: list[Any], i: int = 0) -> Any:
        texts = [postfix.getText() for postfix in arr]
        mixed = _FRACTION.fullmatch(texts[1]) if len(arr) == 2 and texts[0].isdigit() else None
        if any(right[0] in ".0123456789" for _, right in pairwise(texts)):
            raise ValueError("two numbers side by side are no number")
        if mixed:
            if int(mixed[1]) >= int(mixed[2]):
                raise ValueError("a mixed number has a proper fraction")
            return sympy.Integer(texts[0]) + sympy.Rational(int(mixed[1]), int(mixed[2]))
        product = self.convert_postfix(arr[0])
        for postfix in arr[1:]:
            factor = self.convert_postfix(postfix)
            matrices = getattr(product, "is_Matrix", False) or getattr(factor, "is_Matrix", False)
            product = (self.mat_mul_flat if matrices else self.mul_flat)(product, factor)
        return product


@lru_cache(maxsize=4096)
def read_answer(text: str) -> MathAnswer:
    """Reads a text that is an answer. What is not mathematics from its first character to its last stays None."""
    parts = split_answer(text)
    words = " ".join(_PUNCTUATION.sub(" ", parts.whole).split()).casefold()
    bare = None if parts.formula is None else parse_formula(parts.formula)
    whole = None
    if parts.is_formula:
        whole = bare if parts.formula == parts.whole else parse_formula(parts.whole)
    return MathAnswer(
        text=_SPACE.sub("", parts.whole),
        whole=whole,
        bare=bare,
        unit=parts.unit,
        is_letter_unit=parts.is_letter_unit,
        words=_ANNOUNCEMENT.sub("", words) or words,
        is_words=parts.is_words,
    )


def same_answer(gold: MathAnswer, given: MathAnswer) -> bool:
    """Whether two answers are the same text or equal as mathematics, and have no different units."""
    if gold.text and gold.text == given.text:
        return True
    if gold.is_words or _CHOICE.fullmatch(gold.text):
        return gold.words == given.words
    if gold.whole is not None and given.whole is not None and equal(gold.whole, given.whole):
        return True
    if gold.is_letter_unit or gold.value is None or given.bare is None:
        return False
    if "%" in (gold.unit, given.unit) and gold.unit != given.unit and {gold.unit, given.unit} == {"%", ""}:
        percent, other = (gold, given) if gold.unit else (given, gold)
        return equal(percent.value, other.value) or equal(_scaled(percent.value), other.value)
    if gold.unit and given.unit and gold.unit != given.unit:
        return False
    return equal(gold.value, given.bare)


def spelling_of_answer(answer: MathAnswer) -> str | None:
    """One text for answers that are the same; None where not all of an answer was read."""
    if answer.is_words or re.fullmatch("[a-j]", answer.words):
        return answer.words
    return None if answer.value is None else spelling(answer.value)


def parse_formula(text: str) -> Any:
    """A formula by sympy, evaluated; None where it cannot be parsed to its end or a number in it is too large."""
    plain = _PLAIN.fullmatch(text)
    if plain and (plain[3] is None or int(plain[3])):
        value = sympy.Rational(plain[2]) / sympy.Integer(plain[3] or 1)
        return -value if plain[1] == "-" else value
    if len(text) > _MAX_LENGTH or _depth(text) > _MAX_DEPTH or _TOO_LARGE.search(text):
        return None
    exact, approx, rounded = text.partition(r"\approx")
    try:
        if approx:
            return _approximated(parse_formula(exact.strip()), parse_formula(rounded.strip()))
        reader = _Reader(is_real=True, convert_degrees=True, config=ConversionConfig(lowercase_symbols=False))
        return _evaluated(reader.parse(text))
    except Exception:  # ANTLR and sympy raise whatever they like on what is no formula
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
    try:
        return str(a.as_set())
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        pass
    if isinstance(a, And):
        return " and ".join(sorted(map(_spelled_relation, a._unsorted_args)))
    a = a.reversed if isinstance(a, (sympy.Gt, sympy.Ge)) else a
    return f"{type(a).__name__}({spelling(a.lhs)}; {spelling(a.rhs)})"


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _approximated(exact: Any, rounded: Any) -> Any:
    """What stands before an "approximately equal", if what stands after it is within a hundredth."""
    if exact is None or rounded is None:
        return None
    if is_expr_of_only_symbols(exact):
        return rounded
    return exact if bool(sympy.Abs(sympy.N(exact - rounded)) <= sympy.Abs(sympy.N(exact)) / 100) else None


def _scaled(percent: Any) -> Any:
    return percent / 100 if isinstance(percent, sympy.Expr) else percent


def _evaluated(a: Any) -> Any:
    """A parsed formula with its numbers worked out; sums, integrals and limits stay as they are."""
    if isinstance(a, And):
        return And(*map(_evaluated, a._unsorted_args), evaluate=False)
    if isinstance(a, Relational):
        return a.func(_evaluated(a.lhs), _evaluated(a.rhs), evaluate=False)
    if isinstance(a, sympy.FiniteSet):
        return sympy.FiniteSet(*map(_evaluated, a.args))
    if isinstance(a, sympy.Interval):
        return sympy.Interval(_evaluated(a.start), _evaluated(a.end), a.left_open, a.right_open)
    if isinstance(a, sympy.MatrixBase):
        return sympy.ImmutableMatrix(a.applyfunc(_evaluated))
    if isinstance(a, (sympy.Tuple, sympy.Union, sympy.Intersection, sympy.Complement)):
        return a.func(*map(_evaluated, a.args))
    if not isinstance(a, sympy.Expr) or a.has(*_UNEVALUATED):
        return a
    _bits(a)
    value = a.xreplace({sympy.Symbol("i", real=True): sympy.I}).doit()
    if value.has(sympy.nan, sympy.zoo):
        raise ValueError("no number")
    return value


def _bits(a: Any) -> int:
    """How long the integers of a constant may get when it is worked out; raises OverflowError beyond ``_MAX_BITS``."""
    if a.is_Rational:
        bits = int(a.p).bit_length() + int(a.q).bit_length()
    elif isinstance(a, (sympy.Pow, sympy.exp)) and not a.exp.free_symbols:
        _bits(a.exp)
        exponent = abs(sympy.N(a.exp))
        bits = max(_bits(a.base), 2) * (int(exponent) + 1) if exponent < _MAX_BITS else _MAX_BITS + 1
    elif isinstance(a, sympy.factorial) and not a.free_symbols:
        _bits(a.args[0])
        argument = abs(sympy.N(a.args[0]))
        bits = int(argument) * 16 if argument < 3000 else _MAX_BITS + 1
    else:
        bits = sum(map(_bits, a.args))
    if bits > _MAX_BITS:
        raise OverflowError(f"a number has more than {_MAX_BITS} bits")
    return bits


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
    if isinstance(a, sympy.Set) or isinstance(b, sympy.Set):
        try:
            a, b = (x if isinstance(x, sympy.Set) else x.as_set() for x in (a, b))
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            return False
        return _equal_sets(a, b)
    if not (isinstance(a, Relational) and isinstance(b, Relational)):
        return False
    if type(a) is not type(b) and type(a) is type(b.reversed):
        b = b.reversed
    if type(a) is not type(b):
        return False
    try:
        if equal(a.lhs, b.lhs) and equal(a.rhs, b.rhs):
            return True
        ratio = sympy.cancel((a.lhs - a.rhs) / (b.lhs - b.rhs))
    except Exception:  # sides that are no expressions, as of x = {1, 2}
        return False
    return bool(ratio.is_number and (ratio.is_positive or (ratio.is_nonzero and isinstance(a, (sympy.Eq, sympy.Ne)))))


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
        found = next((i for i, b in enumerate(rest) if equal(a, b)), None)
        if found is None:
            return False
        rest.pop(found)
    return True


def _equal_expressions(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if a.is_infinite or b.is_infinite or a.has(*_UNEVALUATED) or b.has(*_UNEVALUATED):
        return False
    symbols = a.free_symbols | b.free_symbols
    if symbols and (a.has(*_STEPS) or b.has(*_STEPS)):
        return False
    if not symbols and (_is_rounding(a, b) or _is_rounding(b, a)):
        return True
    if a.is_Rational and b.is_Rational:
        return False
    digits = _DIGITS + sum(int(n).bit_length() // 3 for x in (a, b) for n in x.atoms(sympy.Integer))
    left, right = _values(a, symbols, digits), _values(b, symbols, digits)
    return (
        left is not None
        and right is not None
        and all(_agree(*pair, digits - 10) for pair in zip(left, right, strict=True))
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
