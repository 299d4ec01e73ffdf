"""Completions of one piece over and over, as a policy that has collapsed writes them, cost no reward much time."""

from __future__ import annotations

import time

import pytest

from grpo_kernels.training.rewards import BUILT_IN, resolve

PIECES = [
    "`", "```\n", "```python\n'''", "~~~ ", "<answer>", "</answer>", "<answer>1</answer>", "<think>", "$", "$a ",
    "$1$ and ", "{", "(", "[", "9", "1,", " ", "\n", "> ", "- ", "*a", "<a ", "\\boxed{", "\\frac{", "answer ",
    "#### ", "\0", "\ud800", "中", "a b ",
]  # fmt: skip
LENGTH = 100_000  # characters
SECONDS = 10.0  # on a busy machine; what is quadratic takes minutes


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "code"])
def test_no_repetition_takes_long(name: str) -> None:
    parameters = {"overlong": "(max_completion_len=4, soft_punish_cache=2)"}
    function = resolve(name + parameters.get(name, ""))
    columns = {"answer": ["5"], "completion_ids": [[1] * 1000]}
    for piece in PIECES:
        text = piece * (LENGTH // len(piece))
        for completion in (text, f"<answer>{text}</answer>", f"<think>{text}</think><answer>5</answer>"):
            begun = time.perf_counter()
            function(prompts=["p"], completions=[completion], **columns)
            assert time.perf_counter() - begun < SECONDS, (piece, completion[:20])
