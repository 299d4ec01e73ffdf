"""The reference against the real TRL trainer: its own ``_compute_loss`` and advantages, not a transcription."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from drawn import TRL_LOSS_TYPES, configs
from hypothesis import strategies as st
from testing.calls import BACKENDS
from testing.cases import ALL_VARIANT_CASES, FAMILY_CASES, Case
from testing.inputs import Inputs, build
from torch import Tensor

from grpo_kernels import AdaptiveEntropy, GRPOLossConfig, group_advantages, policy_loss
from grpo_kernels.integrations import presets

trl = pytest.importorskip("trl")

from trl.experimental.gmpo import GMPOTrainer  # noqa: E402

NOT_OURS = {"policy_loss", "entropy_coef"}  # the loss without its bonus, and a hyper-parameter


def _is_trls(config: GRPOLossConfig) -> bool:
    """Whether TRL has all its options; its GMPO corrects no bias of the KL."""
    has_type = config.loss_type in TRL_LOSS_TYPES or (config.loss_type == "gmpo" and not config.use_bias_correction_kl)
    has_own = (config.kl_estimator, config.kl_gradient, config.kl_clamp, config.log_ratio_clamp) != _TRLS_KL
    has_level = config.importance_sampling_level != "sequence_token"
    return has_type and has_level and not has_own and config.rollout_correction is None and not config.cispo_ratio_low


_TRLS_KL = ("k3", "naive", None, None)
CASES = (
    *ALL_VARIANT_CASES,
    *(case for case in FAMILY_CASES if _is_trls(case.config)),
    Case("on_policy", old=False, config=GRPOLossConfig(beta=0.1)),
    Case("on_policy_sequence", old=False, config=GRPOLossConfig(beta=0.1, importance_sampling_level="sequence")),
    Case("one_completion_masked", mask="first", config=GRPOLossConfig(loss_type="grpo", beta=0.1)),
    Case("one_completion_masked_sequence", mask="first", config=GRPOLossConfig(importance_sampling_level="sequence")),
    Case("all_masked", mask="zeros", config=GRPOLossConfig(loss_type="bnpo", beta=0.1)),
    Case("mask_holes", mask="holes", batch=7, length=9, config=GRPOLossConfig(beta=0.1)),
    Case("token_advantages", advantages="token", config=GRPOLossConfig(beta=0.1)),
    Case("token_advantages_sequence", advantages="token", config=GRPOLossConfig(importance_sampling_level="sequence")),
    Case("rollout_token", rollout="token", config=GRPOLossConfig(beta=0.1)),
    Case("rollout_sequence", rollout="sequence", config=GRPOLossConfig(beta=0.1)),
    Case("few_items", num_items=0.5),
    Case("on_clip_bound", on_bound=True, config=GRPOLossConfig(epsilon_low=0, epsilon_high=0)),
    Case("zero_advantage", advantages="zero", config=GRPOLossConfig(beta=0.1)),
)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {str(i): i + 2 for i in range(10)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=12,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    )
    folder: Path = tmp_path_factory.mktemp("trl")
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=3,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1 2", "3"]}),
        processing_class=_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def _configure(trainer: Any, config: GRPOLossConfig, has_rollout_weights: bool) -> None:
    trainer.loss_type = config.loss_type
    trainer.importance_sampling_level = config.importance_sampling_level
    trainer.epsilon_low = config.epsilon_low
    trainer.epsilon_high = config.epsilon_low if config.epsilon_high is None else config.epsilon_high
    for name in ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
                 "vespo_lambda_neg"):  # fmt: skip
        setattr(trainer.args, name, getattr(config, name))
    trainer.off_policy_mask_threshold = config.off_policy_mask_threshold
    trainer.top_entropy_quantile = config.top_entropy_quantile
    trainer.args.delta = config.delta
    trainer.beta = config.beta
    trainer.args.use_bias_correction_kl = config.use_bias_correction_kl
    trainer.entropy_coef = config.entropy_coef
    trainer._entropy_bonus_enabled = config.entropy_coef != 0
    trainer.max_completion_length = config.max_completion_length
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = has_rollout_weights


def _trl(
    trainer: Any, inputs: Inputs, logprobs: Tensor, entropy: Tensor, configure: bool = True
) -> tuple[Tensor, dict[str, float]]:
    """Loss and logged metrics of TRL's own method, given what its model would have computed."""
    if configure:
        _configure(trainer, inputs.case.config, inputs.rollout is not None)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, entropy, None)
    trainer._metrics["train"].clear()
    mask = inputs.mask.long()
    rollout = inputs.rollout
    if rollout is not None and rollout.shape == mask.shape:
        rollout = torch.where(mask != 0, rollout, 1)  # as TRL makes it
    items = inputs.num_items if inputs.num_items is not None else mask.sum()
    batch = {
        "prompt_ids": inputs.ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": inputs.ids,
        "completion_mask": mask,
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old,
        "ref_per_token_logps": inputs.ref,
        "importance_sampling_ratio": rollout,
        "num_items_in_batch": torch.as_tensor(items, dtype=torch.float64),
    }
    if inputs.sampling is not None:
        batch["sampling_per_token_logps"] = inputs.sampling
    compute_loss = type(trainer)._compute_loss
    if inputs.case.config.loss_type == "gmpo":
        compute_loss = GMPOTrainer._compute_loss
    try:
        loss = compute_loss(trainer, trainer.model, batch)
    finally:
        del trainer._get_per_token_logps_and_entropies
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items() if name not in NOT_OURS}


