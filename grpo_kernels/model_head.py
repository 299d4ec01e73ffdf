"""The head of a Hugging Face causal language model, handed to a function of the caller's in the model's own forward."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.head_module import find_linear, operands, replaced_call

#: What a model's configuration may multiply logits by, in the order in which it is looked for; Granite's divides.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
#: Model types whose ``logits_scaling`` multiplies.
_MULTIPLYING = ("hyperclovax",)
_OTHER_SCALES = ("logits_scaling", "final_logit_softcapping")
_CHECKED_TOKENS = 4


class Projection(NamedTuple):
    """What makes logits of hidden states: ``softcap * tanh(logit_scale * (h W^T + b) / softcap)``.

    Under LoRA adapters of the head the hidden states that come with it, and ``H``, are wider by their ranks.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


class Headed(NamedTuple):
    """What a forward with a ``head`` returns."""

    result: Any  # the function's: a tensor, or tensors in a tuple
    aux_loss: Tensor | None  # of a mixture of experts that was asked for it, unweighted


#: From hidden states ``[B, T, H]`` and the projection to a tensor, or a tuple with tensors in it.
Head = Callable[[Tensor, Projection], Any]


def open_head(model: Any) -> Any:
    """Lets ``model(..., head=function)`` call ``function(hidden_states, projection)`` in the place of its head.

    The rest of the forward is the model's own, ``logits_to_keep`` and a mixture's auxiliary loss included, and it is
    the head module itself that is called, so that the hooks of DDP, FSDP2 and ZeRO-3, which gather its weight, run as
    ever. Without ``head`` the forward is the one it had. Call it before wrapping the model.

    The head is the module that is it at the call: a ``torch.nn.Linear``, with LoRA adapters of peft's or as
    ``modules_to_save`` copies it; any other is refused by name then. A copy of the model, pickled or deep, has its own.
    Forward hooks of the head see one column in the place of its logits, and may not change it.

    Args:
        model: An ``AutoModelForCausalLM``. Softcap and scale of its logits are read from its configuration, and a few
            tokens are compared with its own logits at once.

    Returns:
        The model, its class replaced by one of the same name.

    Raises:
        TypeError: The head is quantised, or computes something else than a linear layer.
        RuntimeError: The model's own logits are others: its head does something more.
        ValueError: The model has no output embeddings, or is divided or prepared by accelerate already.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings")
    find_linear(head)
    if any(not parameter.numel() for parameter in head.parameters()):
        raise ValueError(
            "the head's weight is not in this process: under ZeRO-3 load the model whole, after "
            "transformers.integrations.unset_hf_deepspeed_config(), and open its head before it is divided"
        )
    kind, attributes = type(model), dict(vars(model))
    add_forward(model, _forward)
    opened = type(model)
    checked = opened._checked_forward
    opened._checked_forward, model._head_scales = opened._base.forward, _scales_of(model)
    try:
        _check(model)
    except Exception:
        model.__class__, opened._checked_forward = kind, checked
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
        ValueError: accelerate has prepared the model.
    """
    if any(forward in vars(kind).get("_forwards", ()) for kind in type(model).__mro__):
        return
    own = vars(model)
    if "_original_forward" in own:
        raise ValueError(f"{type(model).__name__} is prepared by accelerate: open its head before")
    is_hooked = "_hf_hook" in own  # by accelerate, which keeps the forward that it calls
    kind = _with_forward(type(model), forward)
    before = own.get("_old_forward" if is_hooked else "forward")
    if before is not None and getattr(before, "__func__", None) is not type(model).forward:
        is_free = isinstance(before, types.MethodType) and before.__func__.__closure__ is None  # copies with the model
        own[_kept_name(forward)] = before, None if is_free else id(model)
    model.__class__ = kind
    if is_hooked:
        own["_old_forward"] = types.MethodType(kind.forward, model)
    else:
        own.pop("forward", None)


def _kept_name(forward: Callable[..., Any]) -> str:
    """The attribute for what somebody had put in the place of the class's forward, and for which model."""
    return f"_forward_under_{forward.__module__}"


