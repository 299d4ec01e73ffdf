"""The GRPO loop: one step however it is cut, ratios, control experiment, and a reward that rises."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from testing.training import ScriptedSampler, accuracies_of, completion_logprobs

from grpo_kernels import backends
from grpo_kernels.device_values import first_bad
from grpo_kernels.loss.metrics import PolicyMetrics
from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.loop import GRPOLoop
from grpo_kernels.training.recipe import Recipe, load_recipe
from grpo_kernels.training.report import read_records
from grpo_kernels.training.rollout import Rollout
from grpo_kernels.training.run import train
from grpo_kernels.training.samplers import ModelSampler
from grpo_kernels.training.task import Task, load_task, train_on_traces


@pytest.fixture(autouse=True)
def one_thread():
    """Two contended threads make a model of this size ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def odd_token_reward(prompts, completions, **columns):
    """Differs within every group, whatever the model."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def share_of_sevens(prompts, completions, **columns):
    return [completion.split().count("7") / 6 for completion in completions]


def recipe_of(**changes):
    settings = {
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "reward_funcs": ["test_training_loop:odd_token_reward"],
        "device": "cpu",
        "num_eval_prompts": 0,
        "disable_tqdm": True,
    }
    return Recipe(**{**settings, **changes})


def loop_of(**changes):
    torch.manual_seed(0)
    recipe = recipe_of(**changes)
    return GRPOLoop(load_task(recipe), recipe)


def gradients(loop, micro_batches):
    loop.model.zero_grad(set_to_none=True)
    metrics = loop.accumulate_gradients(micro_batches)
    return metrics, [parameter.grad.clone() for parameter in loop.model.parameters()]


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "surrogate", "sapo", "reinforce"])
def test_accumulated_gradients_equal_those_of_one_batch(loss_type, backend):
    """Micro-batches of unequal token counts; fp64, so that only the normaliser could tell them apart."""
    entropy_coef = 0.1 if loss_type in ("dapo", "bnpo") else 0.0
    loop = loop_of(loss_type=loss_type, entropy_coef=entropy_coef, beta=0.1, backend=backend)
    loop.model.double()
    loop.policy.reference.double()
    batch, _, _ = loop.collect()
    with torch.no_grad():
        loop.model.lm_head.weight.mul_(1.5)  # ratios and KL away from 1 and 0
    batch = batch._replace(old_logprobs=batch.ref_logprobs)
    order = batch.rollout.completion_mask.sum(dim=1).argsort()
    parts = [batch.select(indices) for indices in order.split(4)]
    assert len({int(part.rollout.completion_mask.sum()) for part in parts}) > 1
    whole_metrics, whole = gradients(loop, [batch.select(order)])
    cut_metrics, cut = gradients(loop, parts)
    assert max(float(g.abs().max()) for g in whole) > 1e-4
    for expected, actual in zip(whole, cut, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-7)
    assert cut_metrics == pytest.approx(whole_metrics, rel=1e-6)


@pytest.mark.parametrize("loss_type", ["bnpo", "grpo"])
def test_a_mean_is_over_the_tokens_or_sequences_of_all_processes(loss_type, monkeypatch):
    """What either of two processes has before gradients are averaged, of half a batch and the other's count."""
    loop = loop_of(loss_type=loss_type)
    loop.model.double()
    batch, _, _ = loop.collect()
    lengths = batch.rollout.completion_mask.sum(dim=1)
    parts = lengths.argsort().split(8)
    assert lengths[parts[0]].sum() < lengths[parts[1]].sum()
    _, whole = gradients(loop, [batch])
    total = lengths.sum() if loss_type == "bnpo" else torch.tensor(len(lengths))
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(loop.accelerator, "reduce", lambda values, how: total if how == "sum" else values)
    monkeypatch.setattr(PolicyMetrics, "reduce", lambda self: self)
    halves = [gradients(loop, [batch.select(part)])[1] for part in parts]
    assert max(float(g.abs().max()) for g in whole) > 1e-4
    for expected, first, second in zip(whole, *halves, strict=True):
        torch.testing.assert_close((first + second) / 2, expected, atol=1e-12, rtol=1e-7)


