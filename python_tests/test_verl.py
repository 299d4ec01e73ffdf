"""The verl preset against verl's own ``core_algos``: its wheel alone, for the formulas need nothing else of it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from testing.calls import BACKENDS
from testing.cases import Case
from testing.inputs import build
from torch import Tensor

from grpo_kernels import GRPOLossConfig, gae, group_advantages, policy_loss
from grpo_kernels.integrations import presets

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed", allow_module_level=True)


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of nothing, for what verl imports for its workers and is not installed here."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        absent = name.split(".")[0] in ("ray", "tensordict", "codetiming", "hydra", "omegaconf", "orjson")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module: Any = MagicMock(name=spec.name)
        module.__path__, module.__version__ = [], "0.10.0"
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@pytest.fixture(scope="module")
def verl() -> Any:
    """``(core_algos, ActorConfig)``."""
    finder = _Absent()
    sys.meta_path.append(finder)
    try:
        from verl.trainer.ppo import core_algos
        from verl.workers.config import ActorConfig
    finally:
        sys.meta_path.remove(finder)
    return core_algos, ActorConfig


MODES = ("vanilla", "gspo", "gpg", "sapo", "cispo", "geo_mean", "clip_cov", "kl_cov")
MEANS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
KL_TYPES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k2+", "k3+", "abs+", "low_var_kl+")


@st.composite
def _options(draw: st.DrawFn) -> dict[str, Any]:
    options: dict[str, Any] = {
        "loss_mode": draw(st.sampled_from(MODES)),
        "loss_agg_mode": draw(st.sampled_from(MEANS)),
        "loss_scale_factor": 7,
        "clip_ratio_low": draw(st.sampled_from([0.2, 0.3])),
        "clip_ratio_high": draw(st.sampled_from([0.2, 0.28])),
        "clip_ratio_c": draw(st.sampled_from([3.0, 1.6])),
        "tau_neg": draw(st.sampled_from([1.05, 2.0])),
        "use_kl_loss": draw(st.booleans()),
        "kl_loss_coef": 0.1,
        "kl_loss_type": draw(st.sampled_from(KL_TYPES)),
        "entropy_coeff": draw(st.sampled_from([0, 0.05])),
    }
    if options["loss_mode"] == "geo_mean":  # whose mean is its own: with it the others' would be another
        options |= {"use_kl_loss": False, "entropy_coeff": 0}
    if options["loss_mode"] == "kl_cov":
        options["use_kl_loss"] = False
        options |= {"kl_cov_ratio": draw(st.sampled_from([0.0002, 0.2, 0.5])), "ppo_kl_coef": 0.3}
    if options["loss_mode"] == "clip_cov":  # all that may be drawn are
        options |= {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": draw(st.sampled_from([0.5, 5.0]))}
    if options["loss_mode"] == "sapo":
        options["loss_agg_mode"] = "seq-mean-token-mean"
    return options


def _verls(verl: Any, options: dict[str, Any], case: Case, leaves: list[Tensor], rollout: Tensor | None) -> Tensor:
    """As verl's actor adds it up."""
    core, actor = verl
    inputs = build(case, torch.float64, "logprobs")
    of_policy_loss = {k: v for k, v in options.items() if "cov" in k or k in ("loss_mode", "ppo_kl_coef")}
    given = {name: value for name, value in options.items() if name not in of_policy_loss}
    config = actor(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **given)
    for name, value in of_policy_loss.items():
        object.__setattr__(config.policy_loss, name, value)
    config.global_batch_info["loss_scale_factor"] = options["loss_scale_factor"]
    mask = inputs.mask.double()
    advantages = inputs.advantages[:, None].expand(mask.shape)
    loss, _ = core.get_policy_loss_fn(options["loss_mode"])(
        old_log_prob=inputs.old, log_prob=leaves[0], advantages=advantages, response_mask=mask,
        loss_agg_mode=options["loss_agg_mode"], config=config, rollout_is_weights=rollout,
    )  # fmt: skip
    mean = {"loss_mask": mask, "loss_agg_mode": options["loss_agg_mode"], **config.global_batch_info}
    if options["entropy_coeff"]:
        loss = loss - options["entropy_coeff"] * core.agg_loss(loss_mat=leaves[1], **mean)
    if options["use_kl_loss"]:
        kl = core.kl_penalty(leaves[0], inputs.ref, options["kl_loss_type"])
        loss = loss + options["kl_loss_coef"] * core.agg_loss(loss_mat=kl, **mean)
    return loss


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    options=_options(),
    seed=st.integers(0, 10**6),
    mask=st.sampled_from(["ones", "tail", "holes", "first"]),
    has_rollout=st.booleans(),
)
def test_losses_and_gradients_are_verls(
    verl: Any, options: dict[str, Any], seed: int, mask: str, has_rollout: bool
) -> None:
    has_rollout = has_rollout and options["loss_mode"] != "geo_mean"  # verl's takes the weights' geometric mean
    case = Case(f"verl_{seed}", batch=4, length=5, mask=mask, rollout="token" if has_rollout else None)
    inputs = build(case, torch.float64, "logprobs")
    theirs = [x.detach().requires_grad_() for x in (inputs.logprobs, inputs.entropy)]
    expected = _verls(verl, options, case, theirs, inputs.rollout)
    expected.backward()
    for backend in BACKENDS:
        ours = [x.detach().requires_grad_() for x in (inputs.logprobs, inputs.entropy)]
        loss = policy_loss(
            ours[0], inputs.advantages, inputs.mask, entropy=ours[1], old_logprobs=inputs.old, ref_logprobs=inputs.ref,
            rollout_is_weights=inputs.rollout, config=GRPOLossConfig.verl(**options), backend=backend,
        ).loss  # fmt: skip
        loss.backward()
        # verl adds 1e-8 to the lengths that it divides by; the terms of the sum are of size 1
        torch.testing.assert_close(loss, expected, rtol=0, atol=4e-8)
        for own, other in zip(ours, theirs, strict=True):
            grads = (torch.zeros_like(x) if x.grad is None else x.grad for x in (own, other))
            torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-8)


