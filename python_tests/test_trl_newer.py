"""TRL from 1.17 on, in so far as it is known, by stubs: a tenth argument of the head, and what else may change."""
# ruff: noqa: F811  (a fixture is imported, and is a parameter)

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl")

import trl_newer  # noqa: E402
from test_trl_drop_in import _assert_equal, _train, folder, trl_as_it_was  # noqa: E402, F401
from testing.assertions import assert_near_baseline  # noqa: E402
from trl.trainer import utils  # noqa: E402
from trl_newer import OUTPUTS, NewerHead, dense_head, sampling_from  # noqa: E402

from grpo_kernels.integrations import trl as drop_in  # noqa: E402
from grpo_kernels.integrations.trl import FusedGRPOTrainer, Settings, apply, unapply  # noqa: E402
from grpo_kernels.integrations.trl.checks import HEAD_ARGUMENTS, TESTED, HeadSignature  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"loss_type": "dapo", "beta": 0.04, "num_iterations": 2}


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[NewerHead]]:
    """The TRL that is installed, with a head of ten arguments."""
    drop_in._say_once.cache_clear()
    trl_newer.install(monkeypatch)
    yield NewerHead
    unapply()


def _problem(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, weight and bias of a head, its targets, and the kept ids of each row."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in ((9, 16), (31, 16), (31,))]
    targets = torch.arange(9) * 3
    kept = torch.stack([targets, (targets + 5) % 31, (targets + 11) % 31, torch.full((9,), -1)], 1)
    return tensors, targets, kept


def _results(function: Any, tensors: list[Tensor]) -> dict[str, Tensor]:
    """What a head returns, and its gradients."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    found = function(*leaves)
    (found[0].sum() - 0.5 * found[1].square().sum()).backward()
    names = (*OUTPUTS, "dhidden", "dweight", "dbias")
    return dict(zip(names, [*(x.detach() for x in found), *(x.grad for x in leaves)], strict=True))


def test_a_call_without_the_mask_is_served(newer: type[NewerHead]) -> None:
    """The numbers are those of TRL's own function, against fp64, and that function does not run."""
    tensors, targets, _ = _problem()
    reference = _results(lambda *x: newer.apply(*x, targets, 0.7, 64, 5.0, 0.5, OUTPUTS), tensors)
    baseline = _results(lambda *x: dense_head(*x, targets, 0.7, 5.0, 0.5, None), [x.double() for x in tensors])
    with apply():
        newer.calls.clear()
        head = utils._ChunkedLogProbFunction
        for last in ((), (None,)):
            ours = _results(lambda *x, last=last: head.apply(*x, targets, 0.7, 64, 5.0, 0.5, OUTPUTS, *last), tensors)
            assert_near_baseline(ours, reference, baseline, torch.float32)
    assert newer.calls == []


def test_a_call_with_the_mask_is_trls_own(newer: type[NewerHead], caplog: pytest.LogCaptureFixture) -> None:
    """It gets the very arguments, its result is returned, and the log says so once."""
    tensors, targets, kept = _problem()
    others = (targets, 0.7, 64, None, 1.0, OUTPUTS, kept)
    expected = _results(lambda *x: newer.apply(*x, *others), tensors)
    with apply():
        newer.calls.clear()
        for _ in range(2):
            given: list[Tensor] = []
            found = _results(
                lambda *x, given=given: utils._ChunkedLogProbFunction.apply(*(given.extend(x) or x), *others), tensors
            )
            arguments = newer.calls.pop()
            assert len(arguments) == 10 and all(a is b for a, b in zip(arguments, (*given, *others), strict=True))
            assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [record.levelname for record in caplog.records if "sampling_mask is given" in record.message] == ["WARNING"]
    without = dense_head(*tensors, targets, 0.7, None, 1.0, None)[0]
    assert (expected["log_probs"] > without).all()  # over three ids


def test_an_output_that_only_trl_knows_is_trls_own(newer: type[NewerHead], caplog: pytest.LogCaptureFixture) -> None:
    tensors, targets, _ = _problem()
    with apply():
        newer.calls.clear()
        utils._ChunkedLogProbFunction.apply(*tensors, targets, 0.7, 64, None, 1.0, ("entropy", "top_k"))
    assert len(newer.calls) == 1 and "the output 'top_k' is given" in caplog.text


def test_nothing_is_expected_after_a_call_of_trls_own(newer: type[NewerHead]) -> None:
    """What a trainer expects is of its first head: a second one of that size has other rows."""
    from grpo_kernels.integrations.trl.head import Expected

    (hidden, weight, bias), targets, kept = _problem()
    expected = Expected(torch.arange(9) % 2 == 0, torch.full((9,), -7.0), None)
    with apply():
        token = drop_in._EXPECTED.set(expected)
        try:
            arguments = (hidden.requires_grad_(), weight, bias, targets, 0.7, 64, None, 1.0, ())
            with torch.no_grad():
                utils._ChunkedLogProbFunction.apply(*arguments, kept)  # a reference's: nothing was expected of it
            assert not expected.is_used
            utils._ChunkedLogProbFunction.apply(*arguments, kept)
            logprobs = utils._ChunkedLogProbFunction.apply(*arguments)[0]
        finally:
            drop_in._EXPECTED.reset(token)
    assert expected.is_used and not (logprobs == -7.0).any()


@pytest.mark.parametrize("kind", [trl.GRPOTrainer, FusedGRPOTrainer])
def test_a_trainer_of_the_newer_layout_is_served(
    kind: type, newer: type[NewerHead], folder: Path, tmp_path: Path
) -> None:
    stock = _train(trl.GRPOTrainer, folder, tmp_path, **OPTIONS)
    settings = Settings()
    if kind is FusedGRPOTrainer:
        calls = len(newer.calls)
        ours = _train(kind, folder, tmp_path, trainer_options={"kernels": settings}, **OPTIONS)
    else:
        with apply() as applied:
            calls, settings = len(newer.calls), applied.settings
            ours = _train(kind, folder, tmp_path, **OPTIONS)
    _assert_equal(stock, ours)
    assert settings.counts.hits > 0 == settings.counts.misses
    compared = 1 if kind is FusedGRPOTrainer else 0  # with TRL's own function, before it is built
    assert len(newer.calls) == calls + compared


@pytest.mark.parametrize("kind", [trl.GRPOTrainer, FusedGRPOTrainer])
def test_a_trainer_whose_tokens_have_kept_ids_is_trls(
    kind: type, newer: type[NewerHead], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit by bit, but for which rows TRL's function is asked for; and it is told once."""
    full = _train(trl.GRPOTrainer, folder, tmp_path, **OPTIONS)
    with sampling_from(4):
        stock = _train(trl.GRPOTrainer, folder, tmp_path, **OPTIONS)
        with apply() as applied:
            ours = _train(kind, folder, tmp_path, **OPTIONS)
    _assert_equal(stock, ours)
    assert any(not torch.equal(p, q) for p, q in zip(stock[1].values(), full[1].values(), strict=True))
    assert applied.counts.hits == applied.counts.misses == 0
    assert len([record for record in caplog.records if "sampling_mask is given" in record.message]) == 1


def test_a_trainer_of_ours_takes_new_keywords(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what it overrides: they reach TRL's methods."""
    _, _, trainer = _train(FusedGRPOTrainer, folder, tmp_path, max_steps=1)
    got = {}

    def scores(self: Any, model: Any, input_ids: Any, *, sampling_mask: Any = None, **_: Any) -> str:
        got["scores"] = (input_ids, sampling_mask, drop_in._settings() is trainer.kernels)
        return "scored"

    def loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, *, further: Any = None) -> str:
        got["loss"] = (return_outputs, further, drop_in._settings() is trainer.kernels)
        return "computed"

    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", scores)
    monkeypatch.setattr(trl.GRPOTrainer, "compute_loss", loss)
    assert trainer._get_per_token_logps_and_entropies(None, 1, sampling_mask=2) == "scored"
    assert trainer.compute_loss(None, {}, return_outputs=True, further=3) == "computed"
    assert got == {"scores": (1, 2, True), "loss": (True, 3, True)}


def test_a_trainer_of_ours_names_a_method_that_trl_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies")
    with pytest.raises(RuntimeError, match=r"no GRPOTrainer\._get_per_token_logps_and_entropies"):
        FusedGRPOTrainer()


def test_nothing_is_expected_where_trl_has_no_such_method(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drop_in._say_once.cache_clear()
    monkeypatch.setitem(drop_in._TRLS, "_compute_loss", None)
    with drop_in._publishing(SimpleNamespace(), {}, True):
        assert drop_in._EXPECTED.get() is None
    assert "has no GRPOTrainer._compute_loss" in caplog.text


def test_inputs_that_are_not_as_known_are_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """A newer loss may name its masks otherwise: then nothing is expected, and the head is served."""
    drop_in._say_once.cache_clear()
    trainer = SimpleNamespace(**{name: SimpleNamespace(__func__=f) for name, f in drop_in._TRLS.items()})
    with drop_in._publishing(trainer, {"loss_mask": torch.ones(1, 2)}, True):
        assert drop_in._EXPECTED.get() is None
    assert "KeyError: 'completion_mask'" in caplog.text


# ---- what a signature may be


def _signature(forward: Any) -> HeadSignature:
    return HeadSignature(SimpleNamespace(forward=forward), ("hidden", "weight", "outputs"))


def test_arguments_are_bound_by_name() -> None:
    """In another order, one of them by keyword alone, and without autograd's context."""

    def reordered(ctx: Any, weight: Any, hidden: Any, chunk_size: int = 1, outputs: Any = "all") -> None: ...
    def by_keyword(hidden: Any, weight: Any, *, outputs: Any = "all") -> None: ...

    assert _signature(reordered).bind((1, 2), {}) == {"weight": 1, "hidden": 2, "chunk_size": 1, "outputs": "all"}
    assert _signature(by_keyword).bind((2, 1), {"outputs": 3}) == {"hidden": 2, "weight": 1, "outputs": 3}
    assert _signature(reordered).further == _signature(by_keyword).further == ()
    values = {"hidden": 2, "weight": 1, "outputs": 3, "chunk_size": 4}
    assert _signature(reordered).arguments(values) == ((1, 2, 4, 3), {})
    assert _signature(by_keyword).arguments(values) == ((2, 1), {"outputs": 3})


def test_further_arguments_are_used_where_they_are_neither_none_nor_their_default() -> None:
    def newer(
        ctx: Any, hidden: Any, weight: Any, must: Any, outputs: Any, eps: float = 0.5, *rest: Any, **more: Any
    ): ...

    head = _signature(newer)
    assert head.missing == () and head.further == ("must", "eps", "rest", "more")
    assert head.arguments({"hidden": 1, "weight": 2, "outputs": 3}) == ((1, 2, None, 3, 0.5), {})
    tensor = torch.zeros(2)
    for args, kwargs, used in (
        ((1, 2, None, 3), {}, ()),
        ((1, 2, None, 3, 0.5, None), {"a": None}, ()),
        ((1, 2, None, 3, None), {}, ()),
        ((1, 2, None, 3, float("0.5")), {}, ()),  # equal, and another object
        ((1, 2, False, 3), {}, ("must",)),
        ((1, 2, tensor, 3, tensor), {}, ("must", "eps")),
        ((1, 2, None, 3, 0.25, tensor), {"a": tensor}, ("eps", "rest", "more")),
    ):
        assert head.unknown(head.bind(args, kwargs)) == used


def test_a_name_that_is_lacking_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed, or hidden behind ``*args``: what it means is not known."""

    class Renamed(NewerHead):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, temperature: float,
                    chunk_size: int, final_logit_softcapping: Any, logit_scale: float,
                    *outputs: Any) -> None:  # fmt: skip
            raise AssertionError("called")

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Renamed)
    with pytest.raises(RuntimeError, match=r"it lacks targets, outputs$"):
        apply()
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", SimpleNamespace(forward=None))
    with pytest.raises(RuntimeError, match="_ChunkedLogProbFunction has no apply"):
        apply()


def test_a_head_that_returns_more_is_refused(newer: type[NewerHead], monkeypatch: pytest.MonkeyPatch) -> None:
    class More(NewerHead):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
            return *NewerHead.forward(ctx, *args), None

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            return NewerHead.backward(ctx, *upstream[:5])

    More.forward.__signature__ = signature(NewerHead.forward)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", More)
    with pytest.raises(RuntimeError, match="returns 6 values, not log_probs, entropy"):
        apply()
    assert utils._ChunkedLogProbFunction is More


# ---- what is said to be tested


def test_the_extra_is_bounded_by_what_is_tested() -> None:
    """The releases that the messages name are the bounds of the extra, and the installed one is the newer of them."""
    import re
    import tomllib

    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    oldest, newest = re.findall(r"(\d+)\.(\d+)\.\d+", TESTED)
    bound = f"trl>={'.'.join(oldest)},<{newest[0]}.{int(newest[1]) + 1}"
    assert extras["trl"] == [bound] and bound in extras["bench"]
    pinned = re.search(r"^trl==(\d+)\.(\d+)", (root / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and pinned.groups() == newest
    assert f"`{bound}`" in (root / "README.md").read_text()


def test_a_signature_of_trls_own_has_nothing_further() -> None:
    """Of the release that is installed: every argument is known."""
    head = HeadSignature(utils._ChunkedLogProbFunction, HEAD_ARGUMENTS)
    assert head.missing == head.further == ()
