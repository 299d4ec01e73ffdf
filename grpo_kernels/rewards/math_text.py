"""Cleans the text of an answer for a parser of LaTeX, and parts it into mathematics, a unit and words around them."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from grpo_kernels.rewards.math_words import CJK, leave_number


class AnswerText(NamedTuple):
    """An answer in parts."""

    latex: str  # LaTeX, without Markdown, dollars, boxes and commands that only format
    formula: str | None  # without unit and words around it; None where these are more than that
    unit: str = ""  # in one spelling, as "km/h" or "%"; empty without one
    is_letter_unit: bool = False  # the unit is a single letter, which may be a factor as well
    is_formula: bool = False  # the LaTeX may be one, words and letters of units included
    is_words: bool = False  # there is nothing but words


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CHARACTERS = str.maketrans(
    {
        "−": "-",
        "‐": "-",
        "∈": r"\in ",
        "γ": r"\gamma ",
        "·": r"\cdot ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "≈": r"\approx ",
        "⁄": "/",
        "²": "^2",
        "¢": " cents ",
        "。": ". ",
        "、": ", ",
        "⟨": "(",
        "⟩": ")",
    }
    | dict.fromkeys("✓✔✅☑🎉\u200b\u200c\u200d\u2060\ufeff\ufe0f\u200e\u200f")
)
_PLAIN_ROOT = re.compile(r"(?:√|(?<![\\a-zA-Z])sqrt(?![a-zA-Z]))\s*(\d+(?:\.\d+)?|[a-zA-Zπ](?![a-zA-Z])|(?=\{))")
_BOXED = re.compile(
    r"\\(?:boxed|fbox|underline|mathbf|boldsymbol|bm|textcolor\s*\{[^{}]*\})\s*\{|\\(?:text|mathrm)\s*\{(?=[^{}]*\{)"
)
_ROOT = re.compile(r"(?:(?<![a-zA-Z])\\?sqrt|√)\s*\(")
_CURRENCIES = {r"\$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "Rs": "rupee"}

# In order: what stands for a form, what replaces it. Emphasis is none inside a formula, as in 2**3**4 or 2*3*4.
_MARKUP = [
    (r"```\w*\s*(.*?)\s*```", r"\1"),
    (r"`([^`]*)`", r"\1"),
    (r"\A\s*(\*{1,3})([^*]*)\1\s*\Z", r"\2"),
    (r"(?<![^\W_])(?<![)}*])(\*{1,3})(?=[^\s*])([^*]*[^\s*])\1(?![^\W_]|[({*])", r"\2"),
    (r"(?<!\w)(?<!\\)(_{1,3})(?=[^\s_])([^_]*[^\s_])\1(?!\w)", r"\2"),
    (r"\A\s*(?:#+\s|\*\*)", ""),
    (r"\A\s*(?:Rs\.?|US)(?=\s*\$?\s*\d)", ""),
    (r"</?(?:b|i|u|em|strong|code|p|br)\s*/?>", " "),
    (r"~~[^~]*~~", " "),
    (r"\A[\s$]*(?:[→⇒∴]|=>|\\(?:[rR]ightarrow|therefore|implies)(?![a-z]))\s*", ""),
    (r"\A\s*–", "-"),
    (r"\*\*", "^"),
]
_FORMS = [
    (r"(?<=\d),\\!\s*(?=\d{3})", ","),
    (r"\\left(?![a-z])\.?|\\right(?![a-z])\.?|\\[Bb]ig+[lr]?(?![a-z])|\\displaystyle|\\limits|\\!", ""),
    # numbers side by side, the second with a sign, are no sum
    (r"(?<![\\&,\s])\s*(?:\\q?quad(?![a-z])\s*)+(?=[-+])|(?<![\\&,\s])[^\S\n]*\n\s*(?=[-+])", ", "),
    (r"\A([\s$]*(?:[a-z]\s*=\s*)?[-+]?\d+(?:[.,]\d+)*)(?:\\ |\s)+([-+]\d[\d.,]*[\s$]*)\Z", r"\1, \2"),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-z])", " "),
    (r"\\\[|\\\]|\\\(|\\\)|\\?\$", " "),
    (r"\\(?:d|t|c)frac", r"\\frac"),
    (r"\\(?:color|phantom)\s*\{[^{}]*\}|\\(?:tiny|small|normalsize|[lL]arge|LARGE|[hH]uge|bf|it)(?![a-zA-Z])", ""),
    (r"\\langle(?![a-z])", "("),
    (r"\\rangle(?![a-z])", ")"),
    (
        r"\A\s*\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid(?![a-z])|(?:\\middle)?\||:)\s*(?=.*\b\1\b)(.*)\\\}\s*\Z",
        r"\2",
    ),
    (r"\\mathbb\s*(?:R(?![a-zA-Z])|\{\s*R\s*\})", r"(-\\infty, \\infty)"),
    (r"(?<=[\w})])\s*;\s*(?=[-+(\w\\])", ", "),
    (r"\\(?:text|mbox|textbf|textit|textrm|textnormal|textsf|texttt)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\(?:mathrm|mathbf|mathit|mathsf|bm|boldsymbol|rm)\s*\{([^{}]*)\}", r"\1"),
    (r"\A\W*(?:there\s+(?:is|are)\s+)?(?:no|0|zero)\s+(?:real\s+)?solutions?\W*\Z", r"\\emptyset"),
    (r"\A\W*(?:the\s+)?empty\s+set\W*\Z", r"\\emptyset"),
    (r"(?i:\A\W*(?:[a-z]\s+is\s+)?all\s+real(?:s|\s+numbers)\W*\Z)", r"(-\\infty, \\infty)"),
    (r"\A(\W*\d+)\s+(?:in|out\s+of)\s+(\d+\W*)\Z", r"\1/\2"),
    (r"\bper\s+cent\b", "percent"),
    (r"\{:\}", ":"),
    (r"(?<=\d:\d\d)\s*([aApP])\.?\s*[mM]\b\.?", lambda m: f" {m[1].upper()}M"),
    (r"\\lbrace(?![a-z])", r"\\{"),
    (r"\\rbrace(?![a-z])", r"\\}"),
    (r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\(?:circ|degree)(?![a-z])|\\degree(?![a-z])", r"^\\circ "),
    (r"\^\\circ\s+([CF])(?![a-zA-Z])", r"^\\circ\1"),
    (r"\\varnothing(?![a-z])", r"\\emptyset "),
    (r"\\leqslant", r"\\le "),
    (r"\\geqslant", r"\\ge "),
    (r"\\(?:dots|cdots)(?![a-z])|\.\.\.", r"\\ldots "),
    (r"\\(?:begin|end)\{(?:align|aligned|gathered|equation|split)\*?\}", " "),
    (r"&(?!.*\\end\{)", " "),
    (r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ","),
    (r"(?<=\d)\{,\}(?=\d)", "."),
    (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\d|[a-zA-Z](?![a-zA-Z]))", lambda m: rf"\sqrt{m[1] or ''}{{{m[2]}}}"),
    (r"\\lg(?![a-z])", r"\\log_{10}"),
    (r"(?<![\\a-zA-Z])C_\{?(\d+)\}?\s*\^\s*\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (
        r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|sec|csc|cot|arcsin|arccos|arctan|log|ln|pi|infinity|infty|exp)(?![a-zA-Z])",
        r"\\\1",
    ),
    (r"\\infinity", r"\\infty"),
    # thousands: 1,234,567 and 1 234 567, but not [1,234), which is an interval, and 0,234
    (r"(?<![\w.,(\[])(?<!\\\{)([1-9]\d{0,2}(?:,\d{3})+)(?![\w,])", lambda m: m[1].replace(",", "")),
    (r"(?<![\w.,])(?<![\d.,] )([1-9]\d{0,2}(?: \d{3})+)(?!\w|[,.]\d| \d)", lambda m: m[1].replace(" ", "")),
    (
        r"(?<![\w.,])([1-9]\d{0,2}(?:['’]\d{3})+|[1-9]\d{0,2}(?:\.\d{3}){2,})(?![\w,])",
        lambda m: re.sub("\\D", "", m[1]),
    ),
    (
        r"(?<![\w.])(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|\((\d+)\))",
        lambda m: _repeating(m[1], m[2], m[3] or m[4]),
    ),
    (r"(?<=\d)\s?(?:st|nd|rd|th)\b", ""),
    (r",(?=\S)", ", "),
    (r"(?<![\w.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])", r"\1\\frac{\2}{\3}"),
    (r"(?<=\d)[eE]([+-]?)(\d+)(?!\w)", r" \\cdot 10^{\1\2}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\^\s*(-?\d+)", r"^{\1}"),
    # a name before a point, or before what a value is said to be
    (r"\A[A-Z]\s*(\([^()]*,[^()]*\))\Z", r"\1"),
    (
        r"\A\s*(?:[a-zA-Z]'{1,3}(?:\([a-z]\))?|\\frac\{d[a-z]\}\{d[a-z]\}|\\angle\s*[A-Z]+|P\([^()\\]*\)|[fghFGH]\(-?\d+\))\s*=(?!=)",
        "",
    ),
    (r"\A\s*[a-zA-Z]_(?:\{?\\(?:max|min|triangle\s*[A-Z]+)\}?|\{\s*[a-zA-Z]{2,}\s*\})\s*=(?!=)", ""),
    # a product, not a function: x(x + 1), but f(x)
    (r"(?<![\\a-zA-Z])(?![fghFGHPQ]\()([a-zA-Z]|\\pi\s*)\(", r"\1 \\cdot ("),
    (r"\b(and|or)\s*,", r"\1"),
    (r"(?<=[\w})\]])\s*(?:或者?|\b(?:oder|ou)\b)\s*(?=[\w\\({-])", " or "),
    (r"(?<=[\d})\]])\s*(?:和|以及|\b(?:und|et)\b)\s*(?=[\d\\({-])", " and "),
    (r",?\s+(and|or)\s+(?=[^a-zA-Z\s]|[a-zA-Z]\b)", lambda m: _connective(m[1], m.string)),
    (r"\b(?:either|both)\s+", ""),
    (r"\s*\n\s*(?=[a-z]\s*=)", ", "),
    (r"(?<=[\d}])\s+(hundred|thousand|million|billion|trillion)\b", lambda m: rf"\cdot 10^{{{_POWERS[m[1]]}}}"),
]
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MARKUP_RULES = [(re.compile(pattern, re.DOTALL), new) for pattern, new in _MARKUP]
_FORM_RULES = [(re.compile(pattern), new) for pattern, new in _FORMS]

# A line: one unit, first the spelling that stands for all.
_UNITS = """
km kilometer kilometers kilometre kilometres|cm centimeter centimeters centimetre centimetres|mm millimeter millimeters
m meter meters metre metres|mile miles mi|foot feet ft|inch inches|yard yards yd|acre acres|hectare hectares
km/h kmph kph|mile/h mph
kg kilogram kilograms|gram grams g|mg milligram milligrams|pound pounds lb lbs|ounce ounces oz|ton tons tonne tonnes
L l liter liters litre litres|mL ml milliliter milliliters|gallon gallons gal|cup cups|unit units
s second seconds sec secs|min minute minutes mins|h hour hours hr hrs|day days|week weeks|month months|year years yr yrs
ms millisecond milliseconds|Hz hertz|kHz|N newton newtons|J joule joules|kJ|W watt watts|kW|V volt volts
A amp amps ampere amperes|\\Omega Ω ohm ohms|Pa pascal pascals
kPa|MPa|kN|nm|eV|MeV|mA|mV|MHz|GHz|k\\Omega kΩ kohm
mol moles|K kelvin|degree degrees deg ^\\circ|^\\circC|^\\circF
rad radian radians|dollar dollars USD bucks|cent cents|euro euros EUR|GBP|yen JPY|rupee rupees INR Rs|% \\% percent pct
"""
_UNIT_NAMES = {
    spelling: names[0]
    for names in (line.split() for line in _UNITS.replace("\n", "|").split("|") if line)
    for spelling in names
}
_UNIT = "(?:" + "|".join(re.escape(name) for name in sorted(_UNIT_NAMES, key=len, reverse=True)) + ")(?![a-zA-Z])"
_UNITS_AT_END = (
    rf"(?:(?:/|per\s|an?\s)\s*)?(?:(?:sq|square|cu|cubic)\.?\s+)?{_UNIT}\.?(?:\s*\^\{{?[23]\}}?)?"
    rf"(?:\s*(?:/|per\s|a\s|\\cdot|(?<=\s))\s*{_UNIT}(?:\s*\^\{{?(?:[23]|-[1-3])\}}?)?)*"
)
_SHORT_WORDS = (
    "[iI]s|[oO]f|[iI]n|[tT]o|[aA]t|[iI]t|[wW]e|[sS]o|[aA]n|[bB]y|[oO]n|[hH]e|[mM]y|[aA]s|[iI]f|[oO]r|[nN]o|be|up|"
    "[lL][aeo]|[iI]l|[eE][lsn]|[aA]u|[uU]n|de|us|ne|é|è|ha"
)
_PROSE_WORD = (
    rf"(?<![\\a-zA-Z])(?:(?:[iI]t|[hH]e)['’]s(?![a-zA-Z])|"
    rf"[iI]l\s+y\s+a(?![a-zA-Z])|(?:{_SHORT_WORDS})(?![a-zA-Z])|"
    rf"[a-zA-ZÀ-ÖØ-öø-ÿ]{{3,}}(?:['’-][a-zA-Z]+)*|[^\W\d_a-zA-Zµ-ÿΑ-ω]+)"
)
_NEXT_WORD = rf"(?:[aAI](?=\s+[a-zA-Z]{{2,}})|{_PROSE_WORD})"
_HEAD = re.compile(rf"\s*(?:{_NEXT_WORD}(?:[\s,;:]|\.(?!\d))*)+")
_STATEMENT = re.compile(r"[^\W\d][^\\\d=<>+*/^|(){}\[\]]*\b(?:is|are|equals)\s+", re.IGNORECASE)  # The value of x is
_TAIL = re.compile(
    rf"(?P<unit>(?:(?<=\d)|(?<=[\s}})!])|(?=\\|%|\^))\s*{_UNITS_AT_END})?"
    rf"(?P<words>(?:(?:[\s,.;:]+|(?<=\d)(?=\(?[{CJK}]))"
    rf"(?:{_NEXT_WORD}(?:/[{CJK}]+)?|\((?:{_PROSE_WORD}[\s,.]*)+\)))*)[\s.,;:]*\Z"
)
_OPERATOR = re.compile(r"\s*(?:[+*/^_<>!)]|-\s|\\(?:cdot|times|div|le|ge|pm)(?![a-z]))")
_INNER_WORD = re.compile(rf"(?<!\S){_PROSE_WORD}")
_MEMBER_UNIT = re.compile(rf"(?<=[\d}}\s])({_UNITS_AT_END})(?=\s*,)")  # of one of a list
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_BASE = re.compile(r"\(?(\w+)\)?(?:_\{?\(?|\s+(?:in\s+)?base\s+)(\d+)\)?\}?")
_THOUSANDS = re.compile(r"\d[kK](?!\w)")


def split_answer(text: str) -> AnswerText:
    """An answer's text in parts. A word that changes a number ("not 3", "3 or more", "half of 3") is no mere word.

    Example:
        >>> split_answer("The speed is **1,200 km/h**.")[:3]
        ('The speed is 1200 km/h', '1200', 'km/h')
    """
    currency = _currency(text)
    latex = clean(text)
    base = _BASE.fullmatch(latex)
    if base and base[1][0].isdigit():
        return AnswerText(latex, base[1], unit=f"base {base[2]}")
    statement = _STATEMENT.match(latex)
    head = _HEAD.match(latex, statement.end() if statement else 0) or statement
    before = latex[: head.end()] if head else ""
    rest = latex[len(before) :]
    if before and not rest.strip(" .,;:!?"):
        return AnswerText(latex, None, is_words=True)
    if before and _OPERATOR.match(rest):
        before, rest = "", latex  # of abc + 3 nothing is a word
    tail = _TAIL.search(rest)
    formula = re.sub(r"\A\s*(?:=|\\approx)\s*", "", rest[: tail.start()] if tail else rest)
    formula = formula.lstrip(" ,;:").rstrip(" .,;:")
    unit, is_letter = _unit_of(tail["unit"] or "" if tail else "")
    if unit:
        formula = _MEMBER_UNIT.sub(lambda m: "" if _unit_of(m[1])[0] == unit else m[0], formula)
    after = tail["words"] if tail else ""
    is_function = before[-1:].isalpha() and rest.startswith("(")
    is_statement = before and rest.lstrip().startswith("=")
    is_more = is_function or not formula or _INNER_WORD.search(formula) or _THOUSANDS.search(latex)
    is_more = is_more or bool(currency and unit == "K")
    is_more = is_more or not leave_number(before + "=" * bool(is_statement), after)
    if unit == "degree" and _TRIGONOMETRY.search(formula):
        return AnswerText(latex, None, is_formula=not is_more and not after)  # there it is no unit, but pi/180
    is_formula = not before and not after and (is_letter or not unit + currency) and not _INNER_WORD.search(formula)
    return AnswerText(latex, None if is_more else formula, unit or currency, is_letter, is_formula)


def clean(text: str) -> str:
    """A text as LaTeX for the parser: no Markdown, delimiters, boxes, thousands separators or signs of Unicode."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    text = re.sub(r"[¼-¾⅐-⅞]", lambda m: " {}/{}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
    text = unicodedata.normalize("NFKC", text.replace("ℝ", r"\mathbb{R}")).translate(_CHARACTERS)
    text = _PLAIN_ROOT.sub(lambda m: rf"\sqrt{{{m[1]}}}" if m[1] else r"\sqrt", text)
    for rule, new in _MARKUP_RULES:
        text = rule.sub(new, text)
    text = _rewrap(_BOXED, "{}", text, " ", " ")
    text = _rewrap(_ROOT, "()", text, r"\sqrt{", "}")
    for currency in "€£¥₹":
        text = text.replace(currency, " ")
    for rule, new in _FORM_RULES:
        text = rule.sub(new, text)
    text = re.sub(r"[^\S\n]+", " ", text).strip().rstrip(" .,;:")
    text = re.sub(r"\A([\"'])(.*)\1\Z", r"\2", text).rstrip(" .,;:")
    text = re.sub(rf"(?<=[\d}}]) *\\frac\{{\s*({_UNIT})\s*\}}\{{\s*({_UNIT})\s*\}}\Z", r" \1/\2", text)
    text = re.sub(rf"\A\\\{{([^{{}}]*,[^{{}}]*?{_UNITS_AT_END})\s*\\\}}\Z", r"\1", text)  # a set with units is a list
    text = re.sub(rf"(?<=[\d}}]) +[(\[]({_UNITS_AT_END})[)\]]\Z", r" \1", text)
    return re.sub(r"\A(?:=|\\approx)\s*", "", text)


