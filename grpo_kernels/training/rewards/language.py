"""Reward for reasoning in one language, by script and frequent words: no model, no download."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# The first word of a letter's Unicode name is its script, but for these.
_SAME_SCRIPT = {"CJK": "HAN", "IDEOGRAPHIC": "HAN", "KATAKANA-HIRAGANA": "KATAKANA"}
_UNSPACED = frozenset({"HAN", "HIRAGANA", "KATAKANA", "THAI"})  # written without spaces: each letter is a word
_KANA = frozenset({"HIRAGANA", "KATAKANA"})

_SCRIPTS = {
    "ar": {"ARABIC"}, "de": {"LATIN"}, "el": {"GREEK"}, "en": {"LATIN"}, "es": {"LATIN"}, "fr": {"LATIN"},
    "he": {"HEBREW"}, "hi": {"DEVANAGARI"}, "it": {"LATIN"}, "ja": {"HAN", *_KANA}, "ko": {"HANGUL"},
    "pt": {"LATIN"}, "ru": {"CYRILLIC"}, "th": {"THAI"}, "uk": {"CYRILLIC"}, "zh": {"HAN"},
}  # fmt: skip

# Frequent words of the languages that share a script. One that stands in two lists tells nothing and is passed over;
# a list therefore has less frequent words, too, where they are frequent in another language (die, pour, come).
_FREQUENT = {
    "en": "the of and to in is that it for was with as at by this have are be not but from or which we you they there "
    "so can if then what will all has had do does let would first each how an on no also when because more one its he "
    "she his her me man hat come per plus die pour son",
    "de": "der die das und ist nicht ein eine einen einer zu den dem des mit von für auf sich auch als an es wir ich "
    "sie er wird sind haben hat oder aber wenn dann also noch nach bei aus so was im in zum durch man will war all her",
    "fr": "le la les un une des et est que qui pour dans pas ne sur avec ce il elle nous vous je me on par plus au aux "
    "du en sont mais ou donc alors si cette comme être fait où puis",
    "es": "el la los las un una dos que de en por para con no se su lo como más pero al del es son está si entonces "
    "porque cuando este esta hay ser tiene también muy ya",
    "it": "il lo la gli le un una di che in per con non si del della dei sono come più ma al alla anche se questo "
    "questa quindi allora perché quando nel nella ha dal",
    "pt": "os as um uma que de em por para com não se do da dos das no na são mais mas ao como também então porque "
    "quando este esta está isso ser tem já muito ou",
    "ru": "не на что это как по но из для он она они мы вы же так от за то есть если или все его был была тогда "
    "поэтому чтобы когда",
    "uk": "не на що це як по але для він вона вони ми ви так від за то якщо або все його був була до та тоді тому щоб "
    "коли",
}

_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+|</?\w+>", re.DOTALL
)
_END_OF_REASONING = re.compile(r"</think>|<answer>")


@dataclass(frozen=True)
class LanguageConsistencyReward:
    """The share of the words of the reasoning that are in the target language (DeepSeek-R1, sec. 2.3.2).

    The reasoning is what follows the first ``<think>``, or the start where there is none, up to the first ``</think>``
    or ``<answer>``, or to the end. Without any word the reward is 0.

    With a ``vocabulary`` (a synthetic task), or where rows name their words in the column ``target_words``, words are
    what stands between white space, and the reward is the share of them that the vocabulary has, case and all.

    Else, for natural text, fenced code, LaTeX formulas and commands and tags are left out first. A word is a run of at
    least two letters of one script (single letters are names of variables), and in Chinese, Japanese and Thai script
    every letter. A word is in the target's script if its letters are; Chinese characters are Japanese only in a
    reasoning that has kana. The words in the target's script may still be of another language of that script: with m
    words that only the target's list of frequent words has, and o that only the lists of others have, m / (m + o) of
    them count as the target's, and all of them where m + o is 0. So

        reward = (words in the target's script / words) * m / (m + o)

    Args:
        language: The target: ar, de, el, en, es, fr, he, hi, it, ja, ko, pt, ru, th, uk or zh; or any other with
            ``words``.
        words: Frequent words of the target, lower case, instead of the list that ships. Of an unlisted language they
            also say what its scripts are.
        vocabulary: Every word of a synthetic task.

    Raises:
        ValueError: The language is not listed and no words are given, or both words and a vocabulary are.
    """

    language: str = "en"
    words: Collection[str] | None = None
    vocabulary: Collection[str] | None = None

    def __post_init__(self) -> None:
        for name in ("words", "vocabulary"):
            value = getattr(self, name)
            is_list = isinstance(value, Collection) and not isinstance(value, str) and len(value) > 0
            if value is not None and not (is_list and all(isinstance(word, str) for word in value)):
                raise ValueError(f"{name} must be a list of words, got {value!r}")
        if self.words is not None and self.vocabulary is not None:
            raise ValueError("words and vocabulary exclude each other, got both")
        if self.language not in _SCRIPTS and self.words is None and self.vocabulary is None:
            raise ValueError(f"language must be one of {', '.join(_SCRIPTS)} or have words, got {self.language!r}")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        named = columns.get("target_words") if self.vocabulary is None else [self.vocabulary] * len(completions)
        if named is not None:
            return [_share_of(frozenset(v), reasoning_of(c).split()) for v, c in zip(named, completions, strict=True)]
        frequent = {name: frozenset(words.split()) for name, words in _FREQUENT.items()}
        if self.words is not None:
            frequent[self.language] = frozenset(self.words)
        own = frequent.pop(self.language, frozenset())
        others = frozenset().union(*frequent.values())
        return [self._natural(_words_of(reasoning_of(c)), own - others, others - own) for c in completions]

    def _natural(self, words: list[tuple[str, str]], own: frozenset[str], others: frozenset[str]) -> float:
        if not words:
            return 0.0
        scripts = set(_SCRIPTS.get(self.language) or {script for w in self.words or () for script, _ in _words_of(w)})
        if self.language == "ja" and not any(script in _KANA for script, _ in words):
            scripts.discard("HAN")
        in_script = [word for script, word in words if script in scripts]
        m, o = sum(word in own for word in in_script), sum(word in others for word in in_script)
        return len(in_script) / len(words) * (m / (m + o) if m + o else 1.0)


def reasoning_of(completion: str) -> str:
    """What follows the first ``<think>``, or the start, up to the first ``</think>`` or ``<answer>``, or to the end."""
    before, opened, after = completion.partition("<think>")
    return _END_OF_REASONING.split(after if opened else before, maxsplit=1)[0]


def _share_of(vocabulary: frozenset[str], words: list[str]) -> float:
    return sum(word in vocabulary for word in words) / len(words) if words else 0.0


def _words_of(text: str) -> list[tuple[str, str]]:
    """Script and lower-cased text of each word."""
    words: list[tuple[str, str]] = []
    run, run_script = "", ""
    for letter in unicodedata.normalize("NFKC", _NOT_PROSE.sub(" ", text)) + " ":
        if run and unicodedata.category(letter)[0] == "M":  # an accent belongs to the letter before it
            run += letter
            continue
        script = _script(letter)
        if script and script == run_script and script not in _UNSPACED:
            run += letter
            continue
        if run_script in _UNSPACED or len(run) > 1:
            words.append((run_script, run.lower()))
        run, run_script = (letter, script) if script else ("", "")
    return words


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    """The script of a letter; empty for anything else."""
    if unicodedata.category(character)[0] != "L":
        return ""
    name = unicodedata.name(character, "").partition(" ")[0]
    return _SAME_SCRIPT.get(name, name)
