"""Completions of one piece over and over cost language_consistency little time, in any thread: no alarm ends it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from grpo_kernels.rewards import LanguageConsistencyReward

PIECES = [
    "\\(", "\\[", "$", "$$", "$a ", "$5 ", "$\\a{", "\\$", "\\begin{pmatrix}", "\\begin{a}\\end{b}", "```", "~~~ ",
    "`", "` ", "<", "<a", "http://", "\u0301", "\u0316\u0301", "e\u0301", "a\u0316\u0301", "a", "aB", "a1", "ab, ",
    "中", "ab是", "'", "a-", "\\", "\\a{", "{", "_", "\N{GRINNING FACE}", "ก", "क्ष", "мир ", "lol ok gonna do it rn. ",
    "We know that there are two cases, so the answer must be smaller. ", "Moment, das kann nicht sein. ",
    "我们知道有两种情况，所以答案更小。",
]  # fmt: skip
LENGTH = 100_000  # characters
SECONDS = 3.0  # on a slow machine; a tenth on most pieces

pytestmark = pytest.mark.xdist_group("lingua")  # one process loads its models


@pytest.fixture(scope="module")
def seconds_of():
    reward = LanguageConsistencyReward()

    def judge(text: str) -> float:
        start = time.process_time()  # of all threads, but not of other processes
        reward(prompts=["p"], completions=[text])
        return time.process_time() - start

    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(judge, "We know that there are two cases.").result()  # loads the models
        yield lambda text: pool.submit(judge, text).result()


@pytest.mark.parametrize("piece", PIECES, ids=ascii)
def test_a_piece_over_and_over(seconds_of, piece: str) -> None:
    assert seconds_of(piece * (LENGTH // len(piece))) < SECONDS


def test_signs_that_open_and_are_all_different(seconds_of) -> None:
    assert seconds_of("".join(f"\\begin{{a{i}}}" for i in range(LENGTH // 14))) < SECONDS
