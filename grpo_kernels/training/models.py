"""The model of a run: loading any causal language model, its adapters, its optimizer, and all three over processes.

The latter is what FSDP2 and DeepSpeed need beside accelerate's ``prepare``.
"""

from __future__ import annotations

import gc
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, fsdp2_prepare_model
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, distributed, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_pt_utils import get_parameter_names
from transformers.utils import is_flash_attn_2_available

from grpo_kernels.hub import check_folder, check_loaded, load_tokenizer, use_cache_if_unreachable

ADAPTERS, ADAPTERS_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names
BASE = "base"  # in a checkpoint of adapters, the folder of a model that can be had nowhere else


def load_pretrained(
    name: str, *, dtype: str = "float32", attn_implementation: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model by its folder or Hub name, in eval mode on the CPU, and its tokenizer.

    Its dropout is set to 0, so that log-probabilities can be recomputed. A folder of adapters gives their base with
    the adapters merged into it. Code that comes with a model runs with ``trust_remote_code`` alone, and weights are
    read from safetensors alone, never from pickle, which can run code too.

    Args:
        name: A folder or a name on the Hub.
        dtype: "float32", "bfloat16" or "float16".
        attn_implementation: By default flash-attention 2 where it can run, else what the model's class takes.
        trust_remote_code: Run the code that comes with the model.

    Raises:
        ValueError: The model cannot be found or read, lacks weights, or its tokenizer has no token that ends a text.
    """
    check_folder("model_name_or_path", name)
    if not Path(name).is_dir():
        use_cache_if_unreachable()
    elif not any((Path(name) / file).is_file() for file in ("config.json", ADAPTERS_CONFIG)):
        inside = sorted(path.parent.name for path in Path(name).glob("*/config.json"))
        hint = f"; there is one in {', '.join(inside)}" if inside else ""
        raise ValueError(f"model_name_or_path {name!r} cannot be loaded: the folder has no config.json{hint}")
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        is_adapter_folder = (Path(name) / ADAPTERS_CONFIG).is_file()
        source = _base_of(Path(name)) if is_adapter_folder else name
        model = _load_whole(source, dtype, attn_implementation, trust_remote_code)
        model = _merge_adapters(model, Path(name)) if is_adapter_folder else model
    except (OSError, RuntimeError, SafetensorError, StrictDataclassError, ValueError) as error:
        raise ValueError(f"model_name_or_path {name!r} cannot be loaded: {_reason(name, error)}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} must have an end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _reason(name: str, error: Exception) -> str:
    if Path(name).is_dir() or not constants.is_offline_mode():
        return str(error)
    return "there is no such folder, the Hub cannot be reached, and its cache has no model of this name"


def _load_whole(name: str, dtype: str, attn_implementation: str | None, trust_remote_code: bool) -> PreTrainedModel:
    trusted = {"trust_remote_code": trust_remote_code}
    config = without_dropout(AutoConfig.from_pretrained(name, **trusted))
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        name,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=attn_implementation or _attention(dtype, config),
        use_safetensors=True,
        output_loading_info=True,
        **trusted,
    )
    check_loaded(loading_info, name)
    return model


def _merge_adapters(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base with the adapters of a folder merged into it: a model of its own, without a name."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
        try:
            model = PeftModel.from_pretrained(base, folder).merge_and_unload(safe_merge=True)
        except UserWarning as error:
            raise ValueError(f"its adapters are of another model, or cut short: {error}") from error
    model.name_or_path = ""
    return model


def _base_of(folder: Path) -> str:
    """What the adapters in a folder are of: a model by its name, or one that was saved with the run."""
    if not (folder / ADAPTERS).is_file():  # peft would go on to a pickle
        raise ValueError(f"its adapters must be in {ADAPTERS}")
    name = json.loads((folder / ADAPTERS_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if name:
        return name
    saved = [folder / BASE, folder.parent / "checkpoint-0" / BASE]
    for base in saved:
        if base.is_dir():
            return str(base)
    raise ValueError(f"its adapters are of a model that has no name and is in neither {saved[0]} nor {saved[1]}")


def add_adapters(model: PreTrainedModel, *, r: int, alpha: int, target_modules: list[str]) -> Any:
    """The model with LoRA adapters, in eval mode.

    Args:
        model: Changed.
        r: Rank of the adapters.
        alpha: Their scale, over the rank.
        target_modules: The modules to adapt; ``["all-linear"]`` for all but the head.

    Raises:
        ValueError: ``target_modules`` takes in the head.
    """
    from peft import LoraConfig, get_peft_model  # only a run with adapters needs it
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=target_modules[0] if target_modules == ["all-linear"] else target_modules,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config).eval()
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(f"lora_target_modules must leave out the head, which is not adapted, got {target_modules}")
    return adapted


def without_dropout(config: Any) -> Any:
    """The configuration with every dropout rate at 0, nested ones too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(config, name, 0.0)
        elif hasattr(value, "model_type"):
            without_dropout(value)
    return config


def _attention(dtype: str, config: Any) -> str | None:
    """Flash-attention 2 where it can run; None for what the model's class takes by itself."""
    can_flash = torch.cuda.is_available() and dtype != "float32" and is_flash_attn_2_available()
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # None: its code comes with it
    return "flash_attention_2" if can_flash and getattr(known, "_supports_flash_attn", False) else None


def base_model(model: Any) -> Any:
    """The model under its adapters, or itself."""
    return model.get_base_model() if has_adapters(model) else model


def has_adapters(model: Any) -> bool:
    """Whether peft has put adapters on it."""
    return hasattr(model, "disable_adapter")


def context_length_of(model: Any) -> int | None:
    """The most tokens that a model was made for; None where its configuration names none."""
    return getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)


def pick_device(name: str) -> torch.device:
    """``name`` as a device, "auto" being CUDA where there is one.

    Raises:
        ValueError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device or auto, got {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that is here, got {name!r}: torch sees no GPU")
    return device


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
    """Prepares model and optimizer with accelerate; sets the batch size and the gradient clipping of DeepSpeed.

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
