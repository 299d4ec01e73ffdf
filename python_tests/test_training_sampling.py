"""Which prompts and groups are trained on, and transformers' continuous batching."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.utils import DistributedType
from test_training_loop import loop_of, one_thread, recipe_of  # noqa: F401  (a fixture)
from testing.training import completion_logprobs, sampler_of

from grpo_kernels.training.data.templates import PromptFormat, rows_that_fit
from grpo_kernels.training.loop import GRPOLoop
from grpo_kernels.training.metrics import informative_groups
from grpo_kernels.training.report import read_records
from grpo_kernels.training.rollout import Rollout, Scored, concat_rollouts, concat_scored, pad_rollout
from grpo_kernels.training.run import train
from grpo_kernels.training.samplers import ContinuousSampler
from grpo_kernels.training.task import build_sampler, load_task

SCORED = []
CRASH_AT = [0]


def reward_of_some(prompts, completions, **columns):
    """Differs in the groups of every other prompt, or so."""
    SCORED.append(list(prompts))
    if len(SCORED) == CRASH_AT[0]:
        raise KeyboardInterrupt
    return [float(k % 4) if is_informative(p) else 1.0 for k, p in enumerate(prompts)]


def is_informative(prompt):
    return sum(map(ord, prompt)) % 2 == 1


def reward_of_none(prompts, completions, **columns):
    return [1.0] * len(prompts)


def reward_up(prompts, completions, **columns):
    return [float(k % 2) for k in range(len(prompts))]


def reward_down(prompts, completions, **columns):
    return [1.0 - k % 2 for k in range(len(prompts))]


def named(*names):
    return [f"test_training_sampling:{name}" for name in names]


@pytest.fixture(autouse=True)
def fresh():
    SCORED.clear()
    CRASH_AT[0] = 0


# rollouts


def test_lists_become_a_rollout_and_rollouts_one():
    one = pad_rollout([[5], [5, 6, 7]], [[8, 1, 9], []], [1], pad_id=0, device="cpu", logprobs=[[-1.0, -2.0, -3.0], []])
    assert one.prompt_ids.tolist() == [[0, 0, 5], [5, 6, 7]] and one.prompt_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert one.completion_ids.tolist() == [[8, 1, 9], [0, 0, 0]]
    assert one.completion_mask.tolist() == [[1, 1, 0], [0, 0, 0]]  # nothing counts after an end token
    assert one.sampling_logprobs.tolist() == [[-1, -2, 0], [0, 0, 0]]
    assert one.select(torch.tensor([0])).sampling_logprobs.tolist() == [[-1, -2]]
    assert pad_rollout([[5]], [[]], [1], pad_id=0, device="cpu").completion_mask.tolist() == [[0]]
    other = pad_rollout([[5, 6]], [[4, 4, 4, 4]], [1], pad_id=0, device="cpu", logprobs=[[-1.0] * 4])
    both = concat_rollouts([one, other])
    assert both.prompt_ids.tolist() == [[0, 0, 5], [5, 6, 7], [0, 5, 6]]
    assert both.completion_mask.sum(dim=1).tolist() == [2, 0, 4] and both.completion_ids.shape == (3, 4)
    for k, part in ((0, one), (2, other)):
        row = torch.tensor([k])
        for got, expected in zip(both.select(row), part.select(torch.tensor([0])), strict=True):
            assert torch.equal(got, expected)
    assert concat_rollouts([one]) is one


def test_groups_are_chosen_with_all_that_belongs_to_them():
    rollout = Rollout(*(torch.arange(8)[:, None] if k % 2 == 0 else torch.ones(8, 1).long() for k in range(4)))
    scored = Scored(rollout, torch.arange(16.0).view(8, 2), list("abcdefgh"), list("ABCDEFGH"), [{}] * 8, {})
    chosen = concat_scored([scored, scored]).groups(torch.tensor([3, 1]), 4)
    assert chosen.prompts == list("efghefgh") and chosen.completions == list("EFGHEFGH")
    assert chosen.rewards[:, 0].tolist() == [8, 10, 12, 14] * 2
    assert chosen.rollout.completion_ids[:, 0].tolist() == [4, 5, 6, 7] * 2


def test_a_group_differs_in_any_column():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 2.0], [1.0, 3.0], [float("nan"), 1.0], [2.0, 1.0]])
    for weights, expected in ((None, [False, True, False]), ([1.0, 0.0], [False, False, False])):
        assert informative_groups(rewards, 2, weights, "normalize_then_sum").tolist() == expected


# dynamic sampling


def test_groups_of_equal_rewards_are_replaced_by_those_of_further_prompts():
    loop = loop_of(dynamic_sampling=True, reward_funcs=named("reward_of_some"), max_completion_length=4)
    batch, metrics, samples = loop.collect()
    rounds = len(SCORED)
    assert metrics["dynamic_sampling/generation_batches"] == rounds > 1
    assert metrics["dynamic_sampling/groups_dropped"] == (rounds - 1) * 4
    assert metrics["dynamic_sampling/groups_missing"] == 0
    assert loop.row_order.drawn == 4 * rounds
    assert batch.advantages.shape == (16,) and (batch.advantages.view(4, 4).abs().sum(dim=1) > 0).all()
    informative = [p for prompts in SCORED for p in prompts[::4] if is_informative(p)][:4]
    assert [sample.prompt for sample in samples][::4] == informative
    assert batch.rollout.completion_mask.any(dim=1).all()
    every = [p for prompts in SCORED for p in prompts[::4]]
    assert metrics["frac_reward_zero_std"] == sum(not is_informative(p) for p in every) / len(every)


def test_at_the_bound_the_groups_that_lack_stay_out_of_the_loss(caplog):
    loop = loop_of(dynamic_sampling=True, max_generation_batches=3, reward_funcs=named("reward_of_none"))
    before = [p.clone() for p in loop.model.parameters()]
    with caplog.at_level(logging.WARNING):
        step = next(loop.steps())
    assert "after max_generation_batches=3 batches of prompts 4 of 4 groups still have equal rewards" in caplog.text
    assert step.metrics["dynamic_sampling/generation_batches"] == 3
    assert step.metrics["dynamic_sampling/groups_missing"] == 4
    assert step.metrics["dynamic_sampling/groups_dropped"] == 12
    assert step.metrics["loss"] == step.metrics["grad_norm"] == 0
    assert all(torch.equal(p, q) for p, q in zip(before, loop.model.parameters(), strict=True))


def test_a_batch_that_lacks_some_groups_trains_on_the_others():
    """Their gradient is that of the informative groups alone, KL term included: the others are nowhere in it."""
    recipe = {
        "dynamic_sampling": True,
        "max_generation_batches": 1,
        "reward_funcs": named("reward_of_some"),
        "beta": 0.1,
    }
    loop = loop_of(**recipe)
    with torch.no_grad():
        loop.model.lm_head.weight.mul_(1.5)
    batch, metrics, _ = loop.collect()
    missing = int(metrics["dynamic_sampling/groups_missing"])
    assert 0 < missing < 4
    kept = batch.rollout.completion_mask.any(dim=1)
    assert kept.tolist() == [True] * (4 * (4 - missing)) + [False] * (4 * missing)
    loop.accumulate_gradients([batch])
    whole = [p.grad.clone() for p in loop.model.parameters()]
    loop.model.zero_grad(set_to_none=True)
    loop.accumulate_gradients([batch.select(kept.nonzero()[:, 0])])
    for got, parameter in zip(whole, loop.model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_what_counts_as_equal_is_what_the_advantages_are_made_of(aggregation):
    """Two rewards that cancel in the sum differ one by one."""
    loop = loop_of(
        dynamic_sampling=True, max_generation_batches=2, reward_funcs=named("reward_up", "reward_down"),
        multi_objective_aggregation=aggregation, max_completion_length=3,
    )  # fmt: skip
    missing = loop.collect()[1]["dynamic_sampling/groups_missing"]
    assert missing == (4 if aggregation == "sum_then_normalize" else 0)


def test_without_it_no_metric_speaks_of_it():
    assert not [name for name in loop_of().collect()[1] if "sampling/" in name]


def test_a_run_with_dynamic_sampling_is_resumed_exactly(tmp_path):
    settings = {
        "dynamic_sampling": True, "reward_funcs": named("reward_of_some"), "max_steps": 4, "save_steps": 1,
        "max_completion_length": 4,
    }  # fmt: skip
    train(recipe_of(output_dir=str(tmp_path / "whole"), **settings))
    CRASH_AT[0], total = len(SCORED) - 1, len(SCORED)
    SCORED.clear()
    with pytest.raises(KeyboardInterrupt):
        train(recipe_of(output_dir=str(tmp_path / "cut"), **settings))
    CRASH_AT[0] = 0
    train(recipe_of(output_dir=str(tmp_path / "cut"), resume=True, **settings))
    records = [
        [{k: v for k, v in record.items() if k != "step_time"} for record in read_records(folder / "metrics.jsonl")]
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert total > 5 and len(records[0]) == 4 and records[0] == records[1]


# the pass-rate filter


def easy_task_run(folder, monkeypatch, **changes):
    """A run whose base model solves the first problems always, the next half of the time, and the others never."""
    asked = []

    def rates_of(sampler, tokenizer, rows, accelerator, *, num_samples, **options):
        asked.append((len(rows), num_samples))
        return [1.0 if i < 10 else 0.5 if i < 30 else 0.0 for i in range(len(rows))]

    monkeypatch.setattr("grpo_kernels.training.run.measure_pass_rates", rates_of)
    SCORED.clear()
    train(recipe_of(output_dir=str(folder), reward_funcs=named("reward_of_some"), max_completion_length=3, **changes))
    return asked


def test_a_run_trains_on_problems_between_the_pass_rates(tmp_path, monkeypatch, capsys):
    rows = load_task(recipe_of()).train_rows
    settings = {"min_pass_rate": 0.0, "max_pass_rate": 1.0, "pass_rate_samples": 4, "max_steps": 6}
    assert easy_task_run(tmp_path, monkeypatch, **settings) == [(len(rows), 4)]
    trained_on = {prompt for prompts in SCORED for prompt in prompts}
    assert trained_on == {row["prompt"] for row in rows[10:30]}
    shown = f"20 of {len(rows)} training problems are left, {len(rows) - 30} were too hard and 10 too easy"
    assert f"pass-rate filter: {shown}" in " ".join(capsys.readouterr().out.split())
    assert easy_task_run(tmp_path, monkeypatch, resume=True, **settings) == []  # the rates are known
    (tmp_path / "pass_rates.json").write_text("[0.1]")
    with pytest.raises(ValueError, match=f"is of another run: it has 1 training problems, not {len(rows)}"):
        easy_task_run(tmp_path, monkeypatch, resume=True, **settings)
    (tmp_path / "pass_rates.json").write_text("[0.1")
    with pytest.raises(ValueError, match=r"pass_rates\.json cannot be read, which says what rows the run has"):
        easy_task_run(tmp_path, monkeypatch, resume=True, **settings)


@pytest.mark.parametrize(
    ("bounds", "left"), [({"min_pass_rate": 0.5}, 10), ({"max_pass_rate": 0.5}, -30), ({"min_pass_rate": 0.0}, 30)]
)
def test_one_bound_leaves_the_other_open(tmp_path, monkeypatch, capsys, bounds, left):
    easy_task_run(tmp_path, monkeypatch, max_steps=1, **bounds)
    count = len(load_task(recipe_of()).train_rows)
    assert f"{left % count} of {count} training problems are left" in capsys.readouterr().out


def test_a_filter_that_leaves_too_little_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"at least 4 training problems .* between min_pass_rate=0\.6 and max_pass_rate"
    ):
        easy_task_run(tmp_path, monkeypatch, min_pass_rate=0.6, max_pass_rate=0.9)


def test_pass_rates_are_those_of_the_model(tmp_path):
    """The real thing, on nine rows: an untrained model solves none."""
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i} + 1 =", "answer": i + 1}) for i in range(9)))
    settings = {"dataset_name": str(path), "model_name_or_path": _saved_model(tmp_path), "pass_rate_samples": 2}
    settings |= {"check": "accuracy"}
    with pytest.raises(ValueError, match="at least 4 training problems"):
        train(recipe_of(output_dir=str(tmp_path / "run"), min_pass_rate=0.0, **settings))
    assert json.loads((tmp_path / "run" / "pass_rates.json").read_text()) == [0.0] * 9
    result = train(recipe_of(output_dir=str(tmp_path / "all"), max_pass_rate=1.0, max_steps=1, **settings))
    assert result.checkpoint.name == "checkpoint-1"


def _saved_model(folder):
    task = load_task(recipe_of())
    task.model.save_pretrained(folder / "model")
    task.tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


# prompts that are too long


def test_prompts_that_are_too_long_are_left_out_and_counted(caplog):
    task = load_task(recipe_of())
    rows = [{"prompt": " ".join("1" * n), "answer": "1"} for n in (3, 116, 117, 8, 200, 5)]
    with caplog.at_level(logging.WARNING):
        loop = GRPOLoop(task._replace(train_rows=rows), recipe_of())  # a context of 128, 12 of a completion
    assert [len(row["prompt"].split()) for row in loop.rows] == [3, 116, 8, 5]
    assert "2 of 6 training prompts are longer than 116 tokens and left out; the longest has 200" in caplog.text
    loop.collect()
    options = {"max_completion_length": 12, "least": 4}
    fitting = rows_that_fit(
        rows, task.tokenizer, PromptFormat(), **options | {"least": 2}, max_prompt_length=8, context_length=128
    )
    assert [len(row["prompt"].split()) for row in fitting] == [3, 8, 5]
    with pytest.raises(ValueError, match=r"at least 4 training prompts .* at most 7 tokens, got 2 of 6"):
        rows_that_fit(rows, task.tokenizer, PromptFormat(), max_prompt_length=7, **options)
    assert rows_that_fit(rows, task.tokenizer, PromptFormat(), **options) == rows


def test_a_completion_as_long_as_the_context_leaves_no_prompt():
    with pytest.raises(ValueError, match="max_completion_length must be less than the context of 128 tokens, got 128"):
        loop_of(max_completion_length=128)


# continuous batching


def test_continuous_batching_samples_the_models_distribution(monkeypatch):
    """Its tokens have the log-probabilities, at the temperature, that the model gives them; sharp ones are greedy."""
    recipe = recipe_of(use_transformers_continuous_batching=True, temperature=0.7)
    task = load_task(recipe)
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    found = []
    original = type(task.model).generate_batch

    def scored(self, *args, continuous_batching_config, **kwargs):
        continuous_batching_config.return_logprobs = True
        found.append(original(self, *args, continuous_batching_config=continuous_batching_config, **kwargs))
        return found[-1]

    monkeypatch.setattr(type(task.model), "generate_batch", scored)
    sampler = sampler_of(task, recipe)
    assert isinstance(sampler, ContinuousSampler)
    prompts = ["1 + 2 =", "4 7 + 3 8 =", "9"] * 4
    rollout = sampler(prompts)
    rows = [row[m.bool()].tolist() for row, m in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    assert rows == task.tokenizer(prompts)["input_ids"]
    expected = completion_logprobs(task.model, rollout, temperature=0.7, batch_size=12, backend="auto")
    for output, row, mask in zip(found[0].values(), expected, rollout.completion_mask.bool(), strict=True):
        torch.testing.assert_close(torch.tensor(output.logprobs), row[mask], atol=1e-4, rtol=1e-4)
    assert len({tuple(row) for row in rollout.completion_ids.tolist()}) > 9
    greedy = sampler_of(task, recipe_of())(prompts, temperature=1e-3)
    again = sampler(prompts, temperature=1e-3)
    assert torch.equal(again.completion_ids * again.completion_mask, greedy.completion_ids * greedy.completion_mask)


@pytest.mark.full
def test_a_loop_trains_by_continuous_batching_and_is_repeatable():
    rewards = []
    for _ in range(2):
        loop = loop_of(use_transformers_continuous_batching=True, max_steps=2)
        rewards.append([step.metrics["reward"] for step in loop.steps()])
        assert loop.model.config._attn_implementation == "sdpa"
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize("name", ["use_vllm", "use_transformers_continuous_batching"])
def test_what_needs_whole_weights_is_refused_under_zero_3(name):
    divided = SimpleNamespace(is_zero3=lambda: True)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(hf_ds_config=divided)
    )
    with pytest.raises(ValueError, match=f"{name} must be False under ZeRO-3"):
        build_sampler(None, recipe_of(**{name: True}), accelerator)


def test_continuous_batching_that_fails_is_an_error(monkeypatch):
    loop = loop_of(use_transformers_continuous_batching=True)
    monkeypatch.setattr(type(loop.model), "generate_batch", lambda self, *args, **kwargs: {})
    with pytest.raises(RuntimeError, match="continuous batching finished 0 of 16 completions: its thread stopped"):
        loop.collect()
    plain = type("Plain", (), {"config": loop.model.config})()
    with pytest.raises(RuntimeError, match=r"Plain of transformers \S+ cannot; 5\.8 and later can"):
        ContinuousSampler(plain, loop.tokenizer, max_completion_length=12)
    monkeypatch.setattr(transformers.generation, "ContinuousBatchingConfig", None)
    with pytest.raises(RuntimeError, match="use_transformers_continuous_batching: Qwen2ForCausalLM of transformers"):
        loop_of(use_transformers_continuous_batching=True)


def test_its_options_go_to_transformers():
    recipe = recipe_of(
        use_transformers_continuous_batching=True, transformers_continuous_batching_config='{"page_size": 16}'
    )
    task = load_task(recipe)
    options = sampler_of(task, recipe)._cache_options([[5] * 4] * 3)
    assert options == {"page_size": 16, "num_blocks": 6, "max_batch_tokens": 256}


# recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_vllm": True, "use_transformers_continuous_batching": True},
            "must be False with use_vllm=True, got True",
        ),
        ({"vllm_server_timeout": 0.0}, "vllm_server_timeout must be finite and greater than 0, got 0.0"),
        ({"vllm_generation_timeout": float("inf")}, "vllm_generation_timeout must be finite"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
        ({"max_generation_batches": 0}, "max_generation_batches must be at least 1, got 0"),
        ({"pass_rate_samples": 0}, "pass_rate_samples must be at least 1, got 0"),
        (
            {"min_pass_rate": 0.5, "max_pass_rate": 0.5},
            r"min_pass_rate must be less than max_pass_rate \(0.5\), got 0.5",
        ),
        ({"min_pass_rate": float("nan")}, "min_pass_rate must be less than"),
        ({"transformers_continuous_batching_config": "[1]"}, r"must be a JSON object, got '\[1\]'"),
        ({"transformers_continuous_batching_config": "{"}, r"must be a JSON object, got '\{'"),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "tis"}, "rollout_correction must be one of"),
        ({"use_vllm": True, "vllm_importance_sampling_clip_min": 4.0}, "rollout_clip_min must be at most"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(**changes)


def test_a_correction_is_trls_and_needs_a_server():
    config = recipe_of(use_vllm=True).loss_config()
    assert (config.rollout_correction, config.rollout_clip_min, config.rollout_clip_max) == ("sequence_mask", None, 3.0)
    assert recipe_of().loss_config().rollout_correction is None
    assert recipe_of(use_vllm=True, vllm_importance_sampling_correction=False).loss_config().rollout_correction is None
    open_above = recipe_of(use_vllm=True, vllm_importance_sampling_clip_max=float("inf"))
    assert open_above.loss_config().rollout_clip_max is None
