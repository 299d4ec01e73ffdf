"""What ``apply`` to TRL leaves behind, refuses, and serves beyond the matrix of configurations."""
# ruff: noqa: F811  (a fixture is imported, and is a parameter)

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl")

from test_trl_drop_in import CONFIGURATIONS, _assert_equal, _train, _two_steps_of, folder, trl_as_it_was  # noqa: E402, F401
from transformers import AutoModelForCausalLM  # noqa: E402

from grpo_kernels.integrations import trl as drop_in  # noqa: E402
from grpo_kernels.integrations.trl import Settings, apply, unapply  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what is there before and after


def test_apply_is_undone_whole() -> None:
    from trl.trainer import distillation_trainer, utils

    places = [(utils, "_ChunkedLogProbFunction"), (utils, "_use_triton"), (trl.GRPOTrainer, "compute_loss"),
              (distillation_trainer, "ChunkedDivergenceFunction"), (distillation_trainer, "_use_triton")]  # fmt: skip
    before = [getattr(owner, name) for owner, name in places]
    apply()
    apply(speculate=False)  # again, with other options
    assert all(getattr(owner, name) is not old for (owner, name), old in zip(places, before, strict=True))
    unapply()
    unapply()
    assert [getattr(owner, name) for owner, name in places] == before


def test_a_trainer_built_before_is_served(folder: Path, tmp_path: Path) -> None:
    """The head is looked up at each call."""
    from trl.trainer import utils

    model = AutoModelForCausalLM.from_pretrained(folder)
    utils.add_fused_lm_head(model)
    ids = torch.tensor([[2, 3, 4, 5]])
    expected = model(ids, labels=ids, fused_lm_head=True).log_probs
    with apply():
        calls = []
        head = drop_in.head_logprobs
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drop_in, "head_logprobs", lambda *given: calls.append(1) or head(*given))
            got = model(ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(got, expected)
    assert calls == [1]


def test_an_unknown_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import utils

    class Other(utils._ChunkedLogProbFunction):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return hidden

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    with pytest.raises(RuntimeError, match="takes hidden, weight, labels, not hidden, weight, bias, targets"):
        apply()
    assert utils._ChunkedLogProbFunction is Other


def test_a_release_without_the_head_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    from trl.trainer import utils

    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(ImportError, match=r"TRL .* has no fused head to take over"):
        runpy.run_path(drop_in.__file__)


def test_a_head_of_other_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import utils

    stock = utils._ChunkedLogProbFunction

    class Base2(stock):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, temperature: float,
                    chunk_size: int, final_logit_softcapping: Any = None, logit_scale: float = 1.0,
                    outputs: tuple[str, ...] = ()) -> tuple[Any, ...]:  # fmt: skip
            logprobs, *others = stock.forward(ctx, hidden, weight, bias, targets, temperature, chunk_size,
                                              final_logit_softcapping, logit_scale, outputs)  # fmt: skip
            return logprobs / math.log(2), *others

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Base2)
    with pytest.raises(RuntimeError, match="computes another log_probs"):
        apply()
    assert utils._ChunkedLogProbFunction is Base2


def test_a_quantised_head_is_refused() -> None:
    from trl.trainer import utils

    with apply(), pytest.raises(TypeError, match="quantised"):
        utils._ChunkedLogProbFunction.apply(
            torch.zeros(1, 4), torch.zeros(3, 4, dtype=torch.uint8), None, torch.zeros(1, dtype=torch.int64), 1.0, 1
        )


