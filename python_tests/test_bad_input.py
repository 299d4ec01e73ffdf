"""Bad input is refused before any launch: the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.calls import BACKENDS

from grpo_kernels import (
    GRPOLossConfig,
    backends,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)

B, T, V, H = 2, 3, 7, 4
IDS, MASK, ADVANTAGES = torch.tensor([[0, 1, 2], [3, 4, 6]]), torch.ones(B, T), torch.tensor([1.0, -1.0])
LOGITS, HIDDEN, HEAD, LOGPROBS = torch.zeros(B, T, V), torch.zeros(B, T, H), torch.zeros(V, H), torch.zeros(B, T)
PACKED = {"cu_seqlens": torch.tensor([0, 2, 6])}
OPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "token_logprobs": (token_logprobs, {"logits": LOGITS, "ids": IDS}),
    "linear_token_logprobs": (
        linear_token_logprobs,
        {"hidden_states": HIDDEN, "lm_head_weight": HEAD, "ids": IDS},
    ),
    "policy_loss": (policy_loss, {"logprobs": LOGPROBS, "advantages": ADVANTAGES, "completion_mask": MASK}),
    "grpo_loss": (
        grpo_loss,
        {"logits": LOGITS, "completion_ids": IDS, "advantages": ADVANTAGES, "completion_mask": MASK},
    ),
    "linear_grpo_loss": (
        linear_grpo_loss,
        {"hidden_states": HIDDEN, "lm_head_weight": HEAD, "completion_ids": IDS, "advantages": ADVANTAGES,
         "completion_mask": MASK},
    ),
    "group_advantages": (group_advantages, {"rewards": torch.tensor([0.0, 1.0, 2.0, 3.0]), "num_generations": 2}),
}  # fmt: skip
LOGPROB_OPS, LOGIT_LOSSES = ("token_logprobs", "linear_token_logprobs"), ("grpo_loss", "linear_grpo_loss")
LOSSES = ("policy_loss", *LOGIT_LOSSES)
LINEAR = ("linear_token_logprobs", "linear_grpo_loss")


def _ids_of(op: str) -> str:
    return "ids" if op in LOGPROB_OPS else "completion_ids"


def _mask_of(op: str) -> str:
    return "mask" if op in LOGPROB_OPS else "completion_mask"


def _each(ops: tuple[str, ...], changes: dict[str, Any], error: type[Exception], *parts: str) -> list[Any]:
    return [pytest.param(op, changes, error, parts, id=f"{op}-{parts[0]}-{parts[-1]}") for op in ops]


def _bad_ids() -> list[Any]:
    rows = []
    for op in (*LOGPROB_OPS, *LOGIT_LOSSES):
        name = _ids_of(op)
        for value in (V, -1, -100):
            bad = IDS.clone()
            bad[1, 2] = value
            rows += _each((op,), {name: bad}, ValueError, name, "[0, 7)", f"got {value}")
        rows += _each((op,), {name: IDS.float()}, TypeError, name, "int64 or int32", "torch.float32")
        rows += _each((op,), {name: IDS.tolist()}, TypeError, name, "tensor", "list")
        rows += _each((op,), {name: IDS[None]}, ValueError, name, "[B, T]", "[1, 2, 3]")
        rows += _each((op,), {name: IDS.to("meta")}, ValueError, name, "cpu", "meta")
        mask = _mask_of(op)
        rows += _each((op,), {mask: torch.ones(B, T + 1)}, ValueError, mask, "[2, 3]", "[2, 4]")
        rows += _each((op,), {mask: torch.ones(B, T, dtype=torch.complex64)}, TypeError, mask, "bool", "complex64")
        rows += _each((op,), {mask: MASK.to("meta")}, ValueError, mask, "cpu", "meta")
    return rows


def _bad_vocabularies() -> list[Any]:
    rows = []
    for op in ("token_logprobs", "grpo_loss"):
        rows += _each((op,), {"logits": LOGITS[..., :0]}, ValueError, "logits", "at least 1", "[2, 3, 0]")
        rows += _each((op,), {"logits": torch.zeros(B, T + 2, V)}, ValueError, "logits", "[2, 4, 7]", "[2, 5, 7]")
        rows += _each((op,), {"logits": torch.zeros(B, V)}, ValueError, "logits", "[2, 3, 7]", "[2, 7]")
        rows += _each((op,), {"logits": torch.tensor(0.0)}, ValueError, "logits", "vocabulary", "[]")
        rows += _each((op,), {"logits": LOGITS.long()}, TypeError, "logits", "float32", "torch.int64")
        rows += _each((op,), {"logits": LOGITS.tolist()}, TypeError, "logits", "tensor", "list")
    for name, value, wanted, got in (
        ("lm_head_weight", HEAD[:0], "V at least 1", "[0, 4]"),
        ("lm_head_weight", HEAD[:, :3], "[V, 4]", "[7, 3]"),
        ("lm_head_weight", HEAD[0], "[V, H]", "[4]"),
        ("lm_head_weight", HEAD.to("meta"), "cpu", "meta"),
        ("hidden_states", HIDDEN[..., :0], "at least 1", "[2, 3, 0]"),
        ("hidden_states", HIDDEN[:, :2], "[2, 3, 4]", "[2, 2, 4]"),
        ("bias", torch.zeros(V + 1), "[7]", "[8]"),
    ):
        rows += _each(LINEAR, {name: value}, ValueError, name, wanted, got)
    rows += _each(LINEAR, {"hidden_states": HIDDEN.int()}, TypeError, "hidden_states", "float32", "torch.int32")
    rows += _each(LINEAR, {"lm_head_weight": HEAD.half()}, TypeError, "lm_head_weight", "float32", "torch.float16")
    rows += _each(LINEAR, {"logits_dtype": torch.float16}, TypeError, "logits_dtype", "float32", "torch.float16")
    rows += _each(LINEAR, {"bias": torch.zeros(V, dtype=torch.int64)}, TypeError, "bias", "float32", "torch.int64")
    return rows


def _bad_loss_inputs() -> list[Any]:
    rows = []
    for name in ("old_logprobs", "ref_logprobs"):
        rows += _each(LOSSES, {name: torch.zeros(B, T - 1)}, ValueError, name, "[2, 3]", "[2, 2]")
        rows += _each(LOSSES, {name: torch.zeros(B, T).long()}, TypeError, name, "float32", "torch.int64")
        rows += _each(LOSSES, {name: torch.zeros(B, T, device="meta")}, ValueError, name, "cpu", "meta")
    for shape, got in (((3,), "[3]"), ((B, 1), "[2, 1]"), ((T,), "[3]")):
        rows += _each(LOSSES, {"advantages": torch.zeros(shape)}, ValueError, "advantages", "[2] or [2, 3]", got)
    rows += _each(LOSSES, {"advantages": ADVANTAGES + 0j}, TypeError, "advantages", "integer", "torch.complex64")
    rows += _each(LOSSES, {"advantages": [1.0, -1.0]}, TypeError, "advantages", "tensor", "list")
    rows += _each(LOSSES, {"rollout_is_weights": torch.ones(B)}, ValueError, "rollout_is_weights", "[2, 1]", "got [2]")
    rows += _each(LOSSES, {"config": GRPOLossConfig(beta=0.1)}, ValueError, "ref_logprobs", "beta=0.1", "None")
    rows += _each(LOSSES, PACKED, ValueError, "cu_seqlens", "None", "[2, 3]")
    rows += _each(LOSSES, {"completion_mask": None}, TypeError, "completion_mask", "tensor", "NoneType")
    rows += _each(LOGIT_LOSSES, {"advantages": None}, ValueError, "advantages", "rewards", "neither")
    rows += _each(LOGIT_LOSSES, {"rewards": ADVANTAGES}, ValueError, "rewards", "advantages", "both")
    rewards = {"advantages": None, "rewards": ADVANTAGES}
    rows += _each(LOGIT_LOSSES, rewards, ValueError, "num_generations", "rewards", "None")
    rows += _each(LOGIT_LOSSES, {**rewards, "num_generations": 3}, ValueError, "num_generations", "divide", "got 3")
    batch = {**rewards, "num_generations": 2, "scale_rewards": "batch"}
    rows += _each(LOGIT_LOSSES, batch, ValueError, "scale_rewards", "'none'", "'batch'")
    infinite = {"advantages": None, "rewards": torch.tensor([1.0, math.inf]), "num_generations": 2}
    rows += _each(LOGIT_LOSSES, infinite, ValueError, "rewards", "finite", "inf")
    rows += _each(("policy_loss",), {"entropy": torch.zeros(B)}, ValueError, "entropy", "[2, 3]", "[2]")
    coefficient = {"config": GRPOLossConfig(entropy_coef=0.1)}
    rows += _each(("policy_loss",), coefficient, ValueError, "entropy", "0.1", "None")
    rows += _each(("policy_loss",), {"logprobs": LOGPROBS.int()}, TypeError, "logprobs", "float32", "torch.int32")
    rows += _each(("policy_loss",), {"logprobs": LOGPROBS[None]}, ValueError, "logprobs", "[B, T]", "[1, 2, 3]")
    return rows


def _bad_packing() -> list[Any]:
    packed = {"logprobs": torch.zeros(6), "completion_mask": torch.ones(6)}
    rows = _each(("policy_loss",), packed, ValueError, "cu_seqlens", "[6]", "None")
    for bounds, error, wanted, got in (
        (torch.tensor([0, 2, 5]), ValueError, "rise from 0 to 6", "[0, 2, 5]"),
        (torch.tensor([0, 4, 2, 6]), ValueError, "rise from 0 to 6", "[0, 4, 2, 6]"),
        (torch.tensor([1, 2, 6]), ValueError, "rise from 0 to 6", "[1, 2, 6]"),
        (torch.tensor([6]), ValueError, "[S + 1]", "[1]"),
        (torch.tensor([0.0, 6.0]), TypeError, "int64", "torch.float32"),
        ([0, 6], TypeError, "tensor", "list"),
    ):
        advantages = {"advantages": torch.zeros(len(bounds) - 1)}
        changes = {**packed, **advantages, "cu_seqlens": bounds}
        rows += _each(("policy_loss",), changes, error, "cu_seqlens", wanted, got)
    return rows


def _bad_options() -> list[Any]:
    rows = _each(tuple(OPS), {"backend": "tpu"}, ValueError, "backend", "'cpu', 'torch'", "'tpu'")
    rows += _each(LOGPROB_OPS, {"outputs": ("entropy", "rank")}, ValueError, "outputs", "'entropy'", "'rank'")
    for value in (0.0, -1.0, math.nan):
        rows += _each(LOGPROB_OPS, {"temperature": value}, ValueError, "temperature", "greater than 0", str(value))
        changes = {"softcap": value}
        rows += _each((*LOGPROB_OPS, *LOGIT_LOSSES), changes, ValueError, "softcap", "greater than 0", str(value))
    rows += _each(LINEAR, {"workspace_bytes": 0}, ValueError, "workspace_bytes", "at least 1", "got 0")
    rows += _each(LINEAR, {"max_logits_bytes": -1}, ValueError, "max_logits_bytes", "at least 0", "got -1")
    return rows


def _bad_rewards() -> list[Any]:
    rows = []
    for changes, error, *parts in (
        ({"num_generations": 3}, ValueError, "num_generations", "divide the batch of 4", "got 3"),
        ({"num_generations": 0}, ValueError, "num_generations", "at least 1", "got 0"),
        ({"rewards": torch.tensor([0.0, math.inf])}, ValueError, "rewards", "finite or NaN", "inf at [1]"),
        ({"rewards": torch.tensor([0.0, -math.inf])}, ValueError, "rewards", "finite or NaN", "-inf"),
        ({"rewards": torch.tensor([0, 1j])}, TypeError, "rewards", "integer", "torch.complex64"),
        ({"rewards": [0.0, 1.0]}, TypeError, "rewards", "tensor", "list"),
        ({"rewards": torch.zeros(0)}, ValueError, "rewards", "[B]", "[0]"),
        ({"rewards": torch.zeros(2, 1, 1)}, ValueError, "rewards", "[B, K]", "[2, 1, 1]"),
        ({"reward_weights": torch.ones(2)}, ValueError, "reward_weights", "[1]", "[2]"),
        ({"scale_rewards": "std"}, ValueError, "scale_rewards", "'group'", "'std'"),
        ({"aggregation": "mean"}, ValueError, "aggregation", "'sum_then_normalize'", "'mean'"),
        ({"estimator": "gae"}, ValueError, "estimator", "'grpo'", "'gae'"),
    ):
        rows += _each(("group_advantages",), changes, error, *parts)
    return rows


BAD = [*_bad_ids(), *_bad_vocabularies(), *_bad_loss_inputs(), *_bad_packing(), *_bad_options(), *_bad_rewards()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "changes", "error", "parts"), BAD)
def test_bad_argument_is_named(
    op: str, changes: dict[str, Any], error: type[Exception], parts: tuple[str, ...], backend: str
) -> None:
    function, arguments = OPS[op]
    with pytest.raises(error) as caught:
        function(**{**arguments, "backend": backend, **changes})
    assert type(caught.value) is error
    message = str(caught.value)
    assert re.match(rf"{parts[0]}\b", message), message
    for part in parts[1:]:
        assert part in message


@pytest.mark.parametrize("op", [op for op in OPS if op != "group_advantages"])
def test_a_named_backend_never_falls_back(op: str) -> None:
    function, arguments = OPS[op]
    elsewhere = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=rf"backend 'cpu' cannot run {op}: its tensors must be on the CPU, got meta"):
        function(**elsewhere, backend="cpu")


@pytest.mark.parametrize("op", OPS)
def test_a_missing_extension_is_named_and_auto_does_without(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = backends._load_extension(Path("_nowhere.so"))
    monkeypatch.setattr(backends, "_EXTENSION_ERROR", missing)
    function, arguments = OPS[op]
    function(**arguments)
    assert backends.resolve(op, "auto", torch.device("cpu")) == "torch"
    with pytest.raises(RuntimeError, match=f"'cpu' cannot run {op}: the C.* extension is not built .*_nowhere.so"):
        function(**arguments, backend="cpu")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"loss_type": "trpo"}, ("loss_type", "'dapo'", "'trpo'")),
        ({"importance_sampling_level": "batch"}, ("importance_sampling_level", "'sequence'", "'batch'")),
        ({"kl_estimator": "k4"}, ("kl_estimator", "'k3'", "'k4'")),
        ({"kl_gradient": "exact"}, ("kl_gradient", "'naive'", "'exact'")),
        ({"rollout_correction": "icepop"}, ("rollout_correction", "'token_mask'", "'icepop'")),
        ({"top_entropy_quantile": 0.0}, ("top_entropy_quantile", "in (0, 1]", "0.0")),
        ({"off_policy_mask_threshold": math.nan}, ("off_policy_mask_threshold", "finite", "nan")),
        ({"loss_type": "cispo", "delta": 2.0}, ("delta", "cispo", "2.0")),
        ({"loss_type": "sapo", "epsilon_high": 0.3}, ("epsilon_high", "sapo", "0.3")),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, ("importance_sampling_level", "vespo")),
        ({"loss_type": "gmpo", "top_entropy_quantile": 0.2}, ("top_entropy_quantile", "gmpo", "0.2")),
        ({"vespo_k_pos": 1.0}, ("vespo_k_pos", "dapo", "1.0")),
        ({"sapo_temperature_neg": 2.0}, ("sapo_temperature_neg", "dapo", "2.0")),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, ("sapo_temperature_neg", "greater than 0", "0.0")),
        ({"cispo_ratio_low": 0.5}, ("cispo_ratio_low", "dapo", "0.5")),
        ({"kl_estimator": "k1"}, ("kl_estimator", "beta=0", "'k1'")),
        ({"loss_type": "gmpo", "epsilon_low": 1000.0}, ("epsilon_low", "80", "1000")),
        ({"beta": 0.1, "kl_gradient": "straight_through"}, ("use_bias_correction_kl", "straight_through", "True")),
        ({"log_ratio_clamp": 1.0, "importance_sampling_level": "sequence"}, ("log_ratio_clamp", "sequence", "1.0")),
        ({"rollout_correction": "token_truncate"}, ("rollout_clip_min", "token_truncate", "neither")),
        (
            {"rollout_correction": "token_mask", "rollout_clip_min": 3.0, "rollout_clip_max": 1.0},
            ("rollout_clip_min", "rollout_clip_max=1.0", "3.0"),
        ),
        ({"loss_type": "cispo", "epsilon_low": 0.1, "epsilon_high": 1.3}, ("epsilon_low", "epsilon_high=1.3", "0.1")),
        ({"loss_type": "kl_cov", "beta": 0.1}, ("beta", "kl_cov", "0.1")),
        (
            {"loss_agg_mode": "seq-mean-token-mean", "entropy_coef": 0.1, "top_entropy_quantile": 0.2},
            ("top_entropy_quantile", "seq-mean-token-mean", "0.2"),
        ),
        ({"rollout_clip_max": 2.0}, ("rollout_clip_max", "rollout_correction=None", "2.0")),
        ({"loss_type": "vespo", "rollout_correction": "sequence_mask"}, ("rollout_correction", "vespo")),
        ({"epsilon_low": -0.1}, ("epsilon_low", "at least 0", "-0.1")),
        ({"epsilon_low": math.nan}, ("epsilon_low", "finite", "nan")),
        ({"epsilon_high": math.inf}, ("epsilon_high", "finite", "inf")),
        ({"delta": 0.0}, ("delta", "greater than 0", "0.0")),
        ({"beta": -1.0}, ("beta", "at least 0", "-1.0")),
        ({"temperature": 0.0}, ("temperature", "greater than 0", "0.0")),
        ({"entropy_coef": math.inf}, ("entropy_coef", "finite", "inf")),
        ({"loss_type": "dr_grpo"}, ("max_completion_length", "dr_grpo", "None")),
        ({"loss_type": "dr_grpo", "max_completion_length": 0}, ("max_completion_length", "greater than 0", "0")),
    ],
)
def test_bad_configuration_is_named(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^{parts[0]} ") as caught:
        GRPOLossConfig(**options)
    assert all(part in str(caught.value) for part in parts)


def test_unknown_op_is_named() -> None:
    with pytest.raises(ValueError, match=r"op must be one of .*'grpo_loss'.*, got 'softmax'"):
        backends.unsupported_reason("softmax", "cpu", torch.device("cpu"))


@pytest.mark.parametrize("op", [*LOGPROB_OPS, *LOGIT_LOSSES])
def test_ids_under_the_mask_may_be_anything(op: str) -> None:
    function, arguments = OPS[op]
    ids = IDS.clone()
    ids[0, 2], ids[1, 2] = -100, 10**9
    mask = MASK.clone()
    mask[:, 2] = 0
    for backend in BACKENDS:
        given, valid = (
            function(**{**arguments, _ids_of(op): x, _mask_of(op): mask}, backend=backend) for x in (ids, IDS)
        )
        assert torch.equal(given.logprobs, valid.logprobs)


class _Broken:
    """A GPU's driver that is not there."""

    def __enter__(self) -> None:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    def __exit__(self, *_: Any) -> None:
        raise AssertionError


