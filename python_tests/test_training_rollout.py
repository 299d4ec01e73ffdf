"""Rollouts: padding, the end mask, and log-probs that are those of the sampler."""

from __future__ import annotations

import pytest
import torch
from testing.training import completion_logits, completion_logprobs
from transformers import GenerationConfig

from grpo_kernels.training import rollout
from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.rollout import completion_texts, end_mask, ends
from grpo_kernels.training.samplers import ModelSampler

PROMPTS = ["1 + 2 =", "4 7 + 3 8 =", "9", "4 7 + 3 8 = <think> units"]


@pytest.fixture
def tokenizer():
    return TASKS["addition"].build_tokenizer()


@pytest.fixture
def model(tokenizer):
    """Weights ten times wider than usual, so that distributions are far from uniform."""
    model = build_model(tokenizer, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model


def test_prompts_are_padded_on_the_left_and_padding_changes_nothing(model, tokenizer):
    tokenizer.padding_side = "right"
    together = ModelSampler(model, tokenizer, max_completion_length=12, temperature=0)(PROMPTS)
    lengths = together.prompt_mask.sum(dim=1)
    assert lengths.tolist() == [4, 6, 1, 8]
    for i, prompt in enumerate(PROMPTS):
        n = int(lengths[i])
        assert together.prompt_mask[i, -n:].all() and not together.prompt_mask[i, :-n].any()
        assert together.prompt_ids[i, -n:].tolist() == tokenizer(prompt)["input_ids"]
        alone = ModelSampler(model, tokenizer, max_completion_length=12, temperature=0)([prompt])
        kept = int(alone.completion_mask.sum())
        assert int(together.completion_mask[i].sum()) == kept
        assert together.completion_ids[i, :kept].tolist() == alone.completion_ids[0, :kept].tolist()


def test_the_end_mask_keeps_the_first_end_token_and_nothing_after_it():
    ids = torch.tensor([[5, 1, 0, 1], [5, 6, 7, 8], [1, 1, 1, 1], [5, 6, 9, 1]])
    assert end_mask(ids, [1, 9]).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]


def test_ends_tells_finished_from_cut_off(model, tokenizer):
    ids = torch.tensor([[5, 1, 0], [5, 6, 7]])
    sampled = rollout.Rollout(ids, torch.ones_like(ids), ids, end_mask(ids, [1]))
    assert ends(sampled, [1]).tolist() == [True, False]
    assert completion_texts(sampled, tokenizer) == [tokenizer.decode([5]), tokenizer.decode([5, 6, 7])]


def test_end_tokens_of_the_generation_config_count(model, tokenizer):
    assert rollout.end_token_ids(model, tokenizer) == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    assert rollout.end_token_ids(model, tokenizer) == [tokenizer.eos_token_id, 7]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recomputed_log_probs_are_those_that_were_sampled_from(model, tokenizer, monkeypatch, temperature):
    """Taken from the probabilities that reach the random draw, under a generation config that would change them."""
    own = GenerationConfig(top_k=2, top_p=0.5, repetition_penalty=3.0, min_new_tokens=5, do_sample=True)
    model.generation_config = own
    drawn_from = []
    draw = torch.multinomial

    def recording_draw(probabilities, *args, **kwargs):
        drawn_from.append(probabilities.clone())
        return draw(probabilities, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", recording_draw)
    torch.manual_seed(0)
    sampled = ModelSampler(model, tokenizer, max_completion_length=10, temperature=temperature)(PROMPTS * 8)
    assert model.generation_config is own
    steps = torch.stack(drawn_from, dim=1).log()  # [B, T, V]
    expected = steps.gather(-1, sampled.completion_ids[..., None])[..., 0]
    recomputed = completion_logprobs(model, sampled, temperature=temperature, batch_size=5, backend="auto")
    mask = sampled.completion_mask.bool()
    assert mask.sum() > 200 and not mask.all()
    torch.testing.assert_close(recomputed[mask], expected[mask], atol=2e-5, rtol=1e-5)
    assert (recomputed[~mask] == 0).all()


def test_select_drops_columns_that_are_all_padding(model, tokenizer):
    torch.manual_seed(0)
    sampled = ModelSampler(model, tokenizer, max_completion_length=10, temperature=1.0)(PROMPTS)
    whole = completion_logprobs(model, sampled, temperature=1.0, batch_size=4, backend="auto")
    part = sampled.select(torch.tensor([2, 0]))
    assert part.prompt_ids.shape == (2, 4)
    assert part.completion_ids.shape[1] == int(sampled.completion_mask[[2, 0]].sum(dim=1).max())
    logprobs = completion_logprobs(model, part, temperature=1.0, batch_size=4, backend="auto")
    torch.testing.assert_close(logprobs, whole[[2, 0], : logprobs.shape[1]], atol=2e-5, rtol=1e-5)


def test_given_completions_take_the_shape_of_sampled_ones(tokenizer):
    given = rollout.teacher_forced(tokenizer, ["1 + 2 =", "3"], ["5", "7 8"])
    assert given.prompt_mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert given.completion_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert [given.completion_ids[0, 1].item(), given.completion_ids[1, 2].item()] == [tokenizer.eos_token_id] * 2
    assert completion_texts(given, tokenizer) == ["5", "7 8"]


def test_a_model_that_keeps_no_logits_is_cut_to_the_completion(model, tokenizer, monkeypatch):
    torch.manual_seed(0)
    sampled = ModelSampler(model, tokenizer, max_completion_length=6, temperature=1.0)(PROMPTS)
    expected = completion_logits(model, sampled)
    assert expected.shape == (4, sampled.completion_ids.shape[1] + 1, len(tokenizer))
    forward = model.forward

    def old_forward(input_ids, attention_mask, position_ids, use_cache):
        return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", old_forward)
    torch.testing.assert_close(completion_logits(model, sampled), expected)
