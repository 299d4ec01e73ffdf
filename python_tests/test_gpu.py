"""The Triton and CUDA backends on a GPU: at real sizes, past 2^31 elements, captured, twice over, within its memory.

Under Triton's interpreter the same checks of Triton run at small sizes, but for those that only a GPU can fail.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from test_conformance import is_tested
from testing.assertions import assert_near_baseline
from testing.calls import SOURCES, cases_of, run
from testing.cases import Case
from testing.conformance import assert_conforms
from testing.expected import Expected
from testing.gpu_heads import planned_bytes
from testing.inputs import Inputs, build
from torch import Tensor

from grpo_kernels import GRPOLossConfig, backends, check_device_values, grpo_loss, linear_grpo_loss, token_logprobs
from grpo_kernels.ops.head.buffers import NeededGradients
from grpo_kernels.ops.head.gemm import Head
from grpo_kernels.ops.head.memory import MemoryPlan, RowBytes

pytestmark = pytest.mark.full  # `make gpu` runs these on a GPU by itself
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
_REASONS = {name: backends.unsupported_reason("grpo_loss", name, DEVICE) for name in ("triton", "cuda")}
#: Whose kernels run here.
BACKENDS = tuple(name for name, reason in _REASONS.items() if reason is None)
if not BACKENDS:
    pytest.skip(f"needs a GPU, or Triton's interpreter: {_REASONS}", allow_module_level=True)

HALF, SINGLE = torch.bfloat16, torch.float32
DTYPES = (SINGLE, HALF, torch.float16)
# Llama 3, DeepSeek V3, Qwen2.5, and a prime
VOCABULARIES = (128256, 129280, 151936, 131071) if ON_GPU else (256, 514, 131)
SEVERAL_BLOCKS = VOCABULARIES[-2:] if ON_GPU else (8192, 8209)  # of a row
WIDE = 40960  # a row takes the shared memory of two blocks in half precision, of four in fp32
KL = GRPOLossConfig(beta=0.1, epsilon_high=0.28, entropy_coef=0.01)


@pytest.fixture(autouse=True)
def needs_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not ON_GPU:
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN, and nothing bad was met that nobody asked for."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    check_device_values(DEVICE)


def on_each_backend(ops: Iterable[str]) -> pytest.MarkDecorator:
    """Every op on every backend that has kernels for it."""
    pairs = [(op, backend) for op in ops for backend in BACKENDS if backends.supports(op, backend, DEVICE)]
    return pytest.mark.parametrize(("op", "backend"), pairs)


def _is_run(op: str, backend: str, dtype: torch.dtype, case: Case) -> bool:
    """Whether the conformance suite has it for Triton and the backend has the kernels that it takes."""
    needed = {"logits": "token_divergence", "hidden": "linear_token_divergence"}
    ops = [op, needed.get(SOURCES[op], op)] if case.config.has_exact_divergence else [op]
    return is_tested(op, "triton", dtype, case) and all(backends.supports(each, backend, DEVICE) for each in ops)


def _assert_conforms(op: str, backend: str, case: Case, dtype: torch.dtype) -> None:
    assert_conforms(op, backend, case, dtype, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "backend", "dtype", "case"),
    [
        pytest.param(op, backend, dtype, case, id=f"{op}-{backend}-{str(dtype)[6:]}-{case}")
        for op in SOURCES
        for case in cases_of(op)
        for dtype in DTYPES
        for backend in BACKENDS
        if _is_run(op, backend, dtype, case)
    ],
)
def test_conformance_suite(op: str, backend: str, dtype: torch.dtype, case: Case) -> None:
    _assert_conforms(op, backend, case, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("op", ["token_logprobs", "grpo_loss", "linear_token_logprobs", "linear_grpo_loss"])
def test_real_vocabularies(op: str, vocab: int, dtype: torch.dtype, backend: str) -> None:
    size = {"batch": 8, "length": 32, "hidden": 256} if ON_GPU else {"batch": 2, "length": 3}
    _assert_conforms(op, backend, Case(f"real_{vocab}", vocab=vocab, mask="holes", config=KL, **size), dtype)


@on_each_backend(["policy_loss", "grpo_loss", "token_logprobs"])
def test_long_completions(op: str, backend: str) -> None:
    """70,000 tokens: more than a grid's second dimension takes."""
    size = {"length": 70_000, "vocab": 521} if ON_GPU else {"length": 70, "vocab": 23}
    _assert_conforms(op, backend, Case("long", batch=2, config=KL, **size), SINGLE)


