"""A fused head under peft's adapters, put there before or after: their logits and gradients, or a refusal by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from heads import IDS, TEMPERATURE, assert_right, fused, fused_logprobs, model_of, own_logprobs

from grpo_kernels.integrations.transformers import fused_head

TARGETS = ["q_proj", "lm_head"]


def _randomized(model: Any) -> Any:
    """As after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def _adapted(model: Any, **options: Any) -> Any:
    config = peft.LoraConfig(**({"r": 4, "task_type": "CAUSAL_LM", "target_modules": TARGETS} | options))
    return _randomized(peft.get_peft_model(model, config, autocast_adapter_dtype=False))


LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "bias": {"lora_bias": True},
    "all-linear but the head": {"target_modules": "all-linear"},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_adapters_have_the_gradients_of_the_models_own_logits(options: dict[str, Any], bias: bool) -> None:
    model = model_of("Phi") if bias else model_of()
    after = _adapted(fused_head(copy.deepcopy(model), temperature=0.7), **options)
    assert_right(after)
    before = _adapted(model, **options)
    fused_head(before.get_base_model(), temperature=0.7)
    assert_right(before)


@pytest.mark.parametrize("name", ["plain", "saved head"])
def test_an_adapter_is_what_it_is_at_the_call(name: str) -> None:
    model = _adapted(fused(), **LORA[name])
    base = fused_logprobs(fused())
    first = fused_logprobs(model)
    assert (first - base).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(fused_logprobs(model), base)
        assert_right(model)
    assert_right(model)
    model.add_adapter(
        "second", peft.LoraConfig(r=2, task_type="CAUSAL_LM", **({"target_modules": TARGETS} | LORA[name]))
    )
    _randomized(model.double())
    model.set_adapter("second")
    assert_right(model)
    assert (fused_logprobs(model) - first).abs().max() > 0.1
    model.delete_adapter("second")
    model.set_adapter("default")
    assert_right(model)
    reference = copy.deepcopy(model)
    kept = own_logprobs(reference)
    model.merge_adapter()
    assert_right(model)
    with model.disable_adapter():  # which unmerges
        torch.testing.assert_close(fused_logprobs(model), base)
        assert_right(model)
    model.merge_adapter()
    _randomized(model)
    assert_right(model)
    torch.testing.assert_close(fused_logprobs(reference), kept)
    merged = model.merge_and_unload()
    assert type(merged.lm_head) is torch.nn.Linear
    assert_right(merged)


def test_adapters_by_the_model_itself_are_served() -> None:
    model = fused()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS), "own")
    assert_right(_randomized(model.double()))
    model.disable_adapters()
    torch.testing.assert_close(fused_logprobs(model), fused_logprobs(fused()))
    model.enable_adapters()
    assert_right(model)


def test_two_active_adapters_add_up() -> None:
    model = _adapted(fused())
    model.add_adapter("second", peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    assert_right(_randomized(model.double()))


def test_dropout_drops_what_it_drops_of_the_models_own() -> None:
    model = _adapted(fused(), lora_dropout=0.5).train()
    assert_right(model, seed=3)


def test_an_adapter_of_a_tied_head_is_the_heads_alone() -> None:
    assert_right(_adapted(fused(tie_word_embeddings=True), target_modules=["lm_head"]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
        ("Cohere2", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 2.0}),
    ],
)
def test_a_softcap_and_a_scale_come_after_the_adapters(name: str, options: dict[str, Any]) -> None:
    assert_right(_adapted(fused(name, **options)))


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_in_16_bits_is_as_exact_as_the_models_own_head(adapter_dtype: torch.dtype) -> None:
    """A small adapter beside a large weight, which their sum in bfloat16 would round away."""
    narrow = _adapted(fused(), target_modules=["lm_head"]).to(torch.bfloat16)
    adapters = [p for name, p in narrow.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for parameter in adapters:
            parameter.mul_(0.1)
            parameter.data = parameter.data.to(adapter_dtype)
    hidden: list[torch.Tensor] = []
    head = narrow.get_base_model().lm_head
    handle = head.register_forward_pre_hook(lambda module, given: hidden.append(given[0]))
    own, ours = own_logprobs(narrow), fused_logprobs(narrow)
    handle.remove()
    exact = copy.deepcopy(head).double()
    without = copy.deepcopy(exact)
    without.enable_adapters(False)

    def logprobs(module: Any) -> torch.Tensor:
        logits = module(hidden[0].double())[:, :-1] / TEMPERATURE
        return logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]

    expected = logprobs(exact)
    errors = [(values.double() - expected).abs().max().item() for values in (own, ours)]
    assert errors[1] <= 2 * errors[0] and errors[1] < 0.1 * (logprobs(without) - expected).abs().max()


def _dora(model: Any) -> Any:
    return _adapted(model, use_dora=True)


def _ia3(model: Any) -> Any:
    return peft.get_peft_model(
        model, peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    )


def _tokens(model: Any) -> Any:
    return _adapted(model, target_modules=["q_proj"], trainable_token_indices={"lm_head": [1, 2]})


def _parameter(model: Any) -> Any:
    return _adapted(model, target_modules=["q_proj"], target_parameters=["lm_head.weight"])


def _hooked(model: Any) -> Any:
    model = _adapted(model)
    model.get_base_model().lm_head.base_layer.register_forward_hook(lambda module, given, output: output * 2)
    return model


def _scaled(model: Any) -> Any:
    model = _adapted(model)
    model.get_base_model().lm_head.register_forward_hook(lambda module, given, output: output * 2)
    return model


def _scaled_copy(model: Any) -> Any:
    model = _adapted(model, **LORA["saved head"])
    copied = model.get_base_model().lm_head.modules_to_save["default"]
    copied.register_forward_hook(lambda module, given, output: output * 2)
    return model


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "dora": (_dora, "LoRA adapters without variants, got 'default' with DoraLinearVariant"),
    "ia3": (_ia3, r"must be a torch\.nn\.Linear, .*got peft\.tuners\.ia3\.layer\.Linear"),
    "trainable tokens": (_tokens, "got peft.*TrainableTokens"),
    "parameter": (_parameter, r"got peft\.tuners\.lora\.layer\.ParamWrapper"),
    "hook under it": (_hooked, "layers under a head's adapters must have no hooks"),
    "hook": (_scaled, "the head must have no forward hooks"),
    "hook of a copy": (_scaled_copy, "the head must have no forward hooks"),
}


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_an_adapter_that_does_something_else_is_refused(change: Callable[[Any], Any], message: str, when: str) -> None:
    if when == "before":
        with pytest.raises(TypeError, match=message):
            fused_head(change(model_of()).get_base_model())
        return
    model = change(fused())
    for _ in range(2):
        with pytest.raises(TypeError, match=message):
            fused_logprobs(model)


def test_dora_that_is_off_or_merged_is_a_plain_weight() -> None:
    model = _dora(fused())
    with model.disable_adapter():
        assert_right(model)
    model.merge_adapter()
    assert_right(model)


@pytest.mark.parametrize("name", ["plain", "saved head"])
def test_a_batch_of_mixed_adapters_is_refused(name: str) -> None:
    model = _adapted(fused(), **LORA[name])
    for names in (["default", "__base__"], ["default", "default"]):
        with pytest.raises(TypeError, match="a batch of several adapters"):
            model(IDS, labels=IDS, return_logprobs=True, adapter_names=names)
