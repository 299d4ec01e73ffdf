"""The head of a Hugging Face causal language model, handed to a function of the caller's in the model's own forward."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.integrations.transformers.head_module import (
    check_model,
    find_linear,
    name_of,
    operands,
    replaced_call,
)
from grpo_kernels.ops.head.selection import is_capturing

#: What a model's configuration may multiply logits by, in the order in which it is looked for; Granite's divides.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
#: Model types whose ``logits_scaling`` multiplies.
_MULTIPLYING = ("hyperclovax",)
_CHECKED_TOKENS = 4
_LARGEST = 50.0  # of the numbers that a forward is probed with


class Projection(NamedTuple):
    """What makes logits of hidden states: ``softcap * tanh(logit_scale * (h W^T + b) / softcap)``.

    Under LoRA adapters of the head the hidden states that come with it, and ``H``, are wider by their ranks.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    @property
    def options(self) -> dict[str, Any]:
        """All but the weight, under the names that the linear ops have for them."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


class HeadOutput(NamedTuple):
    """What a forward with a ``head`` returns."""

    result: Any  # the function's: a tensor, or tensors in a tuple
    aux_loss: Tensor | None  # of a mixture of experts that was asked for it, unweighted


#: From hidden states ``[B, T, H]`` and the projection to a tensor, or a tuple with tensors in it.
Head = Callable[[Tensor, Projection], Any]


def open_head(model: Any) -> Any:
    """Lets ``model(..., head=function)`` call ``function(hidden_states, projection)`` in the place of its head.

    The rest of the forward is the model's own, ``logits_to_keep`` and a mixture's auxiliary loss included, but for
    ``use_cache=False``. The head module itself is called, so that the hooks of DDP, FSDP2 and ZeRO-3, which gather its
    weight, run as ever. Without ``head`` the forward is the one it had. Call it before wrapping the model.

    The head is the module that is it at the call: a ``torch.nn.Linear``, with LoRA adapters of peft's or as
    ``modules_to_save`` copies it; any other is refused by name then. At each call known numbers go through what the
    forward does to its logits: where that is more than the configuration's softcap and scale, the call is refused. A
    copy of the model, pickled or deep, has a head of its own.

    Args:
        model: An ``AutoModelForCausalLM``. Softcap and scale of its logits are read from its configuration, and a few
            tokens are compared with its own logits at once.

    Returns:
        The model, its class replaced by one of the same name.

    Raises:
        TypeError: The head is quantised, or computes something else than a linear layer.
        RuntimeError: The model's own logits are others: it does more to them.
        ValueError: The model has no output embeddings, is an encoder-decoder, is divided or prepared by accelerate
            already, or has a forward of its own that a copy would share.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder, not a causal language model")
    find_linear(head)
    if any(not parameter.numel() for parameter in head.parameters()):
        raise ValueError(
            "the head's weight is not in this process: under ZeRO-3 load the model whole, after "
            "transformers.integrations.unset_hf_deepspeed_config(), and open its head before it is divided"
        )
    kind, attributes = type(model), dict(vars(model))
    add_forward(model, _forward)
    try:
        _check(model)
    except Exception:
        model.__class__ = kind
        vars(model).clear()
        vars(model).update(attributes)
        raise
    return model


def add_forward(model: Any, forward: Callable[..., Any]) -> None:
    """Puts ``forward(model, original, *args, **kwargs)`` before the model's own forward, which ``original`` is; once.

    It gives this one model a class of its own, and so holds nothing of the model that a copy would go on to, and no
    ``__wrapped__``, by which accelerate's unwrapping would take it off.

    Args:
        model: Changed.
        forward: A function of a module, which pickle can name.

    Raises:
        ValueError: accelerate has prepared the model, or its forward was replaced by one that a copy would share.
    """
    if any(forward in vars(kind).get("_forwards", ()) for kind in type(model).__mro__):
        return
    own = vars(model)
    if "_original_forward" in own:
        raise ValueError(f"{type(model).__name__} is prepared by accelerate: open its head before")
    slot = "_old_forward" if "_hf_hook" in own else "forward"  # accelerate's hooks keep the forward that they call
    before = own.get(slot)
    if before is not None and getattr(before, "__func__", None) is not type(model).forward:
        if not isinstance(before, types.MethodType) or before.__func__.__closure__ is not None:
            raise ValueError(
                f"{type(model).__name__}'s forward was replaced by {name_of(before)}, which a copy would share: open "
                "its head before"
            )
        own[_kept_name(forward)] = before
    model.__class__ = kind = _with_forward(type(model), forward)
    if slot == "forward":
        own.pop("forward", None)
    else:
        own[slot] = types.MethodType(kind.forward, model)


def _kept_name(forward: Callable[..., Any]) -> str:
    """The attribute for what somebody had put in the place of the class's forward."""
    return f"_forward_under_{forward.__module__}"


def _with_forward(base: Any, forward: Callable[..., Any]) -> Any:
    """The class with ``forward``, and with the signature of the forward that it has now."""
    return _subclass(base, forward, base.forward)


@functools.cache
def _subclass(base: Any, forward: Callable[..., Any], under: Callable[..., Any]) -> Any:
    @functools.wraps(under)
    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, vars(self).get(_kept_name(forward)) or super(kind, self).forward, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        reduced = super(kind, self).__reduce_ex__(protocol)
        return (_with_forwards, (original, *forwards), *reduced[2:]) if type(self) is kind else reduced

    del own.__wrapped__  # type: ignore[attr-defined]
    own.__signature__ = inspect.signature(under)  # type: ignore[attr-defined]
    own.is_opened = True  # type: ignore[attr-defined]
    original, *before = vars(base).get("_forwards", (base,))
    forwards = (*before, forward)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    attributes = {"_forwards": (original, *forwards), "forward": own, "__reduce_ex__": reduce}
    kind = type(base.__name__, (base,), names | attributes)
    return kind


