"""The loss in the model's own forward: the same as of its logits, for every kind of head, packed, adapted, divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from testing.training import completion_logits
from torch import Tensor

from grpo_kernels import GRPOLossConfig, grpo_loss, token_logprobs
from grpo_kernels.training.policy import Policy
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rollout import Rollout
from grpo_kernels.training.task import prepare_model

COMMON = {
    "vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "untied": ("Qwen2", {"tie_word_embeddings": False}),
    "softcap": ("Gemma3Text", {"final_logit_softcapping": 5.0, "head_dim": 8, "sliding_window": 64}),
    "logit scale": ("Cohere2", {"logit_scale": 0.25, "sliding_window": 64}),
    "logits scaling": ("Granite", {"logits_scaling": 4.0}),
    "experts": ("Qwen3Moe", EXPERTS | {"head_dim": 8, "router_aux_loss_coef": 0.5}),
    "latent attention and experts": ("DeepseekV3", {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "moe_intermediate_size": 24, "num_key_value_heads": 4,
    }),
}  # fmt: skip


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**(COMMON | options))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # logits whose probabilities are no longer all alike
        model.get_output_embeddings().weight.mul_(8)
    return model.eval()


def rollout_of() -> Rollout:
    """Four completions: prompts padded on the left, completions on the right, the last one masked as truncated."""
    torch.manual_seed(1)
    prompt_mask = (torch.arange(5) >= torch.tensor([[0], [2], [3], [1]])).long()
    completion_mask = (torch.arange(6) < torch.tensor([[6], [3], [1], [5]])).long()
    prompt_ids, completion_ids = torch.randint(3, 131, (4, 5)), torch.randint(3, 131, (4, 6))
    return Rollout(prompt_ids * prompt_mask, prompt_mask, completion_ids * completion_mask, completion_mask)


def inputs_of(model: Any, rollout: Rollout) -> dict[str, Tensor]:
    torch.manual_seed(2)
    with torch.no_grad():
        logprobs = token_logprobs(completion_logits(model, rollout), rollout.completion_ids, backend="torch").logprobs
    names = ("old_logprobs", "ref_logprobs", "sampling_logprobs")
    return {name: logprobs + 0.2 * torch.randn_like(logprobs) for name in names}


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ADVANTAGES = torch.tensor([1.0, -0.5, 0.7, -1.2])
CONFIG = GRPOLossConfig(beta=0.1, epsilon_high=0.3, rollout_correction="token_truncate", rollout_clip_max=1.1)


def of_logits(model: Any, rollout: Rollout, given: dict[str, Tensor], config: GRPOLossConfig) -> tuple[Tensor, Any]:
    """The loss from the model's own logits, and the gradients of its parameters."""
    model.zero_grad()
    logits = completion_logits(model, rollout)
    output = grpo_loss(logits, rollout.completion_ids, ADVANTAGES, rollout.completion_mask, config=config,
                       backend="torch", **given)  # fmt: skip
    output.loss.backward()
    return output.loss.detach(), gradients(model)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            got[name], gradient, atol=2e-6 * scale.item(), rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_loss_is_that_of_the_models_logits(name: str, packing: bool) -> None:
    model, rollout = model_of(name), rollout_of()
    given = inputs_of(model, rollout)
    loss, expected = of_logits(model, rollout, given, CONFIG)
    policy = Policy(model, CONFIG, packing=packing, aux_loss_coef=0.0 if name == "experts" else None)
    model.zero_grad()
    found, output, aux_loss = policy.loss(rollout, ADVANTAGES, **given)
    found.backward()
    assert aux_loss is None and output.metrics["kl"] > 0
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["tied", "softcap", "logits scaling"])
def test_log_probs_are_those_of_the_models_logits(name: str, packing: bool) -> None:
    model, rollout = model_of(name), rollout_of()
    mask = rollout.completion_mask
    with torch.no_grad():
        logits = completion_logits(model, rollout)
        expected = token_logprobs(logits, rollout.completion_ids, temperature=0.7, mask=mask, backend="torch").logprobs
    policy = Policy(model, GRPOLossConfig(temperature=0.7, beta=0.1), packing=packing)
    for reference in (False, True):
        found = policy.logprobs(rollout, batch_size=3, reference=reference)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


RECURRENT: dict[str, dict[str, Any]] = {
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Qwen3Next": {
        "layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", list(RECURRENT))
def test_a_model_whose_layers_mix_packed_sequences_is_refused(family: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(COMMON | RECURRENT[family]))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # weights as large as trained ones
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.ndim > 1 else None
    Policy(model, GRPOLossConfig())
    with pytest.raises(ValueError, match=f"{family}ForCausalLM does not keep packed sequences apart"):
        Policy(model, GRPOLossConfig(), packing=True)


def test_a_masked_completion_is_left_out_packed_as_padded() -> None:
    model, rollout = model_of("tied"), rollout_of()
    given = inputs_of(model, rollout)
    rollout = rollout._replace(completion_mask=rollout.completion_mask * torch.tensor([[1], [0], [1], [1]]))
    results = []
    for packing in (False, True):
        policy = Policy(model_of("tied"), CONFIG, packing=packing)
        loss, output, _ = policy.loss(rollout, ADVANTAGES, **given)
        loss.backward()
        results.append((loss.detach(), dict(output.metrics), gradients(policy.model)))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1])
    assert_same(results[1][2], results[0][2])