def test_ratios_leave_1_in_the_second_iteration():
    loop = loop_of(num_iterations=2, epsilon=1e-3)
    batch, _, _ = loop.collect()
    first, second = loop.optimizer_batches(batch)
    assert batch.old_logprobs is not None
    assert loop.optimizer_step(first)["clip_ratio/region_mean"] == 0
    mask = batch.rollout.completion_mask.bool()
    new = completion_logprobs(loop.model, batch.rollout, temperature=1.0, batch_size=16, backend="torch")
    assert (new - batch.old_logprobs)[mask].abs().max() > 1e-3
    assert loop.optimizer_step(second)["clip_ratio/region_mean"] > 0


def test_each_iteration_uses_every_completion_once():
    loop = loop_of(num_iterations=2, gradient_accumulation_steps=2)
    batch, _, _ = loop.collect()
    batch = batch._replace(advantages=torch.arange(16.0))
    seen = [[m.advantages.tolist() for m in step] for step in loop.optimizer_batches(batch)]
    assert [len(step) for step in seen] == [2, 2, 2, 2]
    for half in (seen[:2], seen[2:]):
        assert sorted(advantage for step in half for part in step for advantage in part) == list(range(16))
    assert seen[:2] != seen[2:]


def test_old_and_reference_log_probs_exist_only_where_they_are_used():
    batch, _, _ = loop_of().collect()
    assert batch.old_logprobs is None and batch.ref_logprobs is None
    batch, _, _ = loop_of(num_iterations=2, beta=0.1).collect()
    torch.testing.assert_close(batch.old_logprobs, batch.ref_logprobs)
    assert (batch.old_logprobs < 0).any()


def test_the_reference_stays_where_it_was():
    loop = loop_of(beta=0.1, max_steps=2)
    before = [p.clone() for p in loop.policy.reference.parameters()]
    kl = [step.metrics["kl"] for step in loop.steps()]
    assert abs(kl[0]) < 1e-6 < kl[1]
    assert all(torch.equal(p, q) for p, q in zip(before, loop.policy.reference.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(before, loop.model.parameters(), strict=True))


def test_the_references_log_probs_are_of_the_generation():
    loop = loop_of(beta=0.1)
    batches = [loop.collect()[0] for _ in range(2)]
    assert not torch.equal(batches[0].rollout.completion_ids, batches[1].rollout.completion_ids)
    for batch in batches:
        options = {"temperature": 1.0, "batch_size": 16, "backend": "torch"}
        expected = completion_logprobs(loop.policy.reference, batch.rollout, **options)
        torch.testing.assert_close(batch.ref_logprobs, expected)


def test_what_a_gpu_flagged_stops_the_run_before_the_step():
    loop = loop_of()
    before = [p.clone() for p in loop.model.parameters()]
    first_bad(torch.device("cpu"))[0] = 3
    with pytest.raises(ValueError, match=r"an id outside the vocabulary where unmasked, at 3"):
        next(loop.steps())
    assert all(torch.equal(p, q) for p, q in zip(before, loop.model.parameters(), strict=True))


def test_a_samplers_own_log_probs_correct_the_loss():
    """As a server's do, whoever the sampler is; the recipe can turn it off."""

    class Shifted(ModelSampler):
        gives_logprobs = True

        def __call__(self, prompts, **options):
            rollout = super().__call__(prompts, **options)
            return rollout._replace(sampling_logprobs=torch.where(rollout.completion_mask.bool(), -9.0, 0.0))

    found = {}
    for on in (True, False):
        recipe = recipe_of(vllm_importance_sampling_correction=on, vllm_importance_sampling_mode="token_truncate")
        torch.manual_seed(0)
        task = load_task(recipe)
        loop = GRPOLoop(task, recipe, sampler=Shifted(task.model, task.tokenizer, max_completion_length=12))
        batch, metrics, _ = loop.collect()
        found[on] = loop.accumulate_gradients([batch])["loss"], "sampling/importance_sampling_ratio/mean" in metrics
    assert found[True][1] and not found[False][1]
    assert found[True][0] != found[False][0]


def test_truncated_completions_can_be_left_out():
    loop = loop_of(max_completion_length=2, mask_truncated_completions=True)
    batch, metrics, _ = loop.collect()
    assert metrics["completions/clipped_ratio"] > 0
    kept = batch.rollout.completion_mask.any(dim=1).float().mean().item()
    assert kept == pytest.approx(1 - metrics["completions/clipped_ratio"])
    step = next(iter(loop.optimizer_batches(batch)))
    assert math.isfinite(loop.optimizer_step(step)["loss"])


def test_shuffled_rewards_are_the_same_rewards_elsewhere():
    plain, shuffled = loop_of(), loop_of(shuffle_rewards=True)
    rewards = []
    for loop in (plain, shuffled):
        torch.manual_seed(1)
        rewards.append([sample.reward for sample in loop.collect()[2]])
    assert sorted(rewards[0]) == sorted(rewards[1])
    assert rewards[0] != rewards[1]


def test_metrics_have_trls_names():
    metrics = next(loop_of(beta=0.1).steps()).metrics
    name = "test_training_loop:odd_token_reward"
    assert metrics.keys() >= {
        "loss", "reward", "reward_std", "frac_reward_zero_std", f"rewards/{name}/mean", f"rewards/{name}/std",
        "completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio",
        "completions/mean_terminated_length", "completions/min_terminated_length", "completions/max_terminated_length",
        "num_tokens",
        "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
        "clip_ratio/region_mean", "grad_norm", "learning_rate", "step_time",
    }  # fmt: skip
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())


