"""Reward for reasoning in one language: of natural text by lingua, of a toy task by its vocabulary."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from grpo_kernels.training.rewards.completions import completion_text

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

_SURE, _SURE_OF_OTHER = 0.85, 0.99  # lingua's confidence
_LETTERS, _LETTERS_OF_OTHER = 20, 40  # fewer in a shared script are too few
_HAN_LETTERS = 12  # as many without kana are not Japanese

_NOT_PROSE = re.compile(
    r"(`{3,}|~{3,}).*?(?:\1|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\begin\{(\w+\*?)\}.*?"
    r"\\end\{\2\}|\\[A-Za-z]+|</?\w+>|https?://\S+|(?<![A-Za-z\d_])[A-Za-z\d_]*[\d_][A-Za-z\d_]*|\b[a-z]+[A-Z][A-Za-z]*",
    re.DOTALL,
)
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
    with digits in them are left out first. A word is a run of at least two letters of one script (single letters are
    names of variables), and in scripts without spaces (Chinese, Japanese, Thai) every letter. In a text of another
    script, one or two words in a row are left out where they are names, abbreviations or units: they have a capital
    or, if Latin, fewer than four letters. Then

    1. the words of a script that the target does not use are foreign;
    2. the words of one sentence in the target's script are the target's if there are at least 20 letters and lingua's
       confidence is 0.85 or more, and foreign if there are at least 40 and its confidence in another language is 0.99;
    3. the words of all other sentences are judged alike, as one text.

    The reward is the share of the target's words among those judged. It abstains with None where there is no evidence:
    no words, as in an empty reasoning, or more than half of the words that cannot be judged. Sentences are judged as a
    whole: a few foreign words in one do not count, if they are in its script.

    lingua cannot be relied on to tell apart Indonesian and Malay, Bosnian, Croatian and Serbian, and the two written
    forms of Norwegian: of two such the one is never foreign to the other, and the reward often abstains. Name both,
    ``["id", "ms"]``, if it does not matter which.

    Args:
        language: The target, as ISO 639-1 code of one of lingua's 75 languages, or "no" for both forms of Norwegian;
            or a list of codes, any of which will do. None takes the column ``language``, a code or list per row, and
            abstains where a row has none; and English without that column.
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
        named = columns.get("target_words") if self.vocabulary is None else [self.vocabulary] * len(texts)
        if named is not None:
            return [_share_of(frozenset(v), text.split()) for v, text in zip(named, texts, strict=True)]
        of_rows = columns.get("language") if self.language is None else None
        if of_rows is None:
            targets = [_targets("language", self.language or "en")] * len(texts)
        else:
            targets = [None if v is None else _targets("the column language", v) for v in of_rows]
        return [None if t is None else _share_in(t, text) for t, text in zip(targets, texts, strict=True)]


def reasoning_of(completion: str) -> str:
    """What follows the first ``<think>``, or the start, up to the first ``</think>`` or ``<answer>``, or to the end."""
    before, opened, after = completion.partition("<think>")
    return _END_OF_REASONING.split(after if opened else before, maxsplit=1)[0]


def _share_of(vocabulary: frozenset[str], words: list[str]) -> float:
    return sum(word in vocabulary for word in words) / len(words) if words else 0.0


def _share_in(targets: frozenset[str], text: str) -> float | None:
    """The share of the words of a natural text that are in one of the languages; None without evidence."""
    prose = unicodedata.normalize("NFKC", _NOT_PROSE.sub(" ", text))
    sentences = [_without_names(_words_of(s), targets) for s in _END_OF_SENTENCE.split(prose)]
    judged: dict[bool | None, int] = {True: 0, False: 0, None: 0}
    left: list[_Word] = []
    for sentence in sentences:
        for words in _by_script(sentence):
            verdict = _is_in(targets, words)
            if verdict is None:
                left += words
            else:
                judged[verdict] += len(words)
    for words in _by_script(left):
        judged[_is_in(targets, words)] += len(words)
    known = judged[True] + judged[False]
    return judged[True] / known if known > judged[None] else None


def _is_in(targets: frozenset[str], words: list[_Word]) -> bool | None:
    """Whether words of one script are in one of the languages, None if that cannot be told."""
    script = words[0].script
    if any(script in _ALSO_IN.get(target, ()) for target in targets):
        return None
    if script in _SHARED and not targets & _languages_in(script):
        return False
    text = ("" if script in UNSPACED else " ").join(word.text for word in words)
    confidences = _confidences(text)
    if script not in _SHARED:
        if "ja" in targets and script == "HAN" and not _has_kana(text):
            return False if len(text) >= _HAN_LETTERS else None  # in both languages, if it is short
        return sum(confidences.get(target, 0.0) for target in targets) >= _SURE
    letters = sum(len(word.text) for word in words)
    if sum(confidences.get(target, 0.0) for target in targets) >= _SURE:
        return True if letters >= _LETTERS else None
    without_names = [word for word in words if word.text.islower()]
    if len(without_names) < len(words) and without_names and _is_in(targets, without_names):
        return True
    close = frozenset().union(*(group for group in _CLOSE if group & targets))
    is_other = any(value >= _SURE_OF_OTHER and name not in close for name, value in confidences.items())
    return False if is_other and letters >= _LETTERS_OF_OTHER else None


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
        if run_script in UNSPACED or len(run) > 1:
            words.append(_Word(run_script, run))
        run, run_script = (letter, script) if script else ("", "")
    return words


@lru_cache(maxsize=4096)
def script_of(character: str) -> str:
    """The script of a letter; empty for anything else."""
    if unicodedata.category(character)[0] != "L":
        return ""
    name = unicodedata.name(character, "").partition(" ")[0]
    return _SAME_SCRIPT.get(name, name)


def _has_kana(text: str) -> bool:
    return any(unicodedata.name(letter, "").startswith(("HIRAGANA", "KATAKANA")) for letter in text)


def _targets(name: str, language: Any) -> frozenset[str]:
    """The languages that a code or a list of codes names."""
    codes = [language] if isinstance(language, str) else language
    known = _codes() | set(_MEMBERS)
    if not isinstance(codes, Sequence) or not codes or not known.issuperset(codes):
        raise ValueError(f"{name} must be one or more of {', '.join(sorted(known))}, got {language!r}")
    return frozenset().union(*(_MEMBERS.get(code, {code}) for code in codes))


def _confidences(text: str) -> dict[str, float]:
    """How sure lingua is of each language; rounded, because it adds up in no fixed order."""
    values = _detector().compute_language_confidence_values(text)
    return {_code(value.language): round(value.value, 6) for value in values if value.value > 0}


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
