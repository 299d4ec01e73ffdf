"""The module that is a model's head now: the weight and bias of its call, or a refusal by name."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

#: Modules whose forward hooks gather weights, cast or count, and leave the logits what they are.
_FRAMEWORKS = ("torch.distributed.", "torch.utils.", "deepspeed.", "accelerate.", "wandb.")
_LINEAR_FORWARD = nn.Linear.forward  # as it is before anybody replaces it
#: Held while a head's call is replaced.
_LOCKS: MutableMapping[nn.Module, Any] = WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()
_SERVED = "a torch.nn.Linear, or one with LoRA adapters or a modules_to_save copy of peft's"


def find_linear(head: nn.Module | None) -> nn.Module:
    """The module whose call makes the logits: the head, or what peft's ``modules_to_save`` calls in its place.

    Asked at each call, for a head can be adapted, replaced, quantised or given hooks at any time.

    Raises:
        TypeError: It computes something else than ``h W^T + b`` with a weight of floating point.
        ValueError: There is none.
    """
    if head is None:
        raise ValueError("the model has no output embeddings")
    _check_hooks(head)
    if _is_of_peft(head):
        if any("adapter_names" in getattr(hook, "keywords", ()) for hook in head._forward_pre_hooks.values()):
            raise TypeError("the head must have one adapter for all: a batch of several adapters is not served")
        from peft.utils import ModulesToSaveWrapper

        if isinstance(head, ModulesToSaveWrapper):
            _check_call(head)
            return find_linear(_active_copy(head))
        base = _adapted_linear(head)
    else:
        base = head
    check_floating(base._parameters.get("weight"))  # a parametrized one has none, and reading it may change it
    if not _is_linear(base):
        raise TypeError(f"the head must be {_SERVED}, got {name_of(base)}")
    _check_call(head)
    return head


def check_floating(weight: Any) -> None:
    """Raises TypeError where a head's weight is quantised."""
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise TypeError(f"the head must be floating point, not quantised: got {weight.dtype}")


