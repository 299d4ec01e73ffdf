"""The text of an answer: cleaned for a parser of LaTeX, and parted into mathematics, a unit and words around them."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_CURRENCIES = {r"\$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "Rs": "rupee"}
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# A line: one unit, first the spelling that stands for all. Names of three letters and more have a plural with s.
_UNITS = """
km kilometer kilometre|cm centimeter centimetre|mm millimeter|m meter metre|mile mi|foot feet ft|inch inches|yard yd
acre|hectare|km/h kmph kph|mile/h mph|kg kilogram|gram g|mg milligram|pound lb lbs|ounce oz|ton tonne|L l liter litre
mL ml milliliter|gallon gal|cup|unit|s second sec|min minute|h hour hr hrs|day|week|month|year yr yrs|ms millisecond
Hz hertz|kHz|N newton|J joule|kJ|W watt|kW|V volt|A amp ampere|\\Omega Ω ohm|Pa pascal|kPa|MPa|kN|nm|eV|MeV|mA|mV|MHz
GHz|k\\Omega kΩ kohm|mol mole|K kelvin|degree deg ^\\circ|^\\circC|^\\circF|rad radian|dollar USD buck|cent|euro EUR
GBP|yen JPY|rupee INR Rs|% \\% percent pct
"""
_UNIT_NAMES = {
    spelling: names[0]
    for names in map(str.split, _UNITS.strip().replace("\n", "|").split("|"))
    for name in names
    for spelling in ([name, name + "s"] if re.fullmatch("[a-z]{3,}", name) else [name])
}
_UNIT = "(?:" + "|".join(re.escape(name) for name in sorted(_UNIT_NAMES, key=len, reverse=True)) + ")(?![a-zA-Z])"
_UNITS_AT_END = (
    rf"(?:(?:/|per\s|an?\s)\s*)?(?:(?:sq|square|cu|cubic)\.?\s+)?{_UNIT}\.?(?:\s*\^\{{?[23]\}}?)?"
    rf"(?:\s*(?:/|per\s|a\s|\\cdot|(?<=\s))\s*{_UNIT}(?:\s*\^\{{?(?:[23]|-[1-3])\}}?)?)*"
)


def _pattern(words: str, others: str) -> re.Pattern[str]:
    """Finds any of several words where that is the whole text, or what else says the same."""
    return re.compile(rf"\A(?:{'|'.join(words.split())})\Z|{others}")


CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[^\W\d_{CJK}]+(?:['’-][^\W\d_]+)*|[{CJK}]+")
# Words that a number may follow, also with words between that say nothing;
_VERBS_BEFORE_TO = "equal amounts comes converges adds sums simplifies evaluates reduces leads out"
_VERB = _pattern(
    _VERBS_BEFORE_TO
    + """
is are was were be equals has have had get gets got find finds obtain obtains costs cost earns earn earned needs need
needed takes take took makes make made pays pay paid saves save saved sells sell sold buys buy bought spends spend
spent gives give gave contains contain uses use used weighs weigh leaves leave left remains remain receives receive
received becomes become ate eats read reads ran runs walked walks drove drives lost loses owes scored collected holds
travels travelled traveled works worked lasts drank baked planted picked it's that's there's he's ist sind beträgt
lautet hat haben bleiben bleibt dauert braucht kostet gibt bezahlt zahlt bekommt est sont vaut a ont reste restent faut
coûte donne es son é è sono är tiene tienen hay quedan queda cuesta da tem há ha
""",
    r"(?:[是为為有共得需要花剩坐はが은는]|等于|等於|今年|平均|每\w{1,3})\Z",
)
_HARMLESS = _pattern(
    """
