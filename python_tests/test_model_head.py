"""A fused head computes with the module that is the head at the call, or refuses it by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

pytest.importorskip("transformers")

from heads import IDS, VOCAB, assert_right, fused, fused_logprobs, model_of, move, own_logprobs

from grpo_kernels.integrations.transformers import fused_head


def _scaled(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output * 2


def _padded(module: nn.Module, arguments: Any, output: Tensor) -> None:
    output[..., 13:] = -1e9


def _halved(module: nn.Module, arguments: Any) -> Any:
    return tuple(x / 2 for x in arguments)


def _with_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))


def _linear(bias: bool = False) -> nn.Linear:
    return nn.Linear(16, VOCAB, bias=bias, dtype=torch.float64)


def _loaded(model: Any) -> None:
    other = model_of()
    move(other)
    model.load_state_dict(other.state_dict())


def _tied(model: Any) -> None:
    model.lm_head.weight = model.get_input_embeddings().weight


def _untied(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))


def _align(model: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module

    add_hook_to_module(model.lm_head, SequentialHook(AlignDevicesHook("cpu", io_same_device=True), AlignDevicesHook()))


def _align_and_remove(model: Any) -> None:
    from accelerate.hooks import remove_hook_from_module

    _align(model)
    fused_logprobs(model)
    remove_hook_from_module(model.lm_head)


RIGHT: dict[str, Callable[[Any], Any]] = {
    "swapped": lambda model: setattr(model, "lm_head", _linear()),
    "set": lambda model: model.set_output_embeddings(_linear(bias=True)),
    "biased": _with_bias,
    "resized": lambda model: model.resize_token_embeddings(VOCAB + 8),
    "loaded": _loaded,
    "tied": _tied,
    "untied": _untied,
    "strided": lambda model: setattr(model.lm_head, "weight", nn.Parameter(torch.randn(16, VOCAB).double().mT)),
    "cast": lambda model: model.float().double(),
    "frozen": lambda model: model.lm_head.requires_grad_(False),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model.lm_head),
    "weight norm by hooks": lambda model: nn.utils.weight_norm(model.lm_head),
    "spectral norm": lambda model: nn.utils.parametrizations.spectral_norm(model.lm_head),
    "pruned": lambda model: prune.random_unstructured(model.lm_head, "weight", 0.5),
    "input hook": lambda model: model.lm_head.register_forward_pre_hook(_halved),
    "subclass": lambda model: setattr(model.lm_head, "__class__", type("Named", (nn.Linear,), {})),
    "checkpointing": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}) or model.train(),
    "aligned": _align,
    "no longer aligned": _align_and_remove,
}


@pytest.mark.parametrize("change", RIGHT.values(), ids=RIGHT)
def test_a_head_that_is_changed_later_is_read_as_it_is_then(change: Callable[[Any], Any]) -> None:
    model = fused()
    change(model)
    assert_right(model)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 8)
    assert_right(model)


@pytest.mark.full
def test_a_compiled_model_is_compiled_around_its_head() -> None:
    model = fused()
    assert_right(torch.compile(model, backend="eager"))
    model.compile(backend="eager")
    move(model)
    assert_right(model)


@pytest.mark.parametrize("name", ["weight norm", "biased", "aligned", "tied"])
def test_so_it_is_in_a_copy_and_before_opening(name: str) -> None:
    model = model_of()
    RIGHT[name](model)
    assert_right(fused_head(model, temperature=0.7))
    reference = copy.deepcopy(model)
    before = own_logprobs(reference)
    move(model)
    torch.testing.assert_close(fused_logprobs(reference), before)
    assert_right(reference)


class _Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class _Quantised(Tensor):
    pass


def _doubling(model: Any) -> None:
    model.lm_head.__class__ = _Doubling


def _own_forward(model: Any) -> None:
    linear = model.lm_head
    linear.forward = lambda hidden: 2 * nn.functional.linear(hidden, linear.weight)


def _int8(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.ones(VOCAB, 16, dtype=torch.int8), requires_grad=False)


def _tensor_subclass(model: Any) -> None:
    weight = model.lm_head.weight.detach().as_subclass(_Quantised)
    del model.lm_head.weight
    model.lm_head.weight = weight


def _sparse(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to_sparse())


def _foreign_accelerate_hook(model: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module

    class Doubling(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return output * 2

    add_hook_to_module(model.lm_head, SequentialHook(AlignDevicesHook(), SequentialHook(Doubling())))


def _aligned_over_own_forward(model: Any) -> None:
    _own_forward(model)
    _align(model)


def _twice(model: Any) -> None:
    inner, head = model.model.forward, model.lm_head

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        head(found.last_hidden_state)
        return found

    model.model.forward = forward


def _kwargs(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args, kwargs: (args, {"scale": 2}), with_kwargs=True)


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "subclass": (_doubling, TypeError, r"must be a torch\.nn\.Linear, .*got .*_Doubling"),
    "other module": (
        lambda model: setattr(model, "lm_head", nn.Sequential(_linear(), nn.Tanh())), TypeError, "got .*Sequential"
    ),
    "compiled module": (
        lambda model: setattr(model, "lm_head", torch.compile(model.lm_head)), TypeError, "got .*OptimizedModule"
    ),
    "compiled": (lambda model: model.lm_head.compile(), TypeError, "must not be compiled by itself"),
    "own forward": (_own_forward, TypeError, "must run its class's forward"),
    "own forward, aligned": (_aligned_over_own_forward, TypeError, "must run its class's forward"),
    "quantised": (_int8, TypeError, r"must be floating point, not quantised: got torch\.int8"),
    "quantised tensor": (_tensor_subclass, TypeError, "neither quantised nor sparse: got .*_Quantised"),
    "hook": (lambda model: model.lm_head.register_forward_hook(_scaled), TypeError, "no forward hooks, got .*_scaled"),
    "hook of columns": (lambda model: model.lm_head.register_forward_hook(_padded), TypeError, "forward .*_padded"),
    "accelerate's hook": (_foreign_accelerate_hook, TypeError, "no forward hooks, got .*Doubling"),
    "backward hook": (
        lambda model: model.lm_head.register_full_backward_hook(lambda *x: None), TypeError, "no backward hooks"
    ),
    "sparse": (_sparse, TypeError, r"neither quantised nor sparse: got .*torch\.sparse_coo"),
    "arguments": (_kwargs, TypeError, r"hidden states alone, got \['scale'\]"),
    "none": (lambda model: setattr(model, "get_output_embeddings", lambda: None), ValueError, "no output embeddings"),
    "meta": (lambda model: model.lm_head.to("meta"), ValueError, "meta device"),
    "elsewhere": (
        lambda model: setattr(model, "get_output_embeddings", _linear), RuntimeError, "call its output embeddings once"
    ),
    "twice": (_twice, RuntimeError, "must call its output embeddings once .* got 2 calls"),
}  # fmt: skip


def _state(module: Any) -> Any:
    return {name: id(value) for name, value in vars(module).items()}, list(module._forward_hooks)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.full] if name == "compiled module" else [])
        for name, case in REFUSED.items()
    ],
)
def test_a_head_that_does_something_else_is_refused_at_the_call(
    change: Callable[[Any], Any], kind: type[Exception], message: str
) -> None:
    model = fused()
    change(model)
    before = _state(model.lm_head)
    with pytest.raises(kind, match=message):
        fused_logprobs(model)
    if message != "meta device":
        with torch.inference_mode(), pytest.raises(kind, match=message):
            fused_logprobs(model)
    assert _state(model.lm_head) == before


def test_a_hook_of_all_modules_that_changes_a_head_is_refused() -> None:
    model = fused()

    def doubled(module: nn.Module, arguments: Any, output: Any) -> Any:
        return output * 2 if module is model.lm_head else None

    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        with pytest.raises(TypeError, match=r"no forward hooks, got .*doubled"):
            fused_logprobs(model)
    finally:
        handle.remove()
    assert_right(model)


@pytest.mark.parametrize("kind", [torch.ao.nn.quantized.dynamic.Linear, _Doubling, nn.Bilinear])
def test_a_head_that_does_something_else_is_refused_at_opening(kind: type) -> None:
    model = model_of()
    model.lm_head = kind(16, VOCAB) if kind is not nn.Bilinear else kind(16, 16, VOCAB)
    with pytest.raises(TypeError, match=rf"must be a torch\.nn\.Linear, .*got .*{kind.__name__}"):
        fused_head(model)
    assert type(model) is type(model_of())


def test_a_linear_layer_whose_class_is_patched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * nn.functional.linear(x, self.weight, self.bias))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear"):
        fused_logprobs(model)


def test_a_forward_without_named_logits_and_outputs_that_are_not_returned_are_refused() -> None:
    model = fused()
    with pytest.raises(RuntimeError, match="return logits by name, got 1 calls and tuple"):
        fused_logprobs(model, return_dict=False)
    with pytest.raises(ValueError, match="log-probabilities alone, got output_hidden_states=True"):
        fused_logprobs(model, output_hidden_states=True)


@pytest.mark.parametrize("by_configuration", [False, True])
def test_an_auxiliary_loss_that_is_asked_for_comes_back(by_configuration: bool) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
    model = fused("Mixtral", torch.float32, **experts, output_router_logits=by_configuration)
    asked = {} if by_configuration else {"output_router_logits": True}
    expected = model(IDS, labels=IDS, **asked).aux_loss
    output = model(IDS, labels=IDS, return_logprobs=True, **asked)
    torch.testing.assert_close(output.aux_loss, expected)
    gates = [p for name, p in model.named_parameters() if "gate" in name]
    got, wanted = (
        torch.autograd.grad(x, gates, retain_graph=True, allow_unused=True) for x in (output.aux_loss, expected)
    )
    assert any(x is not None for x in wanted)
    for ours, own in zip(got, wanted, strict=True):
        assert (ours is None) == (own is None)
        if own is not None:
            torch.testing.assert_close(ours, own)
    if not by_configuration:
        assert model(IDS, labels=IDS, return_logprobs=True).aux_loss is None