def _ends_of_a_huge_batch(logits: Tensor, ids: Tensor, op: str, backend: str, ends: list[int]) -> dict[str, Tensor]:
    """What ``op`` makes of the rows ``ends``; in place but for "torch"."""
    leaf, inplace = logits.requires_grad_(), backend != "torch"
    if op == "grpo_loss":  # each token weighs the same however many there are
        mask, advantages = torch.ones(ids.shape, device=DEVICE), torch.ones(1, device=DEVICE)
        out = grpo_loss(leaf, ids, advantages, mask, num_items_in_batch=4.0, inplace=inplace, backend=backend)
        out.loss.backward()
    else:
        out = token_logprobs(leaf, ids, outputs=("entropy",), inplace_backward=inplace, backend=backend)
        (out.logprobs.sum() + 0.5 * out.entropy.sum()).backward()
    assert leaf.grad is not None
    results = {"logprobs": out.logprobs, "entropy": out.entropy, "dlogits": leaf.grad}
    return {name: values.detach()[:, ends] for name, values in results.items()}


@pytest.mark.parametrize("vocab", [151936, 131071] if ON_GPU else [64, 61])
@on_each_backend(["grpo_loss", "token_logprobs"])
def test_more_than_2_to_the_31_logits(op: str, backend: str, vocab: int) -> None:
    """The first rows and the last, 2^31 elements apart, against the reference's of those rows alone."""
    rows = 2**31 // vocab + 3 if ON_GPU else 9
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.empty(1, rows, vocab, dtype=HALF, device=DEVICE).normal_(0, 2, generator=generator)
    ids = torch.randint(vocab, (1, rows), generator=generator, device=DEVICE)
    ends = [0, 1, rows - 2, rows - 1]
    few, few_ids = logits[:, ends].clone(), ids[:, ends]
    got = _ends_of_a_huge_batch(logits, ids, op, backend, ends)
    reference, baseline = (
        _ends_of_a_huge_batch(values, few_ids, op, "torch", [0, 1, 2, 3]) for values in (few.clone(), few.double())
    )
    assert_near_baseline(got, reference, baseline, HALF)


def _real(op: str, dtype: torch.dtype = HALF, vocab: int = VOCABULARIES[2], **options: Any) -> Inputs:
    size = {"batch": 4, "length": 256, "hidden": 256} if ON_GPU else {"batch": 2, "length": 3}
    return build(Case("real", vocab=vocab, **({"config": KL} | size | options)), dtype, SOURCES[op], DEVICE)


