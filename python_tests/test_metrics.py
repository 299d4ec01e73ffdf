"""Metrics under TRL's names: of one process, of several, and of none."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from testing.calls import BACKENDS
from testing.cases import Case
from testing.inputs import Inputs, build
from torch import distributed, multiprocessing

from grpo_kernels import GRPOLossConfig, policy_loss
from grpo_kernels.loss.metrics import PolicyMetrics
from grpo_kernels.training.models import end_process_group

CONFIGS = {
    level: GRPOLossConfig(beta=0.1, importance_sampling_level=level, loss_type="grpo")
    for level in ("token", "sequence")
}
WORLD = 2


def _metrics(inputs: Inputs, rows: slice, backend: str) -> PolicyMetrics:
    return policy_loss(
        inputs.logprobs[rows],
        inputs.advantages[rows],
        inputs.mask[rows],
        entropy=inputs.entropy[rows],
        old_logprobs=inputs.old[rows],
        ref_logprobs=inputs.ref[rows],
        config=inputs.case.config,
        backend=backend,
    ).metrics


def _inputs(level: str) -> Inputs:
    """Completions of unequal length, of which the second process has few tokens, one of them with none."""
    inputs = build(Case(f"world_{level}", batch=12, length=9, config=CONFIGS[level]), torch.float64, "logprobs")
    inputs.mask[8] = 0
    return inputs


def _worker(rank: int, port: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    rows = slice(0, 7) if rank == 0 else slice(7, 12)
    reduced = {
        f"{level}-{backend}": dict(_metrics(_inputs(level), rows, backend).reduce())
        for level in CONFIGS
        for backend in BACKENDS
    }
    torch.save(reduced, Path(folder) / f"{rank}.pt")
    end_process_group()


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_worker, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", CONFIGS)
def test_two_processes_agree_with_one(reduced: list, level: str, backend: str) -> None:
    whole = dict(_metrics(_inputs(level), slice(None), backend))
    for of_rank in reduced:
        got = of_rank[f"{level}-{backend}"]
        assert list(got) == list(whole)
        for name, value in whole.items():
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    local = dict(_metrics(_inputs(level), slice(0, 7), backend))
    assert any(not torch.isclose(local[name], value) for name, value in whole.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_follow_the_inputs(backend: str) -> None:
    arguments = (torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2))
    clip = {f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
    metrics = policy_loss(*arguments, backend=backend).metrics
    assert set(metrics) == clip and len(metrics) == len(clip)
    options = {"ref_logprobs": torch.zeros(1, 2), "entropy": torch.ones(1, 2), "config": GRPOLossConfig(beta=0.1)}
    metrics = policy_loss(*arguments, **options, backend=backend).metrics
    assert set(metrics) == {"kl", "entropy", *clip}
    with pytest.raises(KeyError, match="reward"):
        metrics["reward"]
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", CONFIGS)
def test_micro_batches_agree_with_the_batch(level: str, backend: str) -> None:
    parts = [_metrics(_inputs(level), slice(i, i + 3), backend) for i in range(0, 12, 3)]
    whole = dict(_metrics(_inputs(level), slice(None), backend))
    for name, value in PolicyMetrics.combined(parts).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12)


def test_extrema_are_those_of_any_part() -> None:
    """One completion a part; in the first its token is clipped below, in the second above."""
    ratios, advantages = torch.tensor([[0.5], [2.0]]).log(), torch.tensor([-1.0, 1.0])
    parts = [
        policy_loss(ratios[i], advantages[i], torch.ones(1, 1), old_logprobs=torch.zeros(1, 1), backend="torch").metrics
        for i in (slice(0, 1), slice(1, 2))
    ]
    assert [part["clip_ratio/low_min"].item() for part in parts] == [1, 0]
    assert [part["clip_ratio/high_max"].item() for part in parts] == [0, 1]
    for order in (parts, parts[::-1]):
        whole = PolicyMetrics.combined(order)
        assert whole["clip_ratio/low_min"].item() == 0 and whole["clip_ratio/high_max"].item() == 1
        assert whole["clip_ratio/low_mean"].item() == whole["clip_ratio/high_mean"].item() == 0.5
