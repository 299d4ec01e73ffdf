"""Reward for reasoning in one language: of natural text by lingua, of a toy task by its vocabulary."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain, groupby
from typing import Any, NamedTuple

from grpo_kernels.rewards.completions import completion_text
from grpo_kernels.rewards.prose import prose_of

# The first word of a letter's Unicode name is its script, but for these. Chinese and Japanese share theirs.
_SAME_SCRIPT = dict.fromkeys(("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO"), "HAN")
#: Scripts written without spaces: each letter is a word.
UNSPACED = frozenset({"HAN", "THAI", "LAO", "KHMER", "MYANMAR"})
_SHARED = ("LATIN", "CYRILLIC", "ARABIC", "DEVANAGARI")  # scripts in which lingua knows several languages

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


class _Word(NamedTuple):
    script: str
    text: str


@dataclass(frozen=True)
class LanguageConsistencyReward:
    """The share of the words of the reasoning that are in the target language (DeepSeek-R1, sec. 2.3.2).

    The reasoning is what follows the first ``<think>``, or the start where there is none, up to the first ``</think>``
    or ``<answer>``, or to the end.

    With a ``vocabulary`` (a synthetic task), or where rows name their words in the column ``target_words``, words are
    what stands between white space, and the reward is the share of them that the vocabulary has, case and all; 0
    without any word.

    Else, for natural text, lingua says what a language is. Code, formulas, LaTeX commands, tags, addresses and words
    with digits in them are left out first; what stands between two prices in dollars is no formula. A word is a run of
    letters of one script, of at least two (single letters are names of variables) and at most 60 characters, and in
    scripts without spaces (Chinese, Japanese, Thai) every letter. In a text of another script, one or two words in a
    row are left out where they are names, abbreviations or units: they have a capital or, if Latin, fewer than four
    letters. Then

    1. the words of a script that the target does not use are foreign;
    2. the words of one sentence in the target's script are the target's if there are at least 20 letters and lingua's
       confidence is 0.85 or more;
    3. they are foreign if there are at least 40 letters and its confidence in another language is 0.99. In Latin
       letters, where it is as sure of slang and noise, they also need that language in either half of the words, with
       0.1 or more, and most of them must not look like names (capitalized) or abbreviations;
    4. all other sentences are judged alike, as one text, where 24 letters will do for another language. If they are in
       one, those are foreign in which lingua finds no language 20 times likelier than it;
    5. the sentences left are judged alike as two texts: those in which lingua finds no language 20 times likelier than
       the target, and the others. For the target 12 letters will do with 0.95. If that tells nothing of the first
       text, it is the target's if it is along with the words of 2; of the second, foreign is what 4 says.

    The reward is the share of the target's words among those judged. It abstains with None where there is no evidence:
    no words, as in an empty reasoning; half of the letters or more in words that cannot be judged; or, in those of them
    where another language is 20 times likelier, at least half as many letters as are judged. Fewer are left out of the
    share, so that a short sentence or two in another language may go unnoticed. Sentences are not divided: a few
    foreign words in one do not count, if they are in its script, and one that is half in another language is in either
    or cannot be judged.

    lingua cannot be relied on to tell apart Indonesian and Malay, Bosnian, Croatian and Serbian, and the two written
    forms of Norwegian: of two such the one is never foreign to the other, and the reward often abstains. Name both,
    ``["id", "ms"]``, if it does not matter which.

    Args:
        language: The target, as ISO 639-1 code of one of lingua's 75 languages, or "no" for both forms of Norwegian;
            or a list of codes, any of which will do. Case and subtags are ignored: zh-CN is zh. None takes the column
            ``language``, a code or list per row, and abstains where a row has none; and English without that column.
        vocabulary: Every word of a synthetic task; ``language`` then says nothing.

    Raises:
        ValueError: The vocabulary is no list of words, or lingua has no such language.
        ImportError: lingua is not installed and the text is a natural one: at once if a language is named, else when
            called.
    """

    language: str | Sequence[str] | None = None
    vocabulary: Collection[str] | None = None

    def __post_init__(self) -> None:
        value = self.vocabulary
        is_list = isinstance(value, Collection) and not isinstance(value, str) and len(value) > 0
        if value is not None and not (is_list and all(isinstance(word, str) for word in value)):
            raise ValueError(f"vocabulary must be a list of words, got {value!r}")
        if value is None and self.language is not None:
            _targets("language", self.language)

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


def _share_of(vocabulary: frozenset[str], words: list[str]) -> float:
    return sum(word in vocabulary for word in words) / len(words) if words else 0.0


def _share_in(targets: frozenset[str], text: str) -> float | None:
    """The share of the words of a natural text that are in one of the languages; None without evidence."""
    by_verdict: dict[bool | None, list[_Word]] = {True: [], False: [], None: []}
    undecided: dict[str, list[list[_Word]]] = {}
    for sentence in _END_OF_SENTENCE.split(prose_of(text)):
        for words in _by_script(_without_names(_words_of(sentence), targets)):
            verdict = _is_in(targets, words)
            if verdict is None:
                undecided.setdefault(words[0].script, []).append(words)
            else:
                by_verdict[verdict] += words
    of_target = {script: [w for w in by_verdict[True] if w.script == script] for script in undecided}
    unlikely_letters = 0
    for script, sentences in undecided.items():
        foreign, sentences = _split_foreign(targets, sentences)
        likely, unlikely = _split_by_likelihood(targets, sentences)
        unlikely_foreign, unlikely = _split_foreign(targets, unlikely)
        by_verdict[False] += foreign + unlikely_foreign
        by_verdict[_pool_verdict(targets, _joined(likely), of_target[script])] += _joined(likely)
        verdict = _pool_verdict(targets, _joined(unlikely), [])
        by_verdict[verdict] += _joined(unlikely)
        unlikely_letters += 0 if verdict else _letters(_joined(unlikely))
    judged = by_verdict[True] + by_verdict[False]
    has_evidence = _letters(judged) > max(_letters(by_verdict[None]), 2 * unlikely_letters)
    return len(by_verdict[True]) / len(judged) if has_evidence else None


def _split_foreign(targets: frozenset[str], sentences: list[list[_Word]]) -> tuple[list[_Word], list[list[_Word]]]:
    """Words of the sentences of one script that together are in another language, and the other sentences."""
    if not sentences or _is_in(targets, _joined(sentences), is_pool=True) is not False:
        return [], sentences
    likely, unlikely = _split_by_likelihood(_likeliest(_confidences(_joined(sentences))), sentences)
    foreign = _joined(likely)
    if not foreign or _is_in(targets, foreign, is_pool=True) is not False:
        return [], sentences
    return foreign, unlikely


def _split_by_likelihood(
    languages: frozenset[str], sentences: list[list[_Word]]
) -> tuple[list[list[_Word]], list[list[_Word]]]:
    """Sentences in which lingua finds no language far likelier than these, and the others."""
    likely: list[list[_Word]] = []
    unlikely: list[list[_Word]] = []
    for words in sentences:
        (likely if _may_be_in(languages, words) else unlikely).append(words)
    return likely, unlikely


def _pool_verdict(targets: frozenset[str], pool: list[_Word], of_target: list[_Word]) -> bool | None:
    """True if words of several sentences are in one of the languages, by themselves or along with words that are."""
    verdict = _is_in(targets, pool, is_pool=True) if pool else None
    if verdict is None and pool and of_target:
        verdict = _is_in(targets, of_target + pool)
    return verdict or None


def _may_be_in(languages: frozenset[str], words: list[_Word]) -> bool:
    """Whether lingua finds no language far likelier than these in words of one script, or knows none of them in it."""
    script = words[0].script
    if script not in _SHARED or not languages & _languages_in(script):
        return True
    confidences = _confidences(words)
    confidence = sum(confidences.get(name, 0.0) for name in languages)
    return confidence >= _NEAR_LIKELIEST * max(confidences.values(), default=0.0)


def _is_in(targets: frozenset[str], words: list[_Word], *, is_pool: bool = False) -> bool | None:
    """Whether words of one script are in one of the languages, None if that cannot be told.

    A pool of sentences needs fewer letters than a sentence.
    """
    script = words[0].script
    if any(script in _ALSO_IN.get(target, ()) for target in targets):
        return None
    if script in _SHARED and not targets & _languages_in(script):
        return False
    if script in _SHARED and _letters(words) < (_FEW_LETTERS if is_pool else _LETTERS):
        return None
    confidences = _confidences(words)
    confidence = sum(confidences.get(target, 0.0) for target in targets)
    if script not in _SHARED:
        if "ja" in targets and script == "HAN" and not _has_kana(words):
            return False if len(words) >= _HAN_LETTERS else None  # in both languages, if it is short
        return confidence >= _SURE
    if confidence >= _SURE:
        return True if confidence >= _SURE_OF_FEW or _letters(words) >= _LETTERS else None
    without_names = [word for word in words if word.text.islower()]
    if len(without_names) < len(words) and without_names and _is_in(targets, without_names, is_pool=is_pool):
        return True
    if _letters(words) < (_LETTERS_OF_OTHER_IN_POOL if is_pool else _LETTERS_OF_OTHER):
        return None
    return False if _is_in_another(targets, words, confidences) else None


def _is_in_another(targets: frozenset[str], words: list[_Word], confidences: dict[str, float]) -> bool:
    """Whether words of a shared script are in a language that is no target, nor close to one."""
    others = _likeliest(confidences)
    names = [w for w in words if w.text[0].isupper() and (len(w.text) <= 4 or not w.text.isupper())]
    if others & targets or 3 * len(names) > 2 * len(words):
        return False
    if sum(confidences.get(name, 0.0) for name in others) < _SURE_OF_OTHER:
        return False
    if words[0].script != "LATIN":
        return True
    # Of its many languages in Latin letters lingua finds one in slang and noise, too, but seldom the same in each half.
    middle = len(words) // 2
    halves = [_confidences(words[:middle]), _confidences(words[middle:])]
    return all(sum(half.get(name, 0.0) for name in others) >= _SURE_OF_HALF for half in halves)


def _likeliest(confidences: dict[str, float]) -> frozenset[str]:
    """The likeliest language, and those that lingua cannot be relied on to tell apart from it."""
    likeliest = max(confidences, key=lambda name: confidences[name], default="")
    return next((group for group in _CLOSE if likeliest in group), frozenset({likeliest}))


def _joined(sentences: Iterable[list[_Word]]) -> list[_Word]:
    return list(chain.from_iterable(sentences))


def _letters(words: list[_Word]) -> int:
    return sum(len(word.text) for word in words)


def _without_names(words: list[_Word], targets: frozenset[str]) -> list[_Word]:
    """Words but for one or two in a row of a script that no target uses, if they are names, abbreviations or units."""
    kept: list[_Word] = []
    for script, group in groupby(words, key=lambda word: word.script):
        run = list(group)
        if len(run) <= 2 and script in _SHARED and not targets & _languages_in(script):
            run = [w for w in run if w.text.islower() and (script != "LATIN" or len(w.text) > 3)]
        kept += run
    return kept


def _by_script(words: list[_Word]) -> list[list[_Word]]:
    return [[w for w in words if w.script == script] for script in dict.fromkeys(word.script for word in words)]


def _words_of(text: str) -> list[_Word]:
    words: list[_Word] = []
    run, run_script = "", ""
    for letter in text + " ":
        # An accent belongs to the letter before it, and so does an apostrophe or hyphen, if letters follow.
        if run and (unicodedata.category(letter)[0] == "M" or (letter in "'’-\u200c" and run_script not in UNSPACED)):
            run += letter
            continue
        script = script_of(letter)
        if script and script == run_script and script not in UNSPACED:
            run += letter
            continue
        run = run.rstrip("'’-\u200c")
        if (run_script in UNSPACED or len(run) > 1) and len(run) <= _LONGEST_WORD:
            words.append(_Word(run_script, unicodedata.normalize("NFKC", run)))
        run, run_script = (letter, script) if script else ("", "")
    return words


@lru_cache(maxsize=4096)
def script_of(character: str) -> str:
    """The script of a letter; empty for anything else."""
    if unicodedata.category(character)[0] != "L":
        return ""
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "").partition(" ")[0]
    return _SAME_SCRIPT.get(name, name)


def _has_kana(words: list[_Word]) -> bool:
    return any(unicodedata.name(word.text[0], "").startswith(("HIRAGANA", "KATAKANA")) for word in words)


def _targets(name: str, language: Any) -> frozenset[str]:
    """The languages that a code or a list of codes names; of en-US and zh_Hans, en and zh."""
    codes = [language] if isinstance(language, str) else language
    if not isinstance(codes, Sequence) or not codes or not all(isinstance(code, str) for code in codes):
        raise ValueError(f"{name} must be one or more codes such as 'en', got {language!r}")
    allowed = _codes() | set(_MEMBERS)
    targets: frozenset[str] = frozenset()
    for code in codes:
        primary = re.split("[-_]", code.lower(), maxsplit=1)[0]
        if primary not in allowed:
            code_meant = _COUNTRIES.get(primary) or _codes_by_name().get(primary)
            hint = f"; {code_meant!r} for {code!r}" if code_meant else ""
            raise ValueError(f"{name} must be one or more of {', '.join(sorted(allowed))}, got {language!r}{hint}")
        targets |= _MEMBERS.get(primary, {primary})
    return targets


def _confidences(words: list[_Word]) -> dict[str, float]:
    """How sure lingua is of each language; rounded, because it adds up in no fixed order."""
    text = ("" if words and words[0].script in UNSPACED else " ").join(word.text for word in words)
    values = _detector().compute_language_confidence_values(text)
    return {_code(value.language): round(value.value, 6) for value in values if value.value > 0}


@cache
def _codes_by_name() -> dict[str, str]:
    """The codes by what is written in their place: the English name and the code of three letters."""
    languages = _lingua().Language.all()
    names = {language.name.lower(): _code(language) for language in languages}
    return names | {language.iso_code_639_3.name.lower(): _code(language) for language in languages}


@cache
def _codes() -> frozenset[str]:
    return frozenset(_code(language) for language in _lingua().Language.all())


@cache
def _languages_in(script: str) -> frozenset[str]:
    return frozenset(_code(language) for language in getattr(_lingua().Language, f"all_with_{script.lower()}_script")())


def _code(language: Any) -> str:
    return language.iso_code_639_1.name.lower()


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
