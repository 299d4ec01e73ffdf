"""A fused head in what wraps a model: DDP, FSDP2, tensor parallelism in two processes; accelerate's hooks in one."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import accelerate
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState
from heads import IDS, TEMPERATURE, assert_right, fused, fused_logprobs, model_of, own_logprobs

from grpo_kernels.integrations.transformers import fused_head


@pytest.fixture(params=["no", "bf16"])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Any]:
    AcceleratorState._reset_state()
    yield accelerate.Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state()


def test_accelerates_unwrapping_leaves_the_head_on(accelerator: Any) -> None:
    model = fused()
    prepared = accelerator.prepare(model)
    assert fused_logprobs(prepared).shape == (2, 5)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert_right(unwrapped)
    for reference in (copy.deepcopy(unwrapped), pickle.loads(pickle.dumps(unwrapped))):
        before = own_logprobs(reference)
        with torch.no_grad():
            unwrapped.lm_head.weight.mul_(1.5)
        torch.testing.assert_close(fused_logprobs(reference), before)
    assert_right(fused_head(unwrapped, temperature=TEMPERATURE))


def test_a_copy_of_a_prepared_model_computes_with_its_own_weights() -> None:
    AcceleratorState._reset_state()
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(fused())
    AcceleratorState._reset_state()
    reference = copy.deepcopy(model)
    before = fused_logprobs(reference)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    torch.testing.assert_close(fused_logprobs(reference), before, rtol=0, atol=0)
    assert (fused_logprobs(model) - before).abs().max() > 0.1


def test_a_model_that_accelerate_has_prepared_is_refused_and_left_as_it_was() -> None:
    AcceleratorState._reset_state()
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model_of())
    AcceleratorState._reset_state()
    before, kind = dict(vars(model)), type(model)
    with pytest.raises(ValueError, match="is prepared by accelerate: open its head before"):
        fused_head(model)
    assert vars(model).keys() == before.keys() and type(model) is kind


def _dispatched(model: Any) -> Any:
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def _offloaded(model: Any) -> Any:
    model = accelerate.cpu_offload(model, execution_device="cpu")
    assert model.lm_head.weight.is_meta
    return model


@pytest.mark.parametrize("place", [_dispatched, _offloaded])
@pytest.mark.parametrize("is_opened_first", [False, True])
def test_a_model_that_accelerate_has_placed_keeps_its_hooks(place: Callable[[Any], Any], is_opened_first: bool) -> None:
    if is_opened_first:
        model = place(fused())
    else:
        model = fused_head(place(model_of()), temperature=TEMPERATURE)
    expected = own_logprobs(model_of())
    for _ in range(2):
        torch.testing.assert_close(fused_logprobs(model), expected)
        torch.testing.assert_close(own_logprobs(model), expected)
        assert hasattr(model.lm_head, "_hf_hook") and "AlignDevicesHook" in repr(model.lm_head._hf_hook)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 8)
    if place is _dispatched:
        assert_right(copy.deepcopy(model))
    remove_hook_from_submodules(model)
    if place is _dispatched:
        assert_right(model)


def _compare(wrapped: Any, plain: Any) -> None:
    expected, got = own_logprobs(plain), fused_logprobs(wrapped)
    torch.testing.assert_close(got, expected)
    for values in (expected, got):
        values.square().sum().backward()
    wanted = [p.grad for p in plain.parameters()]
    for parameter, gradient in zip(wrapped.parameters(), wanted, strict=True):
        found = parameter.grad
        assert (found is None) == (gradient is None)
        if found is not None:
            torch.testing.assert_close(found.full_tensor() if hasattr(found, "full_tensor") else found, gradient)


def _adapted(model: Any) -> Any:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()


def main() -> None:
    """In each of two processes, on the same batch: so are the gradients, and their mean."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo")
    _compare(DistributedDataParallel(fused()), model_of())
    for is_tied in (False, True):
        model = fused(tie_word_embeddings=is_tied)
        if not is_tied:
            fully_shard(model.lm_head, reshard_after_forward=True)
        fully_shard(model, reshard_after_forward=True)
        _compare(model, model_of(tie_word_embeddings=is_tied))
    model = model_of()
    fully_shard(model.lm_head)
    fully_shard(model)
    _compare(fused_head(model, temperature=TEMPERATURE), model_of())
    model = _adapted(fused())
    fully_shard(model.get_base_model().lm_head)
    fully_shard(model)
    _compare(model, _adapted(fused()))
    for change, message in (
        (lambda x: setattr(x, "lm_head", DistributedDataParallel(x.lm_head)), "must be a torch.nn.Linear"),
        (
            lambda x: parallelize_module(
                x, init_device_mesh("cpu", (2,)), {"lm_head": ColwiseParallel(output_layouts=Replicate())}
            ),
            "a tensor-parallel head is not served",
        ),
    ):
        model = fused()
        change(model)
        with pytest.raises(TypeError, match=message):
            fused_logprobs(model)
    distributed.destroy_process_group()


@pytest.mark.full
def test_two_processes_have_the_gradients_of_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    main()
