"""A formula in LaTeX by sympy: parsed to its last character by latex2sympy2, which math-verify brings.

math-verify's own ``parse`` takes the first part of a text that it understands for the whole.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import sympy
from antlr4.atn.ParserATNSimulator import ParserATNSimulator
from latex2sympy2_extended import is_expr_of_only_symbols
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from latex2sympy2_extended.logic import And
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

_MAX_LENGTH = 1000  # characters of a formula
_MAX_STEPS = 100_000  # of the parser, which tries all ways to read an ambiguous text: about a second
_MAX_BITS = 100_000  # of a number: 2004! has 19,000
_MAX_ROOT_BITS = 1000  # of a sum whose root is taken, for which sympy factors it
_PLAIN = re.compile(r"([+-]?)\s*(\d{1,4000}(?:\.\d{0,4000})?|\.\d{1,4000})(?:\s*/\s*(\d{1,4000}))?")
_FRACTION = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")
_TOO_LARGE = re.compile(r"\^\{?-?\d{6}|\d{5,}\s*\)?!|!\s*\)*!|\\binom\s*\{\d{5}|\^\{?\d+\^\{?\d+\^|\^\{\d+\^\{?\d{2,}")
_CONNECTIVE = re.compile(r"\\(?:land|lor)(?![a-z])")
UNEVALUATED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative, AppliedUndef)


class _BoundedSimulator(ParserATNSimulator):
    """ANTLR's search for the way to read a text, which ends after ``_MAX_STEPS``."""

    steps = 0

    def closureCheckingStopState(self, *arguments: Any) -> None:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise OverflowError("the formula can be read in too many ways")
        super().closureCheckingStopState(*arguments)


class _Reader(_Latex2Sympy):
    """latex2sympy2 with exact decimals, which takes nothing for a product or a mixed number that is none."""

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(latex_str)
        parser._interp = _BoundedSimulator(parser, parser.atn, parser.decisionsToDFA, parser.sharedContextCache)
        return parser

    def parse_number(self, text: str) -> sympy.Rational:
        return sympy.Rational(text.replace(",", ""))

    def convert_atom(self, atom: Any) -> Any:
        if atom.number_subexpr() and atom.number_subexpr().subexpr():
            raise ValueError("the base of a number would go unread")
        return super().convert_atom(atom)

    def convert_postfix_list(self, arr: list[Any], i: int = 0) -> Any:
        texts = [postfix.getText() for postfix in arr]
        mixed = _FRACTION.fullmatch(texts[1]) if len(arr) == 2 and texts[0].isdigit() else None
        if any(right[0] in ".0123456789" and left[-1] != "!" for left, right in pairwise(texts)):
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


def parse_formula(text: str) -> Any:
    """A formula by sympy, evaluated; None where it cannot be parsed to its end or a number in it is too large."""
    plain = _PLAIN.fullmatch(text)
    if plain and (plain[3] is None or int(plain[3])):
        value = sympy.Rational(plain[2]) / sympy.Integer(plain[3] or 1)
        return -value if plain[1] == "-" else value
    if len(text) > _MAX_LENGTH or _TOO_LARGE.search(text) or "'" in text:  # which would transpose what it follows
        return None
    exact, approx, rounded = text.partition(r"\approx")
    try:
        if _CONNECTIVE.search(text):
            return _connected(text)
        if approx:
            return _approximated(parse_formula(exact.strip()), parse_formula(rounded.strip()))
        if text.count(r"\pm") == 1 and r"\{\pm" not in text.replace(" ", ""):
            both = [parse_formula(text.replace(r"\pm", sign)) for sign in "+-"]
            return None if None in both else sympy.FiniteSet(*both)
        reader = _Reader(is_real=True, convert_degrees=True, config=ConversionConfig(lowercase_symbols=False))
        return _evaluated(reader.parse(_as_symbols(text)))
    except Exception:  # ANTLR and sympy raise whatever they like on what is no formula
        return None


def _connected(text: str) -> Any:
    """The solutions of statements about one symbol that are connected by "and", or by "or"; None where these mix."""
    parts = [parse_formula(part.strip()) for part in _CONNECTIVE.split(text)]
    sets = [solutions(part) for part in parts]
    if None in sets or len(set().union(*(part.free_symbols for part in parts))) != 1:
        return None
    connectives = {r"\land": sympy.Intersection, r"\lor": sympy.Union}
    operation, *mixed = [connectives[name] for name in set(_CONNECTIVE.findall(text))]
    return None if mixed else operation(*sets)


