"""A copy of a model with a fused head, deep or pickled, computes with its own weights."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from heads import assert_right, fused, fused_logprobs, model_of, move, own_logprobs

from grpo_kernels.integrations.transformers import fused_head
from grpo_kernels.integrations.transformers.model_head import open_head
from grpo_kernels.training.policy import Policy


def _saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": _saved,
    "a copy's copy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
}  # fmt: skip


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_computes_with_its_own_weights(duplicate: Callable[[Any], Any]) -> None:
    model = fused()
    reference = duplicate(model)
    before = own_logprobs(reference)
    move(model)
    assert (own_logprobs(model) - before).abs().max() > 0.1
    torch.testing.assert_close(own_logprobs(reference), before, rtol=0, atol=0)
    torch.testing.assert_close(fused_logprobs(reference), before)
    assert type(reference) is type(model)
    move(reference)
    assert_right(reference)
    assert_right(model)


def test_a_forward_that_was_replaced_before_is_kept_or_refused() -> None:
    model = model_of()
    original = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: original(*args, **kwargs), model)
    with pytest.raises(ValueError, match=r"was replaced by .*lambda>, which a copy would share: open its head before"):
        fused_head(model)
    model = model_of()
    model.forward = types.MethodType(_own_class_forward, model)
    model = fused_head(model, temperature=0.7)
    reference = copy.deepcopy(model)
    before = own_logprobs(reference)
    move(model)
    torch.testing.assert_close(fused_logprobs(reference), before)


def _own_class_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(model_of()).forward(self, *args, **kwargs)


def test_a_second_policy_on_the_same_model_has_a_reference_of_its_own() -> None:
    from test_training_policy import GRPOLossConfig, rollout_of

    model, rollout, config = fused(vocab_size=131), rollout_of(), GRPOLossConfig(beta=0.1)
    first = Policy(model, config).logprobs(rollout, 4, reference=True)
    move(model)
    policy = Policy(model, config)
    second = policy.logprobs(rollout, 4, reference=True)
    assert (second - first).abs().max() > 0.1
    move(model)
    torch.testing.assert_close(policy.logprobs(rollout, 4, reference=True), second, rtol=0, atol=0)
    assert (policy.logprobs(rollout, 4) - second).abs().max() > 0.1


def test_a_forward_that_a_class_had_for_a_while_leaves_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(model_of())
    original = kind.forward
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
        assert list(inspect.signature(fused().forward).parameters) == ["args", "kwargs"]
    assert "input_ids" in inspect.signature(fused().forward).parameters


def test_a_model_keeps_its_names_and_its_signature(tmp_path: Path) -> None:
    plain, model = model_of(), fused()
    assert (
        type(model).__name__ == "Qwen2ForCausalLM" and isinstance(model, type(plain)) and not vars(model).get("forward")
    )
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert not hasattr(model.forward, "__wrapped__") and model.can_generate()
    fused_head(open_head(fused_head(model)))
    assert type(model) is type(fused())
    model.save_pretrained(tmp_path)
    assert type(type(plain).from_pretrained(tmp_path)) is type(plain)
    assert model.config.architectures == ["Qwen2ForCausalLM"]