def _assert_trls(trainer: Any, case: Case, backend: str) -> None:
    inputs = build(case, torch.float64, "logprobs")
    inputs = replace(inputs, entropy=inputs.entropy.float().double())  # TRL takes the quantile in fp32
    expected_leaves = [x.detach().requires_grad_() for x in (inputs.logprobs, inputs.entropy)]
    expected, logged = _trl(trainer, inputs, *expected_leaves)
    expected.backward()
    leaves = [x.detach().requires_grad_() for x in (inputs.logprobs, inputs.entropy)]
    loss, metrics = policy_loss(
        leaves[0],
        inputs.advantages,
        inputs.mask,
        entropy=leaves[1],
        old_logprobs=inputs.old,
        ref_logprobs=inputs.ref,
        sampling_logprobs=inputs.sampling,
        rollout_is_weights=inputs.rollout,
        num_items_in_batch=inputs.num_items,
        config=case.config,
        backend=backend,
    )
    loss.backward()
    is_rounded = case.config.loss_type == "sapo" and case.config.sapo_temperature_neg == 1.05  # to fp32, by TRL
    close = {"rtol": 1e-6 if is_rounded else 1e-12, "atol": 1e-14}
    torch.testing.assert_close(loss, expected, **close)
    for ours, theirs in zip(leaves, expected_leaves, strict=True):
        torch.testing.assert_close(
            *(torch.zeros_like(x) if x.grad is None else x.grad for x in (ours, theirs)), **close
        )
    assert set(metrics) == set(logged)
    for name, value in metrics.items():
        if case.name == "token_advantages_sequence" and name.startswith("clip_ratio/"):
            continue  # a sequence has one ratio, and ours counts it once; TRL counts it once a token there
        theirs = torch.tensor(logged[name], dtype=torch.float64).nan_to_num()
        torch.testing.assert_close(value, theirs, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_gradients_and_metrics_are_trls(trainer: Any, case: Case, backend: str) -> None:
    _assert_trls(trainer, case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("config", "advantage", "gap"),
    [
        (GRPOLossConfig(), 1.0, 800.0),
        (GRPOLossConfig(delta=3.0), -1.0, 800.0),
        (GRPOLossConfig(beta=0.1), 1.0, 800.0),
        (GRPOLossConfig(beta=0.1), 1.0, -800.0),
    ],
    ids=str,
)
def test_trl_gives_nan_at_limits_that_are_finite_here(
    trainer: Any, config: GRPOLossConfig, advantage: float, gap: float, backend: str
) -> None:
    """A stated departure: where the ratio of a token is infinite, or 0, in fp64."""
    inputs = build(Case("limits", batch=2, length=3, mask="ones", config=config), torch.float64, "logprobs")
    far = torch.zeros_like(inputs.logprobs)
    far[0, 0] = gap
    inputs = replace(
        inputs,
        logprobs=inputs.logprobs + far.clamp(max=0),
        old=inputs.logprobs - far.clamp(min=0),
        ref=inputs.logprobs,
        advantages=torch.full((2,), advantage, dtype=torch.float64),
    )
    theirs, ours = (inputs.logprobs.clone().requires_grad_() for _ in range(2))
    expected, _ = _trl(trainer, inputs, theirs, inputs.entropy)
    expected.backward()
    loss, _ = policy_loss(
        ours, inputs.advantages, inputs.mask, old_logprobs=inputs.old, ref_logprobs=inputs.ref, config=config,
        backend=backend,
    )  # fmt: skip
    loss.backward()
    assert theirs.grad is not None and ours.grad is not None
    assert theirs.grad[0, 0].isnan() and loss.isfinite() and ours.grad.isfinite().all()
    assert ours.grad[0, 0] == 0
    torch.testing.assert_close(ours.grad[1], theirs.grad[1], rtol=1e-12, atol=1e-14)


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    config = draw(configs(TRL_LOSS_TYPES, only_trls=True))
    return Case(
        f"drawn_{draw(st.integers(0, 10**6))}",
        batch=draw(st.integers(1, 6)),
        length=draw(st.integers(2, 7)),  # TRL takes the metrics of one token for those of a sequence
        config=config,
        mask=draw(st.sampled_from(["ones", "tail", "holes", "first", "zeros"])),
        advantages=draw(st.sampled_from(["sequence", "zero", "some"])),
        old=draw(st.booleans()),
        sampling=draw(st.booleans()),
        rollout=draw(st.sampled_from([None, "token"])),
        num_items=draw(st.sampled_from([None, 7.0, 0.5])),
    )


@hypothesis.settings(max_examples=100 if "triton" in BACKENDS else 600)  # the interpreter takes a third of a second
@hypothesis.given(case=_cases())
def test_any_loss_is_trls(trainer: Any, case: Case) -> None:
    for backend in BACKENDS:
        _assert_trls(trainer, case, backend)


NAN = float("nan")
REWARDS = {
    "plain": [[0.0], [1.0], [0.5], [0.25], [3.0], [-1.0], [2.0], [2.5]],
    "missing": [[0.0], [NAN], [0.5], [0.25], [NAN], [NAN], [NAN], [2.5]],
    "none_scored": [[NAN]] * 4 + [[1.0], [2.0], [3.0], [4.0]],
    "two_functions": [[0.0, 1.0], [1.0, 0.5], [0.5, 2.0], [0.25, 0.0], [3.0, 1.0], [-1.0, 4.0], [2.0, 0.5], [2.5, 1.5]],
    "two_functions_missing": [[0.0, NAN], [NAN, 0.5], [NAN, NAN], [0.25, 0.0], [3.0, 1.0], [-1.0, NAN], [2.0, 0.5],
                              [2.5, 1.5]],
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("name", REWARDS)
def test_advantages_are_trls(trainer: Any, name: str, scale_rewards: str, aggregation: str, backend: str) -> None:
    rewards = torch.tensor(REWARDS[name])
    weights = torch.tensor([1.0, 0.5])[: rewards.shape[1]]
    _configure(trainer, GRPOLossConfig(), False)
    trainer.max_completion_length = 3
    trainer.scale_rewards, trainer.multi_objective_aggregation = scale_rewards, aggregation
    trainer.reward_funcs = [None] * rewards.shape[1]
    trainer.reward_func_names = [f"function_{k}" for k in range(rewards.shape[1])]
    trainer.reward_weights = weights
    trainer._calculate_rewards = lambda *_: rewards.clone()
    prompts = [{"prompt": "1 2"}] * 4 + [{"prompt": "3"}] * 4
    expected = trainer._generate_and_score_completions(prompts)["advantages"]
    got = group_advantages(
        rewards, 4, scale_rewards=scale_rewards, reward_weights=weights, aggregation=aggregation, backend=backend
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_adaptive_entropy_bonus_is_trls(trainer: Any) -> None:
    """Coefficient and loss over steps whose entropy falls below the target and rises again."""
    config = GRPOLossConfig(entropy_coef=0.02)
    bonus = AdaptiveEntropy(coef=0.02, target=0.5, delta=0.015, most=0.04)
    trainer.use_adaptive_entropy, trainer._entropy_window_stats = True, None
    trainer._last_world_entropy = float("inf")
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    for name, value in (("target", 0.5), ("coef_delta", 0.015), ("coef_min", 0.0), ("coef_max", 0.04)):
        setattr(trainer.args, f"entropy_{name}", value)
    coefs = []
    try:
        for step, scale in enumerate((1.0, 0.2, 0.1, 0.1, 0.9, 1.2, 1.1, 1.0, 0.3)):
            inputs = build(Case(f"adaptive_{step}", config=config, ref=False), torch.float64, "logprobs")
            inputs = replace(inputs, entropy=inputs.entropy * 0 + scale)
            kept = (trainer.entropy_coef, trainer._last_world_entropy)
            _configure(trainer, config, False)
            if step:
                trainer.entropy_coef, trainer._last_world_entropy = kept
            expected, _ = _trl(trainer, inputs, inputs.logprobs, inputs.entropy, configure=False)
            loss, metrics = policy_loss(
                inputs.logprobs, inputs.advantages, inputs.mask, entropy=inputs.entropy, old_logprobs=inputs.old,
                config=bonus.config(config),
            )  # fmt: skip
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
            bonus.update(metrics["entropy"].item())
            coefs.append((bonus.coef, trainer.entropy_coef))
    finally:
        trainer.use_adaptive_entropy = False
    assert all(ours == pytest.approx(theirs, abs=1e-15) for ours, theirs in coefs)
    assert max(ours for ours, _ in coefs) == 0.04 and min(ours for ours, _ in coefs) == 0.0


#: Given by every option that changes TRL's loss, but those of one loss type each.
PRESETS = {
    "grpo": {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.6, "beta": 0.1},
    "luspo": {"importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": False},
    "dr_grpo": {"max_completion_length": 8, "entropy_coef": 0.05, "delta": 1.6},
    "cispo": {"epsilon": 0.1, "epsilon_high": 1.3, "delta": 1.6},
    "sapo": {"sapo_temperature_neg": 1.5, "epsilon_high": 0.3, "vespo_k_pos": 1.0},
    "vespo": {"vespo_k_pos": 1.5, "off_policy_mask_threshold": 0.02, "top_entropy_quantile": 0.37},
}


@pytest.mark.parametrize("loss_type", PRESETS)
def test_the_presets_loss_is_that_of_trls_configuration(trainer: Any, loss_type: str) -> None:
    options = PRESETS[loss_type]
    _assert_trls(trainer, Case(f"preset_{loss_type}", config=GRPOLossConfig.trl(loss_type=loss_type, **options)), "cpu")
    assert GRPOLossConfig.trl(loss_type=loss_type, max_completion_length=8).max_completion_length == 8


def test_the_presets_defaults_are_trls() -> None:
    theirs = {field.name: field.default for field in fields(trl.GRPOConfig)}
    for name, parameter in inspect.signature(presets.trl).parameters.items():
        if name != "vllm_importance_sampling_correction":  # which has no effect without vLLM
            assert theirs[name] == parameter.default, name
    config = GRPOLossConfig.trl(vllm_importance_sampling_correction=True)
    assert (config.rollout_correction, config.rollout_clip_max) == ("sequence_mask", 3.0)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"loss_type": "gmpo"}, ("loss_type", "'vespo'", "'gmpo'")),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, ("importance_sampling_level", "vespo")),
    ],
)
def test_what_the_preset_does_not_have_is_named(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        GRPOLossConfig.trl(**options)
    assert all(part in str(caught.value) for part in parts), caught.value
