"""Reward functions are called as TRL's trainer calls them, and those of ``trl.rewards`` run unchanged."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from grpo_kernels import rewards
from grpo_kernels.errors import ThirdPartyError
from grpo_kernels.rewards import RewardLog, RewardModel, columns_of, resolve, score
from grpo_kernels.training.addition import TASKS, build_model

CHAT = [{"role": "user", "content": "1 + 1 ="}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_everything_goes_by_keyword_under_trls_names() -> None:
    seen: list[dict[str, Any]] = []

    def mine(**given: Any) -> list[float]:
        seen.append(given)
        return [0.0] * 2

    rows = [{"prompt": "p", "answer": "1", "completion": "worked"}, {"prompt": CHAT, "answer": "2"}]
    log = RewardLog(step=3, max_steps=10)
    score({"mine": mine}, [row["prompt"] for row in rows], ["a", "b"], columns_of(rows, [[5], [6, 7]]), log)
    (given,) = seen
    assert given.pop("trainer_state").global_step == 3
    given.pop("log_metric")("speed", 0.5)
    given.pop("log_extra")("note", ["x", "y"])
    assert given == {
        "prompts": ["p", CHAT], "completions": ["a", say("b")], "completion_ids": [[5], [6, 7]], "answer": ["1", "2"],
    }  # fmt: skip
    assert log.metrics == {"speed": [0.5]} and log.rows(2) == [{"note": "x"}, {"note": "y"}]


def swapped(completions: list[str], prompts: list[str], **kwargs: Any) -> list[float]:
    return [float(c == "c" and p == "p") for c, p in zip(completions, prompts, strict=True)]


def completions_alone(completions: list[str]) -> list[float]:
    return [float(len(c)) for c in completions]


def with_a_column(completions: list[str], answer: list[str]) -> list[float]:
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


async def asynchronous(completions: list[str], **kwargs: Any) -> torch.Tensor:
    return torch.tensor([len(c) for c in completions])


class Method:
    def reward(self, *, completions: list[str], **kwargs: Any) -> list[int | None]:
        return [len(c) if c == "c" else None for c in completions]


@pytest.mark.parametrize(
    "function",
    [swapped, completions_alone, with_a_column, asynchronous, Method().reward, functools.partial(swapped, other=1)],
)
def test_the_order_and_the_kind_of_a_function_do_not_matter(function: Any) -> None:
    columns = {"answer": ["c"], "completion_ids": [[1]], "other": [2]} if function is not swapped else {"answer": ["c"]}
    columns.pop("other", None)
    assert score({"mine": function}, ["p"], ["c"], columns).tolist() == [[1.0]]


def test_a_function_that_names_something_else_is_told_what_it_is_given() -> None:
    def positional(p: Any, c: Any, **kwargs: Any) -> list[float]:
        return [1.0]

    message = r"'mine' failed on 1 completions: TypeError: missing a required argument: 'p'; it is called by keyword, "
    with pytest.raises(ThirdPartyError, match=message + "with prompts, completions, trainer_state, .*answer"):
        score({"mine": positional}, ["p"], ["c"], {"answer": ["1"]})


def test_a_missing_column_is_told_with_those_that_are_there() -> None:
    def mine(completions: list[str], ground_truth: list[str]) -> list[float]:
        return [1.0]

    with pytest.raises(ThirdPartyError, match=r"'ground_truth'; it is called by keyword, with .*, answer, and"):
        score({"mine": mine}, ["p"], ["c"], {"answer": ["1"]})


def test_what_is_logged_can_be_written_and_hides_nothing() -> None:
    log = RewardLog()
    log.log_extra("array", np.array([1.5, 2.5], dtype=np.float32))
    log.log_extra("tensors", [torch.tensor(1), torch.tensor(2)])
    log.log_extra("sets", [{1}, (1, np.int64(2))])
    assert json.loads(json.dumps(log.rows(2))) == [
        {"array": 1.5, "tensors": 1, "sets": "{1}"}, {"array": 2.5, "tensors": 2, "sets": [1, 2]},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="a metric of the trainer's own has this name"):
        log.log_metric("step", 7)


def test_an_error_is_one_line_that_says_where() -> None:
    def broken(completions: list[str], **kwargs: Any) -> list[float]:
        raise ValueError("a\nb")

    with pytest.raises(ThirdPartyError) as caught:
        score({"mine": broken}, ["p"], ["c"], {})
    line = broken.__code__.co_firstlineno + 1
    assert str(caught.value) == (
        f"reward function 'mine' failed on 1 completions: ValueError: a b (test_rewards_as_trl.py:{line}, in broken)"
    )


def test_a_long_message_of_a_function_that_fails_is_cut_short() -> None:
    def broken(completions: list[str], **kwargs: Any) -> list[float]:
        raise ValueError("x" * 100_000)

    with pytest.raises(ThirdPartyError, match=r"ValueError: x+\.\.\. \(test_rewards_as_trl.py:") as caught:
        score({"mine": broken}, ["p"], ["c"], {})
    assert len(str(caught.value)) < 500


def test_trls_own_functions_run_unchanged() -> None:
    theirs = pytest.importorskip("trl.rewards")
    texts = [r"<think>a</think>\boxed{4}", r"\boxed{5}"]
    functions = {
        "format": resolve("trl.rewards:think_format_reward"),
        "accuracy": theirs.accuracy_reward,
        "repetition": theirs.get_repetition_penalty_reward(ngram_size=1),
        "overlong": theirs.get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2),
    }
    columns = {"solution": ["$4$", "$4$"], "completion_ids": [[1, 2, 3], [5, 5, 5, 5]]}
    found = score(functions, [CHAT] * 2, texts, columns)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 0.0, -0.5], [0.0, 0.0, -0.75, -1.0]]))


@pytest.mark.parametrize(
    "name", [n for n in rewards.BUILT_IN if n not in ("code", "language_consistency", "reasoning_gym")]
)
def test_ours_read_messages_as_they_read_text(name: str) -> None:
    """As TRL's trainer hands them over, so that they can be given to it."""
    pytest.importorskip("math_verify")
    parameters = {"overlong": "(max_completion_len=4, soft_punish_cache=2)"}
    function = resolve(name + parameters.get(name, ""))
    texts = ["<think>a a a a</think><answer>4</answer>", "4", r"\boxed{5} \boxed{5} \boxed{5} \boxed{5}"]
    columns = {"answer": ["4"] * 3, "completion_ids": [[1], [2], [3, 3, 3, 3]]}
    expected = function(prompts=["p"] * 3, completions=texts, **columns)
    assert function(prompts=[CHAT] * 3, completions=[say(text) for text in texts], **columns) == expected


