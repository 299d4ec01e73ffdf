"""TRL's own trainers with and without these kernels: the same logs, the same parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from test_trl import _tokenizer  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from trl.experimental.gmpo import GMPOTrainer  # noqa: E402

from grpo_kernels.integrations import trl as drop_in  # noqa: E402
from grpo_kernels.integrations.trl import FusedGRPOTrainer, Settings, apply, unapply  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
#: Of the clock, or of what is saved.
NOT_COMPARED = ("time", "runtime", "per_second", "flos")


@pytest.fixture(autouse=True)
def trl_as_it_was() -> Iterator[None]:
    yield
    unapply()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that TRL can load again, as it does for a reference; many ids end a text, so that lengths vary."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = [1, 10, 11]
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [math.sin(sum((i + 1) * token for i, token in enumerate(ids))) for ids in completion_ids]


def _length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids) % 3) for ids in completion_ids]


def _train(
    kind: type, folder: Path, tmp_path: Path, model: Any = None, peft: Any = None, rewards: Any = _reward,
    trainer_options: dict[str, Any] | None = None, **options: Any,
) -> tuple[dict[str, float], dict[str, Tensor], Any]:  # fmt: skip
    """Two steps: every logged number, the parameters afterwards, and the trainer.

    By SGD: of a gradient that is 0 but for rounding, as that of keys' biases, Adam makes whole steps.
    """
    defaults = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "max_steps": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 0.5, "lr_scheduler_type": "constant", "optim": "sgd",
    }  # fmt: skip
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_strategy="no", seed=1,
        disable_tqdm=True, **(defaults | options),
    )  # fmt: skip
    torch.manual_seed(1)
    trainer = kind(
        model=str(folder) if model is None else model(),
        reward_funcs=rewards,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1 2 3", "4", "5 6", "7 8 9 1"]}),
        processing_class=_tokenizer(),
        peft_config=peft,
        **(trainer_options or {}),
    )
    trainer.train()
    logged = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if not any(part in name for part in NOT_COMPARED):
                logged[f"{name}@{entry['step']}"] = value
    return logged, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, trainer


def _two_steps_of(kind: type, folder: Path, tmp_path: Path, change: Any, **options: Any) -> tuple[Any, ...]:
    """A run whose trainer or inputs are changed before each loss."""
    prepare = trl.GRPOTrainer._prepare_inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trl.GRPOTrainer, "_prepare_inputs", lambda self, *given: change(self, dict(prepare(self, *given)))
        )
        return _train(kind, folder, tmp_path, **options)


def _assert_equal(stock: tuple[Any, ...], ours: tuple[Any, ...], rtol: float = 1e-5) -> None:
    assert stock[0].keys() == ours[0].keys()
    for name, value in stock[0].items():
        assert ours[0][name] == pytest.approx(value, rel=rtol, abs=rtol, nan_ok=True), name
    assert stock[1].keys() == ours[1].keys()
    for name, value in stock[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}")


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
CONFIGURATIONS = {
    f"{loss_type}-beta_{beta}-iterations_{iterations}": {
        "loss_type": loss_type, "beta": beta, "num_iterations": iterations,
    }
    for loss_type in LOSSES
    for beta in (0.0, 0.04)
    for iterations in (1, 2)
}  # fmt: skip
SEQUENCE = {"importance_sampling_level": "sequence"}
VARIANTS: dict[str, dict[str, Any]] = {
    "sequence": SEQUENCE,
    "sequence-iterations": SEQUENCE | {"num_iterations": 2, "beta": 0.04},
    "delta": {"delta": 1.5, "num_iterations": 2},
    "entropy": {"entropy_coef": 0.05},
    "entropy-beta": {"entropy_coef": 0.05, "beta": 0.04, "num_iterations": 2, "loss_type": "grpo"},
    "adaptive_entropy": {"use_adaptive_entropy": True, "entropy_target": 3.0},
    "top_entropy": {"top_entropy_quantile": 0.5},
    "off_policy_mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
    "scale_batch": {"scale_rewards": "batch"},
    "scale_none": {"scale_rewards": "none"},
    "masked_truncation": {"mask_truncated_completions": True},
    "no_bias_correction": {"use_bias_correction_kl": False, "beta": 0.04, "num_iterations": 2},
    "accumulation": {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    "generation_of_several_steps": {"gradient_accumulation_steps": 1, "steps_per_generation": 2},
    "temperature": {"temperature": 0.7, "num_iterations": 2},
    "cast_head": {"cast_lm_head_to_fp32": True},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
}
CONFIGURATIONS |= VARIANTS
#: In `make test`: each loss type once, by turns with a KL and a second iteration, and what takes a way of its own.
QUICK = (
    "grpo-beta_0.0-iterations_1", "bnpo-beta_0.04-iterations_2", "dr_grpo-beta_0.04-iterations_1",
    "dapo-beta_0.0-iterations_2", "luspo-beta_0.04-iterations_2", "cispo-beta_0.04-iterations_1",
    "sapo-beta_0.0-iterations_2", "vespo-beta_0.04-iterations_2", "sequence", "entropy-beta", "top_entropy",
    "off_policy_mask", "temperature", "accumulation", "gdpo",
)  # fmt: skip
assert set(QUICK) <= CONFIGURATIONS.keys()
#: Where a token's gradient waits for others, or its mask for entropies: what is expected is not known in the forward.
NOT_SPECULATED = ("vespo", "top_entropy", "off_policy_mask", "sequence-iterations")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in CONFIGURATIONS]
)
def test_a_trainers_logs_and_parameters_are_stock(name: str, folder: Path, tmp_path: Path) -> None:
    options = dict(CONFIGURATIONS[name])
    if name == "gdpo":
        options["rewards"] = [_reward, _length]
    stock = _train(trl.GRPOTrainer, folder, tmp_path, **options)
    with apply() as applied:
        ours = _train(trl.GRPOTrainer, folder, tmp_path, **options)
    _assert_equal(stock, ours)
    assert applied.counts.misses == 0
    assert (applied.counts.hits > 0) == (not name.startswith(NOT_SPECULATED)), applied.counts
    assert any(not torch.equal(p, q) for p, q in zip(stock[1].values(), ours[1].values(), strict=True))


def test_the_live_share_is_that_of_the_advantages(folder: Path, tmp_path: Path) -> None:
    """One of four completions has an advantage here."""

    def one_of_four(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs["advantages"] = torch.tensor([1.0, 0.0, 0.0, 0.0])
        inputs["completion_mask"] = torch.ones_like(inputs["completion_mask"])
        return inputs

    with apply() as applied:
        _two_steps_of(trl.GRPOTrainer, folder, tmp_path, one_of_four)
    assert applied.counts.live_share == 0.25


def test_a_trainer_of_ours_changes_no_other(folder: Path, tmp_path: Path) -> None:
    options = CONFIGURATIONS["dapo-beta_0.04-iterations_2"]
    stock = _train(trl.GRPOTrainer, folder, tmp_path, **options)
    settings = Settings()
    ours = _train(FusedGRPOTrainer, folder, tmp_path, trainer_options={"kernels": settings}, **options)
    _assert_equal(stock, ours)
    assert settings.counts.hits > 0 == settings.counts.misses
    after = _train(trl.GRPOTrainer, folder, tmp_path, **options)
    assert settings.counts.hits + settings.counts.misses == 4  # of its own micro-batches alone
    for name, value in stock[1].items():
        assert torch.equal(after[1][name], value)  # bit by bit: nothing of ours ran


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, id="plain", marks=pytest.mark.full), pytest.param({"beta": 0.04, "num_iterations": 2}, id="kl")],
)
def test_a_trainer_with_a_loss_of_its_own_is_right(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """GMPO overrides ``_compute_loss``: nothing is expected of it. Made to expect TRL's, every gradient is a miss."""
    options = options | {"use_bias_correction_kl": False}
    kind = trl.experimental.gmpo.GMPOConfig
    stock = _train_gmpo(kind, folder, tmp_path, options)
    with apply() as applied:
        ours = _train_gmpo(kind, folder, tmp_path, options)
        assert applied.counts.hits == applied.counts.misses == 0
    _assert_equal(stock, ours)
    with apply() as applied, pytest.MonkeyPatch.context() as patch:
        patch.setattr(drop_in, "_has_trls_loss", lambda trainer: True)
        forced = _train_gmpo(kind, folder, tmp_path, options)
        assert applied.counts.misses > 0
    _assert_equal(stock, forced)