@on_each_backend(SOURCES)
def test_runs_are_bit_equal(op: str, backend: str) -> None:
    inputs = _real(op)
    first, second = run(op, inputs, backend), run(op, inputs, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", SEVERAL_BLOCKS)
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_the_gradient_in_place_is_that_of_a_second_buffer(dtype: torch.dtype, vocab: int, backend: str) -> None:
    """Bit for bit over 100 launches: a row's gradient is written where other threads may still read its logits."""
    inputs = _real("grpo_loss", dtype, vocab)
    given = (inputs.ids, inputs.advantages, inputs.mask)
    options = {"old_logprobs": inputs.old, "ref_logprobs": inputs.ref, "config": KL, "backend": backend}

    def gradient(inplace: bool) -> Tensor:
        leaf = inputs.logits.clone().requires_grad_()
        grpo_loss(leaf, *given, inplace=inplace, **options).loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = gradient(inplace=False)
    for launch in range(100 if ON_GPU else 2):
        assert torch.equal(gradient(inplace=True), expected), f"launch {launch}"


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("vocab", [4099, WIDE] if ON_GPU else [4099])
@on_each_backend(SOURCES)
def test_captured_graphs_replay(op: str, backend: str, vocab: int, level: str) -> None:
    """Forward and backward, on values that were not there when they were captured."""
    config = GRPOLossConfig(beta=0.1, importance_sampling_level=level)
    size = {"batch": 8, "length": 24, "vocab": vocab, "mask": "holes", "config": config}
    static, other = (build(Case(name, **size), HALF, SOURCES[op], DEVICE) for name in ("captured", "replayed"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(op, static, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, static, backend)
    for name, values in static.tensors().items():
        values.copy_(other.tensors()[name])
    graph.replay()
    Expected.of(op, other, HALF, rounds_dlogits=True).assert_near(captured)


BONUS, PLAIN = GRPOLossConfig(entropy_coef=0.01), GRPOLossConfig()


#: Waits of the host: for the count of unmasked rows and of those that may be live; of those with a gradient; and, in
#: each chunk where rows may turn out to be clipped, for which are not.
@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("op", "config", "advantages", "waits"),
    [
        ("policy_loss", KL, "sequence", 0),
        ("token_logprobs", KL, "sequence", 0),
        ("grpo_loss", KL, "sequence", 0),
        ("grpo_loss", PLAIN, "rewards", 0),
        ("linear_token_logprobs", KL, "sequence", 2),
        ("linear_grpo_loss", BONUS, "sequence", 1),
        ("linear_grpo_loss", PLAIN, "sequence", 2),
    ],
)
def test_the_host_waits_for_counts_of_rows_alone(
    op: str, config: GRPOLossConfig, advantages: str, waits: int, backend: str
) -> None:
    inputs = _real(op, config=config, advantages=advantages)
    run(op, inputs, backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(op, inputs, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(syncs) <= waits, syncs


def _peak(function: Any) -> int:
    """Most bytes allocated beyond those before a call, in its second run: the first allocates what libraries keep."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


_SLACK = 64 << 20  # what the allocator rounds up, and temporaries of [N]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [True, False])
def test_memory_of_grpo_loss_is_its_gradient(inplace: bool, backend: str) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    logits = torch.randn(1, 8192, VOCABULARIES[0], device=DEVICE, dtype=HALF)
    ids, mask = torch.zeros(1, 8192, dtype=torch.long, device=DEVICE), torch.ones(1, 8192, device=DEVICE)

    def step() -> None:
        leaf = logits.detach().requires_grad_()
        grpo_loss(leaf, ids, mask[:, 0], mask, inplace=inplace, backend=backend).loss.backward()

    assert _peak(step) <= (0 if inplace else logits.nbytes) + _SLACK


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("live", [1.0, 0.25])
@pytest.mark.parametrize("logits_dtype", [SINGLE, HALF], ids=str)
def test_memory_of_linear_grpo_loss_is_its_workspace_and_gradients(
    logits_dtype: torch.dtype, live: float, backend: str
) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    tokens, width, vocab = 16384, 1024, VOCABULARIES[0]
    hidden = torch.randn(16, tokens // 16, width, device=DEVICE, dtype=HALF, requires_grad=True)
    weight = torch.empty(vocab, width, device=DEVICE, dtype=HALF).normal_(0, 0.02).requires_grad_()
    ids, mask = (
        torch.zeros(hidden.shape[:2], dtype=torch.long, device=DEVICE),
        torch.ones(hidden.shape[:2], device=DEVICE),
    )
    advantages = (torch.arange(16, device=DEVICE) < 16 * live).float()
    old = torch.full(hidden.shape[:2], -12.0, device=DEVICE)

    def step() -> None:
        hidden.grad = weight.grad = None
        out = linear_grpo_loss(hidden, weight, ids, advantages, mask, old_logprobs=old, logits_dtype=logits_dtype,
                               backend=backend)  # fmt: skip
        out.loss.backward()
        hidden.grad = weight.grad = None

    needs, rows = NeededGradients(True, True, False), int(tokens * live)
    head = Head.of(backend, weight, None, HALF, logits_dtype)
    plan = MemoryPlan.of(head, needs, tokens, rows, None)
    workspace = planned_bytes(plan, RowBytes.of(head, needs), tokens, rows) + (16 << 20)  # rows that are packed
    sums = 4 * vocab * width
    assert workspace <= (512 * 4 * vocab if logits_dtype == SINGLE else 0) + sums + 10**9 + sums + _SLACK
    gradients = weight.numel() * 2 + hidden.numel() * (2 + 2 + 2)  # dW, dX, and the rows that are multiplied
    assert _peak(step) <= workspace + gradients + _SLACK


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_outside_the_vocabulary_are_told_later(backend: str) -> None:
    logits, ids = torch.randn(2, 3, 1000, device=DEVICE), torch.zeros(2, 3, dtype=torch.long, device=DEVICE)
    ids[1, 1] = 2**40
    given = (logits, ids, torch.ones(2, device=DEVICE), torch.ones(2, 3, device=DEVICE))
    loss = grpo_loss(*given, backend=backend).loss
    assert loss.isfinite()
    with pytest.raises(ValueError, match="an id outside the vocabulary where unmasked, at 4"):
        check_device_values(DEVICE)
    with pytest.raises(ValueError, match="completion_ids must lie in"):
        grpo_loss(*given, debug=True, backend=backend)


@pytest.mark.parametrize("vocab", [1, 67, 1031, 4096, WIDE] if ON_GPU else [1, 67, 1031, 4096])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@on_each_backend(SOURCES)
def test_small_shapes(op: str, backend: str, dtype: torch.dtype, vocab: int) -> None:
    """What the sanitizer runs."""
    results = run(op, _real(op, dtype, vocab, batch=2, length=3, mask="holes"), backend)
    assert all(values.isfinite().all() for values in results.values())
