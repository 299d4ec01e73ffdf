"""The model and its optimizer over processes: what FSDP2 and DeepSpeed need beside accelerate's ``prepare``."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, fsdp2_prepare_model
from torch import Tensor, distributed, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_pt_utils import get_parameter_names

#: Names that weight decay passes by, those of transformers' ``Trainer.get_decay_parameter_names``.
NOT_DECAYED = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def build_accelerator(*, bf16: bool, cpu: bool, **options: Any) -> Accelerator:
    """An accelerator that leaves the accumulation of gradients to the loop.

    Args:
        bf16: Compute in bfloat16 by autocast, whatever accelerate's configuration says.
        cpu: Whether to stay there.
        options: Accelerator's further ones.
    """
    precision = "bf16" if bf16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # of an earlier run in this process, whose precision would stay
    accumulation = GradientAccumulationPlugin(num_steps=1)  # whatever accelerate's configuration or environment says
    return Accelerator(cpu=cpu, mixed_precision=precision, gradient_accumulation_plugin=accumulation, **options)


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed's engine takes the steps."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_launch(accelerator: Accelerator) -> None:
    """Raises where accelerate leaves out what its configuration asks for, as it does without a word on a CPU.

    Raises:
        RuntimeError: FSDP or DeepSpeed was asked for, and the processes would each have the whole model.
    """
    for name in ("FSDP", "DEEPSPEED"):
        is_asked_for = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
        if is_asked_for and accelerator.distributed_type != DistributedType[name]:
            raise RuntimeError(
                f"accelerate's configuration asks for {name}, which accelerate has on no {accelerator.device.type}: "
                "take accelerate_configs/ddp.yaml there"
            )


def load_models_whole(accelerator: Accelerator) -> None:
    """Models that are loaded from here on are whole in every process until they are wrapped.

    Under ZeRO-3 transformers would divide them as it loads them, whatever ``zero3_init_flag`` says: then none can
    sample, be copied or be compared with its own logits before DeepSpeed's engine has it.
    """
    if is_deepspeed(accelerator):
        unset_hf_deepspeed_config()


def check_trainable(model: Any, hint: str) -> None:
    """Raises ValueError, with what to do, where weights that are to be trained have 16 bits."""
    narrow = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if narrow:
        raise ValueError(f"weights of {narrow.pop()} cannot be trained: most updates would be rounded away; {hint}")


def build_optimizer(
    model: Any, *, learning_rate: float, weight_decay: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW of the trained parameters in one kernel; as in transformers, biases and norms do not decay."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trained if name not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def wrap_policy(
    model: Any,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    bf16: bool,
    micro_batch_size: int,
    max_grad_norm: float,
) -> tuple[Any, Any]:
    """Model and optimizer as accelerate prepares them; DeepSpeed is told the size of batches and the norm to clip to.

    Raises:
        ValueError: The accelerator would divide gradients once more, or compute in another precision than ``bf16``
            says; or weights are to be trained in 16 bits, which most updates are too small for.
    """
    if accelerator.gradient_accumulation_steps != 1 and not is_deepspeed(accelerator):
        raise ValueError(
            "the accelerator must have gradient_accumulation_steps=1, for the loop divides the loss itself, got "
            f"{accelerator.gradient_accumulation_steps}"
        )
    if bf16 and accelerator.mixed_precision != "bf16":
        raise ValueError(f"bf16 needs an accelerator with mixed_precision='bf16', got {accelerator.mixed_precision!r}")
    if not is_deepspeed(accelerator):  # its engine keeps weights of 32 bits beside them
        check_trainable(model, "set dtype=float32, with bf16=True to compute in bfloat16, or use_peft=True")
    else:
        accelerator.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=micro_batch_size,
            gradient_accumulation_steps=1,  # the loss is divided already
            gradient_clipping=max_grad_norm,
            zero_allow_untested_optimizer=True,
        )
    return accelerator.prepare(model, optimizer)


def wrap_reference(reference: Any, accelerator: Accelerator) -> Any:
    """The frozen model: divided over the processes as the policy is under FSDP2, else whole in each."""
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, reference)
    return accelerator.prepare_model(reference, evaluation_mode=True)


def backward(loss: Tensor, accelerator: Accelerator, is_last: bool) -> None:
    """Adds a micro-batch's gradient; DeepSpeed's engine clips and steps in the last one's."""
    if is_deepspeed(accelerator):
        accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=is_last)
    else:
        accelerator.backward(loss)


def end_process_group() -> None:
    """Destroys torch's process group, if there is one, with the threads that gloo has for it.

    A thread of gloo that releases a tensor while the interpreter ends aborts the process ("terminate called without an
    active exception", exit status -6). Threads end with the last reference to their group: DDP and accelerate hold it
    in cycles, which must be gone before the group is. Call it last, after a run that succeeded: it waits for
    collectives that have begun, and those of a process that failed never end. Under FSDP2, which keeps references in
    C++, gloo's threads stay.
    """
    gc.collect()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