the an of in so thus therefore hence then and finally altogether we us there it this that i answer answers result
results solution solutions value values final correct right number amount total exactly only just approximately about
around roughly usd eur gbp inr jpy antwort ergebnis lösung réponse résultat respuesta resultado solución la le el il
die der das also donc insgesamt au en de por lo tanto y
""",
    r"\A(?:最终|答案|答|结果|結果|总数|總數|共计|共|一共|总共|所以|因此|即|故|约|大约|約|大約|정답은|답은|답)+\Z",
)
# words that make another statement of the one around a number, and those that make another number of it, or none.
_DENYING = _pattern(
    """
not no none nor neither never without cannot wrong incorrect false untrue invalid impossible unlikely or than kein keine
nicht falsch unmöglich pas ne faux fausse nunca jamás incorrecto falso mal não non нет не
""",
    r"n['’]t\Z|不(?!同)|[非没無无未错錯]|可能|아니|아닌|ない",
)
_CHANGING = _pattern(
    """
half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth
ninths tenth tenths hundredth hundredths thousandth thousandths dozen dozens score gross hundred hundreds thousand
thousands billion billions trillion trillions grand lakh lakhs crore crores mil mln mio bil mrd mille tausend tys one
two three four five six seven eight nine ten minus negative plus times squared cubed factorial doubled tripled halved
multiplied divided fold least most above below under over between except unless but until up too mehr weniger mindestens
höchstens moins más menos больше меньше halb dutzend zehntel hundertstel tausendstel drittel viertel douzaine douzaines
dixième dixièmes centième centièmes tiers docena docenas décima décimas centésima centésimas tercio tercios minimum
maximum min max pairs loss debt extraneous discarded undefined probably maybe perhaps unknown guess instead initially
originally excluded excluding exclusive exceeded versus vs against some counting approx base binary ternary octal hex
hexadecimal modulo mod remainder ppm basis kilo
""",
    r"\A(?:million|milliard|millón|millon|milion|миллион|тысяч|reject|ruled|fail)|千(?![米克瓦])"
    r"|[负負減减万萬億亿百十多余餘几半倍천백십만억]|分之|的平方|以上|以下|以内|左右|이상|이하|미만|초과",
)

_CHARACTERS = str.maketrans(
    dict(zip("−‐⁄⟨⟩", "--/()", strict=True))
    | {"∈": r"\in ", "γ": r"\gamma ", "·": r"\cdot ", "∞": r"\infty ", "°": r"^\circ ", "≈": r"\approx "}
    | {"¢": " cents ", "。": ". ", "、": ", "}
    | dict.fromkeys("✓✔✅☑🎉\u200b\u200c\u200d\u2060\ufeff\ufe0f\u200e\u200f")
)
_FORMATS = """left left. right displaystyle limits tiny small normalsize large Large LARGE huge Huge bf it
big bigl bigr bigg biggl biggr Big Bigl Bigr Bigg Biggl Biggr"""
# Commands without an argument, and what replaces them.
_COMMANDS = (
    dict.fromkeys(_FORMATS.split(), "")
    | {"langle": "(", "rangle": ")", "lbrace": r"\{", "rbrace": r"\}", "leqslant": r"\le ", "geqslant": r"\ge "}
    | {"quad": " ", "qquad": " ", "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "lg": r"\log_{10}"}
    | {"varnothing": r"\emptyset ", "dots": r"\ldots ", "cdots": r"\ldots ", "infinity": r"\infty"}
)
# Commands that leave their argument as it is.
_WRAPPER = re.compile(
    r"\\(?:boxed|fbox|underline|textcolor\s*\{[^{}]*\}|text(?:bf|it|rm|normal|sf|tt)?|mbox|math(?:rm|bf|it|sf)"
    r"|boldsymbol|bm|rm)\s*\{"
)
_ROOT = re.compile(r"(?:(?<![a-zA-Z])\\?sqrt|√)\s*\(")

# In order: what stands for a form, what replaces it. Emphasis is none inside a formula, as in 2**3**4 or 2*3*4.
_MARKUP = [
    (r"(`{1,3})(?:(?<=```)\w*\s)?([^`]*)\1", r"\2"),
    (r"\A\s*(\*{1,3})([^*]*)\1\s*\Z", r"\2"),
    (r"(?<![^\W_])(?<![)}*])(\*{1,3})(?=[^\s*])([^*]*[^\s*])\1(?![^\W_]|[({*])", r"\2"),
    (r"(?<!\w)(?<!\\)(_{1,3})(?=[^\s_])([^_]*[^\s_])\1(?!\w)", r"\2"),
    (r"\A\s*(?:#+\s|\*\*|(?:Rs\.?|US)(?=\s*\$?\s*\d))", ""),
    (r"</?(?:b|i|u|em|strong|code|p|br)\s*/?>|~~[^~]*~~", " "),
    (r"\A[\s$]*(?:[→⇒∴]|=>|\\(?:[rR]ightarrow|therefore|implies)(?![a-z]))\s*", ""),
    (r"\A\s*–", "-"),
    (r"\*\*", "^"),
    (r"(?:√|(?<![\\a-zA-Z])sqrt(?![a-zA-Z]))\s*(\d+(?:\.\d+)?|[a-zA-Zπ](?![a-zA-Z]))", r"\\sqrt{\1}"),
    (r"(?:√|(?<![\\a-zA-Z])sqrt)\s*(?=\{)", r"\\sqrt"),
]
_FORMS = [
    (r"[€£¥₹]", " "),
    (r"(?<=\d),\\!\s*(?=\d{3})", ","),
    # numbers side by side, the second with a sign, are no sum
    (r"(?<![\\&,\s])(?:\s*(?:\\q?quad(?![a-z])\s*)+|[^\S\n]*\n\s*)(?=[-+])", ", "),
    (r"\A([\s$]*(?:[a-z]\s*=\s*)?[-+]?\d+(?:[.,]\d+)*)(?:\\ |\s)+([-+]\d[\d.,]*[\s$]*)\Z", r"\1, \2"),
    (r"\\!|\\(?:color|phantom)\s*\{[^{}]*\}", ""),
    (r"\\([a-zA-Z]+(?:(?<=\\left)\.)?)", lambda m: _COMMANDS.get(m[1], m[0])),
    (r"(?<!\\)\\[,;: ]|~", " "),
    (r"\\[\[\]()]|\\?\$", " "),
    # the condition of {x | x > 2}
    (
        r"\A\s*\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid(?![a-z])|(?:\\middle)?\||:)\s*"
        r"(?=.*\b\1\b)(.*)\\\}\s*\Z",
        r"\2",
    ),
    (r"\\mathbb\s*(?:R(?![a-zA-Z])|\{\s*R\s*\})", r"(-\\infty, \\infty)"),
    (r"(?i:\A\W*(?:[a-z]\s+is\s+)?all\s+real(?:s|\s+numbers)\W*\Z)", r"(-\\infty, \\infty)"),
    (
        r"\A\W*(?:(?:there\s+(?:is|are)\s+)?(?:no|0|zero)\s+(?:real\s+)?solutions?|(?:the\s+)?empty\s+set)\W*\Z",
        r"\\emptyset",
    ),
    (r"(?<=[\w})])\s*;\s*(?=[-+(\w\\])", ", "),
    (r"\A(\W*\d+)\s+(?:in|out\s+of)\s+(\d+\W*)\Z", r"\1/\2"),
    (r"\bper\s+cent\b", "percent"),
    (r"\{:\}", ":"),
    (r"(?<=\d:\d\d)\s*([aApP])\.?\s*[mM]\b\.?", lambda m: f" {m[1].upper()}M"),
    (r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\(?:circ|degree)(?![a-z])|\\degree(?![a-z])", r"^\\circ "),
    (r"\^\\circ\s+([CF])(?![a-zA-Z])", r"^\\circ\1"),
    (r"\.\.\.", r"\\ldots "),
    (r"\\(?:begin|end)\{(?:align|aligned|gathered|equation|split)\*?\}", " "),
    (r"&(?!.*\\end\{)", " "),
    (r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ","),
    (r"(?<=\d)\{,\}(?=\d)", "."),
    (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\d|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt\1{\2}"),
    (r"(?<![\\a-zA-Z])C_\{?(\d+)\}?\s*\^\s*\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (r"(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|sqrt|sec|csc|cot|log|ln|pi|infty|exp)(?![a-zA-Z])", r"\\\1"),
    (r"(?<![\\a-zA-Z])infinity(?![a-zA-Z])", r"\\infty"),
    # thousands: 1,234,567 and 1 234 567, but not [1,234), which is an interval, and 0,234
    (r"(?<![\w.,(\[])(?<!\\\{)([1-9]\d{0,2}(?:,\d{3})+)(?![\w,])", lambda m: m[1].replace(",", "")),
    (r"(?<![\w.,])(?<![\d.,] )([1-9]\d{0,2}(?: \d{3})+)(?!\w|[,.]\d| \d)", lambda m: m[1].replace(" ", "")),
    (r"(?<![\w.,])[1-9]\d{0,2}(?:(?:['’]\d{3})+|(?:\.\d{3}){2,})(?![\w,])", lambda m: re.sub(r"\D", "", m[0])),
    (r"(?<![\w.])(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|\((\d+)\))", lambda m: _repeating(*m.groups(""))),
    (r"(?<=\d)\s?(?:st|nd|rd|th)\b", ""),
    (r",(?=\S)", ", "),
    (r"(?<![\w.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])", r"\1\\frac{\2}{\3}"),
    (r"(?<=\d)[eE]([+-]?)(\d+)(?!\w)", r" \\cdot 10^{\1\2}"),
    (r"\^\s*(?:\(([^()]*)\)|(-?\d+))", r"^{\1\2}"),
    # a name before a point, or before what a value is said to be
    (r"\A[A-Z]\s*(\([^()]*,[^()]*\))\Z", r"\1"),
    (
        r"\A\s*(?:[a-zA-Z]'{1,3}(?:\([a-z]\))?|\\frac\{d[a-z]\}\{d[a-z]\}|\\angle\s*[A-Z]+|P\([^()\\]*\)|[fghFGH]\(-?\d+\)"
        r"|[a-zA-Z]_(?:\{?\\(?:max|min|triangle\s*[A-Z]+)\}?|\{\s*[a-zA-Z]{2,}\s*\}))\s*=(?!=)",
        "",
    ),
    # a product, not a function: x(x + 1), but f(x)
    (r"(?<![\\a-zA-Z])(?![fghFGHPQ]\()([a-zA-Z]|\\pi\s*)\(", r"\1 \\cdot ("),
    # lists of answers
    (r"\b(and|or)\s*,", r"\1"),
    (r"(?<=[\w})\]])\s*(?:或者?|\b(?:oder|ou)\b)\s*(?=[\w\\({-])", " or "),
    (r"(?<=[\d})\]])\s*(?:和|以及|\b(?:und|et)\b)\s*(?=[\d\\({-])", " and "),
    (r",?\s+(and|or)\s+(?=[^a-zA-Z\s]|[a-zA-Z]\b)", lambda m: _connective(m[1], m.string)),
    (r"\b(?:either|both)\s+", ""),
    (r"\s*\n\s*(?=[a-z]\s*=)", ", "),
    (r"(?<=[\d}])\s+(hundred|thousand|million|billion|trillion)\b", lambda m: rf"\cdot 10^{{{_POWERS[m[1]]}}}"),
    # the ends, a text in quotes, units in fractions, sets and brackets
    (r"[^\S\n]+", " "),
    (r"\A\s+|[\s.,;:]+\Z", ""),
    (r"\A([\"'])(.*?)[ .,;:]*\1\Z", r"\2"),
    (rf"(?<=[\d}}]) *\\frac\{{\s*({_UNIT})\s*\}}\{{\s*({_UNIT})\s*\}}\Z", r" \1/\2"),
    (rf"\A\\\{{([^{{}}]*,[^{{}}]*?{_UNITS_AT_END})\s*\\\}}\Z", r"\1"),
    (rf"(?<=[\d}}]) +[(\[]({_UNITS_AT_END})[)\]]\Z", r" \1"),
    (r"\A(?:=|\\approx)\s*", ""),
]
_MARKUP_RULES = [(re.compile(pattern, re.DOTALL), new) for pattern, new in _MARKUP]
_FORM_RULES = [(re.compile(pattern, re.DOTALL), new) for pattern, new in _FORMS]

_PROSE_WORD = (
    r"(?<![\\a-zA-Z])(?:(?:[iI]t['’]s|[hH]e['’]s|[iI]l\s+y\s+a|[iI]s|[oO]f|[iI]n|[tT]o|[aA]t|[iI]t|[wW]e|[sS]o|[aA]n|"
    r"[bB]y|[oO]n|[hH]e|[mM]y|[aA]s|[iI]f|[oO]r|[nN]o|be|up|[lL][aeo]|[iI]l|[eE][lsn]|[aA]u|[uU]n|de|us|ne|é|è|ha)"
    r"(?![a-zA-Z])|[a-zA-ZÀ-ÖØ-öø-ÿ]{3,}(?:['’-][a-zA-Z]+)*|[^\W\d_a-zA-Zµ-ÿΑ-ω]+)"
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
_BASE = re.compile(r"\(?(\d\w*)\)?(?:_\{?\(?|\s+(?:in\s+)?base\s+)(\d+)\)?\}?")
_THOUSANDS = re.compile(r"\d[kK](?!\w)")


class AnswerText(NamedTuple):
    """An answer in parts."""

    latex: str  # LaTeX, without Markdown, dollars, boxes and commands that only format
    formula: str | None  # without unit and words around it; None where these are more than that
    unit: str = ""  # in one spelling, as "km/h" or "%"; empty without one
    is_letter_unit: bool = False  # the unit is a single letter, which may be a factor as well
    is_formula: bool = False  # the LaTeX may be one, words and letters of units included
    is_words: bool = False  # there is nothing but words


def split_answer(text: str) -> AnswerText:
    """An answer's text in parts. A word that changes a number ("not 3", "3 or more", "half of 3") is no mere word.

    Example:
        >>> split_answer("The speed is **1,200 km/h**.")[:3]
        ('The speed is 1200 km/h', '1200', 'km/h')
    """
    pair = "" if text.count("$") % 2 == 0 else "dollar"  # which delimits a formula
    currency = next((name for sign, name in _CURRENCIES.items() if sign in text), pair)
    latex = clean(text)
    base = _BASE.fullmatch(latex)
    if base:
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
    has_inner_words = _INNER_WORD.search(formula)
    is_more = (
        not formula
        or has_inner_words
        or (before[-1:].isalpha() and rest.startswith("("))  # of a function
        or _THOUSANDS.search(latex)
        or (currency and unit == "K")
        or not _leave_number(before + "=" * rest.lstrip().startswith("="), after)
    )
    if unit == "degree" and _TRIGONOMETRY.search(formula):
        return AnswerText(latex, None, is_formula=not is_more and not after)  # there it is no unit, but pi/180
    is_formula = not (before or after or has_inner_words) and (is_letter or not unit + currency)
    return AnswerText(latex, None if is_more else formula, unit or currency, is_letter, is_formula)


def _leave_number(before: str, after: str) -> bool:
    """Whether the words before a number and those after it leave it as it is: "The area is" and "in total" do."""
    words_before, words_after = (_WORD.findall(words.casefold()) for words in (before, after))
    return (
        not any(map(_DENYING.search, words_before))
        and (before.rstrip().endswith(("=", ":")) or _lead_to_number(words_before))
        and not any(_DENYING.search(word) or _CHANGING.search(word) for word in words_after)
        and words_after[-1:] not in (["more"], ["less"], ["fewer"])
    )


def _lead_to_number(words: list[str]) -> bool:
    """Whether words end as "the area is" does, or there are none but such as "the answer"."""
    while words and _HARMLESS.search(words[-1]):
        words.pop()
    last, before_last = [*words[::-1], "", ""][:2]
    if last == "be" and before_last in ("might", "could", "may"):
        return False
    return not words or bool(_VERB.search(last)) or (last == "to" and before_last in _VERBS_BEFORE_TO.split())


def clean(text: str) -> str:
    """A text as LaTeX for the parser: no Markdown, delimiters, boxes, thousands separators or signs of Unicode."""
    text = re.sub("([⁰¹²³⁴-⁹⁺⁻ⁿ]+)", r"^{\1}", text)
    text = re.sub("([₀-₉]+)", r"_{\1}", text)
    text = re.sub("([¼-¾⅐-⅞])", r" \1", text).replace("ℝ", r"\mathbb{R}")
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    for rule, new in _MARKUP_RULES:
        text = rule.sub(new, text)
    text = _rewrap(_WRAPPER, "{}", text, " ", " ")
    text = _rewrap(_ROOT, "()", text, r"\sqrt{", "}")
    for rule, new in _FORM_RULES:
        text = rule.sub(new, text)
    return text


def closing_bracket(text: str, start: int, brackets: str, limit: int) -> int | None:
    """Where the bracket is closed that was opened before ``start``; None where it is not before ``limit``."""
    depth = 1
    for i in range(start, min(len(text), limit)):
        depth += (text[i] == brackets[0]) - (text[i] == brackets[1])
        if depth == 0:
            return i
    return None


def _rewrap(opening: re.Pattern[str], brackets: str, text: str, before: str, after: str) -> str:
    """What stands between an opening and its closing bracket put between two other texts; as it is without one."""
    while start := opening.search(text):
        end = closing_bracket(text, start.end(), brackets, len(text))
        if end is None:
            break
        text = f"{text[: start.start()]}{before}{text[start.end() : end]}{after}{text[end + 1 :]}"
    return text


def _repeating(integer: str, start: str, *periods: str) -> str:
    """A decimal without end as a fraction: 0.1\\overline{6} as (16 - 1)/90."""
    period = "".join(periods)
    top = int(integer + start + period) - int(integer + start or 0)
    return rf"\frac{{{top}}}{{{'9' * len(period)}{'0' * len(start)}}}"


def _connective(word: str, text: str) -> str:
    """What stands for "and" or "or" in a text: they are the same in a list of answers, but not between inequalities."""
    is_inequality = re.search(r"[<>]|\\(?:[lg]e?|[lg]eq|ne)(?![a-z])", text)
    return {"and": r" \land ", "or": r" \lor "}[word] if is_inequality else ", "


def _unit_of(text: str) -> tuple[str, bool]:
    """A unit in one spelling, and whether it is a single letter."""
    text = text.strip().rstrip(".")
    text = re.sub(r"^(sq|square)\.?\s+(.*)", r"\2^2", re.sub(r"^(cu|cubic)\.?\s+(.*)", r"\2^3", text))
    spelled = re.sub(_UNIT, lambda m: _UNIT_NAMES[m[0]], re.sub(r"\s*(?:per|a)\s+", "/", text))
    spelled = re.sub(r"\s+(\S+?)\s*\^\{?-([1-3])\}?", lambda m: f"/{m[1]}" + f"^{m[2]}" * (m[2] > "1"), spelled)
    spelled = re.sub(r"(?<=\w)(?:\s+|\s*\\cdot\s*)(?=\w)", "*", spelled)
    return re.sub(r"[\s{}]", "", spelled), len(text) == 1 and text.isalpha()
