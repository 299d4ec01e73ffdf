"""A head's loss by the number of rows that are projected at once: which one the default should be."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from unittest import mock

import torch
from interleaved import Comparison
from problems import Problem, head_problem
from works import GEMMS, Head, bare_gemms, shape_of, titled

from grpo_kernels import linear_grpo_loss
from grpo_kernels.ops.head import memory

#: The default; 640, whose tiles of 128 x 256 fill 19 waves of an H100 at V = 128256, where 512 fill 15 of 16; others.
ROWS = (256, 512, 640, 1024)


def workspace_rows(
    tokens: int, head: Head, dtype: torch.dtype, device: torch.device, ours: Mapping[str, str]
) -> Comparison:
    """``linear_grpo_loss``, forward and backward, of every backend. Floor: its three GEMMs."""
    problem = head_problem(tokens, *head, dtype, device)
    comparison = titled("workspace", "linear_grpo_loss by rows projected at once", shape_of(tokens, head), dtype, GEMMS)
    comparison.operations = 6.0 * tokens * head[0] * head[1]
    comparison.contenders[GEMMS] = bare_gemms(problem, "dX, dW")
    for label, backend in ours.items():
        for rows in ROWS:
            comparison.contenders[f"{label}, {rows} rows"] = partial(_step, problem, backend, rows)
    return comparison


def _step(problem: Problem, backend: str, rows: int) -> None:
    hidden, weight = (x.detach().requires_grad_() for x in (problem.hidden, problem.weight))
    given = (problem.ids, problem.advantages, problem.mask)
    with mock.patch.object(memory, "WORKSPACE_ROWS", rows):
        linear_grpo_loss(hidden, weight, *given, old_logprobs=problem.old, backend=backend).loss.backward()
