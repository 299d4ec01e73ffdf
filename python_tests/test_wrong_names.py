"""Names that a function or a configuration does not have, and what a new user who writes one is told."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
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
     TypeError, "token_divergence has no argument 'beta': did you mean mixture=...?"),
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
    ("policy_loss(logprobs, advantages, mask, kl_loss_coef=0.1)",
     TypeError,
     "policy_loss has no argument 'kl_loss_coef', which is a field of its configuration: "
     "config=GRPOLossConfig(beta=...)"),
    ("policy_loss(logprobs, advantages, mask, clip_ratio_high=0.2)",
     TypeError,
     "policy_loss has no argument 'clip_ratio_high', which is a field of its configuration: "
     "config=GRPOLossConfig(epsilon_high=...)"),
    ("policy_loss(logprobs, advantages, mask, clip_eps_high=0.2)",
     TypeError,
     "policy_loss has no argument 'clip_eps_high', which is a field of its configuration: "
     "config=GRPOLossConfig(epsilon_high=...)"),
    ("policy_loss(logprobs, advantages, mask, eps_clip=0.2)",
     TypeError,
     "policy_loss has no argument 'eps_clip', which is a field of its configuration: "
     "config=GRPOLossConfig(epsilon_low=...)"),
    ("policy_loss(logprobs, advantages, mask, cliprange=0.2)",
     TypeError,
     "policy_loss has no argument 'cliprange', which is a field of its configuration: "
     "config=GRPOLossConfig(epsilon_low=...)"),
    ("policy_loss(logprobs, advantages, mask, epsilon_hig=0.2)",
     TypeError,
     "policy_loss has no argument 'epsilon_hig', which is a field of its configuration: "
     "config=GRPOLossConfig(epsilon_high=...)"),
    ("grpo_loss(logits, ids, advantages, mask, log_probs=logprobs)",
     TypeError, "grpo_loss has no argument 'log_probs', which is logprobs, an argument of policy_loss"),
    ('grpo_loss(logits, ids, advantages, mask, adv_estimator="rloo")',
     TypeError, "grpo_loss has no argument 'adv_estimator', which is estimator, an argument of group_advantages"),
    ("grpo_loss(logits, labels=ids)",
     TypeError, "grpo_loss has no argument 'labels': did you mean completion_ids=...?"),
    ("token_logprobs(logits, labels=ids)",
     TypeError, "token_logprobs has no argument 'labels': did you mean ids=...?"),
    ("token_logprobs(logits, ids, return_entropy=True)",
     TypeError, "token_logprobs has no argument 'return_entropy': did you mean outputs=\"entropy\"?"),
    ("token_logprobs(logits, ids, compute_entropy=True)",
     TypeError, "token_logprobs has no argument 'compute_entropy': did you mean outputs=\"entropy\"?"),
    ("distillation_loss(student_logits=logits)",
     TypeError, "distillation_loss has no argument 'student_logits': did you mean hidden_states=...?"),
    ("distillation_loss(hidden, head, ids, mask, beta=0.5)",
     TypeError, "distillation_loss has no argument 'beta': did you mean mixture=...?"),
    ("grpo_loss(hidden_states=hidden)",
     TypeError,
     "grpo_loss has no argument 'hidden_states', which is an argument of linear_grpo_loss, "
     "linear_token_logprobs and linear_token_divergence"),
    ('GRPOLossConfig(kl_type="k1")',
     TypeError, "GRPOLossConfig has no field 'kl_type': did you mean kl_estimator=...?"),
    ("GRPOLossConfig(clip_eps_high=0.3)",
     TypeError, "GRPOLossConfig has no field 'clip_eps_high': did you mean epsilon_high=...?"),
    ('GRPOLossConfig(adv_estimator="rloo")',
     TypeError, "GRPOLossConfig has no field 'adv_estimator', which is estimator, an argument of group_advantages"),
    ("GRPOLossConfig(group_size=8)",
     TypeError,
     "GRPOLossConfig has no field 'group_size', which is num_generations, an argument of grpo_loss, "
     "linear_grpo_loss and group_advantages"),
    ("GRPOLoss(self=3)",
     TypeError,
     "GRPOLoss has no option 'self': it has the fields of GRPOLossConfig and the keyword arguments of "
     "grpo_loss"),
    ("AdaptiveEntropy(self=3)",
     TypeError, "AdaptiveEntropy has no argument 'self': it has coef, delta, last_entropy, least, most, target"),
    ("grpo_loss(logits, ids, advantages, mask, js)",
     TypeError,
     "positional arguments of grpo_loss must be at most 4, with the others by name, as config=..., got 5"),
    ("AdaptiveEntropy(1, 2, 3, 4, 5, 6, 7)",
     TypeError, "positional arguments of AdaptiveEntropy must be at most 6, got 7"),
    ("AdaptiveEntropy(coeff=0.1)",
     TypeError, "AdaptiveEntropy has no argument 'coeff': did you mean coef=...?"),
]  # fmt: skip

WRONG_TRUTH_VALUES = [
    ("mask_truncated(ids, mask, [2, np.True_])",
     ValueError, "eos_token_id must be an id, or several, got " + repr([2, np.True_])),
    ("GRPOLossConfig(use_bias_correction_kl=1)",
     TypeError, "use_bias_correction_kl must be True or False, got 1"),
    ("GRPOLossConfig.verl(use_kl_loss=1)",
     TypeError, "use_kl_loss must be True or False, got 1"),
    ("GRPOLossConfig(beta=True)",
     TypeError, "beta must be a number, got True"),
    ("group_advantages(rewards, True)",
     TypeError, "num_generations must be an integer, got True"),
    ("token_logprobs(logits, ids, temperature=True)",
     TypeError, "temperature must be a number, got True"),
    ("token_logprobs(logits, ids, softcap=np.True_)",
     TypeError, "softcap must be a number, got " + repr(np.True_)),
    ("policy_loss(logprobs, advantages, mask, num_items_in_batch=True)",
     TypeError, "num_items_in_batch must be a number, got True"),
    ("policy_loss(logprobs, advantages, mask, num_items_in_batch=torch.tensor(True))",
     TypeError, "num_items_in_batch must be a number, got tensor(True)"),
    ("policy_loss(logprobs, advantages, mask, entropy=logprobs, entropy_threshold=torch.tensor(True), "
     "config=GRPOLossConfig(top_entropy_quantile=0.5))",
     TypeError, "entropy_threshold must be a number, got tensor(True)"),
    ("GRPOLoss(inplace=0)",
     TypeError, "inplace must be True or False, got 0"),
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
    for unknown, end in (("xyzzy", f": it has {options}"), ("specualte", ": did you mean speculate=...?")):
        message = f"apply_grpo_kernels_to_trl has no argument {unknown!r}{end}"
        check_wrong_call(f"apply_grpo_kernels_to_trl({unknown}=1)", TypeError, message)


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("grpo_loss", "prompt_mask"),
        ("grpo_loss", "prompt_ids"),
        ("grpo_loss", "sampling_logits"),
        ("distillation_loss", "teacher"),
        ("dpo_loss", "rejected_ids"),
        ("gae", "next_values"),
        ("policy_loss", "completion_ids"),
    ],
)
def test_another_tensor_is_not_suggested(name: str, unknown: str) -> None:
    arguments = ", ".join(sorted(inspect.signature(NAMES[name]).parameters))
    message = f"{name} has no argument {unknown!r}: it has {arguments}"
    check_wrong_call(f"{name}({unknown}=logits)", TypeError, message)


@pytest.mark.parametrize(("unknown", "end"), [
    ("beta", ", which is a field of its configuration: config=GRPOLossConfig"),
    ("log_prob", ": did you mean logprobs="),
    ("xyzzy", ": it has advantages, "),
])  # fmt: skip
def test_a_wrong_name_is_told_while_a_graph_is_traced(unknown: str, end: str) -> None:
    torch._dynamo.reset()
    loss = torch.compile(grpo_kernels.policy_loss, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"policy_loss has no argument '{unknown}'{end}"):
        loss(NAMES["logprobs"], NAMES["advantages"], NAMES["mask"], **{unknown: NAMES["logprobs"]})


@pytest.mark.parametrize(("call", "error", "message"), WRONG_TRUTH_VALUES, ids=[row[0] for row in WRONG_TRUTH_VALUES])
def test_a_truth_value_is_no_number(call: str, error: type[Exception], message: str) -> None:
    """And a number is no truth value."""
    check_wrong_call(call, error, message)


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_a_flag_is_true_or_false(name: str, flag: str) -> None:
    """Also 0 and "no", which count as false and true elsewhere."""
    assert inspect.signature(NAMES[name]).parameters[flag].kind is inspect.Parameter.KEYWORD_ONLY
    for value in ("no", 0, None):
        call = f"{name}({flag}={value!r})"
        check_wrong_call(call, TypeError, f"{flag} must be True or False, got {value!r}")
