"""The rewards that ship, against numbers worked by hand."""

from __future__ import annotations

import math
import sys
import threading
from types import SimpleNamespace

import pytest

from grpo_kernels import rewards
from grpo_kernels.rewards import (
    CodeReward,
    CosineLengthReward,
    LengthReward,
    OverlongReward,
    RepetitionReward,
    bubblewrap,
)
from grpo_kernels.rewards.completions import completion_tokens


def called(reward, *completions, **columns):
    """A reward on completions of one prompt; a column that is no list is the same for each."""
    full = {name: value if isinstance(value, list) else [value] * len(completions) for name, value in columns.items()}
    return reward(["p"] * len(completions), list(completions), **full)


# Answers


def test_exact_match_wants_the_whole_completion():
    got = called(rewards.exact_match_reward, " 4\n", "4.", "a 4", "4 0", answer=["4", "4", "4", "4 0"])
    assert got == [1.0, 0.0, 0.0, 1.0]
    assert called(rewards.exact_match_reward, "4", answer=4) == [1.0]


@pytest.mark.parametrize("answer", ["42", 42, 42.0, r"\frac{84}{2}", "$42$", r"\boxed{42}", "First 6 x 7.\n#### 42"])
def test_math_accuracy_reads_every_kind_of_gold(answer):
    got = called(rewards.math_accuracy_reward, "<answer>42</answer>", r"so \boxed{42}", "\\boxed{43}", answer=answer)
    assert got == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("<answer>1/2</answer>", r"\frac12", 1.0),
        ("<answer>0.5</answer>", r"\frac{1}{2}", 1.0),
        ("<answer>50%</answer>", "0.5", 1.0),
        ("<answer>x^2+2x+1</answer>", "(x+1)^2", 1.0),
        (r"<answer>3\sqrt{2}</answer>", r"\sqrt{18}", 1.0),
        (r"<answer>\{1, 2\}</answer>", r"\{2, 1\}", 1.0),
        ("<answer>(1, 2)</answer>", "(2, 1)", 0.0),
        ("<answer>-3</answer>", "3", 0.0),
        ("<answer>42 apples</answer>", "42", 1.0),
        ("<answer>$18</answer>", "#### $18", 1.0),
        ("<answer>1,234</answer>", "#### 1,234", 1.0),
        ("and so\n#### 1,234\n", "1234", 1.0),
        ("#### 4\n#### 5", "4", 0.0),
        ("<answer>4</answer> <answer>5</answer>", "5", 1.0),
        (r"<think>\boxed{42}</think> no", "42", 0.0),
        (r"<think>\boxed{1}</think> \boxed{42}", "42", 1.0),
        (r"\boxed{41} \boxed{42}", "42", 0.0),
        ("first $3$, then $42$.", "42", 1.0),
        ("the answer is 42", "42", 0.0),
        ("<answer>{{{ \\frac{1}{</answer>", "42", 0.0),
        ("<answer></answer>", "42", 0.0),
    ],
)
def test_math_accuracy_compares_mathematics(completion, answer, expected):
    assert called(rewards.math_accuracy_reward, completion, answer=answer) == [expected]


def test_math_accuracy_abstains_without_a_gold():
    got = called(rewards.math_accuracy_reward, *["<answer>42</answer>"] * 4, answer=["no idea", "", None, "####"])
    assert got == [None] * 4


def test_math_accuracy_works_outside_the_main_thread():
    got = []
    worker = threading.Thread(
        target=lambda: got.extend(called(rewards.math_accuracy_reward, r"\boxed{1/2}", r"\boxed{2}", answer="0.5"))
    )
    worker.start()
    worker.join()
    assert got == [1.0, 0.0]


def test_math_accuracy_gives_up_on_what_takes_too_long(monkeypatch):
    monkeypatch.setattr("grpo_kernels.rewards.answers._SECONDS", 1)
    assert called(rewards.math_accuracy_reward, "<answer>9^{9^{9^9}}</answer>", answer="42") == [0.0]


def test_math_accuracy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="math_accuracy needs math-verify: pip install math-verify"):
        called(rewards.math_accuracy_reward, "42", answer="42")


# Form