def test_an_exception_within_leaves_trl_usable(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("within")

    with apply():
        monkeypatch.setattr(drop_in, "head_logprobs", fails)
        with pytest.raises(RuntimeError, match="within"):
            _train(trl.GRPOTrainer, folder, tmp_path)
    _train(trl.GRPOTrainer, folder, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_logits_bytes": -1}, "max_logits_bytes"),
        ({"workspace_bytes": 0}, "workspace_bytes"),
        ({"backend": "x"}, "got 'x'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        apply(**options)


# ---- what a trainer may do that is not in the matrix


def _of_tools(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    mask = inputs["completion_mask"]
    tool = torch.arange(mask.shape[1]) % 3 == 1
    inputs["tool_mask"] = (~tool).to(mask.dtype).expand(mask.shape)
    old = inputs.get("old_per_token_logps")
    if old is not None:  # a tool's output may be anything to the policy
        inputs["old_per_token_logps"] = torch.where(tool, old - 60.0, old)
        inputs["ref_per_token_logps"] = torch.where(
            tool, inputs["ref_per_token_logps"] - 60.0, inputs["ref_per_token_logps"]
        )
    return inputs


def _per_completion(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"advantages": inputs["advantages"][:, None]}


def _per_token(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    steps = 1 + 0.1 * torch.arange(inputs["completion_ids"].shape[1])
    return inputs | {"advantages": inputs["advantages"][:, None] * steps}


@pytest.mark.parametrize("change", [_of_tools, _per_completion, _per_token])
@pytest.mark.parametrize("speculate", [True, False])
def test_other_inputs_are_served(change: Any, speculate: bool, folder: Path, tmp_path: Path) -> None:
    """Tools' improbable tokens, of which TRL takes ratios before it masks them; advantages ``[B, 1]``, ``[B, T]``."""
    options = CONFIGURATIONS["dapo-beta_0.04-iterations_2"]
    stock = _two_steps_of(trl.GRPOTrainer, folder, tmp_path, change, **options)
    assert all(math.isfinite(value) for name, value in stock[0].items() if "loss" in name)
    with apply(speculate=speculate) as applied:
        ours = _two_steps_of(trl.GRPOTrainer, folder, tmp_path, change, **options)
    _assert_equal(stock, ours)
    assert (applied.counts.hits > 0) == speculate and applied.counts.misses == 0


@pytest.mark.full
def test_a_loss_of_ones_own_reads_every_token(folder: Path, tmp_path: Path) -> None:
    """Patched on the class or set on the instance: nothing is expected then, and every row is scored."""

    def loss_of_all(self: Any, model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logprobs, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])
        return -(logprobs * inputs["completion_mask"]).sum()

    def on_instance(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        trainer._compute_loss = loss_of_all.__get__(trainer)
        return _of_tools(trainer, inputs)

    for speculate in (True, False):
        stock = _two_steps_of(trl.GRPOTrainer, folder, tmp_path, on_instance)
        with apply(speculate=speculate) as applied:
            ours = _two_steps_of(trl.GRPOTrainer, folder, tmp_path, on_instance)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(trl.GRPOTrainer, "_compute_loss", loss_of_all)
                patched = _two_steps_of(trl.GRPOTrainer, folder, tmp_path, _of_tools)
        _assert_equal(stock, ours)
        _assert_equal(stock, patched)
        assert applied.counts.hits == applied.counts.misses == 0


def test_options_that_only_trl_allows_run_as_ever(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"loss_type": "vespo", "importance_sampling_level": "sequence"}
    stock = _train(trl.GRPOTrainer, folder, tmp_path, **options)
    drop_in._say_once.cache_clear()
    with apply() as applied:
        ours = _train(trl.GRPOTrainer, folder, tmp_path, **options)
    _assert_equal(stock, ours)
    assert applied.counts.hits == applied.counts.misses == 0
    assert [record.message for record in caplog.records if "gradients are not formed" in record.message][1:] == []
    assert "importance_sampling_level" in caplog.text


@pytest.mark.full
def test_a_compiled_model_and_a_retained_graph(folder: Path) -> None:
    from trl.trainer import utils

    ids = torch.tensor([[2, 3, 4, 5]])
    results = []
    for use in (False, True):
        torch._dynamo.reset()
        model = AutoModelForCausalLM.from_pretrained(folder)
        utils.add_fused_lm_head(model)
        if use:
            apply()
        compiled = torch.compile(model, backend="aot_eager") if use else model
        loss = compiled(ids, labels=ids, fused_lm_head=True).log_probs.sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([p.grad for p in model.parameters()])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def _expected_head(dtype: torch.dtype, factor: float, twice: bool = False) -> tuple[list[Tensor], Any]:
    """dX and dW of a head whose gradient is expected, in fp64, and the counts."""
    from grpo_kernels import GRPOLossConfig
    from grpo_kernels.integrations.trl.head import Expected, head_logprobs
    from grpo_kernels.loss.inputs import PolicyInputs
    from grpo_kernels.ops.head.speculation import ExpectedLoss

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((6, 8), (31, 8)))
    advantages = torch.linspace(-1, 1, 6)[None]
    inputs = PolicyInputs.of(
        torch.zeros(1, 6, dtype=torch.int64), torch.float32, advantages, torch.ones(1, 6), num_items_in_batch=262144.0,
        cu_seqlens=None, loss_scale=1.0, config=GRPOLossConfig(), debug=False,
    )  # fmt: skip
    settings = Settings()
    loss = ExpectedLoss.of(inputs, GRPOLossConfig(), torch.arange(6))
    expected = Expected(torch.ones(6, dtype=torch.bool), None, loss)
    logprobs, *_ = head_logprobs(
        settings, expected, hidden, weight, None, torch.arange(6), 1.0, None, 1.0, ("log_probs", "entropy")
    )
    total = -((logprobs - logprobs.detach()).exp() * advantages[0]).sum() / 262144 * factor
    if twice:
        total.backward(retain_graph=True)
    total.backward()
    return [hidden.grad.double() / factor, weight.grad.double() / factor], settings.counts


def test_fp16_waits_for_its_scaler() -> None:
    """Formed before the factor comes, the gradients of a mean over many tokens would underflow."""
    exact, _ = _expected_head(torch.float64, 1.0)
    got, counts = _expected_head(torch.float16, 65536.0)
    assert counts.hits == counts.misses == 0
    for a, b in zip(exact, got, strict=True):
        assert (a - b).norm() < 2e-2 * a.norm()


def test_a_second_backward_projects_again() -> None:
    once, counts = _expected_head(torch.float32, 3.0)
    assert (counts.hits, counts.misses) == (1, 0)
    twice, counts = _expected_head(torch.float32, 3.0, twice=True)
    assert (counts.hits, counts.misses) == (1, 1)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(b, 2 * a, rtol=1e-5, atol=1e-12)


def test_blocks_may_be_nested() -> None:
    from trl.trainer import utils

    stock = utils._ChunkedLogProbFunction
    outer = apply()
    with apply(speculate=False):
        assert drop_in._settings().speculate is False
    assert drop_in._settings() is outer.settings and utils._ChunkedLogProbFunction is not stock
    with outer:
        pass
    assert drop_in._settings() is None and utils._ChunkedLogProbFunction is stock


def test_somebody_elses_patch_stays() -> None:
    original = trl.GRPOTrainer.compute_loss
    calls = []

    def theirs(self: Any, *given: Any, **options: Any) -> Any:
        calls.append(1)
        return original(self, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl.GRPOTrainer, "compute_loss", theirs)
        apply()
        assert trl.GRPOTrainer.compute_loss.__wrapped__ is theirs
        unapply()
        assert trl.GRPOTrainer.compute_loss is theirs
        apply()
        patch.setattr(trl.GRPOTrainer, "compute_loss", original)
        unapply()
        assert trl.GRPOTrainer.compute_loss is original


@pytest.mark.parametrize("state", ["no_grad", "inference", "bf16"])
def test_apply_under_any_of_torchs_states(state: str) -> None:
    stock = trl.GRPOTrainer.compute_loss
    if state == "bf16":
        torch.set_default_dtype(torch.bfloat16)
    try:
        with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(state, contextlib.nullcontext)():
            apply()
    finally:
        torch.set_default_dtype(torch.float32)
    assert trl.GRPOTrainer.compute_loss.__wrapped__ is stock
    unapply()
    assert trl.GRPOTrainer.compute_loss is stock


def test_tokens_that_are_not_scored_have_what_they_are_compared_with() -> None:
    """Their ratio is 1 then: of 0 over an improbable one it would be infinite, and its product with 0 NaN."""
    from grpo_kernels.integrations.trl.head import Expected

    mask, old = torch.tensor([True, False]), torch.tensor([-1.0, -150.0])
    logprobs = torch.tensor([-2.0, 0.0], requires_grad=True)
    filled = Expected(mask, old, None).filled(logprobs)
    assert filled.tolist() == [-2.0, -150.0]
    ((filled - old).exp() * mask).sum().backward()
    assert logprobs.grad[1] == 0 and logprobs.grad.isfinite().all()
