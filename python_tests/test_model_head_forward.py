"""What a model's forward does around a fused head is asked at each call, and left as it was."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from heads import IDS, VOCAB, assert_right, fused, fused_logprobs, model_of, move

from grpo_kernels.integrations.transformers import fused_head
from grpo_kernels.integrations.transformers.model_head import open_head


def _louder(output: Any) -> Any:
    if hasattr(output, "logits"):
        output.logits = output.logits * 1.1
    return output


def _own_model_forward(model: Any) -> None:
    original = model.forward
    model.forward = lambda *args, **kwargs: _louder(original(*args, **kwargs))


def _model_hook(model: Any) -> None:
    model.register_forward_hook(lambda module, arguments, output: _louder(output))


def _model_subclass(model: Any) -> None:
    class Louder(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return _louder(super().forward(*args, **kwargs))

    model.__class__ = Louder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_own_model_forward, "the model must run its class's forward, got one of its own"),
        (_model_hook, "the model must have no forward hooks, got .*_model_hook"),
        (_model_subclass, "the model must run the forward that opened its head, got .*Louder.forward"),
    ],
)
def test_a_model_that_does_more_around_its_opened_forward_is_refused(
    change: Callable[[Any], Any], message: str
) -> None:
    model = fused()
    change(model)
    with pytest.raises(TypeError, match=message):
        fused_logprobs(model)


@pytest.mark.parametrize(
    ("name", "options", "change", "is_told"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0}, ("config", "final_logit_softcapping"), True),
        ("Cohere2", {"logit_scale": 0.25}, ("", "logit_scale"), False),
        ("Granite", {"logits_scaling": 2.0}, ("config", "logits_scaling"), True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_softcap_or_scale_is_what_it_is_at_the_call(
    name: str, options: dict[str, float], change: tuple[str, str], is_told: bool, dtype: torch.dtype
) -> None:
    """Where the configuration tells the forward of it; where the model alone was changed the call is refused."""
    model = fused(name, dtype, **options, **({"query_pre_attn_scalar": 8} if name == "Gemma2" else {}))
    owner, attribute = change
    setattr(model.config if owner else model, attribute, 7.0)
    if not is_told:
        with pytest.raises(RuntimeError, match=r"more to its logits than project, scale by 0\.25 and cap at None"):
            fused_logprobs(model)
    elif dtype == torch.float64:
        assert_right(model)
    else:
        assert fused_logprobs(model).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_that_small_logits_do_not_show_is_refused_at_opening(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known numbers go through the forward, whatever the weights are."""
    model = model_of("Gemma2", dtype, query_pre_attn_scalar=8, final_logit_softcapping=30.0)
    move(model)
    monkeypatch.setattr(type(model), "forward", type(model_of()).forward)  # without a softcap
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    with pytest.raises(RuntimeError, match="does more to its logits than project, scale by 1 and cap at 30"):
        fused_head(model)
    assert not hasattr(type(model), "_forwards")


def test_a_class_whose_forward_is_replaced_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused()
    kind = type(model_of())
    original = kind.forward
    for factor in (1.0, 1.001):

        def scaled(self: Any, *args: Any, factor: float = factor, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            output.logits = output.logits * factor
            return output

        monkeypatch.setattr(kind, "forward", scaled)
        if factor == 1:
            assert_right(model)
        else:
            with pytest.raises(RuntimeError, match="does more to its logits"):
                fused_logprobs(model)


def test_a_modules_own_mode_is_left_as_it_was() -> None:
    model = model_of().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    fused_head(model)
    assert [module.training for module in model.modules()] == before


def test_threads_share_a_model() -> None:
    """One at a time reads the head; others call it as it is meanwhile."""
    model, results = fused(), []
    expected, logits = fused_logprobs(model).detach(), model(IDS).logits.detach()
    barrier = threading.Barrier(3)

    def work(is_fused: bool) -> None:
        barrier.wait()
        for _ in range(20):
            found = fused_logprobs(model) if is_fused else model(IDS).logits
            wanted = expected if is_fused else logits
            results.append(found.shape == wanted.shape and torch.allclose(found, wanted))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work, args=(is_fused,)) for is_fused in (True, True, False)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert results == [True] * 60 and not vars(model.lm_head).get("forward")


def test_a_head_function_may_call_the_model() -> None:
    model = open_head(model_of())
    logits = model(IDS).logits
    found = model(IDS, head=lambda hidden, projection: model(IDS).logits).result
    torch.testing.assert_close(found, logits)


def test_an_encoder_decoder_and_chosen_positions_are_refused() -> None:
    config = transformers.BartConfig(vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1)
    with pytest.raises(ValueError, match="is an encoder-decoder, not a causal language model"):
        fused_head(transformers.BartForConditionalGeneration(config))
    with pytest.raises(ValueError, match=r"every position .*, got logits_to_keep"):
        fused_logprobs(fused(), logits_to_keep=torch.arange(5, -1, -1))