def test_each_tag_that_occurs_once_earns_a_quarter():
    completions = [
        "<think>a</think><answer>b</answer>",
        "<think>a</think>",
        "<think>a<think>b</think><answer>c</answer>",
        "</answer>",
        "think answer",
    ]
    assert called(rewards.tag_count_reward, *completions) == [1.0, 0.5, 0.75, 0.25, 0.0]


def test_repetition_counts_what_recurs():
    # 6 words have 5 pairs, "a b" three times and "b a" twice: 2 different ones; and 4 triples of 2 kinds.
    assert called(RepetitionReward(n=2), "a b A b a B") == pytest.approx([-0.6])
    assert called(RepetitionReward(max_penalty=-2.0), "a b a b a b", "a b c d", "a b") == [-1.0, 0.0, 0.0]
    assert called(RepetitionReward(n=1), "x " * 10) == pytest.approx([-0.9])
    assert math.copysign(1, called(RepetitionReward(), "a b c d")[0]) == 1


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("我们知道", 4),
        ("我们 知道。", 5),
        ("それはカー", 5),
        ("ที่นี่", 2),  # two letters, each with two marks
        ("ພາສາລາວ", 7),
        ("ភាសា", 2),
        ("မြန်မာ", 3),
        ("用Python写3行", 5),
        ("We say 你好, then go.", 7),
        ("그는 학교에 간다", 3),
        ("мы don't знаем", 3),
    ],
)
def test_repetition_has_letters_for_words_where_no_spaces_are(text, units):
    # u units and the same again have u + 1 u-grams, of which the first and the last are the same
    assert called(RepetitionReward(n=units), f"{text} {text}") == pytest.approx([-1 / (units + 1)])


def test_repetition_counts_what_its_unit_says():
    # "abab" has 3 pairs, 2 different; white space counts as one character, whatever it is
    assert called(RepetitionReward(n=2, unit="characters"), "aBAb", "a  \n b a b") == pytest.approx([-1 / 3, -2 / 6])
    tokens = RepetitionReward(n=2, unit="tokens")
    assert called(tokens, "no", "matter", completion_ids=[[5, 6, 5, 6], [1, 2, 3]]) == pytest.approx([-1 / 3, 0.0])
    with pytest.raises(ValueError, match="repetition needs the column completion_ids"):
        called(tokens, "a")


def test_form_and_length_are_those_of_the_assistants_messages():
    chat = [
        {"role": "assistant", "content": "<think>a</think><answer>4</answer>"},
        {"role": "tool", "content": "b " * 9},
    ]
    assert called(rewards.format_reward, chat) == called(rewards.tag_count_reward, chat) == [1.0]
    assert called(RepetitionReward(n=1), chat) == [0.0]
    judge = lambda prompts, completions, **columns: [1.0] * len(completions)  # noqa: E731
    [by_text] = called(CosineLengthReward(judge=judge), chat[0]["content"])
    assert called(CosineLengthReward(judge=judge), chat) == [by_text]


# Length


def test_length_compares_the_answers_to_one_prompt():
    prompts = ["p", "p", "p", "q", "q", [{"role": "user", "content": "r"}]]
    completions = ["42", "42  ", "4100", "42", "4" * 9, "42"]
    judge = LengthReward(judge="exact_match")
    # "p": lengths 2, 4 and 4: 0.5, -0.5 and min(0, -0.5); "q": 2 and 9: 0.5 and min(0, -0.5); "r": one length
    assert judge(prompts, completions, answer=["42"] * 6) == [0.5, -0.5, -0.5, 0.5, -0.5, 0.0]
    short_and_wrong = judge(["p"] * 3, ["4", "42", "42 "], answer=["42"] * 3)
    assert short_and_wrong == [0.0, 0.0, -0.5]


def test_cosine_length_goes_from_end_to_end():
    reward = CosineLengthReward(judge=lambda prompts, completions, *, right, **columns: right, max_len=8)
    lengths = [0, 2, 4, 8, 12]
    completions = ["x" * n for n in lengths]
    half = math.sqrt(0.5) / 2  # of the cosine at a quarter of the way: (1 + cos(pi / 4)) / 2 = 0.5 + half
    right = called(reward, *completions, right=1.0)
    assert right == pytest.approx([1.0, 0.5 + 0.5 * (0.5 + half), 0.75, 0.5, 0.5])
    wrong = called(reward, *completions, right=0.0)
    assert wrong == pytest.approx([-1.0, -0.5 - 0.5 * (0.5 + half), -0.75, -0.5, -0.5])
    assert called(reward, "x", "x", right=[None, 0.5]) == [None, pytest.approx(called(reward, "x", right=0.0)[0])]


