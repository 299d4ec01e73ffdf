"""Language consistency: every case of a table, and what no table holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from grpo_kernels import rewards
from grpo_kernels.rewards import LanguageConsistencyReward, language

CASES = yaml.safe_load((Path(__file__).parent / "reward_cases" / "language.yaml").read_text(encoding="utf-8"))
ENGLISH = "We know that there are two cases, so the answer must be smaller than this one."
POLISH = "Najpierw obliczamy pole kwadratu, a potem dzielimy je przez dwa."

pytestmark = pytest.mark.xdist_group("lingua")  # one process loads its models


def consistency(reward, *completions, **columns):
    return reward(prompts=["p"] * len(completions), completions=list(completions), **columns)


def test_cases_have_names_of_their_own():
    assert len({case["name"] for case in CASES}) == len(CASES) > 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_text_is_in_the_target_language_in_part_or_cannot_be_told(case):
    [share] = consistency(LanguageConsistencyReward(case["language"]), case["text"])
    if case["expected"] == "part":
        assert share is not None and case["least"] <= share <= case["most"]
    else:
        assert share == {"full": 1.0, "none": 0.0, "abstains": None}[case["expected"]]


def test_words_are_counted():
    # 4 words of another script beside 12 English ones; the single letter is none
    assert consistency(
        LanguageConsistencyReward(), "We know that there are two cases, so this must be x. Это совсем не так"
    ) == [pytest.approx(11 / 15)]
    # each Chinese character is a word, a run of Latin letters one, wherever they meet
    assert consistency(LanguageConsistencyReward("zh"), "用python写") == [pytest.approx(2 / 3)]


def test_several_languages_may_do():
    both = LanguageConsistencyReward(["en", "pl"])
    assert consistency(both, ENGLISH, POLISH, f"{ENGLISH} {POLISH}", "Это просто") == [1.0, 1.0, 1.0, 0.0]


def test_rows_may_say_which_language():
    rows = {"language": ["pl", "en", None, ["en", "pl"]]}
    assert consistency(LanguageConsistencyReward(), POLISH, POLISH, POLISH, POLISH, **rows) == [1.0, 0.0, None, 1.0]
    assert consistency(LanguageConsistencyReward("pl"), *[POLISH] * 4, **rows) == [1.0] * 4
    with pytest.raises(ValueError, match=r"the column language must be one or more of af, .* got 'Polish'"):
        consistency(LanguageConsistencyReward(), POLISH, language=["Polish"])


def test_case_and_subtags_of_a_code_are_ignored():
    for code in ("PL", "pl-PL", "pl_Latn", ["en-US", "PL"]):
        assert consistency(LanguageConsistencyReward(code), POLISH) == [1.0]
    assert consistency(LanguageConsistencyReward(), POLISH, language=["pl-PL"]) == [1.0]


def test_a_text_is_judged_alike_again_and_beside_others():
    completions = [f"{ENGLISH} {POLISH} {case['text']}" for case in CASES]
    reward = LanguageConsistencyReward("en")
    first = consistency(reward, *completions)
    assert first == consistency(reward, *completions) == [consistency(reward, c)[0] for c in completions]


def test_messages_are_read_as_their_text():
    assert consistency(LanguageConsistencyReward(), [{"role": "assistant", "content": ENGLISH}]) == [1.0]


def test_a_vocabulary_says_what_the_language_is():
    toy = LanguageConsistencyReward(vocabulary={"1", "+", "="})
    assert consistency(toy, "1 + 1 = two .", "") == [pytest.approx(4 / 6), 0.0]
    assert LanguageConsistencyReward("tlh", vocabulary=["a"])([""], ["a b"]) == [0.5]
    rows = {"target_words": [["a", "b"], ["c"]], "language": ["toy", "toy"]}
    assert consistency(LanguageConsistencyReward(), "<think>a b c A</think>", "c", **rows) == [0.5, 1.0]


def test_lingua_is_needed_for_natural_text_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "lingua", None)
    for cached in (language._detector, language._codes):
        cached.cache_clear()
    by_words, toy = LanguageConsistencyReward(), LanguageConsistencyReward(vocabulary=["a"])
    assert consistency(by_words, "a b", target_words=[["a"]]) == consistency(toy, "a b") == [0.5]
    for use in (lambda: rewards.resolve("language_consistency(language='pl')"), lambda: consistency(by_words, "a")):
        with pytest.raises(ImportError, match=r"needs lingua .*: pip install lingua-language-detector"):
            use()


def test_the_end_of_the_reasoning():
    assert rewards.reasoning_of("a<think>b<think>c</think>d</think>") == "b<think>c"
    assert rewards.reasoning_of("a</think>b") == rewards.reasoning_of("a<answer>b") == "a"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"language": "tlh"}, "language must be one or more of af, ar, .*, zu, got 'tlh'"),
        ({"language": "-en"}, "got '-en'"),
        ({"language": "jp"}, "got 'jp'; 'ja' for 'jp'"),
        ({"language": ["en", "KR"]}, r"got \['en', 'KR'\]; 'ko' for 'KR'"),
        ({"language": "English"}, "got 'English'; 'en' for 'English'"),
        ({"language": "zho"}, "got 'zho'; 'zh' for 'zho'"),
        ({"language": []}, r"language must be one or more codes such as 'en', got \[\]"),
        ({"language": [["en"]]}, r"got \[\['en'\]\]"),
        ({"language": ["en", "tlh"]}, r"got \['en', 'tlh'\]"),
        ({"language": 3}, "got 3"),
        ({"vocabulary": []}, r"vocabulary must be a list of words, got \[\]"),
        ({"vocabulary": "a b"}, "vocabulary must be a list of words, got 'a b'"),
        ({"vocabulary": 3}, "vocabulary must be a list of words, got 3"),
    ],
)
def test_parameters_that_do_not_fit_are_named(parameters, message):
    with pytest.raises(ValueError, match=message):
        LanguageConsistencyReward(**parameters)
