"""What accelerate may change, precision, and what it may not, the size of a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from test_training_loop import loop_of, one_thread, recipe_of  # noqa: F401  (a fixture)

from grpo_kernels.training.loop import Batch, GRPOLoop
from grpo_kernels.training.task import load_task, prepare_model


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Any:
    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()


def adapted(**changes: Any) -> GRPOLoop:
    torch.manual_seed(0)
    recipe = recipe_of(use_peft=True, lora_r=4, **changes)
    task = load_task(recipe)
    return GRPOLoop(task._replace(model=prepare_model(task.model, recipe)), recipe)


def sampled(loop: GRPOLoop) -> Batch:
    torch.manual_seed(1)
    return loop.collect()[0]


def gradient(loop: GRPOLoop, batch: Batch) -> torch.Tensor:
    loop.accumulate_gradients([batch])
    return torch.cat([p.grad.flatten() for p in loop.model.parameters() if p.grad is not None])


def test_accelerates_accumulation_divides_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_of()
    batch = sampled(loop)
    expected = gradient(loop, batch)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert torch.equal(gradient(loop_of(), batch), expected) and expected.abs().max() > 1e-4


def test_an_accelerator_that_accumulates_is_refused() -> None:
    recipe = recipe_of()
    with pytest.raises(ValueError, match=r"must have gradient_accumulation_steps=1, .* got 4"):
        GRPOLoop(load_task(recipe), recipe, Accelerator(cpu=True, gradient_accumulation_steps=4))


@pytest.mark.parametrize("make", [loop_of, adapted])
def test_bf16_computes_in_16_bits_and_trains_32(make: Any) -> None:
    loop, seen = make(bf16=True, learning_rate=1e-6, max_steps=2, beta=0.1, num_iterations=2), []
    trained = [p for p in loop.model.parameters() if p.requires_grad]
    layer = next(m for name, m in loop.model.named_modules() if name.endswith("down_proj"))
    layer.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    batch, _, _ = loop.collect()
    assert len(seen) > 1 and set(seen) == {torch.bfloat16}  # sampled, scored and held to the reference
    seen.clear()
    before = [p.detach().clone() for p in trained]
    for micro_batches in loop.optimizer_batches(batch):
        metrics = loop.optimizer_step(micro_batches)
    assert set(seen) == {torch.bfloat16} and metrics["entropy"] > 0
    assert all(p.dtype == torch.float32 for p in trained)
    changed = sum(int((p != b).sum()) for p, b in zip(trained, before, strict=True))
    assert changed > 0.3 * sum(p.numel() for p in trained)


def test_a_bf16_gradient_is_near_that_of_32_bits() -> None:
    loop = loop_of()
    batch = sampled(loop)
    expected = gradient(loop, batch)
    got = gradient(loop_of(bf16=True), batch)
    assert 0 < (got - expected).norm() < 0.05 * expected.norm()


def test_an_accelerator_of_another_precision_is_refused() -> None:
    recipe = recipe_of(bf16=True)
    with pytest.raises(ValueError, match="bf16 needs an accelerator with mixed_precision='bf16', got 'no'"):
        GRPOLoop(load_task(recipe), recipe, Accelerator(cpu=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_are_trained_by_adapters_alone(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"weights of torch.{dtype} cannot be trained: .* set dtype=float32"):
        loop_of(dtype=dtype)
    assert {p.dtype for p in adapted(dtype=dtype).model.parameters() if p.requires_grad} == {torch.float32}
