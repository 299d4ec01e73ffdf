"""Reward for reasoning in one language: of natural text by lingua, of a toy task by its vocabulary."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import Any

from grpo_kernels.rewards.completions import UNSPACED, completion_text, script_of

# Languages that lingua cannot be relied on to tell apart: a text in the one is no evidence against the other.
_CLOSE = (frozenset({"id", "ms"}), frozenset({"bs", "hr", "sr"}), frozenset({"nb", "nn"}))
_MEMBERS = {"no": frozenset({"nb", "nn"})}  # Norwegian, by the code for both of its written forms
# Scripts of a language in which lingua does not know it: no evidence for or against it.
_ALSO_IN = {"az": {"ARABIC", "CYRILLIC"}, "bs": {"CYRILLIC"}, "kk": {"ARABIC", "LATIN"}, "mn": {"MONGOLIAN"},
            "ms": {"ARABIC"}, "pa": {"ARABIC"}, "sr": {"LATIN"}}  # fmt: skip
# Codes of countries that are written in place of their languages'.
_COUNTRIES = {"cn": "zh", "cz": "cs", "dk": "da", "gr": "el", "jp": "ja", "kr": "ko", "ua": "uk", "vn": "vi"}

_SURE, _SURE_OF_FEW = 0.85, 0.95  # lingua's confidence in the target
_LETTERS, _FEW_LETTERS = 20, 12  # fewer in a shared script are too few
_SURE_OF_OTHER, _SURE_OF_HALF, _LETTERS_OF_OTHER = 0.99, 0.1, 40
_LETTERS_OF_OTHER_IN_POOL = 24
_NEAR_LIKELIEST = 0.05  # of the confidence in the likeliest language
_HAN_LETTERS = 12  # as many without kana are not Japanese
_LONGEST_WORD = 60  # characters; lingua's time grows with the square of a word's length

_END_OF_SENTENCE = re.compile(r"[.!?]\s|[\n。！？।؟۔]")
_END_OF_REASONING = re.compile(r"</think>|<answer>")
_KANA = re.compile(r"[\u3041-\u30ff\u31f0-\u31ff]")
_INSIDE_WORDS = "'’-\u200c"

# A code span or a formula, as in Pandoc with no digit after it, or what opens a program or a formula.
_OPENING = re.compile(
    r"(?P<fence>`{3,}|~{3,})|(?P<span>`[^`\n]*`|(?<!\\)\$(?P<formula>(?:\\.|[^$\\\n])+)\$(?!\d))"
    r"|\$\$|\\[(\[]|\\begin\{(?P<environment>\w+\*?)\}"
)
_CLOSING = {r"\(": r"\)", r"\[": r"\]"}
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})?")
_WORDS_IN_A_ROW = re.compile(r"[^\W\d_]{2,}(?:[\s,]+[^\W\d_]{2,}){2}")
_NO_PROSE = re.compile(
    r"\\[A-Za-z]+|</?\w+>|https?://\S+|(?<![A-Za-z\d_])[A-Za-z\d_]*[\d_][A-Za-z\d_]*|\b[a-z]+[A-Z][A-Za-z]*"
)


@dataclass(frozen=True)
class LanguageConsistencyReward:
    """The share of the words of the reasoning that are in the target language (DeepSeek-R1, sec. 2.3.2).

    With a ``vocabulary`` (a synthetic task), or the column ``target_words``, words are what stands between white space,
    and the reward is the share of them that the vocabulary has, case and all; 0 without any word.

    Else lingua tells the language of each sentence, by script. Words are runs of at least two letters, and in scripts
    without spaces single letters. Left out are code, formulas, LaTeX commands, tags, addresses, words with digits, and
    names, abbreviations and units in another script.

    1. Words of a script that the target does not use are foreign.
    2. A sentence is the target's if it has 20 letters and lingua's confidence is 0.85.
    3. It is foreign if it has 40 letters and the confidence in another language is 0.99; in Latin letters only if most
       words do not look like names and either half of them agrees.
    4. The other sentences are judged as one text, where 24 letters will do for another language, and 12 with 0.95 for
       the target; those in which lingua finds a language 20 times likelier are judged by themselves.

    It abstains with None where there is no evidence: no words; half of the letters or more in words that cannot be
    judged; or, where another language is 20 times likelier, half as many letters as are judged. Fewer are left out of
    the share, so that a short sentence in another language, or a few words of it, may go unnoticed.

    lingua cannot be relied on to tell apart Indonesian and Malay, Bosnian, Croatian and Serbian, and the two written
    forms of Norwegian: the one is never foreign to the other, and the reward often abstains. Name both if either will
    do, ``["id", "ms"]``.

    Args:
        language: The target, as ISO 639-1 code of one of lingua's 75 languages, or "no" for both forms of Norwegian;
            or a list of codes, any of which will do. Case and subtags are ignored: zh-CN is zh. None takes the column
            ``language``, a code or list per row, and abstains where a row has none; and English without that column.
        vocabulary: Every word of a synthetic task; ``language`` then says nothing.

    Raises:
        ValueError: The vocabulary is no list of words, or lingua has no such language.
        ImportError: lingua is not installed: at once if a language is named, else when a natural text is judged.
    """

    language: str | Sequence[str] | None = None
    vocabulary: Collection[str] | None = None

    def __post_init__(self) -> None:
        words = self.vocabulary
        if words is None and self.language is not None:
            _targets("language", self.language)
        is_list = isinstance(words, Collection) and not isinstance(words, str) and len(words) > 0
        if words is not None and not (is_list and all(isinstance(word, str) for word in words)):
            raise ValueError(f"vocabulary must be a list of words, got {words!r}")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        texts = [reasoning_of(completion_text(c)) for c in completions]
        vocabularies = columns.get("target_words") if self.vocabulary is None else [self.vocabulary] * len(texts)
        if vocabularies is not None:
            return [_share_of(frozenset(v), text.split()) for v, text in zip(vocabularies, texts, strict=True)]
        languages = columns.get("language") if self.language is None else None
        if languages is None:
            targets = [_targets("language", self.language or "en")] * len(texts)
        else:
            targets = [None if v is None else _targets("the column language", v) for v in languages]
        return [None if t is None else _share_in(t, text) for t, text in zip(targets, texts, strict=True)]


def reasoning_of(completion: str) -> str:
    """What follows the first ``<think>``, or the start, up to the first ``</think>`` or ``<answer>``, or to the end."""
    before, opened, after = completion.partition("<think>")
    return _END_OF_REASONING.split(after if opened else before, maxsplit=1)[0]


@dataclass(eq=False)
class _Passage:
    """Words of one script, of a sentence or of several."""

    script: str
    words: list[str]

    @cached_property
    def letters(self) -> int:
        return sum(map(len, self.words))

    @cached_property
    def confidences(self) -> dict[str, float]:
        """How sure lingua is of each language; rounded, because it adds up in no fixed order."""
        text = ("" if self.script in UNSPACED else " ").join(self.words)
        values = _detector().compute_language_confidence_values(text)
        return {_code(value.language): round(value.value, 6) for value in values if value.value > 0}

    @cached_property
    def likeliest(self) -> frozenset[str]:
        """The likeliest language, and those that lingua cannot be relied on to tell apart from it."""
        language = max(self.confidences, key=lambda name: self.confidences[name], default="")
        return next((group for group in _CLOSE if language in group), frozenset({language}))

    def confidence(self, languages: frozenset[str]) -> float:
        return sum(self.confidences.get(language, 0.0) for language in languages)

    def may_be_in(self, languages: frozenset[str]) -> bool:
        """Whether lingua finds no language far likelier than these, or knows none of them in this script."""
        if not languages & _languages_in(self.script):
            return True
        return self.confidence(languages) >= _NEAR_LIKELIEST * max(self.confidences.values(), default=0.0)

    def is_in(self, targets: frozenset[str], *, is_pool: bool = False) -> bool | None:
        """Whether the words are in one of the languages, None if that cannot be told; a pool needs fewer letters."""
        if not self.words or any(self.script in _ALSO_IN.get(target, ()) for target in targets):
            return None
        languages = _languages_in(self.script)
        if not languages:
            if "ja" in targets and self.script == "HAN" and not any(map(_KANA.match, self.words)):
                return False if len(self.words) >= _HAN_LETTERS else None  # in both languages, if it is short
            return self.confidence(targets) >= _SURE
        if not targets & languages:
            return False
        if self.letters < (_FEW_LETTERS if is_pool else _LETTERS):
            return None
        confidence = self.confidence(targets)
        if confidence >= _SURE:
            return True if confidence >= _SURE_OF_FEW or self.letters >= _LETTERS else None
        without_names = _Passage(self.script, [word for word in self.words if word.islower()])
        if len(without_names.words) < len(self.words) and without_names.is_in(targets, is_pool=is_pool):
            return True
        is_enough = self.letters >= (_LETTERS_OF_OTHER_IN_POOL if is_pool else _LETTERS_OF_OTHER)
        return False if is_enough and self._is_in_another(targets) else None

    def _is_in_another(self, targets: frozenset[str]) -> bool:
        """Whether the words, of a shared script, are in a language that is no target, nor close to one."""
        others = self.likeliest
        names = [word for word in self.words if word[0].isupper() and (len(word) <= 4 or not word.isupper())]
        if others & targets or 3 * len(names) > 2 * len(self.words) or self.confidence(others) < _SURE_OF_OTHER:
            return False
        if self.script != "LATIN":
            return True
        # In Latin letters lingua finds a language in slang and noise, too, but seldom the same in each half.
        middle = len(self.words) // 2
        halves = (_Passage(self.script, words) for words in (self.words[:middle], self.words[middle:]))
        return all(half.confidence(others) >= _SURE_OF_HALF for half in halves)


def _share_of(vocabulary: frozenset[str], words: list[str]) -> float:
    return sum(word in vocabulary for word in words) / len(words) if words else 0.0


def _share_in(targets: frozenset[str], text: str) -> float | None:
    """The share of the words of a natural text that are in one of the languages; None without evidence."""
    by_verdict: dict[bool | None, list[_Passage]] = {True: [], False: [], None: []}
    undecided: dict[str, list[_Passage]] = defaultdict(list)
    for sentence in _END_OF_SENTENCE.split(_prose_of(text)):
        for passage in _passages(sentence, targets):
            verdict = passage.is_in(targets)
            (undecided[passage.script] if verdict is None else by_verdict[verdict]).append(passage)
    unlikely_letters = 0
    for script, passages in undecided.items():
        of_target = [passage for passage in by_verdict[True] if passage.script == script]
        foreign, others = _split_foreign(targets, passages)
        likely, unlikely = _split_by_likelihood(targets, others)
        unlikely_foreign, unlikely = _split_foreign(targets, unlikely)
        by_verdict[False] += foreign + unlikely_foreign
        is_target = _concat(likely).is_in(targets, is_pool=True)
        if is_target is None and of_target:
            is_target = _concat(of_target + likely).is_in(targets)
        by_verdict[is_target or None] += likely
        is_target = _concat(unlikely).is_in(targets, is_pool=True)
        by_verdict[is_target or None] += unlikely
        unlikely_letters += 0 if is_target else _concat(unlikely).letters
    in_target, in_others, unknown = (_concat(by_verdict[verdict]) for verdict in (True, False, None))
    has_evidence = in_target.letters + in_others.letters > max(unknown.letters, 2 * unlikely_letters)
    return len(in_target.words) / len(in_target.words + in_others.words) if has_evidence else None


def _concat(passages: list[_Passage]) -> _Passage:
    return _Passage(passages[0].script if passages else "", [word for p in passages for word in p.words])


def _split_by_likelihood(languages: frozenset[str], passages: list[_Passage]) -> tuple[list[_Passage], list[_Passage]]:
    likely = [passage for passage in passages if passage.may_be_in(languages)]
    return likely, [passage for passage in passages if not passage.may_be_in(languages)]


def _split_foreign(targets: frozenset[str], passages: list[_Passage]) -> tuple[list[_Passage], list[_Passage]]:
    """Sentences of one script that as one text are in another language, and the other sentences."""
    pool = _concat(passages)
    if pool.is_in(targets, is_pool=True) is False:
        likely, unlikely = _split_by_likelihood(pool.likeliest, passages)
        if _concat(likely).is_in(targets, is_pool=True) is False:
            return likely, unlikely
    return [], passages


def _passages(sentence: str, targets: frozenset[str]) -> list[_Passage]:
    """The words of a sentence by script, but for one or two foreign names, abbreviations or units in a row."""
    words_by_script: dict[str, list[str]] = defaultdict(list)
    for script, run in groupby(_words_of(sentence), key=lambda word: word[0]):
        words = [word for _, word in run]
        languages = _languages_in(script)
        if len(words) <= 2 and languages and not targets & languages:
            words = [word for word in words if word.islower() and (script != "LATIN" or len(word) > 3)]
        words_by_script[script] += words
    return [_Passage(script, words) for script, words in words_by_script.items() if words]


def _words_of(text: str) -> Iterator[tuple[str, str]]:
    """Each word with its script."""
    run, run_script = "", ""
    for character in text + " ":
        # An accent belongs to the letter before it, and so does an apostrophe or hyphen, if letters follow.
        is_inside = character in _INSIDE_WORDS and run_script not in UNSPACED
        if run and (is_inside or unicodedata.category(character)[0] == "M"):
            run += character
            continue
        script = script_of(character)
        if script and script == run_script and script not in UNSPACED:
            run += character
            continue
        run = run.rstrip(_INSIDE_WORDS)
        if (run_script in UNSPACED or len(run) > 1) and len(run) <= _LONGEST_WORD:
            yield run_script, unicodedata.normalize("NFKC", run)
        run, run_script = (character, script) if script else ("", "")


def _prose_of(text: str) -> str:
    """A text without code, formulas, LaTeX commands, tags, addresses, camelCase names and words with digits in them."""
    prose: list[str] = []
    unclosed: set[str] = set()  # to look for these again would take quadratic time
    copied = position = 0
    while opening := _OPENING.search(text, position):
        position = opening.end()
        if opening["formula"] and _is_between_prices(opening["formula"]):
            position = opening.start() + 1
            continue
        if not opening["span"]:
            sign, environment = opening.group(), opening["environment"]
            closing = rf"\end{{{environment}}}" if environment else _CLOSING.get(sign, sign)
            end = -1 if closing in unclosed else text.find(closing, position)
            if end < 0:
                unclosed.add(closing)
                if not opening["fence"]:
                    continue
            position = end + len(closing) if end >= 0 else len(text)
        prose.append(text[copied : opening.start()])
        copied = position
    return _NO_PROSE.sub(" ", " ".join([*prose, text[copied:]]))


def _is_between_prices(text: str) -> bool:
    """Whether what stands between two dollars is prose: with a space at one end alone, or with words in a row."""
    return text[0].isspace() != text[-1].isspace() or _WORDS_IN_A_ROW.search(_COMMAND.sub(" ", text)) is not None


def _targets(name: str, language: Any) -> frozenset[str]:
    """The languages that a code or a list of codes names; of en-US and zh_Hans, en and zh."""
    codes = [language] if isinstance(language, str) else language
    if not isinstance(codes, Sequence) or not codes or not all(isinstance(code, str) for code in codes):
        raise ValueError(f"{name} must be one or more codes such as 'en', got {language!r}")
    allowed = {*_codes().values(), *_MEMBERS}
    targets: frozenset[str] = frozenset()
    for code in codes:
        primary = re.split("[-_]", code.lower(), maxsplit=1)[0]
        if primary not in allowed:
            code_meant = _COUNTRIES.get(primary) or _codes().get(primary)
            hint = f"; {code_meant!r} for {code!r}" if code_meant else ""
            raise ValueError(f"{name} must be one or more of {', '.join(sorted(allowed))}, got {language!r}{hint}")
        targets |= _MEMBERS.get(primary, {primary})
    return targets


@cache
def _codes() -> dict[str, str]:
    """The codes by what is written in their place: the English name and the code of three letters."""
    languages = _lingua().Language.all()
    return {alias.lower(): _code(x) for x in languages for alias in (x.name, x.iso_code_639_3.name)}


def _code(language: Any) -> str:
    return language.iso_code_639_1.name.lower()


@cache
def _languages_in(script: str) -> frozenset[str]:
    """The languages of one of the scripts in which lingua knows several; none of any other script."""
    languages = getattr(_lingua().Language, f"all_with_{script.lower()}_script", frozenset)()
    return frozenset(map(_code, languages))


@cache
def _detector() -> Any:
    """Of all languages, by groups of three letters alone: 70 MB instead of 1 GB, and beyond 120 letters no worse."""
    return _lingua().LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()


def _lingua() -> Any:
    try:
        import lingua
    except ImportError as error:
        raise ImportError(
            "the reward language_consistency needs lingua for natural text: pip install lingua-language-detector"
        ) from error
    return lingua
