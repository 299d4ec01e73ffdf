"""The words around a number: which of them leave it as it is.

Before a number the words have to be ones that are known to: a sentence that ends in "is" or another verb of the lists
below, or nothing but words such as "the answer". After it any will do, "12 different ways", but those that are numbers
themselves, compare or deny.
"""

from __future__ import annotations

import re

CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_VERBS = _set("""
is are was were be equals equal has have had get gets got find finds obtain obtains costs cost earns earn earned needs
need needed takes take took makes make made pays pay paid saves save saved sells sell sold buys buy bought spends
spend spent gives give gave contains contain uses use used weighs weigh leaves leave left remains remain receives
receive received becomes become ate eats read reads ran runs walked walks drove drives lost loses owes scored
collected holds travels travelled traveled works worked lasts drank baked planted picked it's that's there's he's ist
sind beträgt lautet hat haben bleiben bleibt dauert braucht kostet gibt bezahlt zahlt bekommt est sont vaut a ont
reste restent faut coûte donne es son é è sono är tiene tienen hay quedan queda cuesta da tem há ha
""")
_TO = _set("equal amounts comes converges adds sums simplifies evaluates reduces leads out")
_HARMLESS = _set("""
the a an of in so thus therefore hence then and finally altogether we us there it this that i answer answers result
results solution solutions value values final correct right number amount total exactly only just approximately about
around roughly usd eur gbp inr jpy antwort ergebnis lösung réponse résultat solution respuesta resultado solución la
le el il die der das es also donc insgesamt au en de por lo tanto y
""")
_CJK_BEFORE = re.compile(
    "(?:最终|答案|答|结果|結果|总数|總數|共计|共|一共|总共|所以|因此|即|故|约|大约|約|大約|정답은|답은|답)+"
)
_CJK_VERB = re.compile("(?:[是为為有共得需要花剩坐はが은는]|等于|等於|今年|平均|每\\w{1,3})$")

# What makes another statement of the one before a number.
_DENYING = _set("""
not no none nor neither never without cannot wrong incorrect false untrue invalid impossible unlikely kein keine nicht
falsch unmöglich pas ne faux fausse nunca jamás incorrecto falso mal não non нет не
""")
_UNSURE = _set("might could may")  # be
_COMPARING = _set("or than")
_CJK_DENYING = re.compile("不(?!同)|[非没無无未错錯]|可能|아니|아닌|ない")

# What makes another number of the one before it, or none.
_CHANGING = (
    _COMPARING
    | _DENYING
    | _set("""
half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths
ninth ninths tenth tenths hundredth hundredths thousandth thousandths millionth millionths dozen dozens score gross
hundred hundreds thousand thousands million millions billion billions trillion trillions grand lakh lakhs crore crores
mil mln mio bil mrd mille tausend tys one two three four five six seven eight nine ten minus negative plus times
squared cubed factorial doubled tripled halved multiplied divided fold least most above below under over between
except unless but until up too mehr weniger mindestens höchstens moins más menos больше меньше half halb dutzend
zehntel hundertstel tausendstel drittel viertel douzaine douzaines dixième dixièmes centième centièmes tiers docena
docenas décima décimas centésima centésimas tercio tercios minimum maximum min max pairs loss debt extraneous
discarded undefined probably maybe perhaps unknown guess instead initially originally excluded excluding exclusive
exceeded versus vs against some counting approx base binary ternary octal hex hexadecimal modulo mod remainder ppm
basis kilo
""")
)
_STARTS_CHANGING = ("million", "milliard", "millón", "millon", "milion", "миллион", "тысяч", "reject", "ruled", "fail")
_ENDS_IN_MORE = re.compile(r"\b(?:more|less|fewer)\W*\Z", re.IGNORECASE)
_CJK_CHANGING = re.compile(
    "千(?![米克瓦])|不(?!同)|[非负負没無无未错錯减減万萬億亿百十多余餘几半倍천백십만억]|分之|的平方|以上|以下|以内|左右|이상|이하|미만|초과|아니|아닌"
)
_WORD = re.compile(rf"[^\W\d_{CJK}]+(?:['’-][^\W\d_]+)*|[{CJK}]+")


def leave_number(before: str, after: str) -> bool:
    """Whether the words before a number and those after it leave it as it is.

    Example:
        >>> leave_number("The area is", "in total"), leave_number("almost", ""), leave_number("", "or more")
        (True, False, False)
    """
    return _may_precede(before) and not any(map(_changes, _words(after))) and not _ENDS_IN_MORE.search(after)


def _may_precede(text: str) -> bool:
    words = _words(text)
    if any(_denies(word) or word in _COMPARING for word in words):
        return False
    if re.search(r"[=:]\s*\Z", text):
        return True
    while words and (words[-1] in _HARMLESS - _VERBS or _CJK_BEFORE.fullmatch(words[-1])):
        words.pop()
    if words and words[-1] == "to" and words[-2:-1] and words[-2] in _TO:
        return True
    if words[-1:] == ["be"] and words[-2:-1] and words[-2] in _UNSURE:
        return False
    return not words or words[-1] in _VERBS | _TO or _CJK_VERB.search(words[-1]) is not None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _denies(word: str) -> bool:
    return word in _DENYING or word.endswith(("n't", "n’t")) or _CJK_DENYING.search(word) is not None


def _changes(word: str) -> bool:
    is_number_word = word in _CHANGING or word.startswith(_STARTS_CHANGING)
    return is_number_word or _denies(word) or _CJK_CHANGING.search(word) is not None