def _with_forwards(base: type, *forwards: Callable[..., Any]) -> Any:
    """A model without attributes yet, as pickle and deepcopy make it."""
    kind = functools.reduce(_with_forward, forwards, base)
    return kind.__new__(kind)


def _forward(model: Any, original: Callable[..., Any], *args: Any, head: Head | None = None, **kwargs: Any) -> Any:
    """The model's own forward, with ``head`` in the place of its head's call where it is given."""
    return original(*args, **kwargs) if head is None else _run_with_head(model, original, head, args, kwargs)


@torch.compiler.disable(recursive=False)  # what is compiled is what it calls: it changes a module and back
def _run_with_head(
    model: Any, original: Callable[..., Any], head: Head, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    check_model(model)
    transform, results, probes = _transform_of(model.config.get_text_config()), [], []
    module = model.get_output_embeddings()

    def project(linear: Any, hidden: Tensor) -> Tensor:
        inputs, weight, bias = operands(linear, hidden)
        results.append(head(inputs, Projection(weight, bias, *transform)))
        probes.append(_probe(hidden))
        return probes[0]

    with replaced_call(module, project):
        outputs = original(*args, **(kwargs | {"use_cache": False}))
    if len(results) != 1 or not hasattr(outputs, "logits"):
        raise RuntimeError(
            f"{type(model).__name__}'s forward must call its output embeddings once and return logits by name, got "
            f"{len(results)} calls and {type(outputs).__name__}"
        )
    _check_probe(model, probes[0], outputs.logits, *transform)
    return HeadOutput(_after(outputs.logits, results[0]), getattr(outputs, "aux_loss", None))


def _probe(hidden: Tensor) -> Tensor:  # [B, T, H] -> [B, T, 1]
    """Known numbers in the place of logits, which for autograd come from the hidden states."""
    known = torch.linspace(-_LARGEST, _LARGEST, hidden[..., 0].numel(), device=hidden.device)
    known = known.view(*hidden.shape[:-1], 1).to(hidden.dtype)
    return torch.where(torch.ones((), dtype=torch.bool, device=hidden.device), known, hidden[..., :1])


def _check_probe(model: Any, probe: Tensor, found: Tensor, softcap: float | None, logit_scale: float) -> None:
    """Raises where the forward did other things to its logits than softcap and scale; a captured graph is not asked."""
    if is_capturing(probe.device):
        return
    expected = probe.detach().cpu().double() * logit_scale  # not every device has fp64
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    allowed = 3 * torch.finfo(probe.dtype).eps  # scaled, divided, tanh taken, multiplied: half an eps each, and some
    found = found.detach().cpu().double()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=allowed, atol=allowed):
        raise RuntimeError(
            f"{type(model).__name__}'s forward does more to its logits than project, scale by {logit_scale:g} and cap "
            f"at {softcap}"
        )


class _After(torch.autograd.Function):
    """A value whose gradient, on its way back, passes the head module's output first.

    There the hooks wait that gather the module's weight again, which its forward let go. They get no gradient, and
    the nodes behind them do no work. The engine takes the node that was made last, and the output was made after
    the value.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, output: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _after(output: Tensor, result: Any) -> Any:
    """The result with ``_After`` on what has a gradient in it."""
    if isinstance(result, tuple):
        values = [_after(output, value) for value in result]
        return type(result)(*values) if hasattr(result, "_fields") else tuple(values)
    return _After.apply(result, output) if isinstance(result, Tensor) and result.requires_grad else result


def _transform_of(config: Any) -> tuple[float | None, float]:
    """Softcap and scale."""
    for name in _SCALES:
        if getattr(config, name, None) is not None:
            return getattr(config, "final_logit_softcapping", None), float(getattr(config, name))
    scale = 1.0
    if getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type in _MULTIPLYING else 1 / config.logits_scaling
    return getattr(config, "final_logit_softcapping", None), float(scale)


@torch.no_grad()
def _check(model: Any) -> None:
    """Raises where the projection does not make the model's own logits."""
    embeddings, dtypes = model.get_input_embeddings().weight, []
    device = "cpu" if embeddings.is_meta else embeddings.device  # accelerate brings weights, and moves ids to them
    ids = torch.arange(_CHECKED_TOKENS, device=device)[None] % embeddings.shape[0]

    def logits(hidden: Tensor, projection: Projection) -> Tensor:
        dtypes.append(projection.weight.dtype)
        found = projection.logit_scale * torch.nn.functional.linear(hidden, projection.weight, projection.bias).float()
        cap = projection.softcap
        return found if cap is None else cap * torch.tanh(found / cap)

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        got, expected = model(ids, head=logits).result, model(ids).logits.float()
    finally:
        for module, is_training in modes:
            module.training = is_training
    allowed = 1e-3 if dtypes[0] in (torch.float32, torch.float64) else 0.25  # half an ulp of a bf16 logit of tens
    error = (got.log_softmax(-1) - expected.to(got.device).log_softmax(-1)).abs().max().item()
    if not error <= allowed:
        raise RuntimeError(
            f"{type(model).__name__}'s own logits give other log-probabilities, by {error:.3g}: its head does more "
            "than project, scale and cap"
        )