def solutions(a: Any) -> Any:
    """The set of x of ``1 < x``, ``1 < x < 2``, ``|x - 1| < 2`` or ``x != 1``; None for anything else."""
    if isinstance(a, sympy.Eq) and a.lhs.is_Symbol and isinstance(a.rhs, sympy.Set):  # x \in [1, 2]
        return a.rhs
    statements = parts_of(a) if isinstance(a, And) else [a]
    if not all(isinstance(x, Relational) and len(x.free_symbols) == 1 for x in statements):
        return None
    if len(a.free_symbols) != 1 or not all(_is_bounded(side) for x in statements for side in x.args):
        return None
    return sympy.Intersection(*(x.as_set() for x in statements))


def _is_bounded(side: Any) -> bool:
    """Whether a side of an inequality is a symbol, a real number or the distance of a symbol from a number."""
    if isinstance(side, sympy.Abs) and side.free_symbols:
        return side.args[0].is_polynomial() and sympy.degree(side.args[0]) == 1
    return side.is_Symbol or (side.is_number and side.is_real)


def _as_symbols(text: str) -> str:
    """The text with symbols for what the parser takes for others: I for i, gamma for a constant, ^T for nothing."""
    symbols = {"I": r"\text{I}", r"\gamma": r"\text{littlegamma}"}
    text = re.sub(r"\\[a-zA-Z]+|I", lambda m: symbols.get(m[0], m[0]), text)
    return text if "matrix" in text else re.sub(r"\^(T|\{T\})", "^{ T }", text)


def _approximated(exact: Any, rounded: Any) -> Any:
    """What stands before an "approximately equal", if what stands after it is within a hundredth."""
    if exact is None or rounded is None:
        return None
    if is_expr_of_only_symbols(exact):
        return rounded
    return exact if bool(sympy.Abs(sympy.N(exact - rounded)) <= sympy.Abs(sympy.N(exact)) / 100) else None


def parts_of(a: Any) -> list[Any]:
    """A chain's statements in order, a matrix's shape and entries, the arguments of anything else."""
    if isinstance(a, sympy.MatrixBase):
        return [*map(sympy.Integer, a.shape), *a.flat()]
    return list(a._unsorted_args if isinstance(a, And) else a.args)


def _evaluated(a: Any) -> Any:
    """A parsed formula with its numbers worked out; sums, integrals and limits stay as they are."""
    if isinstance(a, sympy.MatrixBase):
        return sympy.ImmutableMatrix(a.applyfunc(_evaluated))
    if isinstance(a, (And, Relational)):
        return a.func(*map(_evaluated, parts_of(a)), evaluate=False)
    if isinstance(a, sympy.FiniteSet):
        return sympy.FiniteSet(*map(_evaluated, a.args))
    if isinstance(a, (sympy.Tuple, sympy.Interval, sympy.Union, sympy.Intersection, sympy.Complement)):
        return a.func(*map(_evaluated, a.args))
    if not isinstance(a, sympy.Expr) or a.has(*UNEVALUATED):
        return a
    _bits(a)
    value = _with_real_roots(a).xreplace({sympy.Symbol("i", real=True): sympy.I}).doit()
    if value.has(sympy.nan, sympy.zoo):
        raise ValueError("no number")
    return value


def _with_real_roots(a: Any) -> Any:
    """-2 for the third root of -8, as at school, where sympy has a complex one."""

    def is_odd_root(x: Any) -> bool:
        is_root = isinstance(x, sympy.Pow) and x.exp.is_Rational and x.exp.q > 1 and x.exp.q % 2 == 1
        return bool(is_root and x.base.is_number and x.base.is_real and sympy.N(x.base) < 0)

    return a.replace(is_odd_root, lambda x: (-1) ** x.exp.p * (-x.base) ** x.exp)


def _bits(a: Any) -> int:
    """How long the integers of a constant may get when it is worked out; raises OverflowError beyond ``_MAX_BITS``."""
    inner = [_bits(x) for x in a.args]
    bits = sum(inner)
    if a.is_Rational:
        bits = int(a.p).bit_length() + int(a.q).bit_length()
    elif isinstance(a, (sympy.Pow, sympy.exp)) and not a.exp.free_symbols:
        base, exponent = inner[0] if isinstance(a, sympy.Pow) else 0, abs(sympy.N(a.exp))
        if base > _MAX_ROOT_BITS and a.base.has(sympy.Add) and not a.exp.is_Integer:
            raise OverflowError("a root of a number that would have to be factored")
        bits = max(base, 2) * (int(exponent) + 1) if exponent < _MAX_BITS else _MAX_BITS + 1
    elif isinstance(a, sympy.factorial) and not a.free_symbols:
        argument = abs(sympy.N(a.args[0]))
        bits = int(argument) * 16 if argument < 3000 else _MAX_BITS + 1
    if bits > _MAX_BITS:
        raise OverflowError(f"a number has more than {_MAX_BITS} bits")
    return bits