def test_the_experts_own_loss_is_the_models() -> None:
    model, rollout = model_of("experts"), rollout_of()
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    kept = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)
    positions = (kept.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=kept, position_ids=positions, output_router_logits=True).aux_loss
    policy = Policy(model, GRPOLossConfig())
    loss, output, aux_loss = policy.loss(rollout, ADVANTAGES, loss_scale=0.5, aux_loss_scale=0.25)
    torch.testing.assert_close(aux_loss, expected)
    torch.testing.assert_close(loss, output.loss + 0.5 * 0.25 * expected)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0\.1, but Qwen2ForCausalLM is no mixture"):
        Policy(model_of("tied"), GRPOLossConfig(), aux_loss_coef=0.1)


def test_with_adapters_the_model_without_them_is_the_reference() -> None:
    model, rollout = model_of("untied"), rollout_of()
    plain = Policy(model_of("untied"), GRPOLossConfig(beta=0.1)).logprobs(rollout, 4)
    recipe = Recipe(use_peft=True, lora_r=4, gradient_checkpointing=True)
    policy = Policy(prepare_model(model, recipe), GRPOLossConfig(beta=0.1))
    assert policy.reference is policy.model
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and "lm_head" not in name for name in trained)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    torch.testing.assert_close(policy.logprobs(rollout, 4, reference=True), plain)
    assert (policy.logprobs(rollout, 4) - plain).abs().max() > 1e-3
    loss, *_ = policy.loss(rollout, ADVANTAGES, ref_logprobs=plain)
    loss.backward()
    assert gradients(policy.model).keys() == trained


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_adapters_of_the_head_have_the_gradients_of_the_models_logits(packing: bool) -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    model, rollout = peft.get_peft_model(model_of("untied"), config).eval(), rollout_of()
    base = model.get_base_model()
    given = inputs_of(base, rollout)
    loss, expected = of_logits(base, rollout, given, CONFIG)
    assert sum("lm_head.lora_" in name for name in expected) == 2
    policy = Policy(model, CONFIG, packing=packing)
    model.zero_grad()
    found, *_ = policy.loss(rollout, ADVANTAGES, **given)
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    assert_same(gradients(base), expected)


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "PromptTuningConfig"])
def test_a_reference_without_adapters_must_not_move_with_the_policy(kind: str) -> None:
    import peft

    options = {"num_virtual_tokens": 2} if kind == "PromptTuningConfig" else {"target_modules": ["q_proj"]}
    options |= {"feedforward_modules": []} if kind == "IA3Config" else {}
    model = peft.get_peft_model(model_of("untied"), getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    assert Policy(model, GRPOLossConfig(beta=0.1)).reference is model
    bias = next(p for name, p in model.named_parameters() if name.endswith(".bias"))
    bias.requires_grad_()
    assert Policy(model, GRPOLossConfig()).reference is None
    with pytest.raises(ValueError, match=r"so they alone may train, got .*bias \(and 0 more\)"):
        Policy(model, GRPOLossConfig(beta=0.1))


def test_packing_that_was_checked_with_another_attention_is_refused() -> None:
    policy = Policy(model_of("untied"), GRPOLossConfig(), packing=True)
    policy.model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="was checked with attn_implementation='sdpa' and is now run with 'eager'"):
        policy.logprobs(rollout_of(), 4)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    rollout = rollout_of()
    found = []
    for checkpointing in (False, True):
        model = prepare_model(model_of("untied"), Recipe(gradient_checkpointing=checkpointing))
        model.train(checkpointing)
        loss, *_ = Policy(model, GRPOLossConfig()).loss(rollout, ADVANTAGES)
        loss.backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])


def test_a_forward_without_a_head_is_the_models_own() -> None:
    model, rollout = model_of("softcap"), rollout_of()
    before = model(rollout.prompt_ids).logits
    Policy(model, GRPOLossConfig())
    torch.testing.assert_close(model(rollout.prompt_ids).logits, before, rtol=0, atol=0)


def test_a_gradient_passes_the_heads_output_before_what_was_made_of_it() -> None:
    """There FSDP2 and ZeRO-3 wait to gather the weight again; they see no gradient of it, and nor do the parameters."""
    model, rollout, seen = model_of("softcap"), rollout_of(), []
    Policy(model, GRPOLossConfig())

    def watch(module: Any, arguments: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: seen.append(("head", gradient)))

    watch.__module__ = "torch.distributed.fsdp"  # hooks of others are refused

    def head(hidden: Tensor, projection: Any) -> tuple[Tensor, Tensor]:
        value = (hidden @ projection.weight.mT).square().mean()
        value.register_hook(lambda gradient: seen.append(("value", gradient.item())))
        return value, hidden.detach()

    model.get_output_embeddings().register_forward_hook(watch)
    value, hidden = model(rollout.prompt_ids, head=head).result
    value.backward()
    assert seen == [("head", None), ("value", 1.0)] and not hidden.requires_grad