def test_lengths_and_tokens_are_counted_as_trl_does():
    """Prompts of 4 and 2 tokens; completions of 4 tokens, cut off, and of 3 with their end."""
    loop = loop_of()
    end = loop.tokenizer.eos_token_id
    ids, mask = torch.tensor([[5, 6, 7, 8], [5, 6, end, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    prompt_mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    rollout = Rollout(prompt_mask * 5, prompt_mask, ids, mask)
    metrics = loop._length_metrics(rollout)
    assert metrics["num_tokens"] == 13 and metrics["completions/mean_length"] == 3.5
    assert [metrics[f"completions/{name}_terminated_length"] for name in ("mean", "min", "max")] == [3.0] * 3
    cut = loop._length_metrics(rollout.select(torch.tensor([0])))
    assert cut["completions/max_terminated_length"] == 0 and cut["num_tokens"] == 13 + 8


def test_the_gradient_norm_is_clipped_and_the_learning_rate_decays():
    loop = loop_of(max_grad_norm=1e-3, max_steps=4)
    step, *_ = loop.optimizer_batches(loop.collect()[0])
    assert loop.optimizer_step(step)["grad_norm"] > 1e-3  # reported before clipping
    rates = [step.metrics["learning_rate"] for step in loop_of(max_steps=4).steps()]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_an_evaluation_is_repeatable_and_leaves_the_random_state():
    recipe = recipe_of(num_eval_prompts=8, eval_samples=2, eval_batch_size=3, reward_funcs=["accuracy"])
    task = load_task(recipe)
    state = torch.get_rng_state()
    first = accuracies_of(task, task.eval_rows, recipe)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert accuracies_of(task, task.eval_rows, recipe) == first


def test_an_evaluation_counts_right_answers():
    """A sampler that answers the first half of the problems rightly, and every problem when greedy."""
    recipe = recipe_of(num_eval_prompts=8, eval_samples=2, eval_batch_size=3, reward_funcs=["accuracy"])
    task = load_task(recipe)
    answers = {row["prompt"]: row["answer"] for row in task.eval_rows}
    known = set(list(answers)[:4])

    def said(prompt, temperature):
        digits = " ".join(answers[prompt]) if temperature == 0 or prompt in known else "7"
        return f"<answer> {digits} </answer>"

    accuracies = accuracies_of(task, task.eval_rows, recipe, ScriptedSampler(task, said))
    assert accuracies == {"eval_accuracy": 0.5, "eval_accuracy_greedy": 1.0}


def test_the_cold_start_lowers_the_loss_and_needs_completions():
    recipe = recipe_of(sft_steps=20)
    task = load_task(recipe)
    losses = [step.loss for step in train_on_traces(task.model, task.tokenizer, task.train_rows, recipe)]
    assert len(losses) == 20
    assert losses[0] > math.log(len(task.tokenizer)) - 0.5
    assert losses[-1] < losses[0] - 0.5
    with pytest.raises(ValueError, match="sft_steps is 20, but no row of 'addition' has a completion"):
        next(train_on_traces(task.model, task.tokenizer, [{"prompt": "1", "answer": "1"}], recipe))


def test_any_model_folder_trains_on_any_prompt_answer_file(tmp_path):
    """Model and tokenizer by folder, data by file, reward columns from the file, checkpoint by AutoModelForCausalLM."""
    tokenizer = TASKS["addition"].build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1, "hint": "x"} for i in range(9)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = recipe_of(
        dataset_name=str(tmp_path / "sums.jsonl"),
        model_name_or_path=str(tmp_path / "model"),
        output_dir=str(tmp_path / "run"),
        num_eval_prompts=2,
        reward_funcs=["accuracy", "test_training_loop:odd_token_reward"],
        max_steps=2,
    )
    result = train(recipe)
    assert result.before.keys() == {"eval_accuracy", "eval_accuracy_greedy"}
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    again = load_task(recipe_of(model_name_or_path=str(result.checkpoint)))
    assert isinstance(again, Task)
    assert again.tokenizer("1 + 1 =")["input_ids"] == tokenizer("1 + 1 =")["input_ids"]
    for changes in (
        {},
        {"use_vllm": True, "vllm_server_port": 9, "vllm_server_timeout": 0.1},
    ):  # before a server is asked
        with pytest.raises(FileExistsError, match="holds another run"):
            train(replace(recipe, **changes))


def curve(folder, **changes):
    """The reward at each step of a run."""
    train(recipe_of(output_dir=str(folder), **changes))
    return [record["reward"] for record in read_records(folder / "metrics.jsonl")]


def test_the_same_recipe_gives_the_same_curve_and_another_seed_another(tmp_path):
    curves = [curve(tmp_path / name, seed=seed, max_steps=3) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert curves[0] == curves[1] != curves[2]


def test_the_backends_give_the_same_curve():
    """Rewards are those of the same sampled completions, so they are equal, not merely close."""
    reason = backends.unsupported_reason("grpo_loss", "cpu", torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    settings = {"num_iterations": 2, "beta": 0.1, "max_steps": 8, "temperature": 0.9}
    runs = [[step.metrics for step in loop_of(backend=b, **settings).steps()] for b in ("torch", "cpu")]
    for reference, kernels in zip(*runs, strict=True):
        del reference["step_time"], kernels["step_time"]
        assert kernels["reward"] == reference["reward"]
        assert kernels == pytest.approx(reference, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_reward_rises_unless_it_is_shuffled(shuffle):
    loop = loop_of(
        reward_funcs=["test_training_loop:share_of_sevens"],
        shuffle_rewards=shuffle,
        per_device_train_batch_size=16,
        steps_per_generation=2,
        gradient_accumulation_steps=1,
        max_completion_length=6,
        max_steps=30,
        learning_rate=3e-3,
    )
    rewards = [step.metrics["reward"] for step in loop.steps()]
    rise = sum(rewards[-4:]) / 4 - sum(rewards[:4]) / 4
    assert rise < 0.05 if shuffle else rise > 0.3


@pytest.mark.early
@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_raises_held_out_accuracy(tmp_path, seed):
    result = train(load_recipe("addition", ["--output_dir", str(tmp_path), "--seed", str(seed)]))
    assert result.after["eval_accuracy"] >= result.before["eval_accuracy"] + 0.2


@pytest.mark.early
@pytest.mark.full
def test_shuffled_rewards_do_not_raise_held_out_accuracy(tmp_path):
    result = train(load_recipe("addition", ["--output_dir", str(tmp_path), "--shuffle_rewards", "true"]))
    assert result.after["eval_accuracy"] < result.before["eval_accuracy"] + 0.1
