"""pass@k, cons@k and their intervals, by hand and by simulation, and the evaluation that draws the samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from testing.training import ScriptedSampler, accuracies_of, report_of

from grpo_kernels.rewards import columns_of, resolve
from grpo_kernels.training.evaluation import (
    Score,
    _student,
    cons_at_k,
    interval,
    measure_pass_rates,
    pass_at_k,
)
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rollout import teacher_forced
from grpo_kernels.training.task import evaluation_options, load_task


def rights(*counts, samples):
    return [[True] * right + [False] * (samples - right) for right in counts]


def test_pass_at_k_by_hand():
    right = rights(0, 1, 4, samples=4)
    assert pass_at_k(right).value == pytest.approx(1.25 / 3)
    assert pass_at_k(right, 2).value == pytest.approx((0 + 0.5 + 1) / 3)  # 1 - C(3, 2) / C(4, 2) = 1 - 3/6
    assert pass_at_k(right, 4).value == pytest.approx(2 / 3)
    assert [pass_at_k(right, k).name for k in (1, 4)] == ["pass@1", "pass@4"]


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(k):
    for right in range(7):
        samples = rights(right, samples=6)[0]
        subsets = [any(subset) for subset in itertools.combinations(samples, k)]
        assert pass_at_k([samples], k).value == pytest.approx(sum(subsets) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many_samples_neither_overflows_nor_cancels():
    right = rights(1, 1999, samples=2000)
    expected = [1 - math.comb(2000 - c, 1000) / math.comb(2000, 1000) for c in (1, 1999)]
    assert pass_at_k(right, 1000).value == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_problems_may_have_unequal_numbers_of_samples():
    assert pass_at_k([[True], [True, False, False, False]]).value == pytest.approx((1 + 0.25) / 2)
    with pytest.raises(ValueError, match=r"at most the samples of each problem \(1\), got 2"):
        pass_at_k([[True], [True, False, False, False]], 2)


def test_the_answer_with_most_votes_wins():
    answers = [["7", "12", "12", "3"], ["7", "7", "12", "7"]]
    right = [[answer == "12" for answer in given] for given in answers]
    assert cons_at_k(answers, right, 4).value == 0.5
    assert cons_at_k(answers, right, 4).name == "cons@4"


def test_of_equal_votes_the_answer_sampled_first_wins():
    for first, second in (("12", "7"), ("7", "12")):
        given = [first, second, second, first]
        assert cons_at_k([given], [[answer == "12" for answer in given]], 4).value == float(first == "12")


def test_a_missing_answer_never_wins():
    assert cons_at_k([[None, None, "12"]], [[False, False, True]], 3).value == 1.0
    assert cons_at_k([[None, None, None]], [[True, True, True]], 3).value == 0.0


def test_every_k_samples_vote_and_what_is_left_over_does_not():
    answers = [["12", "12", "7", "7", "12"]]
    right = [[answer == "12" for answer in answers[0]]]
    assert cons_at_k(answers, right, 2).value == 0.5  # 12 12 | 7 7 | 12
    assert cons_at_k(answers, right, 1).value == pass_at_k(right).value == 0.6


def test_answers_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"one answer for each sample in right \(4 of 2 problems\), got 3 of 2"):
        cons_at_k([["1", "2"], ["1"]], rights(1, 1, samples=2), 1)


@pytest.mark.parametrize("score", [pass_at_k, lambda right, k: cons_at_k([["1"] * len(s) for s in right], right, k)])
def test_a_k_out_of_range_and_no_problems_are_refused(score):
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k must be at least 1 and at most .* \(4\), got {k}"):
            score(rights(1, 2, samples=4), k)
    with pytest.raises(ValueError, match="right must have at least one problem, got none"):
        score([], 1)


def test_no_values_and_no_samples_are_refused():
    with pytest.raises(ValueError, match="values must have one value per problem, got none"):
        interval([])
    with pytest.raises(ValueError, match=r"the samples of each problem \(0\)"):
        pass_at_k([[True], []])


def test_one_sample_a_problem_has_wilsons_interval():
    """The published 95% intervals of 0 of 10, 8 of 10 and 81 of 263."""
    for right, of, low, high in ((0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (81, 263, 0.2553, 0.3662)):
        score = pass_at_k([[True]] * right + [[False]] * (of - right))
        assert (score.value, score.low, score.high) == pytest.approx((right / of, low, high), abs=1e-4)


def test_the_interval_counts_problems_and_not_samples():
    """Samples of a problem that all agree say no more than one of them."""
    one = pass_at_k(rights(1, 0, 1, 0, 1, 0, 1, 0, samples=1))
    assert pass_at_k(rights(64, 0, 64, 0, 64, 0, 64, 0, samples=64)) == one
    alike = pass_at_k(rights(32, 24, 40, 28, 36, 30, 34, 32, samples=64))
    assert alike.high - alike.low < (one.high - one.low) / 3


def test_equal_pass_rates_count_no_more_than_all_samples():
    few = pass_at_k(rights(*[2] * 50, samples=4))
    alone = pass_at_k([[True]] * 100 + [[False]] * 100)
    assert few == alone


def test_students_quantile_agrees_with_the_tables():
    for freedom, quantile in ((3, 3.1824), (4, 2.7764), (9, 2.2622), (29, 2.0452), (1000, 1.9623)):
        assert _student(freedom) == pytest.approx(quantile, rel=0.01)


@pytest.mark.parametrize(
    ("problems", "samples", "k", "a", "b"),
    [
        (20, 1, 1, 1.0, 1.0),
        (10, 8, 1, 1.0, 1.0),
        (30, 4, 1, 0.3, 0.3),  # problems that are mostly all right or all wrong
        (100, 16, 1, 2.0, 8.0),
        (30, 8, 4, 0.5, 2.0),
        (100, 8, 2, 9.0, 1.0),
        (30, 4, 1, 300.0, 300.0),  # problems that are all alike
    ],
)
def test_the_interval_holds_the_truth_95_times_in_100(problems, samples, k, a, b):
    """2000 draws of problems with Beta(a, b) pass rates; their mean pass@k is 1 - E[(1-q)^k]."""
    rng = np.random.default_rng(0)
    truth = 1 - math.prod((b + i) / (a + b + i) for i in range(k))
    covered = 0
    for _ in range(2000):
        rates = rng.beta(a, b, size=(problems, 1))
        score = pass_at_k((rng.random((problems, samples)) < rates).tolist(), k)
        covered += score.low <= truth <= score.high
    assert 0.935 <= covered / 2000 <= 0.985


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.5], [0.0, 1.0], [0.25, 0.25], [1 / 3] * 7, [1 - 1e-16, 1.0]])
def test_an_interval_is_within_0_and_1_has_width_and_holds_the_mean(values):
    low, high = interval(values, 8)
    assert 0 <= low <= sum(values) / len(values) <= high <= 1
    assert high - low > 0.05


def recipe_of(**changes):
    settings = {"device": "cpu", "num_threads": 1, "num_eval_prompts": 6, "eval_samples": 4, "eval_batch_size": 5,
                "max_completion_length": 12}  # fmt: skip
    return Recipe(**{**settings, **changes})


@pytest.fixture
def task(one_thread):
    return load_task(recipe_of())


class Script(ScriptedSampler, dict):
    """Completions by prompt, handed out in order; the last one also to who asks greedily."""

    def __init__(self, task):
        super().__init__(task, lambda prompt, t: self[prompt][-1] if t == 0 else self[prompt].pop(0))


@pytest.fixture
def script(task):
    return Script(task)


def answered(digits):
    return f"<answer> {' '.join(digits)} </answer>" if digits else "units"


def test_a_report_has_samples_rates_and_scores_in_the_order_of_the_rows(task, script):
    rows = task.eval_rows[:2]
    right = [row["answer"] for row in rows]
    script[rows[0]["prompt"]] = [answered(text) for text in (right[0], "7", right[0], None, right[0])]
    script[rows[1]["prompt"]] = [answered(text) for text in ("7", "8", "8", right[1], "9")]
    report = report_of(task, rows, recipe_of(eval_batch_size=3), script)
    assert [[s.right for s in group] for group in report.samples] == [[True, False, True, False], [False] * 3 + [True]]
    assert [s.answer for s in report.samples[0]] == [right[0], "7", right[0], None]
    assert [s.prompt for s in report.greedy] == [row["prompt"] for row in rows]
    assert [s.right for s in report.greedy] == [True, False]
    values = {name: score.value for name, score in report.scores.items()}
    assert values == {"pass@1": 0.375, "pass@4": 1.0, "cons@4": 0.5, "greedy": 0.5}
    assert all(isinstance(score, Score) and score.name == name for name, score in report.scores.items())


def test_metrics_of_a_report_are_those_of_evaluate_with_intervals(task):
    recipe = recipe_of()
    report = report_of(task, task.eval_rows, recipe, ks=[1, 2])
    metrics = report.metrics()
    assert metrics.keys() == {
        "eval_accuracy", "eval_accuracy_low", "eval_accuracy_high", "eval_pass@2", "eval_cons@2",
        "eval_accuracy_greedy", "eval_accuracy_greedy_low", "eval_accuracy_greedy_high",
    }  # fmt: skip
    plain = accuracies_of(task, task.eval_rows, recipe)
    assert {name: metrics[name] for name in plain} == pytest.approx(plain)
    assert metrics["eval_accuracy_low"] <= metrics["eval_accuracy"] <= metrics["eval_accuracy_high"]


def test_the_check_and_the_extraction_are_the_callers(task, script):
    rows = [{**row, "level": k} for k, row in enumerate(task.eval_rows[:2])]
    for row in rows:
        script[row["prompt"]] = ["1 2", "3", "3", "4", "4"]
    seen = []

    def check(prompts, completions, *, level, **columns):
        seen.extend(zip(prompts, level, strict=True))
        return [None if c == "4" else 1.0 if c == "3" else 0.9 for c in completions]

    check.extract = lambda text: text
    found = report_of(task, rows, recipe_of(), script, ks=(3,), check=check)
    assert [[s.right for s in group] for group in found.samples] == [[False, True, True, False]] * 2  # a whole 1
    assert found.scores["cons@3"].value == 1.0
    assert set(seen) == {(row["prompt"], row["level"]) for row in rows}


def boxed(answer):
    return rf"so it is $\boxed{{{answer}}}$"


@pytest.mark.parametrize(
    "changes",
    [
        {"reward_funcs": ["format", "math_accuracy"]},
        {"reward_funcs": ["accuracy", "format"], "check": "math_accuracy"},
    ],
)
def test_the_recipes_judge_says_what_is_right(task, script, monkeypatch, changes):
    """In evaluations, votes and the pass-rate filter, whatever form it reads an answer from."""
    rows, said = task.eval_rows[:2], []

    def sampler(prompts, *, temperature, **options):
        said[:] = [script[p][-1] if temperature == 0 else script[p].pop(0) for p in prompts]
        return teacher_forced(task.tokenizer, prompts, ["1"] * len(prompts))

    sampler.end_ids = []
    monkeypatch.setattr(
        "grpo_kernels.training.rollout.completion_texts", lambda rollout, tokenizer, end_ids: list(said)
    )  # not the task's words
    right = [row["answer"] for row in rows]
    script[rows[0]["prompt"]] = [boxed(text) for text in (right[0], "7", "0" + right[0], "8", right[0])]
    script[rows[1]["prompt"]] = [boxed(text) for text in ("7", "8", "8", right[1], "9")]
    before = {prompt: list(texts) for prompt, texts in script.items()}
    recipe = recipe_of(**changes)
    report = report_of(task, rows, recipe, sampler)
    assert {name: score.value for name, score in report.scores.items()} == {
        "pass@1": 0.375, "pass@4": 1.0, "cons@4": 0.5, "greedy": 0.5,
    }  # fmt: skip
    script.update({prompt: list(texts) for prompt, texts in before.items()})
    assert accuracies_of(task, rows, recipe, sampler) == {"eval_accuracy": 0.375, "eval_accuracy_greedy": 0.5}
    script.update({prompt: list(texts) for prompt, texts in before.items()})
    assert measure_pass_rates(sampler, task.tokenizer, rows, **evaluation_options(recipe)) == [0.5, 0.25]


def test_by_default_the_first_reward_that_judges_is_the_judge():
    for names, expected in (
        (["format", "exact_match", "accuracy"], "exact_match"),
        (["format", "code(seconds=1.0)"], "code(seconds=1.0)"),
        (["format"], "accuracy"),
    ):
        assert evaluation_options(recipe_of(reward_funcs=names))["check"] == resolve(expected)
    with pytest.raises(ValueError, match="expected one of accuracy"):
        evaluation_options(recipe_of(check="fluency"))


def test_a_judge_without_answers_has_no_vote(task, script):
    rows = task.eval_rows[:2]
    for row in rows:
        script[row["prompt"]] = ["1 2", "3", "3", "4", "4"]

    def check(prompts, completions, **columns):
        return [float(c == "3") for c in completions]

    report = report_of(task, rows, recipe_of(), script, check=check)
    assert report.scores.keys() == {"pass@1", "pass@4", "greedy"} and report.greedy[0].answer is None


def test_every_column_reaches_a_check_and_the_tokens_do(task, script):
    """Whatever the first row of a batch lacks."""
    rows = [task.eval_rows[0], {**task.eval_rows[1], "level": 3}]
    for row in rows:
        script[row["prompt"]] = ["1 2"] * 5
    seen = []

    def check(prompts, completions, *, level, completion_ids, **columns):
        seen.extend(level)
        assert completion_ids == [task.tokenizer("1 2 <eos>")["input_ids"]] * len(completions)
        return [None] * len(completions)

    report_of(task, rows, recipe_of(eval_batch_size=2), script, check=check)
    assert set(seen) == {None, 3}
    found = columns_of(rows, [[1], [2]])
    assert found["level"] == [None, 3] and "prompt" not in found and found["completion_ids"] == [[1], [2]]


def test_samples_are_repeatable_and_the_random_state_is_put_back(task):
    state = torch.get_rng_state()
    first = report_of(task, task.eval_rows, recipe_of())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert report_of(task, task.eval_rows, recipe_of()) == first
    other = report_of(task, task.eval_rows, recipe_of(seed=1))
    assert other.samples != first.samples
    assert len({sample.completion for group in first.samples for sample in group}) > 6  # not one sample repeated


def test_no_rows_and_too_large_a_k_are_refused_before_anything_is_sampled(task, script):
    for function in (accuracies_of, report_of):
        with pytest.raises(ValueError, match="rows must have at least one problem to evaluate, got none"):
            function(task, [], recipe_of(), script)
    with pytest.raises(ValueError, match=r"at most eval_samples \(4\), got 5"):
        report_of(task, task.eval_rows, recipe_of(), script, ks=[1, 5])