def test_a_clamped_ratio_and_a_clamped_divergence_are_verls(verl: Any) -> None:
    core, actor = verl
    logprobs = torch.full((1, 4), -1.0, dtype=torch.float64)
    ref = logprobs + torch.tensor([[25.0, -25.0, 3.0, 700.0]], dtype=torch.float64)
    old = logprobs - torch.tensor([[25.0, -25.0, 0.1, 0.1]], dtype=torch.float64)
    mask, advantages = torch.ones(1, 4), torch.full((1, 4), -1.0, dtype=torch.float64)
    config = actor(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    leaf = logprobs.clone().requires_grad_()
    loss, _ = core.compute_policy_loss_cispo(old, leaf, advantages, mask, config=config)
    (loss + core.kl_penalty(leaf, ref, "k3").mean()).backward()
    options = {"use_kl_loss": True, "kl_loss_type": "k3", "kl_loss_coef": 1.0}
    for backend in BACKENDS:
        own = logprobs.clone().requires_grad_()
        arguments = {"old_logprobs": old, "ref_logprobs": ref, "backend": backend}
        policy_loss(
            own, advantages, mask, config=GRPOLossConfig.verl(loss_mode="cispo", **options), **arguments
        ).loss.backward()
        torch.testing.assert_close(own.grad, leaf.grad)
    # a ratio of e^-25 is e^-20 to verl, and passes no gradient; above, the other clips hide the clamp
    one, mask = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1)
    leaf = logprobs[:, :1].clone().requires_grad_()
    expected, _ = core.compute_policy_loss_vanilla(leaf.detach() + 25, leaf, one, mask, config=config)
    for backend in BACKENDS:
        arguments = {"old_logprobs": leaf.detach() + 25, "config": GRPOLossConfig.verl(), "backend": backend}
        loss = policy_loss(leaf, one[0], mask, **arguments).loss
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert gradient.item() == 0


