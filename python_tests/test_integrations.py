"""Plain transformers against the package; OpenRLHF's functions and NeMo-RL's protocol as they are written down."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from grpo_kernels import GRPOLossConfig, policy_loss
from grpo_kernels.integrations.nemo_rl import ClippedPGLoss
from grpo_kernels.integrations.openrlhf import compute_entropy, log_probs_from_logits

transformers = pytest.importorskip("transformers")

from grpo_kernels.integrations.transformers import fused_head  # noqa: E402


def _model(name: str) -> Any:
    torch.manual_seed(0)
    common = {
        "vocab_size": 23, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    own = {
        "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}, "Cohere2": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 2.0}, "Qwen2": {"tie_word_embeddings": True}, "Phi": {},
    }[name]  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**(common | own)))


@pytest.mark.parametrize("name", ["Gemma2", "Cohere2", "Granite", "Qwen2", "Phi"])
def test_a_models_logprobs_are_those_of_its_logits(name: str) -> None:
    """And so are its gradients; a softcap, scales, a tied head, a bias."""
    model = _model(name)
    ids = torch.arange(12).view(2, 6) % 23
    labels = ids.clone()
    labels[:, :3] = -100
    mask = labels[:, 1:] != -100
    logits = model(ids).logits[:, :-1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask
    model.zero_grad()
    expected.sum().backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert fused_head(model, temperature=0.7) is model
    got = model(ids, labels=labels, return_logprobs=True, outputs=("entropy",))
    torch.testing.assert_close(got.logprobs, expected)
    assert got.entropy is not None and (got.entropy[~mask] == 0).all()
    got.logprobs.sum().backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[key], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(ids).logits[:, :-1] / 0.7, logits)  # as it was


def test_a_head_that_does_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it does nothing to the numbers that a forward is probed with: to some columns alone."""
    model = _model("Qwen2")
    kind = type(model)
    original = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits[..., 5:] = -1e4
        return out

    monkeypatch.setattr(kind, "forward", forward)
    with torch.no_grad(), pytest.raises(RuntimeError, match="other log-probabilities"):
        fused_head(model)
    assert type(model) is kind and "forward" not in vars(model)


def test_what_a_fused_head_needs() -> None:
    model = fused_head(_model("Qwen2"))
    with pytest.raises(ValueError, match="labels must be given"):
        model(torch.zeros(1, 3, dtype=torch.int64), return_logprobs=True)
    with pytest.raises(ValueError, match="no output embeddings"):
        fused_head(transformers.Qwen2Model(_model("Qwen2").config))


def test_openrlhfs_functions() -> None:
    logits = torch.randn(2, 3, 11, requires_grad=True)
    before, labels = logits.detach().clone(), torch.arange(6).view(2, 3)
    log_p = (logits / 1.5).log_softmax(-1)
    torch.testing.assert_close(
        log_probs_from_logits(logits, labels, temperature=1.5), log_p.gather(-1, labels[..., None])[..., 0]
    )
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    got = compute_entropy(logits)
    torch.testing.assert_close(got, entropy)
    gradients = [torch.autograd.grad(x.sum(), logits)[0] for x in (got, entropy)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("options", [{}, {"token_level_loss": False}, {"use_cispo": True}], ids=str)
def test_nemo_rls_protocol(options: dict[str, Any]) -> None:
    """Two micro-batches by the global counts are the whole batch."""
    generator = torch.Generator().manual_seed(0)
    data = {
        name: -1 - torch.rand(4, 6, generator=generator)
        for name in ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs")
    }
    data["advantages"] = torch.randn(4, 1, generator=generator).expand(4, 6)
    data["token_mask"] = (torch.arange(6) < torch.tensor([[6], [4], [3], [5]])).float()
    data["sample_mask"] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    logprobs = -1 - torch.rand(4, 5, generator=generator)
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    expected = policy_loss(
        logprobs, data["advantages"][:, 1:], mask, old_logprobs=data["prev_logprobs"][:, 1:],
        ref_logprobs=data["reference_policy_logprobs"][:, 1:], config=GRPOLossConfig.nemo_rl(**options),
    ).loss  # fmt: skip
    loss_fn = ClippedPGLoss(options)
    total = 0
    for part in (slice(0, 2), slice(2, 4)):
        micro = {name: x[part] for name, x in data.items()}
        loss, metrics = loss_fn(logprobs[part], micro, (mask.sum(-1) > 0).sum(), mask.sum())
        total = total + loss
        assert metrics["kl_penalty"] >= 0 and metrics["num_valid_samples"] == data["sample_mask"][part].sum()
    torch.testing.assert_close(total, expected)
    assert loss_fn.loss_type == ("token_level" if options.get("token_level_loss", True) else "sequence_level")


def test_a_framework_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import grpo_kernels

    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "grpo_kernels.integrations.trl", raising=False)
    with pytest.raises(ImportError, match="needs TRL, tested with"):
        grpo_kernels.apply_grpo_kernels_to_trl()
