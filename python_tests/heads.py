"""Small models with a fused head, and their log-probabilities by their own logits."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from grpo_kernels.integrations.transformers import fused_head

VOCAB, TEMPERATURE = 23, 0.7
IDS = torch.arange(12).view(2, 6)


def model_of(name: str = "Qwen2", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """In eval mode, its head not tied."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, max_position_embeddings=32, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
        **({"vocab_size": VOCAB, "tie_word_embeddings": False} | options),
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()


def fused(name: str = "Qwen2", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return fused_head(model_of(name, dtype, **options), temperature=TEMPERATURE)


def own_logprobs(model: Any, **options: Any) -> Tensor:
    logits = model(IDS, **options).logits[:, :-1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]


def fused_logprobs(model: Any, **options: Any) -> Tensor:
    return model(IDS, labels=IDS, return_logprobs=True, **options).logprobs


def move(model: Any) -> None:
    """As a step of training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def assert_right(model: Any, seed: int | None = None) -> None:
    """Its fused log-probabilities, twice, and every gradient are those of its own logits."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for function in (own_logprobs, fused_logprobs, fused_logprobs):
        if seed is not None:  # of dropout
            torch.manual_seed(seed)
        values = function(model)
        loss, leaves = values.square().sum(), list(parameters.values())
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if values.requires_grad else ()
        found.append((values, dict(zip(parameters, gradients, strict=False))))
    (expected, wanted), *others = found
    for values, gradients in others:
        torch.testing.assert_close(values, expected)
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            assert (gradient is None) == (wanted[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, wanted[name], msg=lambda text, name=name: f"{name}: {text}")