ESTIMATORS = {
    "grpo": ("grpo", {"eps": 1e-6}),
    "dr_grpo": ("grpo", {}),
    "rloo": ("rloo", {}),
    "opo": ("opo", {}),
    "gpg": ("gpg", {}),
    "passk": ("grpo_passk", {"eps": 1e-6}),
    "remax": ("remax", {}),
    "reinforce++": ("reinforce_plus_plus", {}),
    "reinforce++_baseline": ("reinforce_plus_plus_baseline", {}),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@hypothesis.settings(max_examples=30)
@hypothesis.given(seed=st.integers(0, 10**6), size=st.sampled_from([2, 3, 6]))
def test_advantages_are_verls(verl: Any, name: str, seed: int, size: int) -> None:
    core, _ = verl
    rng = torch.Generator().manual_seed(seed)
    # all different: of equal ones ours are exactly 0
    rewards = torch.randn(6, generator=rng, dtype=torch.float64).round(decimals=2) + 0.001 * torch.arange(6)
    mask = (torch.arange(5) < torch.randint(1, 6, (6, 1), generator=rng)).double()
    last = torch.nn.functional.one_hot(mask.sum(-1).long() - 1, 5)
    greedy = torch.randn(6 // size, generator=rng, dtype=torch.float64)
    theirs, options = ESTIMATORS[name]
    given: dict[str, Any] = {"token_level_rewards": last * rewards[:, None], "response_mask": mask}
    if theirs not in ("remax", "reinforce_plus_plus"):
        given["index"] = np.repeat(np.arange(6 // size), size)
    if theirs == "remax":
        given["reward_baselines"] = greedy.repeat_interleave(size)
    elif theirs == "grpo":
        given |= {"epsilon": 1e-6, "norm_adv_by_std_in_grpo": name == "grpo"}
    elif theirs == "grpo_passk":
        given["epsilon"] = 1e-6
    given["config"] = SimpleNamespace(gamma=1.0, get=lambda key, default=None: default)
    expected, _ = core.get_adv_estimator_fn(theirs)(**given)
    if name in ("opo", "reinforce++", "reinforce++_baseline"):
        options = {**options, "completion_lengths": mask.sum(-1)}
    if name == "remax":
        options = {**options, "baseline_rewards": greedy}
    got = group_advantages(rewards, size, estimator=name, **options)
    torch.testing.assert_close(got[:, None] * mask, expected * mask, rtol=1e-6, atol=1e-9)


def test_generalised_advantages_are_verls_once_whitened(verl: Any) -> None:
    core, _ = verl
    rng = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(4, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(4, 6, generator=rng) < 0.7
    expected, returns = core.compute_gae_advantage_return(rewards, values, mask.double(), 0.99, 0.95)
    for backend in BACKENDS:
        got = gae(rewards, values, mask, gamma=0.99, lam=0.95, backend=backend)
        kept = got.advantages[mask]
        whitened = (kept - kept.mean()) * (kept.var() + 1e-8).rsqrt()
        torch.testing.assert_close(whitened, expected[mask], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.returns[mask], returns[mask], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"loss_mode": "dppo_tv"}, ("loss_mode", "'vanilla'", "'dppo_tv'")),
        ({"loss_agg_mode": "mean"}, ("loss_agg_mode", "'token-mean'", "'mean'")),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, ("loss_scale_factor", "None")),
        ({"clip_ratio_c": 1.1}, ("clip_ratio_c", "1.2", "1.1")),
        ({"loss_mode": "sapo", "entropy_coeff": 0.1}, ("sapo", "token-mean")),
        ({"loss_mode": "geo_mean", "use_kl_loss": True}, ("geo_mean", "KL")),
        ({"loss_mode": "kl_cov", "use_kl_loss": True}, ("kl_cov", "KL")),
    ],
)
def test_what_the_preset_does_not_have_is_named(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        GRPOLossConfig.verl(**options)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_the_presets_defaults_are_verls(verl: Any) -> None:
    _, actor = verl
    theirs = actor(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    for name, parameter in inspect.signature(presets.verl).parameters.items():
        owner = theirs.policy_loss if "cov" in name or name in ("loss_mode", "ppo_kl_coef") else theirs
        if name != "temperature":  # of the rollout's configuration
            assert getattr(owner, name) == parameter.default, name
    assert GRPOLossConfig.verl(loss_mode="cispo", clip_ratio_low=10.0).cispo_ratio_low is None
    assert GRPOLossConfig.verl(use_kl_loss=True, kl_loss_coef=0).beta == 0


def _as_registered(
    verl: Any, options: dict[str, Any], case: Case, counts: dict[str, Any], prefix: str
) -> tuple[Any, ...]:
    """Loss, gradient and metrics by the name in verl's own registry."""
    core, actor = verl
    inputs = build(case, torch.float64, "logprobs")
    config = actor(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    for name in ("clip_cov_ratio", "clip_cov_lb", "kl_cov_ratio"):
        object.__setattr__(
            config.policy_loss, name, {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05, "kl_cov_ratio": 0.2}[name]
        )
    config.global_batch_info.update(counts)
    leaf, mask = inputs.logprobs.detach().requires_grad_(), inputs.mask.double()
    loss, metrics = core.get_policy_loss_fn(prefix + options["loss_mode"])(
        old_log_prob=inputs.old, log_prob=leaf, advantages=inputs.advantages[:, None].expand(mask.shape),
        response_mask=mask, loss_agg_mode=options["loss_agg_mode"], config=config, rollout_is_weights=None,
    )  # fmt: skip
    return loss, torch.autograd.grad(loss, leaf)[0], metrics


@pytest.mark.parametrize(
    "counts", [{}, {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9}], ids=["local", "two"]
)
@pytest.mark.parametrize("loss_agg_mode", [*MEANS, "token-sum"])
@pytest.mark.parametrize("loss_mode", MODES)
def test_registered_losses_are_verls(verl: Any, loss_mode: str, loss_agg_mode: str, counts: dict[str, Any]) -> None:
    """Over a global batch, by its counts, too. The geometric mean and sapo have means of their own."""
    from grpo_kernels.integrations import verl as kernels

    kernels.register()
    options = {"loss_mode": loss_mode, "loss_agg_mode": loss_agg_mode}
    case = Case(f"registered_{loss_mode}", batch=5, length=6, mask="first")
    expected, got = (_as_registered(verl, options, case, counts, prefix) for prefix in ("", "grpo_kernels_"))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-7, atol=4e-8)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-7, atol=1e-8)
    for name in set(got[2]) & set(expected[2]) & {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}:
        if loss_mode == "vanilla":
            assert got[2][name] == pytest.approx(expected[2][name], rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("name", ["grpo", "grpo_passk", "rloo", "opo", "gpg", "remax", "reinforce_plus_plus",
                                  "reinforce_plus_plus_baseline"])  # fmt: skip
def test_registered_estimators_are_verls(verl: Any, name: str) -> None:
    """Groups of several sizes whose members lie anywhere, but where the whole batch is whitened."""
    from grpo_kernels.integrations import verl as kernels

    kernels.register()
    kernels.register()  # again
    core, _ = verl
    rng = torch.Generator().manual_seed(0)
    keys = np.array(
        ["a", "b", "a", "c", "b", "a", "b", "b"] if "plus" not in name and name != "gpg" else [*"abcdabcd"], object
    )
    rewards, mask = torch.randn(8, generator=rng, dtype=torch.float64), (torch.rand(8, 5, generator=rng) < 0.8).double()
    mask[:, 0] = 1
    if name == "grpo_passk":  # which a group of one has not
        keys = np.array([*"abababab"], object)
    last = torch.arange(5) == 4 - mask.flip(-1).argmax(-1, keepdim=True)
    given: dict[str, Any] = {"token_level_rewards": last * rewards[:, None]}
    given |= {
        "response_mask": mask,
        "index": keys,
        "reward_baselines": torch.randn(8, generator=rng, dtype=torch.float64),
    }
    given["config"] = SimpleNamespace(gamma=1.0, get=lambda key, default=None: default)
    if name in ("reinforce_plus_plus", "remax"):
        given.pop("index")
    if name != "remax":
        given.pop("reward_baselines")
    expected, _ = core.get_adv_estimator_fn(name)(**given)
    got, _ = core.get_adv_estimator_fn("grpo_kernels_" + name)(**given)
    torch.testing.assert_close(got * mask, expected * mask, rtol=1e-6, atol=1e-8)


def test_the_fused_hook_is_served(verl: Any) -> None:
    """``linear_cross_entropy`` where verl's model forwards import it from, at each call."""
    from grpo_kernels.integrations import verl as kernels

    hidden, weight, labels = torch.randn(2, 3, 8), torch.randn(11, 8), torch.arange(6).view(2, 3)
    logits = (hidden @ weight.T) / 0.7
    log_p = logits.log_softmax(-1)
    logprobs, entropy = kernels.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    torch.testing.assert_close(logprobs, log_p.gather(-1, labels[..., None]).flatten())
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1).flatten())
    with pytest.raises(ValueError, match="reduction"):
        kernels.linear_cross_entropy(hidden, weight, labels, 0.7, "mean")
    with pytest.raises(ValueError, match="dist_process_group"):
        kernels.linear_cross_entropy(hidden, weight, labels, 0.7, "none", object())
    module = kernels._kernel_module()
    before = module.linear_cross_entropy
    kernels.apply()
    kernels.apply()
    assert module.linear_cross_entropy is kernels.linear_cross_entropy
    kernels.unapply()
    kernels.unapply()
    assert module.linear_cross_entropy is before


def test_registered_estimators_know_their_options(verl: Any) -> None:
    from grpo_kernels.integrations import verl as kernels

    kernels.register()
    core, actor = verl
    rewards, mask = torch.tensor([1.0, 3.0, 2.0, 5.0]).double(), torch.ones(4, 3)
    given = {"response_mask": mask, "index": np.array([*"abab"], object)}
    given["token_level_rewards"] = torch.nn.functional.pad(rewards[:, None], (2, 0))
    for name in ("grpo", "grpo_passk"):
        for scaled in (True, False):
            config = SimpleNamespace(gamma=1.0, get={"norm_adv_by_std_in_grpo": scaled}.get)
            options = given | {"config": config} | ({"norm_adv_by_std_in_grpo": scaled} if name == "grpo" else {})
            expected, got = (core.get_adv_estimator_fn(prefix + name)(**options)[0] for prefix in ("", "grpo_kernels_"))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    estimate = core.get_adv_estimator_fn("grpo_kernels_reinforce_plus_plus")
    config = SimpleNamespace(gamma=0.5, get=lambda key, default=None: default)
    with pytest.raises(ValueError, match="gamma must be 1"):
        estimate(**given, config=config)
    config.gamma = 1.0
    early = given | {"token_level_rewards": torch.nn.functional.pad(rewards[:, None], (0, 2))}
    with pytest.raises(ValueError, match="last token"):
        estimate(**early, config=config)
    config = actor(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    config.global_batch_info["dp_size"] = 2
    for mode in ("token-mean", "seq-mean-token-mean"):
        with pytest.raises(ValueError, match="must be given when dp_size"):
            core.get_policy_loss_fn("grpo_kernels_vanilla")(
                torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3), mode, config
            )