def _train_gmpo(config: type, folder: Path, tmp_path: Path, options: dict[str, Any]) -> tuple[Any, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl, "GRPOConfig", config)
        return _train(GMPOTrainer, folder, tmp_path, **options)


def test_a_wrong_backward_is_caught(folder: Path, tmp_path: Path) -> None:
    """The comparison sees an error of 1%."""
    options = CONFIGURATIONS["dapo-beta_0.0-iterations_1"]
    stock = _train(trl.GRPOTrainer, folder, tmp_path, **options)
    with apply(), pytest.MonkeyPatch.context() as patch:
        from grpo_kernels.ops.head import speculation

        right = speculation._common_factor
        patch.setattr(speculation, "_common_factor", lambda *arguments: 1.01 * right(*arguments))
        ours = _train(trl.GRPOTrainer, folder, tmp_path, **options)
    with pytest.raises(AssertionError):
        _assert_equal(stock, ours)


@pytest.mark.parametrize("speculate", [True, pytest.param(False, marks=pytest.mark.full)])
def test_in_bf16(speculate: bool, folder: Path, tmp_path: Path) -> None:
    """Autocast: the head's GEMMs take bf16 as TRL's do, but its logits stay fp32. Against a run in fp32 the error of
    all parameters together is no larger than stock's, but for what one rounding otherwise makes of it."""
    options = CONFIGURATIONS["dapo-beta_0.04-iterations_2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl, "GRPOConfig", lambda **given: _bf16_config(**given))
        stock = _train(trl.GRPOTrainer, folder, tmp_path, **options)
        with apply(speculate=speculate):
            ours = _train(trl.GRPOTrainer, folder, tmp_path, **options)
    exact = _train(trl.GRPOTrainer, folder, tmp_path, **options)
    errors = [
        torch.cat([(run[1][name] - value).flatten() for name, value in exact[1].items()]) for run in (stock, ours)
    ]
    assert 0 < errors[1].norm() <= 1.25 * errors[0].norm()


_CONFIG = trl.GRPOConfig


def _bf16_config(**given: Any) -> Any:
    return _CONFIG(**(given | {"bf16": True}))


def _lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["adapters", "saved_head"],
)
@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.full), 0.04])
def test_under_lora(options: dict[str, Any], beta: float, folder: Path, tmp_path: Path) -> None:
    stock = _train(trl.GRPOTrainer, folder, tmp_path, peft=_lora(**options), beta=beta, num_iterations=2)
    with apply() as applied:
        ours = _train(trl.GRPOTrainer, folder, tmp_path, peft=_lora(**options), beta=beta, num_iterations=2)
    _assert_equal(stock, ours)
    assert applied.counts.hits > 0 == applied.counts.misses