def test_cosine_length_is_trls_on_tokens():
    from trl.rewards import get_cosine_scaled_reward

    texts = [r"\boxed{3}", r"\boxed{4}", r"\boxed{3}", r"\boxed{4}"]
    ids = [[0] * 30, [0] * 70, [0] * 100, [0] * 140]
    bounds = {"min_value_wrong": -2.0, "max_value_wrong": -0.25, "min_value_correct": 0.25, "max_value_correct": 3.0}
    trl = get_cosine_scaled_reward(max_len=100, **bounds)
    expected = trl([[{"content": text}] for text in texts], solution=["3"] * 4, completion_ids=ids)
    ours = CosineLengthReward(judge="math_accuracy", unit="tokens", max_len=100, **bounds)
    assert called(ours, *texts, answer="3", completion_ids=ids) == pytest.approx(expected)


def test_length_may_be_counted_by_a_tokenizer():
    def words(text, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": text.split()}

    reward = CosineLengthReward(
        judge=lambda prompts, completions, **columns: [1.0] * len(completions), tokenizer=words, max_len=4
    )
    assert called(reward, "several long words here", "two words") == pytest.approx([0.5, 0.75])


def test_a_tokenizer_is_loaded_by_its_name(tmp_path):
    from grpo_kernels.training.addition import TASKS

    tokenizer = TASKS["addition"].build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    reward = rewards.resolve(f"cosine_length(tokenizer={str(tmp_path)!r}, max_len=6)")
    text = "1 + 2"
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 3
    assert called(reward, text, answer="3") == pytest.approx([-0.75])


def test_overlong_is_daposs_equation_13():
    reward = OverlongReward(max_completion_len=100, soft_punish_cache=20)
    lengths = [0, 80, 81, 90, 100, 101, 500]
    got = called(reward, *["c"] * 7, completion_ids=[[7] * n for n in lengths])
    assert got == pytest.approx([0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0])
    sharp = OverlongReward(max_completion_len=100, soft_punish_cache=0)
    assert called(sharp, "c", "c", completion_ids=[[7] * 100, [7] * 101]) == [0.0, -1.0]


def test_a_reward_on_tokens_needs_them():
    with pytest.raises(ValueError, match=r"overlong needs the column completion_ids, .*; it has answer"):
        called(OverlongReward(10, 2), "c", answer="4")
    with pytest.raises(ValueError, match="cosine_length needs the column completion_ids"):
        called(CosineLengthReward(unit="tokens"), "c", answer="4")
    with pytest.raises(ValueError, match="it has none"):
        completion_tokens("mine", {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LengthReward(judge="guess"),
            "judge must be a reward function or one of accuracy, exact_match, math_a",
        ),
        (lambda: LengthReward(unit="words"), "unit must be one of characters, tokens, got 'words'"),
        (lambda: CosineLengthReward(max_len=0), "max_len must be an integer of at least 1, got 0"),
        (lambda: CosineLengthReward(min_value_wrong=0.0), r"max_value_wrong must be in \[0.0, inf\], got -0.5"),
        (lambda: CosineLengthReward(max_value_correct=math.nan), "max_value_correct must be a finite number, got nan"),
        (lambda: OverlongReward(0, 0), "max_completion_len must be an integer of at least 1, got 0"),
        (lambda: OverlongReward(4, 5), r"soft_punish_cache must be at most max_completion_len \(4\), got 5"),
        (lambda: RepetitionReward(unit="letters"), "unit must be one of words, characters, tokens, got 'letters'"),
        (lambda: RepetitionReward(n=0), "n must be an integer of at least 1, got 0"),
        (lambda: CodeReward(seconds=0), r"seconds must be in \[0.1, inf\], got 0"),
        (lambda: CodeReward(workers=0), "workers must be an integer of at least 1, got 0"),
    ],
)
def test_parameters_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Code

FENCE = "Here:\n```python\n{}\n```\nDone."
DOUBLE = FENCE.format("def double(x):\n    return 2 * x")