def test_a_gpu_without_triton_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "device", lambda device: _Broken())
    backends._triton_failure.cache_clear()
    try:
        for _ in range(2):
            assert backends.resolve("grpo_loss", "auto", device) == "torch"
        with pytest.raises(RuntimeError, match=r"'triton' cannot run grpo_loss: Triton cannot compile here: .*driver"):
            backends.resolve("grpo_loss", "triton", device)
    finally:
        backends._triton_failure.cache_clear()
    of_cuda = backends.unsupported_reason("grpo_loss", "cuda", device)
    assert [record.getMessage() for record in caplog.records] == [
        "backend 'triton' cannot run on cuda:7, another does: Triton cannot compile here: RuntimeError: "
        "0 active drivers ([]). There should only be one.",
        f"backend 'cuda' cannot run on cuda:7, another does: {of_cuda}",
    ]


def test_an_old_triton_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    backends._triton_failure.cache_clear()
    try:
        assert backends.unsupported_reason("grpo_loss", "triton", torch.device("cuda", 6)) == (
            "Triton 3.6 or newer is needed, got 3.5.1"
        )
    finally:
        backends._triton_failure.cache_clear()


def test_other_devices_have_the_reference() -> None:
    assert backends.resolve("grpo_loss", "auto", torch.device("mps")) == "torch"