def test_an_adapter_on_the_head_is_trls_to_refuse(folder: Path, tmp_path: Path) -> None:
    with apply(), pytest.raises(ValueError, match="lm_head"):
        _train(trl.GRPOTrainer, folder, tmp_path, peft=_lora(target_modules=["q_proj", "lm_head"]))


def _model_of(name: str) -> Any:
    import transformers

    torch.manual_seed(0)
    common = {
        "vocab_size": 12, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3, "head_dim": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    own = {
        "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
        "Cohere2": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 2.0},
        "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        "Qwen2": {"tie_word_embeddings": True},
        "Phi": {},
    }[name]  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**(common | own))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.generation_config.eos_token_id = [1, 10, 11]
    return model


@pytest.mark.parametrize(
    "name",
    [
        "Gemma2",
        "Phi",
        *(pytest.param(x, marks=pytest.mark.full) for x in ("Cohere2", "Granite", "Qwen3Moe", "Qwen2")),
    ],
)
def test_of_other_models(name: str, folder: Path, tmp_path: Path) -> None:
    """A softcap, logit scales, experts, a tied head, a head with a bias (Phi)."""
    stock = _train(trl.GRPOTrainer, folder, tmp_path, model=lambda: _model_of(name), num_iterations=2)
    with apply() as applied:
        ours = _train(trl.GRPOTrainer, folder, tmp_path, model=lambda: _model_of(name), num_iterations=2)
    _assert_equal(stock, ours)
    assert applied.counts.hits > 0 == applied.counts.misses


@pytest.mark.full
def test_retained_logits_and_small_workspaces_change_nothing(folder: Path, tmp_path: Path) -> None:
    options = CONFIGURATIONS["vespo-beta_0.04-iterations_2"]
    stock = _train(trl.GRPOTrainer, folder, tmp_path, **options)
    for given in ({"max_logits_bytes": 300}, {"workspace_bytes": 3000}, {"speculate": False}):
        with apply(**given):
            _assert_equal(stock, _train(trl.GRPOTrainer, folder, tmp_path, **options))