def operands(linear: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias whose product is the call of a module that ``find_linear`` has found.

    Of LoRA adapters ``[h, scaling A h] [W, B]^T``, which keeps a small ``B A`` beside a large ``W`` in 16 bits.
    """
    if not _is_of_peft(linear):
        weight, bias = _tensors(linear)
        return _moved(hidden, weight), weight, bias
    adapters = _active_adapters(linear)
    if linear.disable_adapters and linear.merged:  # as its own forward does
        linear.unmerge()
    weight, bias = _tensors(linear.get_base_layer())
    hidden = _moved(hidden, weight)
    inputs, weights = [hidden], [weight]
    for name in adapters:
        down, (up, up_bias) = linear.lora_A[name], _tensors(linear.lora_B[name])
        narrow = down(linear.lora_dropout[name](hidden.to(down.weight.dtype))) * linear.scaling[name]
        inputs.append(narrow.to(hidden.dtype))
        weights.append(up.to(weight.dtype))
        if up_bias is not None:
            added = (up_bias * linear.scaling[name]).to(weight.dtype)
            bias = added if bias is None else bias + added
    return (torch.cat(inputs, dim=-1), torch.cat(weights, dim=-1), bias) if adapters else (hidden, weight, bias)


@contextmanager
def replaced_call(head: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Inside, calls of the head by this thread run ``function(linear, hidden)`` and the hooks around it.

    Other threads, and ``function`` itself, call the head as it is; for another replacement they wait.

    Raises:
        TypeError: As for ``find_linear``.
        ValueError: As for ``find_linear``.
    """
    if head is None:
        find_linear(head)
    with _lock_of(head):
        linear = find_linear(head)
        slot = "_old_forward" if "_hf_hook" in vars(linear) else "forward"
        before = vars(linear).get(slot)
        own = type(linear).forward.__get__(linear) if before is None else before
        thread, is_within = threading.get_ident(), False

        def called(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal is_within
            if is_within or threading.get_ident() != thread:
                return own(hidden, *args, **kwargs)
            if args or kwargs:
                raise TypeError(f"the head must be called with hidden states alone, got {sorted(kwargs) or len(args)}")
            is_within = True
            try:
                return function(linear, hidden)
            finally:
                is_within = False

        setattr(linear, slot, called)
        try:
            yield
        finally:
            if before is None:
                delattr(linear, slot)
            else:
                setattr(linear, slot, before)


def check_model(model: nn.Module) -> None:
    """Raises TypeError where a call of a model does not end with the forward that opened its head."""
    if not getattr(type(model).forward, "is_opened", False):
        raise TypeError(f"the model must run the forward that opened its head, got {name_of(type(model).forward)}")
    if "_original_forward" not in vars(model):  # accelerate's, which casts
        _check_call(model, "model")
    names = _foreign_hooks(model)
    if names:
        raise TypeError(f"the model must have no forward hooks, got {', '.join(names)}")


def _lock_of(head: nn.Module) -> Any:
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(head, threading.RLock())


def _is_of_peft(module: nn.Module) -> bool:
    """Whether it is one of peft's, which is then imported, under the class that FSDP2 may have given it."""
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def _is_linear(module: Any) -> bool:
    """Whether its class computes what ``torch.nn.Linear`` does; FSDP2's and parametrized classes do."""
    kind = type(module)
    is_own = kind.forward is _LINEAR_FORWARD and kind.__call__ is nn.Module.__call__
    return isinstance(module, nn.Linear) and is_own


def name_of(value: Any) -> str:
    """Module and name of a function or method, or of a value's class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _active_copy(wrapper: Any) -> nn.Module:
    names = wrapper.active_adapters
    if wrapper.disable_adapters or not names or any(name not in wrapper.modules_to_save for name in names):
        return wrapper.original_module
    return wrapper.modules_to_save[names[0]]


def _adapted_linear(layer: Any) -> nn.Module:
    """The linear layer under LoRA adapters that can be served, or the layer itself, which is refused then."""
    from peft.tuners.lora import Linear as LoraLinear

    if not isinstance(layer, LoraLinear) or type(layer).forward is not LoraLinear.forward:
        return layer
    names = _active_adapters(layer)
    for name in names:
        if name in layer.lora_variant:
            variant = layer.lora_variant[name]
            variant = variant.__name__ if isinstance(variant, type) else type(variant).__name__
            raise TypeError(f"the head must have LoRA adapters without variants, got {name!r} with {variant}")
    for part in (layer.base_layer, *(layer.lora_B[name] for name in names)):  # read, not called
        hooks = (part._forward_pre_hooks, part._forward_hooks, part._backward_hooks, part._backward_pre_hooks)
        if any(hooks) or "_hf_hook" in vars(part) or "forward" in vars(part):
            raise TypeError(f"the layers under a head's adapters must have no hooks, got some on {name_of(part)}")
    unserved = [layer.lora_B[name] for name in names if not _is_linear(layer.lora_B[name])]
    return unserved[0] if unserved else layer.base_layer


def _active_adapters(layer: Any) -> list[str]:
    is_base = layer.disable_adapters or layer.merged
    return [] if is_base else [name for name in layer.active_adapters if name in layer.lora_A]


def _check_call(module: nn.Module, what: str = "head") -> None:
    """Raises TypeError where a call of the module does not run its class's forward."""
    own = vars(module)
    function = own.get("_old_forward" if "_hf_hook" in own else "forward")
    is_class = getattr(function, "__func__", None) is type(module).forward and function.__self__ is module  # type: ignore[union-attr]
    if function is not None and not is_class:
        raise TypeError(f"the {what} must run its class's forward, got one of its own on {name_of(module)}")
    if what == "head" and own.get("_compiled_call_impl") is not None:
        raise TypeError("the head must not be compiled by itself: compile the model")


def _check_hooks(head: nn.Module) -> None:
    """Raises TypeError where hooks wait for logits, or for their gradient, which there are not."""
    backward = (
        *torch_module._global_backward_hooks.values(),
        *torch_module._global_backward_pre_hooks.values(),
        *head._backward_hooks.values(),
        *head._backward_pre_hooks.values(),
    )
    for kind, names in (("forward", _foreign_hooks(head)), ("backward", _foreign(backward))):
        if names:
            raise TypeError(f"the head must have no {kind} hooks, got {', '.join(names)}")


def _foreign_hooks(module: nn.Module) -> list[str]:
    """Forward hooks that may change the output: of none that gathers weights, moves tensors or counts."""
    moving = vars(module).get("_hf_hook")
    hooks = (
        *torch_module._global_forward_hooks.values(),
        *module._forward_hooks.values(),
        *([] if moving is None else _single_hooks(moving)),
    )
    return _foreign(hooks)


def _foreign(hooks: Iterable[Any]) -> list[str]:
    return [name for name in map(_hook_name, hooks) if not name.startswith(_FRAMEWORKS)]


def _single_hooks(hook: Any) -> list[Any]:
    """Those that accelerate's hook is a sequence of, or itself."""
    is_sequence = type(hook).__name__ == "SequentialHook"
    return [single for part in hook.hooks for single in _single_hooks(part)] if is_sequence else [hook]


def _hook_name(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return name_of(hook)


def _tensors(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, each read once, whole where they are divided; autograd divides their gradients again."""
    weight, bias = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (linear.weight, linear.bias))
    check_floating(weight)
    for x in (weight, bias):
        if x is not None and (type(x) not in (Tensor, nn.Parameter) or x.layout is not torch.strided):
            raise TypeError(
                f"the head must have plain tensors, neither quantised nor sparse: got {name_of(x)}, {x.layout}"
            )
    if weight.is_meta:
        raise ValueError("the head's weight is on the meta device: load it first")
    return weight, bias


def _moved(hidden: Tensor, weight: Tensor) -> Tensor:
    """Hidden states on the head's device, which in a model over several devices can be another."""
    if hasattr(hidden, "full_tensor"):
        raise TypeError("the head's hidden states must be plain tensors: a tensor-parallel head is not served")
    return hidden.to(weight.device)