@functools.cache
def _with_forward(base: Any, forward: Callable[..., Any]) -> Any:
    @functools.wraps(base.forward)
    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        original, owner = vars(self).get(_kept_name(forward)) or (super(kind, self).forward, None)
        if owner not in (None, id(self)):  # it may go on to the model that was copied
            raise RuntimeError(
                f"this {base.__name__} is a copy of one whose forward had been replaced before its head was opened: "
                "copy it first"
            )
        return forward(self, original, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        reduced = super(kind, self).__reduce_ex__(protocol)
        return (_with_forwards, (kind._base, *kind._forwards), *reduced[2:]) if type(self) is kind else reduced

    del own.__wrapped__  # type: ignore[attr-defined]
    own.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    is_ours = "_forwards" in vars(base)
    forwards = (*(base._forwards if is_ours else ()), forward)
    lineage = {"_base": base._base if is_ours else base, "_forwards": forwards}
    lineage |= {} if is_ours else {"_checked_forward": base.forward}
    kind = type(base.__name__, (base,), names | lineage | {"forward": own, "__reduce_ex__": reduce})
    return kind


def _with_forwards(base: type, *forwards: Callable[..., Any]) -> Any:
    """A model without attributes yet, as pickle and deepcopy make it."""
    kind = functools.reduce(_with_forward, forwards, base)
    return kind.__new__(kind)


def _forward(model: Any, original: Callable[..., Any], *args: Any, head: Head | None = None, **kwargs: Any) -> Any:
    """The model's own forward, with ``head`` in the place of its head's call where it is given."""
    return original(*args, **kwargs) if head is None else _headed(model, original, head, args, kwargs)


@torch.compiler.disable(recursive=False)  # what is compiled is what it calls: it changes a module and back
def _headed(model: Any, original: Callable[..., Any], head: Head, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    is_class = type(model)._base.forward is type(model)._checked_forward
    if not is_class or _scales_of(model) != model._head_scales:
        what = "softcap or a scale of its logits" if is_class else "forward of its class"
        raise RuntimeError(f"the {what} has changed since {type(model).__name__}'s head was opened: open it again")
    transform, module, results = _transform_of(model.config.get_text_config()), model.get_output_embeddings(), []
    linear = find_linear(module)

    def project(hidden: Tensor) -> Tensor:
        inputs, weight, bias = operands(linear, hidden)
        results.append(head(inputs, Projection(weight, bias, *transform)))
        return hidden[..., :1].clone()  # for what the forward does to its logits

    with replaced_call(module, linear, project):
        outputs = original(*args, **(kwargs | {"use_cache": False}))
    if len(results) != 1 or not hasattr(outputs, "logits"):
        raise RuntimeError(
            f"{type(model).__name__}'s forward must call its output embeddings once and return logits by name, got "
            f"{len(results)} calls and {type(outputs).__name__}"
        )
    return Headed(_after(outputs.logits, results[0]), getattr(outputs, "aux_loss", None))


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


def _scales_of(model: Any) -> tuple[Any, ...]:
    """What the model may do to its logits, by its configuration and by what it has read of it."""
    owners = (model.config.get_text_config(), model, getattr(model, "base_model", model))
    values = (getattr(owner, name, None) for owner in owners for name in (*_SCALES, *_OTHER_SCALES))
    return tuple(value if isinstance(value, int | float) else None for value in values)


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

    was_training = model.training
    model.eval()
    try:
        got, expected = model(ids, head=logits).result, model(ids).logits.float()
    finally:
        model.train(was_training)
    allowed = 1e-3 if dtypes[0] in (torch.float32, torch.float64) else 0.25  # half an ulp of a bf16 logit of tens
    error = (got.log_softmax(-1) - expected.to(got.device).log_softmax(-1)).abs().max().item()
    if not error <= allowed:
        raise RuntimeError(
            f"{type(model).__name__}'s own logits give other log-probabilities, by {error:.3g}: its head does more "
            "than project, scale and cap"
        )
