"""Names that a function or a configuration does not have, and what a new user who writes one is told."""

from __future__ import annotations

import inspect

import pytest
from testing.wrong_calls import NAMES, check_wrong_call

import grpo_kernels

FUNCTIONS = [name for name in grpo_kernels.__all__ if inspect.isfunction(NAMES[name])]
FLAGS = [
    (name, flag)
    for name in FUNCTIONS
    for flag, parameter in inspect.signature(NAMES[name]).parameters.items()
    if isinstance(parameter.default, bool)
]
WRONG_NAMES = [
    ("policy_loss(logprobs, advantages, mask, clip_ratio=0.2)",
     TypeError,
     "policy_loss has no argument 'clip_ratio', which is a field of its configuration: "
     "config=GRPOLossConfig(epsilon_low=...)"),
    ("grpo_loss(logits, ids, advantages, mask, beta=0.1)",
     TypeError,
     "grpo_loss has no argument 'beta', which is a field of its configuration: config=GRPOLossConfig(beta=...)"),
    ("grpo_loss(logits, ids, advantages, mask, epsilon=0.2)",
     TypeError,
     "grpo_loss has no argument 'epsilon', which is a field of its configuration: "
     "config=GRPOLossConfig(epsilon_low=...)"),
    ("grpo_loss(logits, ids, advantages, mask=mask)",
     TypeError, "grpo_loss has no argument 'mask': did you mean completion_mask=...?"),
    ("grpo_loss(logits, ids, advantages, mask, old_logprob=logprobs)",
     TypeError, "grpo_loss has no argument 'old_logprob': did you mean old_logprobs=...?"),
    ('linear_grpo_loss(hidden, head, ids, advantages, mask, loss_type="grpo")',
     TypeError,
     "linear_grpo_loss has no argument 'loss_type', which is a field of its configuration: "
     "config=GRPOLossConfig(loss_type=...)"),
    ('GRPOLossConfig("grpo")',
     TypeError, "GRPOLossConfig takes its fields by name, as loss_type=..., got 'grpo' without one"),
    ("GRPOLossConfig(epsilon=0.2)",
     TypeError,
     "GRPOLossConfig has no field 'epsilon': did you mean epsilon_low=... or GRPOLossConfig.trl(epsilon=...)?"),
    ("GRPOLossConfig(epsilon_lo=0.2)",
     TypeError, "GRPOLossConfig has no field 'epsilon_lo': did you mean epsilon_low=...?"),
    ("GRPOLossConfig(kl_coef=0.1)",
     TypeError, "GRPOLossConfig has no field 'kl_coef': did you mean beta=...?"),
    ("GRPOLossConfig(num_generations=8)",
     TypeError,
     "GRPOLossConfig has no field 'num_generations', which is an argument of grpo_loss, linear_grpo_loss and "
     "group_advantages"),
    ("GRPOLossConfig(num_iterations=2)",
     TypeError,
     "GRPOLossConfig has no field 'num_iterations', which is the training loop's; give old_logprobs to a loss "
     "from the second iteration on"),
    ("GRPOLossConfig(clip_ratio=0.2)",
     TypeError,
     "GRPOLossConfig has no field 'clip_ratio': did you mean epsilon_low=... or "
     "GRPOLossConfig.verl(clip_ratio=...)?"),
    ("GRPOLossConfig.trl(epsilon_low=0.2)",
     TypeError, "GRPOLossConfig.trl has no option 'epsilon_low': did you mean epsilon=...?"),
    ("GRPOLossConfig.trl(num_generations=8)",
     TypeError,
     "GRPOLossConfig.trl has no option 'num_generations', which is an argument of grpo_loss, linear_grpo_loss "
     "and group_advantages"),
    ("GRPOLoss(beta=0.1, bogus=3)",
     TypeError,
     "GRPOLoss has no option 'bogus': it has the fields of GRPOLossConfig and the keyword arguments of "
     "grpo_loss"),
    ("GRPOLoss(epsilon=0.2)",
     TypeError, "GRPOLoss has no option 'epsilon': did you mean epsilon_low=...?"),
    ("GRPOLoss(inplce=True)",
     TypeError, "GRPOLoss has no option 'inplce': did you mean inplace=...?"),
    ("GRPOLoss()(logits, ids, advantages, mask, beta=0.1)",
     TypeError,
     "grpo_loss has no argument 'beta', which is a field of its configuration: config=GRPOLossConfig(beta=...)"),
    ("LinearGRPOLoss(inplace=True)",
     TypeError,
     "LinearGRPOLoss has no option 'inplace': it has the fields of GRPOLossConfig and the keyword arguments of"
     " linear_grpo_loss"),
    ("grpo_loss(logits, ids, advantages, mask, ref_per_token_logps=logprobs)",
     TypeError, "grpo_loss has no argument 'ref_per_token_logps': did you mean ref_logprobs=...?"),
    ("grpo_loss(logits, ids, advantages, mask, old_per_token_logps=logprobs)",
     TypeError, "grpo_loss has no argument 'old_per_token_logps': did you mean old_logprobs=...?"),
    ("grpo_loss(logits, ids, advantages, mask, importance_sampling_ratio=mask)",
     TypeError, "grpo_loss has no argument 'importance_sampling_ratio': did you mean rollout_is_weights=...?"),
    ("grpo_loss(logits, ids, None, mask, rewards=rewards, group_size=2)",
     TypeError, "grpo_loss has no argument 'group_size': did you mean num_generations=...?"),
    ("grpo_loss(logits, input_ids=ids, advantages=advantages, completion_mask=mask)",
     TypeError, "grpo_loss has no argument 'input_ids': did you mean completion_ids=...?"),
    ("linear_grpo_loss(hidden, head, ids, advantages, mask, rollout_log_probs=logprobs)",
     TypeError, "linear_grpo_loss has no argument 'rollout_log_probs': did you mean sampling_logprobs=...?"),
    ("policy_loss(per_token_logps=logprobs, advantages=advantages, completion_mask=mask)",
     TypeError, "policy_loss has no argument 'per_token_logps': did you mean logprobs=...?"),
    ("policy_loss(logprobs, advantages, mask, prev_logprobs=logprobs)",
     TypeError, "policy_loss has no argument 'prev_logprobs': did you mean old_logprobs=...?"),
    ("policy_loss(logprobs, advantages, response_mask=mask)",
     TypeError, "policy_loss has no argument 'response_mask': did you mean completion_mask=...?"),
    ("rollout_weights(logprobs, logprobs, mask, None, rollout_clip_max=2.0)",
     TypeError,
     "rollout_weights has no argument 'rollout_clip_max', which is a field of its configuration: "
     "config=GRPOLossConfig(rollout_clip_max=...)"),
    ("group_advantages(rewards, num_generation=2)",
     TypeError, "group_advantages has no argument 'num_generation': did you mean num_generations=...?"),
    ("group_advantages(rewards, 2, num_items_in_batch=2)",
     TypeError, "group_advantages has no argument 'num_items_in_batch', which is an argument of the loss functions"),
    ("gae(logprobs, logprobs, mask, lmbda=0.9)",
     TypeError, "gae has no argument 'lmbda': did you mean lam=...?"),
    ("token_logprobs(logits, ids, temp=2.0)",
     TypeError, "token_logprobs has no argument 'temp': did you mean temperature=...?"),
    ("token_logprobs(logits, ids, completion_mask=mask)",
     TypeError, "token_logprobs has no argument 'completion_mask': did you mean mask=...?"),
    ("token_divergence(logits, logits, beta=0.1)",
     TypeError,
     "token_divergence has no argument 'beta': it has backend, debug, divergence, divergence_temperature, ids, "
     "inplace_backward, logit_scale, logits, mask, mixture, reference_logit_scale, reference_logits, "
     "reference_softcap, softcap, temperature"),
    ("linear_token_divergence(hidden, head, ref_logits=logits)",
     TypeError, "linear_token_divergence has no argument 'ref_logits': did you mean reference_logits=...?"),
    ("linear_token_logprobs(hidden, weight=head, ids=ids)",
     TypeError, "linear_token_logprobs has no argument 'weight': did you mean lm_head_weight=...?"),
    ("sft_loss(hidden, head, label=ids)",
     TypeError, "sft_loss has no argument 'label': did you mean labels=...?"),
    ("distillation_loss(hidden, head, ids, mask, ref_logits=logits)",
     TypeError, "distillation_loss has no argument 'ref_logits': did you mean teacher_logits=...?"),
    ("dpo_loss(chosen_logps=rewards)",
     TypeError, "dpo_loss has no argument 'chosen_logps': did you mean chosen_logprobs=...?"),
    ("dpo_loss(logprobs, reference_logprobs=logprobs, completion_mask=mask)",
     TypeError, "dpo_loss has no argument 'reference_logprobs': did you mean ref_logprobs=...?"),
    ("reward_model_loss(rewards, rewards, margin=rewards)",
     TypeError, "reward_model_loss has no argument 'margin': did you mean margins=...?"),
    ("kl_penalized_rewards(rewards, logprobs, logprobs, mask, kl_coef=0.1)",
     TypeError, "kl_penalized_rewards has no argument 'kl_coef': did you mean beta=...?"),
    ("mask_truncated(ids, mask, eos_id=2)",
     TypeError, "mask_truncated has no argument 'eos_id': did you mean eos_token_id=...?"),
    ('mask_truncated(ids, mask, 2, backend="cpu")',
     TypeError, "mask_truncated has no argument 'backend', which is an argument of the functions that run kernels"),
    ('check_device_values(devices="cpu")',
     TypeError, "check_device_values has no argument 'devices': did you mean device=...?"),
    ("AdaptiveEntropy(coeff=0.1)",
     TypeError, "AdaptiveEntropy has no argument 'coeff': did you mean coef=...?"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG_NAMES, ids=[call for call, _, _ in WRONG_NAMES])
def test_a_wrong_name_is_told(call: str, error: type[Exception], message: str) -> None:
    check_wrong_call(call, error, message)


@pytest.mark.parametrize("name", sorted({*FUNCTIONS, "AdaptiveEntropy"} - {"apply_grpo_kernels_to_trl"}))
def test_every_function_lists_its_arguments(name: str) -> None:
    arguments = ", ".join(sorted(inspect.signature(NAMES[name]).parameters))
    check_wrong_call(f"{name}(xyzzy=1)", TypeError, f"{name} has no argument 'xyzzy': it has {arguments}")


def test_the_options_for_trl_are_listed() -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    options = "backend, max_logits_bytes, speculate, workspace_bytes"
    check_wrong_call(
        "apply_grpo_kernels_to_trl(xyzzy=1)", TypeError, f"apply has no argument 'xyzzy': it has {options}"
    )


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_a_flag_is_true_or_false(name: str, flag: str) -> None:
    """Also 0 and "no", which count as false and true elsewhere."""
    assert inspect.signature(NAMES[name]).parameters[flag].kind is inspect.Parameter.KEYWORD_ONLY
    for value in ("no", 0, None):
        call = f"{name}({flag}={value!r})"
        check_wrong_call(call, TypeError, f"{flag} must be True or False, got {value!r}")
