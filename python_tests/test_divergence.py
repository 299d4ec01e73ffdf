"""Exact divergences: numbers worked by hand, TRL's own, gradients, what they cost, and the losses made of them."""

from __future__ import annotations

import math

import pytest
import torch
from testing.calls import BACKENDS
from torch import Tensor

from grpo_kernels import (
    GRPOLossConfig,
    distillation_loss,
    grpo_loss,
    linear_grpo_loss,
    linear_token_divergence,
    policy_loss,
    sft_loss,
    token_divergence,
    token_logprobs,
)
from grpo_kernels.loss.options import DIVERGENCES
from grpo_kernels.ops.head.reference_model import Reference, ReferenceRows
from grpo_kernels.ops.head.selection import SelectedRows

KERNELS = [backend for backend in BACKENDS if backend != "torch"]
HALF, QUARTER = math.log(2), math.log(4)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        # p = (1/2, 1/2), q = (1/4, 3/4), m = (3/8, 5/8)
        ("forward_kl", 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
        ("reverse_kl", 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ("js", 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(1.2) + 0.5 * math.log(4 / 3) + 0.5 * math.log(0.8))),
    ],
)
def test_values_worked_by_hand(backend: str, divergence: str, expected: float) -> None:
    reference = torch.tensor([[[0.0, math.log(3)]]], dtype=torch.float64)
    got = token_divergence(torch.zeros_like(reference), reference, divergence=divergence, backend=backend)
    torch.testing.assert_close(got.divergence, torch.tensor([[expected]], dtype=torch.float64))
    assert got.logprobs is None and got.entropy.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_are_those_of_finite_differences(backend: str, divergence: str) -> None:
    logits, reference = _random(2, 3, 5).requires_grad_(), _random(2, 3, 5, seed=1)
    ids = torch.tensor([[0, 1, 2], [3, 4, 0]])

    def outputs(z: Tensor) -> tuple[Tensor, ...]:
        return token_divergence(
            z, reference, divergence=divergence, mixture=0.3, ids=ids, temperature=1.3, softcap=4.0,
            divergence_temperature=0.7, reference_logit_scale=0.5, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(outputs, (logits,), fast_mode=backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_distribution_does_not_diverge_from_itself(backend: str, divergence: str) -> None:
    logits = (10 * _random(4, 3000) + 100).float().requires_grad_()
    got = token_divergence(logits, logits, divergence=divergence, backend=backend).divergence
    assert got.abs().max() < 1e-6
    got.sum().backward()
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_impossible_in_one_distribution_alone(backend: str) -> None:
    """KL is infinite where the second distribution has no weight and the first has; Jensen's and Shannon's never is."""
    all_of_it = torch.tensor([[0.0, 0.0, 0.0]])
    a_part = torch.tensor([[0.0, 0.0, -math.inf]])

    def value(first: Tensor, second: Tensor, divergence: str) -> float:
        return token_divergence(first, second, divergence=divergence, backend=backend).divergence.item()

    assert value(all_of_it, a_part, "reverse_kl") == value(a_part, all_of_it, "forward_kl") == math.inf
    assert value(a_part, all_of_it, "reverse_kl") == pytest.approx(math.log(1.5))
    assert value(all_of_it, a_part, "forward_kl") == pytest.approx(math.log(1.5))
    assert value(a_part, a_part, "js") == pytest.approx(0, abs=1e-6)
    assert (
        value(all_of_it, a_part, "js")
        == pytest.approx(value(a_part, all_of_it, "js"))
        == pytest.approx(0.1323, abs=1e-4)
    )
    for divergence in DIVERGENCES:
        logits = a_part.clone().requires_grad_()
        token_divergence(logits, a_part + 1, divergence=divergence, backend=backend).divergence.sum().backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_divergence_is_no_other_metrics(backend: str) -> None:
    logits, reference = torch.zeros(1, 2, 3), torch.tensor([[[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]]])
    config = GRPOLossConfig(beta=0.1, kl_estimator="reverse_kl")
    ids, mask = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)
    arguments = (logits, ids, torch.ones(1), mask)
    metrics = grpo_loss(*arguments, reference_logits=reference, config=config, backend=backend).metrics
    assert metrics["kl"].item() == math.inf
    assert metrics["entropy"].item() == pytest.approx(math.log(3)) and metrics["clip_ratio/low_mean"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impossible_first_column_is_as_any_other(backend: str) -> None:
    """No ids means the ids 0, of which nothing may be seen."""
    logits = torch.tensor([[-math.inf, 1.0, 2.0]], requires_grad=True)
    found = token_divergence(logits, torch.tensor([[-math.inf, 1.0, 1.0]]), backend=backend)
    (found.divergence + found.entropy).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mixture", [1e-9, 1 - 1e-9, 1e-30])
def test_a_mixture_of_almost_one_alone_is_almost_nothing(backend: str, mixture: float) -> None:
    """Not the KL that has the rounded number."""
    logits, reference = _random(4, 30).float(), _random(4, 30, seed=1).float()
    got = token_divergence(logits, reference, divergence="js", mixture=mixture, backend=backend).divergence
    assert got.abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["dense", "transposed", "half"])
def test_given_logits_may_lie_anywhere(backend: str, masked: bool, layout: str) -> None:
    hidden, head, reference = _random(5, 8).float(), _random(31, 8, seed=1).float(), _random(5, 31, seed=2).float()
    given = {"dense": reference, "transposed": reference.T.contiguous().T, "half": reference.bfloat16()}[layout]
    mask = torch.arange(5) % 2 == 0 if masked else None
    got = linear_token_divergence(hidden, head, reference_logits=given, mask=mask, backend=backend)
    expected = token_divergence(hidden @ head.T, given.float().contiguous(), mask=mask, backend="torch")
    torch.testing.assert_close(got.divergence, expected.divergence, rtol=1e-5, atol=1e-6)


def test_given_logits_are_copied_where_they_must_be_alone() -> None:
    """Else no workspace is theirs, and the policy's chunks may be twice as large."""
    given, ids = torch.randn(6, 31), torch.zeros(6, dtype=torch.int64)
    every, some = SelectedRows.of(None, None, ids), SelectedRows.of(torch.arange(6) != 2, None, ids)

    def row_bytes(logits: Tensor, rows: SelectedRows) -> int:
        return ReferenceRows(Reference.of(ids, 31, logits, None, None, None), rows, torch.float32).row_bytes

    assert row_bytes(given, every) == 0
    copied = ((given, some), (given.bfloat16(), every), (given.T.contiguous().T, every))
    assert [row_bytes(*each) for each in copied] == [31 * 4] * 3


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16, torch.float64])
def test_models_of_any_two_dtypes(student: torch.dtype, teacher: torch.dtype) -> None:
    hidden, head = _random(5, 8).to(student), _random(31, 8, seed=1).to(student)
    others = {"reference_hidden_states": _random(5, 6, seed=2).to(teacher),
              "reference_lm_head_weight": _random(31, 6, seed=3).to(teacher)}  # fmt: skip
    got = linear_token_divergence(hidden, head, **others, backend="cpu").divergence
    expected = linear_token_divergence(
        hidden.double(), head.double(), **{name: x.double() for name, x in others.items()}, backend="torch"
    ).divergence
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_gradient_may_lie_over_the_logits(backend: str) -> None:
    logits, reference = _random(2, 4, 70).float(), _random(2, 4, 70, seed=1).float()
    ids = torch.zeros(2, 3, dtype=torch.int64)  # a position more than there are tokens
    expected, got = (logits.clone().requires_grad_() for _ in range(2))
    for z, inplace in ((expected, False), (got, True)):
        token_divergence(z, reference, ids=ids, inplace_backward=inplace, backend=backend).divergence.sum().backward()
    assert torch.equal(got.grad, expected.grad) and torch.equal(got, expected.grad)
    assert (got.grad[:, 3] == 0).all() and (got.grad[:, :3] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("from_hidden", [True, False])
def test_from_hidden_states_it_is_the_same(backend: str, divergence: str, from_hidden: bool) -> None:
    hidden, head, bias = _random(3, 5, 8), _random(41, 8, seed=1), _random(41, seed=2)
    other, other_head = _random(3, 5, 6, seed=3), _random(41, 6, seed=4)
    ids, mask = torch.arange(15).view(3, 5), torch.arange(15).view(3, 5) % 4 != 1
    given = {"reference_hidden_states": other, "reference_lm_head_weight": other_head}
    if not from_hidden:
        given = {"reference_logits": other @ other_head.T}
    options = {"divergence": divergence, "ids": ids, "mask": mask, "softcap": 6.0, "divergence_temperature": 2.0}
    results = []
    for linear in (False, True):
        leaf = [x.clone().requires_grad_() for x in (hidden, head, bias)]
        if linear:
            found = linear_token_divergence(
                leaf[0], leaf[1], bias=leaf[2], **given, **options, workspace_bytes=6 * 41 * 8, backend=backend
            )
        else:
            logits = leaf[0] @ leaf[1].T + leaf[2]
            found = token_divergence(logits, other @ other_head.T, **options, backend="torch")
        upstream = (mask * torch.arange(15.0).view(3, 5)).double()  # of one token it is 0
        gradients = torch.autograd.grad((upstream * found.divergence + found.entropy - found.logprobs).sum(), leaf)
        results.append((*found, *gradients))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_trls(backend: str, beta: float) -> None:
    """TRL 1.16's function, whose one number is the mixture: 0 is the forward KL, 1 the reverse."""
    chunked_divergence = pytest.importorskip("trl.kernels.chunked_divergence")
    student, teacher = _random(9, 8).float(), _random(9, 6, seed=1).float()
    heads = [_random(301, 8, seed=2).float(), _random(301, 6, seed=3).float()]
    divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "js")
    results = []
    for theirs in (True, False):
        leaf = [student.clone().requires_grad_(), heads[0].clone().requires_grad_()]
        if theirs:
            values, entropy = chunked_divergence.ChunkedDivergenceFunction.apply(
                leaf[0], leaf[1], None, teacher, heads[1], None, beta, 1.5, 1.0, 8.0, 0.5, None
            )
        else:
            found = linear_token_divergence(
                *leaf, reference_hidden_states=teacher, reference_lm_head_weight=heads[1], divergence=divergence,
                mixture=0.3, temperature=1.5, softcap=8.0, reference_logit_scale=0.5, backend=backend,
            )  # fmt: skip
            values, entropy = found.divergence, found.entropy
        (values * torch.arange(9.0)).sum().backward()
        results.append((values, entropy, *(x.grad for x in leaf)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


LEVELS = ["token", "sequence"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("level", LEVELS)
def test_in_a_grpo_loss_it_is_the_sum_of_both(backend: str, divergence: str, level: str) -> None:
    """The loss without a penalty, and ``beta`` times the mean divergence: in every fused form, with its gradient."""
    hidden, head = _random(4, 5, 8).requires_grad_(), _random(31, 8, seed=1).requires_grad_()
    reference_head = _random(31, 8, seed=2)
    ids, mask = torch.arange(20).view(4, 5), torch.arange(20).view(4, 5) % 5 < 3
    advantages, old = _random(4, seed=3), _random(4, 5, seed=4) - 4
    config = GRPOLossConfig(beta=0.3, kl_estimator=divergence, importance_sampling_level=level, entropy_coef=0.1)
    plain = GRPOLossConfig(importance_sampling_level=level, entropy_coef=0.1)
    logits, reference = hidden @ head.T, hidden.detach() @ reference_head.T
    tokens = token_logprobs(logits, ids, mask=mask, outputs=("entropy",), backend="torch")
    common = {"old_logprobs": old, "backend": "torch"}
    expected = policy_loss(tokens.logprobs, advantages, mask, entropy=tokens.entropy, config=plain, **common).loss
    mean = (
        token_divergence(logits, reference, divergence=divergence, mask=mask, backend="torch").divergence.sum()
        / mask.sum()
    )
    expected = expected + 0.3 * mean
    wanted = torch.autograd.grad(expected, (hidden, head))
    forms = {
        "logits": lambda: grpo_loss(
            hidden @ head.T, ids, advantages, mask, old_logprobs=old, reference_logits=reference, config=config,
            backend=backend,
        ),
        "hidden": lambda: linear_grpo_loss(
            hidden, head, ids, advantages, mask, old_logprobs=old, reference_hidden_states=hidden.detach(),
            reference_lm_head_weight=reference_head, config=config, workspace_bytes=10 * 31 * 8, backend=backend,
        ),
    }  # fmt: skip
    for form in forms.values():
        out = form()
        torch.testing.assert_close(out.loss, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(out.metrics["kl"], mean, rtol=1e-11, atol=1e-12)
        for got, gradient in zip(torch.autograd.grad(out.loss, (hidden, head)), wanted, strict=True):
            torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize(("divergence", "temperature"), [("forward_kl", 1.0), ("forward_kl", 2.5), ("js", 2.0)])
def test_distillation(backend: str, reduction: str, divergence: str, temperature: float) -> None:
    """Hinton's: hard targets at temperature 1, soft ones at T, times its square."""
    hidden, head = _random(3, 4, 8).requires_grad_(), _random(31, 8, seed=1).requires_grad_()
    teacher = 2 * _random(3, 4, 31, seed=2)
    ids, mask = torch.arange(12).view(3, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    logits = hidden @ head.T
    p, q = ((z / temperature).log_softmax(-1) for z in (logits, teacher))
    m = torch.logaddexp(p, q) - HALF
    soft = (q.exp() * (q - p)).sum(-1)
    if divergence == "js":
        soft = 0.5 * (q.exp() * (q - m)).sum(-1) + 0.5 * (p.exp() * (p - m)).sum(-1)
    hard = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    mask = mask.double()
    weights = mask / mask.sum() if reduction == "token_mean" else mask / mask.sum(-1, keepdim=True) / 3
    expected = (weights * (0.75 * temperature**2 * soft + 0.25 * hard)).sum()
    loss, metrics = distillation_loss(
        hidden, head, ids, mask, teacher_logits=teacher, divergence=divergence, temperature=temperature,
        hard_weight=0.25, reduction=reduction, workspace_bytes=6 * 31 * 8, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(metrics["kl"], (mask * soft).sum() / mask.sum(), rtol=1e-11, atol=1e-12)
    wanted = torch.autograd.grad(expected, (hidden, head))
    for got, gradient in zip(torch.autograd.grad(loss, (hidden, head)), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-12)


def test_distillation_with_a_teacher_that_knows_one_token_is_sft() -> None:
    hidden, head = _random(2, 3, 8).float(), _random(31, 8, seed=1).float()
    ids, mask = torch.arange(6).view(2, 3), torch.ones(2, 3)
    teacher = torch.full((2, 3, 31), -math.inf).scatter_(-1, ids[..., None], 0.0)
    loss, _ = distillation_loss(hidden, head, ids, mask, teacher_logits=teacher)
    torch.testing.assert_close(loss, sft_loss(hidden, head, ids, mask))


def test_both_models_are_projected_once() -> None:
    """Of a one-pass loss: 8 N H V operations in all, two GEMMs forward and the student's two backward."""
    rows, vocab, width = 24, 50, 16
    hidden, head = torch.randn(4, 6, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    given = {"teacher_hidden_states": torch.randn(4, 6, width), "teacher_lm_head_weight": torch.randn(vocab, width)}
    ids, mask = torch.zeros(4, 6, dtype=torch.int64), torch.ones(4, 6)
    with torch.profiler.profile(with_flops=True) as profile:
        distillation_loss(hidden, head, ids, mask, **given, backend="cpu").loss.backward()
    gemms = [
        event.flops for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm", "aten::addmm_")
    ]
    assert sum(gemms) == 8 * rows * width * vocab


ZEROS = torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"divergence": "kl"}, ValueError, "divergence must be one of 'forward_kl'"),
        ({"divergence": "js", "mixture": 1.0}, ValueError, "mixture must be finite and in"),
        ({"reference_logits": torch.zeros(1, 2, 4)}, ValueError, "reference_logits must have shape"),
        ({"reference_logits": ZEROS.double()}, TypeError, "reference_logits must have the dtype of logits"),
        ({"reference_logits": ZEROS.long()}, TypeError, "reference_logits"),
        ({"divergence_temperature": 0.0}, ValueError, "divergence_temperature must be finite and greater than 0"),
        ({"reference_softcap": -1.0}, ValueError, "reference_softcap must be"),
        ({"logits": torch.zeros(3)}, ValueError, "logits must have shape"),
        ({"ids": torch.tensor([[0, 3]])}, ValueError, "ids must lie in"),
        ({"mask": torch.ones(1, 3)}, ValueError, "mask must have shape"),
    ],
)
def test_bad_input_is_refused(changes: dict, error: type[Exception], words: str) -> None:
    arguments = {"logits": ZEROS, "reference_logits": ZEROS} | changes
    with pytest.raises(error, match=words):
        token_divergence(**arguments)


EXACT = GRPOLossConfig(beta=0.1, kl_estimator="js")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: linear_token_divergence(*a[:2]), "must be given, got neither"),
        (lambda a: linear_token_divergence(*a[:2], reference_hidden_states=a[0]), "got one of the latter"),
        (
            lambda a: linear_token_divergence(*a[:2], reference_logits=ZEROS, reference_hidden_states=a[0]),
            "reference_hidden_states must be None beside reference_logits",
        ),
        (lambda a: linear_grpo_loss(*a, config=EXACT), "reference_logits, or .* must be given"),
        (lambda a: linear_grpo_loss(*a, reference_logits=ZEROS), "must be None with kl_estimator"),
        (lambda a: grpo_loss(ZEROS, *a[2:], config=EXACT), "reference_logits must be given"),
        (lambda a: policy_loss(a[4], *a[3:], config=EXACT), "divergence must be given"),
        (lambda a: policy_loss(a[4], *a[3:], divergence=a[4]), "divergence must be None"),
        (lambda a: distillation_loss(*a[:3], a[4]), "teacher_logits, or both"),
        (lambda a: distillation_loss(*a[:3], a[4], teacher_logits=ZEROS, teacher_softcap=-1.0), "teacher_softcap"),
        (
            lambda a: linear_grpo_loss(*a, reference_logits=ZEROS, ref_logprobs=a[4], config=EXACT),
            "ref_logprobs must be None",
        ),
        (lambda a: distillation_loss(*a[:3], a[4], teacher_logits=ZEROS, hard_weight=1.0), "hard_weight"),
        (lambda a: GRPOLossConfig(beta=0.1, kl_estimator="js", kl_clamp=1.0), "kl_clamp has no effect"),
        (lambda a: GRPOLossConfig(kl_estimator="js"), "kl_estimator has no effect with beta=0"),
    ],
)
def test_what_does_not_go_together_is_refused(call, words: str) -> None:
    arguments = (
        torch.zeros(1, 2, 4),
        torch.zeros(3, 4),
        torch.zeros(1, 2, dtype=torch.int64),
        torch.ones(1),
        torch.ones(1, 2),
    )
    with pytest.raises(ValueError, match=words):
        call(arguments)