def reward_model(folder: Path, template: str | None = None) -> tuple[Qwen2ForSequenceClassification, Any]:
    torch.manual_seed(0)
    tokenizer = TASKS["addition"].build_tokenizer()
    tokenizer.chat_template = template
    model = Qwen2ForSequenceClassification(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_labels=1, pad_token_id=tokenizer.pad_token_id, initializer_range=0.5,
    )).eval()  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("kind", ["folder", "module", "module with a tokenizer", "in a recipe"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_model_gives_its_logit(tmp_path: Path, kind: str, chat: bool) -> None:
    model, tokenizer = reward_model(tmp_path, TEMPLATE if chat else None)
    prompts = [CHAT, CHAT] if chat else ["1 + 1 = ", "2 + 2 = "]
    texts = ["2", "4 5 6"]
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        whole = tokenizer.apply_chat_template([*prompt, *say(text)], tokenize=False) if chat else prompt + text
        ids = tokenizer(whole, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            expected.append(model(**ids).logits[0, 0].item())
    loaded = Qwen2ForSequenceClassification.from_pretrained(tmp_path).eval()
    function: Any = {
        "folder": lambda: RewardModel(str(tmp_path), batch_size=1),
        "module": lambda: loaded,
        "module with a tokenizer": lambda: RewardModel(model, tokenizer),
        "in a recipe": lambda: resolve(str(tmp_path)),
    }[kind]()
    found = score({"model": function}, prompts, texts, {"completion_ids": [[1], [2]], "answer": ["2", "4"]})
    torch.testing.assert_close(found[:, 0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/a/b", "reward_funcs 'runs/a/b' cannot be loaded: no such folder"),
        ("acuracy", "expected one of accuracy, .*, got 'acuracy'; did you mean 'accuracy'"),
        ("", "expected one of accuracy"),
        ("./my_rewards.py:right", "names a module, as my_rewards:right, got './my_rewards.py:right'"),
        ("formatting", "or \"module:function\", got 'formatting'"),
    ],
)
def test_a_name_that_is_no_reward_is_told_so(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(name)


def test_a_module_is_looked_for_in_the_folders_that_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", ["/nowhere"])
    monkeypatch.setattr(rewards.registry, "_FOLDERS", [])
    (tmp_path / "beside_a_recipe.py").write_text("def f(completions, **kw): return [1.0]\n")
    (tmp_path / "broken_beside.py").write_text("import numpyy\n")
    rewards.look_in(tmp_path)
    assert resolve("beside_a_recipe:f")(completions=["a"]) == [1.0]
    with pytest.raises(ValueError, match=f"No module named 'elsewhere' among the installed packages or in {tmp_path}"):
        resolve("elsewhere:f")
    with pytest.raises(ValueError, match=r"module 'beside_a_recipe' \(.*beside_a_recipe.py\) has no function 'g'"):
        resolve("beside_a_recipe:g")
    with pytest.raises(ThirdPartyError, match=r"ModuleNotFoundError: No module named 'numpyy' \(broken_beside.py:1"):
        resolve("broken_beside:f")


def test_a_column_of_unequal_length_is_refused() -> None:
    log = RewardLog()
    log.log_extra("note", ["x"])
    with pytest.raises(ValueError, match=r"log_extra\('note', ...\) must have 2 values, got 1"):
        log.rows(2)
    assert math.isnan(score({"none": lambda **kw: [None]}, ["p"], ["c"], {}).item())


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    tokenizer = TASKS["addition"].build_tokenizer()
    build_model(tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a sequence classifier, got Qwen2ForCausalLM"):
        resolve(str(tmp_path))


def test_an_answer_that_is_a_truth_value_is_right_in_either_case() -> None:
    given = [f"<answer>{text}</answer>" for text in ("false", "False", "true", "0")]
    assert rewards.accuracy_reward([""] * 4, given, answer=[False] * 4) == [1.0, 1.0, 0.0, 0.0]
