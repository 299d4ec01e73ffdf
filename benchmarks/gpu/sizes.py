"""Sizes of what is timed and checked on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from problems import HEADS
from qualify import Case
from qualify import Sizes as ProblemSizes
from works import Head

HALF, SINGLE = torch.bfloat16, torch.float32
CASES: tuple[Case, ...] = (("logits", "bfloat16"), ("logits", "float32"), ("hidden", "bfloat16"),
                           ("logprobs", "bfloat16"), ("upstream", "bfloat16"))  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Heads ``(N, (H, V))``, the first with fewer live rows too and with other N; logits ``(dtype, N, V)``.

    bf16 logits are taken at each of ``vocabularies`` with each of ``tokens``, and at ``few_tokens``. Peers are
    beside us at the fewest of ``tokens``. The last of ``vocabularies`` is a prime: no row but the first is aligned.
    """

    heads: tuple[tuple[int, Head], ...] = (
        (8192, HEADS["Llama-3.1-8B"]),
        (8192, HEADS["Qwen2.5-0.5B"]),
        (8192, HEADS["Qwen3-32B"]),
        (8192, HEADS["DeepSeek-V3"]),
    )
    head_tokens: tuple[int, ...] = (1024, 32768, 131072)  # at the first head
    head_vocabularies: tuple[int, ...] = (32000, 65536)  # with its hidden size and number of tokens
    vocabularies: tuple[int, ...] = (151936, 129280, 128256, 131071)
    tokens: tuple[int, ...] = (8192, 65536)
    few_tokens: int = 64
    logits: tuple[tuple[torch.dtype, int, int], ...] = (
        (SINGLE, 4096, 151936),
        (HALF, 32768, 32000),
        (SINGLE, 16384, 32000),
    )
    policy: tuple[int, int] = (256, 8192)
    exact_tokens: int = 256  # where the whole is formed in fp64
    #: Of what providers are checked on: rows as they are timed, whose kernels are then compiled too.
    checked: ProblemSizes = field(default_factory=lambda: ProblemSizes(exact=(64, 896, 151936)))

    def told(self) -> str:
        """What errors are of, for a report."""
        n, h, v = self.checked.exact
        return (
            f"Errors are the largest against fp64 on problems of N={n} H={h} V={v}: log-probs in nats, the loss over "
            "the mean advantage, gradients relative to their norm. Memory is the allocator's peak beyond the inputs."
        )

    @classmethod
    def dry(cls) -> Sizes:
        return cls(
            heads=((8, (32, 96)),),
            head_tokens=(),
            head_vocabularies=(),
            vocabularies=(96,),
            tokens=(8, 16),
            few_tokens=8,
            logits=(),
            policy=(8, 8),
            exact_tokens=8,
            checked=ProblemSizes((8, 32, 97), 8, (), (32, 96)),
        )