def _repeating(integer: str, start: str, period: str) -> str:
    """A decimal without end as a fraction: 0.1\\overline{6} as (16 - 1)/90."""
    top = int(integer + start + period) - int(integer + start or 0)
    return rf"\frac{{{top}}}{{{'9' * len(period)}{'0' * len(start)}}}"


def _connective(word: str, text: str) -> str:
    """What stands for "and" or "or" in a text: they are the same in a list of answers, but not between inequalities."""
    is_inequality = re.search(r"[<>]|\\(?:[lg]e?|[lg]eq|ne)(?![a-z])", text)
    return {"and": r" \land ", "or": r" \lor "}[word] if is_inequality else ", "


def _rewrap(opening: re.Pattern[str], brackets: str, text: str, before: str, after: str) -> str:
    """What stands between an opening and its closing bracket put between two other texts; as it is without one."""
    while start := opening.search(text):
        depth = 1
        for end in range(start.end(), len(text)):
            depth += (text[end] == brackets[0]) - (text[end] == brackets[1])
            if depth == 0:
                break
        else:
            return text
        text = f"{text[: start.start()]}{before}{text[start.end() : end]}{after}{text[end + 1 :]}"
    return text


def _currency(text: str) -> str:
    for sign, name in _CURRENCIES.items():
        if sign in text:
            return name
    return "dollar" if text.count("$") % 2 else ""  # a pair of dollars delimits a formula


def _unit_of(text: str) -> tuple[str, bool]:
    """A unit in one spelling, and whether it is a single letter."""
    text = text.strip().rstrip(".")
    text = re.sub(r"^(sq|square)\.?\s+(.*)", r"\2^2", re.sub(r"^(cu|cubic)\.?\s+(.*)", r"\2^3", text))
    spelled = re.sub(_UNIT, lambda m: _UNIT_NAMES[m[0]], re.sub(r"\s*(?:per|a)\s+", "/", text))
    spelled = re.sub(r"\s+(\S+?)\s*\^\{?-([1-3])\}?", lambda m: f"/{m[1]}" + f"^{m[2]}" * (m[2] > "1"), spelled)
    spelled = re.sub(r"(?<=\w)(?:\s+|\s*\\cdot\s*)(?=\w)", "*", spelled)
    return re.sub(r"[\s{}]", "", spelled), len(text) == 1 and text.isalpha()
