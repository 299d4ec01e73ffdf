"""AsyncGRPO, where TRL has it: as a stable trainer, as an experimental one, or both."""
# ruff: noqa: F811  (a fixture is imported, and is a parameter)

from __future__ import annotations

import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl")

import trl_newer  # noqa: E402
from test_trl_drop_in import folder, trl_as_it_was  # noqa: E402, F401
from transformers import AutoModelForCausalLM  # noqa: E402
from trl.trainer import utils  # noqa: E402

from grpo_kernels.integrations import trl as drop_in  # noqa: E402
from grpo_kernels.integrations.trl import apply, unapply  # noqa: E402
from grpo_kernels.integrations.trl.checks import ASYNC_GRPO  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
STABLE = """
from trl.kernels import ChunkedLogProbFunction as head_function  # the head's own name, not utils'
from trl.trainer.utils import add_fused_lm_head
class AsyncGRPOTrainer:
    def compute_loss(self, *arguments):
        return head_function.apply(*arguments)[0]
"""


@pytest.fixture
def stable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """TRL with AsyncGRPO as a stable trainer, whose module is not imported yet."""
    trl_newer.install_stable_async_grpo(monkeypatch, tmp_path, STABLE)
    yield ASYNC_GRPO[0]
    unapply()
    sys.modules.pop(ASYNC_GRPO[0], None)
    vars(trl.trainer).pop("async_grpo_trainer", None)


def _calls_of_head(patch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    head = drop_in.head_logprobs
    patch.setattr(drop_in, "head_logprobs", lambda *given: calls.append(1) or head(*given))
    return calls


def test_a_stable_async_grpo_is_found(stable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its file; what it has of the head, under whatever name, is replaced and put back."""
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((9, 16), (31, 16), (31,))]
    targets = torch.arange(9) * 3
    with apply():
        calls = _calls_of_head(monkeypatch)
        module = sys.modules[stable]
        arguments = (*tensors, targets, 0.7, 64, None, 1.0, trl_newer.OUTPUTS)
        ours = module.AsyncGRPOTrainer().compute_loss(*arguments)
        assert calls == [1] and module.head_function is utils._ChunkedLogProbFunction
    assert module.head_function is utils._ChunkedLogProbFunction  # TRL's again
    torch.testing.assert_close(ours, trl_newer.dense_head(*tensors, targets, 0.7, None, 1.0, None)[0])


def test_both_places_are_replaced(stable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experimental = ModuleType(ASYNC_GRPO[1])
    experimental.head_function = stock = utils._ChunkedLogProbFunction
    experimental._use_triton = no = lambda device: False
    monkeypatch.setitem(sys.modules, ASYNC_GRPO[1], experimental)
    with apply():
        assert experimental.head_function is sys.modules[stable].head_function is utils._ChunkedLogProbFunction
        assert experimental.head_function is not stock
        assert experimental._use_triton(torch.device("cpu"))  # positions that count are picked, as on a GPU
    assert experimental.head_function is stock and experimental._use_triton is no


def test_an_alias_that_warns_is_not_imported(stable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TRL 1.18 keeps ``trl.experimental.async_grpo`` as an alias, with a warning, and without its modules."""
    import trl.experimental

    for name in [name for name in sys.modules if name.startswith("trl.experimental.async_grpo")]:
        monkeypatch.delitem(sys.modules, name)
    alias = tmp_path / "experimental" / "async_grpo"
    alias.mkdir(parents=True)
    (alias / "__init__.py").write_text("import warnings\nwarnings.warn('moved', FutureWarning)\n")
    monkeypatch.setattr(trl, "__path__", [str(tmp_path)])
    monkeypatch.setattr(trl.experimental, "__path__", [str(alias.parent)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        apply()
    assert stable in sys.modules and ASYNC_GRPO[1].rpartition(".")[0] not in sys.modules


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("class AsyncGRPOTrainer: ...", "uses no head that is known here"),
        ("import not_installed", "cannot be imported"),
    ],
)
def test_an_async_grpo_that_is_not_served_is_logged(
    source: str, words: str, stable: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "trainer" / "async_grpo_trainer.py").write_text(source)
    with caplog.at_level(logging.INFO), apply():
        pass
    assert len([record for record in caplog.records if words in record.message and stable in record.message]) == 1


def test_the_installed_async_grpo_is_stock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own ``compute_loss`` on one packed row: loss and gradients, through the head that all trainers share."""
    from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer

    results = []
    for use in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
        if use:
            apply()
            calls = _calls_of_head(monkeypatch)
        loss = AsyncGRPOTrainer.compute_loss(_async_trainer(), model, _packed_row())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert calls == [1]
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def _async_trainer() -> Any:
    same = lambda x, **_: x  # noqa: E731
    return SimpleNamespace(
        aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2, current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, reduce=same, gather=same),
        _metrics={"train": defaultdict(list)}, _step_forward_tokens=0.0, _step_trained_tokens=0.0,
        _step_seq_len_weighted=0.0, _step_samples=0.0, _step_forward_s=0.0,
    )  # fmt: skip


def _packed_row() -> dict[str, Tensor]:
    """Two sequences of four tokens; the last three of each are scored."""
    ids = torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9]])
    labels = torch.tensor([[3, 4, 5, -100, 7, 8, 9, -100]])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "shift_labels": labels,
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
        "token_index": torch.tensor([[0, 1, 2, 4, 5, 6]]), "segment_id": torch.tensor([[0, 0, 0, 1, 1, 1]]),
        "old_log_probs": torch.full((1, 6), -2.5), "advantages": torch.tensor([[1.0, 1.0, 1.0, -0.5, -0.5, -0.5]]),
        "global_n_tokens": torch.tensor([6]), "global_n_forward_tokens": torch.tensor([8]),
        "mean_seq_len": torch.tensor([4.0]), "tree_kv_index": torch.full((1, 1), -1),
        "tree_cu_seqlens_q": torch.full((1, 1), -1), "tree_cu_seqlens_k": torch.full((1, 1), -1),
        "tree_max_seqlens": torch.tensor([[4, 4]]),
    }  # fmt: skip