def test_code_earns_the_share_of_assertions_that_hold(sandbox):
    tests = ["assert double(2) == 4", "assert double(2) == 5", "assert triple(1) == 3", "x = double(3)\nassert x == 6"]
    broken = FENCE.format("def double(x) return 2 * x")
    assert called(CodeReward(executor=sandbox.run), DOUBLE, broken, "no code", tests=[tests] * 3) == [0.5, 0.0, 0.0]


def test_code_earns_the_share_of_outputs_that_agree(sandbox):
    program = FENCE.format("a, b = map(int, input().split())\nprint(a + b, ' ')\nprint()")
    tests = [{"input": "1 2\n", "output": "3"}, {"input": "2 2\n", "output": "4\n\n"}, {"input": "1", "output": "1"}]
    assert called(CodeReward(executor=sandbox.run), program, tests=[tests]) == pytest.approx([2 / 3])


def test_a_guarded_main_runs_for_input_alone(sandbox):
    program = FENCE.format("def f(): return 1\nif __name__ == '__main__':\n    print(input())")
    tests = [["assert f() == 1"], [{"input": "7", "output": "7"}]]
    assert called(CodeReward(executor=sandbox.run), program, program, tests=tests) == [1.0, 1.0]


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; print('ok', flush=True); os._exit(0)",
        "import sys; print(open('/program.py').read()); print(sys.stdin.read(), flush=True)",
        "import builtins; builtins.AssertionError = KeyboardInterrupt",
        "while True: pass",
        "x = [0] * 10**9",
    ],
)
def test_a_program_without_the_answer_earns_nothing(sandbox, program):
    reward = CodeReward(executor=sandbox.run, seconds=20.0, cpu_seconds=1, memory_bytes=2**28)
    assert called(reward, FENCE.format(program), tests=[["assert double(2) == 4"]]) == [0.0]


def test_code_abstains_without_tests():
    assert called(CodeReward(), DOUBLE, DOUBLE, "", tests=[[], None, []]) == [None, None, None]


@pytest.mark.parametrize("tests", ["assert True", [3], [{"input": "1"}], [{"input": "1", "output": 1}], {"input": "1"}])
def test_bad_tests_are_refused(tests):
    with pytest.raises(ValueError, match=r"tests must be lists of assertions or of .*, got .* for completion 1"):
        called(CodeReward(), "", "", tests=[["assert True"], tests])


def test_code_is_not_run_without_a_sandbox(monkeypatch):
    monkeypatch.setattr(bubblewrap, "unavailable", lambda: "no user namespaces")
    with pytest.raises(RuntimeError, match=r"'code' failed on 1 completions: .*no user namespaces"):
        rewards.score({"code": CodeReward()}, ["p"], [DOUBLE], {"tests": [["assert double(1) == 2"]]})


def test_an_executor_is_named_like_a_reward_function(sandbox):
    reward = rewards.resolve(f"code(executor='{sandbox.__name__}:run', seconds=20.0)")
    assert called(reward, DOUBLE, tests=[["assert double(2) == 4", "assert double(2) == 5"]]) == [0.5]


def test_an_executor_is_told_the_limits():
    calls = []

    def executor(program, stdin, **limits):
        calls.append((program, stdin, limits))
        return SimpleNamespace(status="ok", stdout="2\n", stderr="")

    reward = CodeReward(seconds=3.0, cpu_seconds=2, memory_bytes=2**28, executor=executor)
    tests = [[{"input": "1", "output": "2"}, {"input": "1", "output": "3"}]]
    assert called(reward, FENCE.format("print(2)"), tests=tests) == [0.5]
    assert calls == [("print(2)", "1", {"seconds": 3.0, "cpu_seconds": 2, "memory_bytes": 2**28})] * 2


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        ("docker", 'executor must be "bubblewrap", a function or "module:function", got \'docker\''),
        (3, 'executor must be "bubblewrap", a function or "module:function", got 3'),
        ("no_such_module:run", "reward_funcs: 'code': 'no_such_module:run' cannot be imported: No module named"),
        ("json:run", r"module 'json' \(.*\) has no function 'run'"),
    ],
)
def test_what_is_no_executor_is_refused_before_any_work(executor, message):
    with pytest.raises(ValueError, match=message):
        rewards.resolve(f"code(executor={executor!r})")
