"""The model as GRPO sees it: log-probabilities of completions, its reference's, and the loss, in its forward."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from grpo_kernels import GRPOLossConfig, GRPOLossOutput, PolicyMetrics, linear_grpo_loss, linear_token_logprobs
from grpo_kernels.integrations.transformers.model_head import HeadOutput, Projection, open_head
from grpo_kernels.training.models import base_model, has_adapters, wrap_policy, wrap_reference
from grpo_kernels.training.rollout import Rollout, forward_arguments

_CHECKED_TOKENS = 12  # of each sequence that shows whether packing keeps them apart


class ModelInputs(NamedTuple):
    """How a rollout goes through a model, and what comes back of it."""

    arguments: dict[str, Any]  # of the forward
    length: int  # T, of the padded form; 0 packed
    mask: Tensor  # [B, T] bool

    def select_hidden(self, values: Tensor) -> Tensor:
        """Those that predict a completion's token: ``[B, T, H]``, or packed ``[N, H]``."""
        return values[:, -(self.length + 1) : -1] if self.length else values[0]

    def select_tokens(self, values: Tensor | None) -> Tensor | None:
        """``[B, T]`` as the hidden states are: packed ``[N]``."""
        return values if values is None or self.length else values[self.mask]

    def unpack(self, values: Tensor) -> Tensor:
        """``[B, T]`` of what came back, 0 where nothing was read."""
        if self.length:
            return values
        return torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(self.mask, values)

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Where each completion begins and ends among the packed tokens, ``[B + 1]``."""
        if self.length:
            return None
        return nn.functional.pad(self.mask.sum(dim=1).cumsum(0), (1, 0))


class Policy:
    """A causal language model and the frozen one that it is held to.

    Args:
        model: Any ``AutoModelForCausalLM``, or one that peft has put adapters on, in eval mode.
        config: The loss; its temperature is the one that log-probabilities are taken at.
        backend: Of the kernels.
        packing: One row without padding in the place of a padded batch; the model must tell sequences apart by their
            positions, as transformers' sdpa, eager and flash-attention do, and most recurrent layers do not. Two short
            sequences are compared, in 16 bits coarsely.
        aux_loss_coef: Weight of a mixture of experts' auxiliary loss; None takes the model's own.

    Raises:
        ValueError: The model has no output embeddings, its forward takes no ``logits_to_keep`` to pack by, one packed
            sequence changes another's log-probabilities, or more than adapters trains of a model whose reference is
            itself without them.
    """

    def __init__(
        self,
        model: Any,
        config: GRPOLossConfig,
        *,
        backend: str = "auto",
        packing: bool = False,
        aux_loss_coef: float | None = None,
    ) -> None:
        self.model = self.wrapped = model
        self.config, self.backend, self.packing = config, backend, packing
        base = base_model(model)
        open_head(base)
        self.reference = None
        if config.beta:
            if has_adapters(model):
                _check_only_adapters_train(model)
            self.reference = model if has_adapters(model) else copy.deepcopy(base).requires_grad_(False)
        self._known = inspect.signature(base.forward).parameters
        if packing and not {"logits_to_keep", "position_ids"} <= self._known.keys():
            raise ValueError(f"{type(base).__name__} takes no logits_to_keep and position_ids: packing must be False")
        self._attention = _attention_of(base)
        if packing:
            self._check_packing()
        self.aux_loss_coef = _aux_loss_coef(base, aux_loss_coef)

    def wrap(self, optimizer: torch.optim.Optimizer, accelerator: Accelerator, **options: Any) -> Any:
        """Has accelerate wrap the model and its reference, as ``wrap_policy``; returns the optimizer, wrapped."""
        self.wrapped, optimizer = wrap_policy(self.model, optimizer, accelerator, **options)
        if self.reference is not None and self.reference is not self.model:
            self.reference = wrap_reference(self.reference, accelerator)
        return optimizer

    def loss(
        self,
        rollout: Rollout,
        advantages: Tensor,  # [B]
        *,
        old_logprobs: Tensor | None = None,  # [B, T]
        ref_logprobs: Tensor | None = None,  # [B, T]
        sampling_logprobs: Tensor | None = None,  # [B, T]
        loss_scale: float = 1.0,
        aux_loss_scale: float = 1.0,
    ) -> tuple[Tensor, GRPOLossOutput, Tensor | None]:
        """The loss to differentiate, the GRPO loss's output, and a mixture's auxiliary loss, unscaled, if it counts.

        ``loss_scale`` and ``aux_loss_scale`` are the shares of an optimizer step that the two losses here have.
        """
        inputs = self._model_inputs(rollout)

        def loss_of_hidden(hidden: Tensor, projection: Projection) -> GRPOLossOutput:
            output = linear_grpo_loss(
                inputs.select_hidden(hidden),
                projection.weight,
                inputs.select_tokens(rollout.completion_ids),
                advantages,
                inputs.select_tokens(rollout.completion_mask),
                old_logprobs=inputs.select_tokens(old_logprobs),
                ref_logprobs=inputs.select_tokens(ref_logprobs),
                sampling_logprobs=inputs.select_tokens(sampling_logprobs),
                cu_seqlens=inputs.cu_seqlens,
                loss_scale=loss_scale,
                config=self.config,
                backend=self.backend,
                **projection.options,
            )
            # accelerate makes mappings anew as it converts outputs to fp32, so PolicyMetrics travels as a tuple
            return output._replace(metrics=(output.metrics.partials, output.metrics.names))

        router_options = {"output_router_logits": True} if self.aux_loss_coef else {}
        # the forward calls loss_of_hidden in the place of its lm_head
        forward_output: HeadOutput = self.wrapped(**inputs.arguments, **router_options, head=loss_of_hidden)
        output: GRPOLossOutput = forward_output.result
        output = output._replace(metrics=PolicyMetrics(*output.metrics))
        aux_loss = forward_output.aux_loss
        if not self.aux_loss_coef:
            return output.loss, output, None
        return output.loss + self.aux_loss_coef * aux_loss_scale * aux_loss, output, aux_loss

    @torch.no_grad()
    def logprobs(self, rollout: Rollout, batch_size: int, reference: bool = False) -> Tensor:  # [B, T]
        """Log-probabilities, in nats, of the sampled tokens at the loss's temperature; 0 on padding.

        ``batch_size`` completions go through the model at once. With ``reference`` they are the frozen model's.
        """
        model = self.reference if reference else self.wrapped
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        logprobs = torch.zeros(rollout.completion_ids.shape, dtype=dtype, device=rollout.completion_ids.device)
        with self._without_adapters() if reference else contextlib.nullcontext():
            for indices in torch.arange(len(logprobs), device=logprobs.device).split(batch_size):
                values = self._logprobs_of(model, rollout.select(indices))
                logprobs[indices, : values.shape[1]] = values
        return logprobs

    def _logprobs_of(self, model: Any, rollout: Rollout) -> Tensor:
        inputs = self._model_inputs(rollout)

        def logprobs_of_hidden(hidden: Tensor, projection: Projection) -> Tensor:
            return linear_token_logprobs(
                inputs.select_hidden(hidden),
                projection.weight,
                inputs.select_tokens(rollout.completion_ids),
                temperature=self.config.temperature,
                mask=inputs.select_tokens(rollout.completion_mask),
                backend=self.backend,
                **projection.options,
            ).logprobs

        return inputs.unpack(model(**inputs.arguments, head=logprobs_of_hidden).result)

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Raises ValueError where two packed sequences have other log-probabilities than beside each other."""
        vocabulary = base_model(self.model).get_output_embeddings().weight.shape[0]
        ids = torch.arange(2 * _CHECKED_TOKENS, device=self.model.device).view(2, -1) % vocabulary
        prompt, completion = ids.chunk(2, dim=1)
        rollout = Rollout(prompt, torch.ones_like(prompt), completion, torch.ones_like(completion))
        packed = self._logprobs_of(self.model, rollout)
        self.packing = False
        error = (self._logprobs_of(self.model, rollout) - packed).abs().max().item()
        self.packing = True
        if not error <= (1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.25):
            raise ValueError(
                f"{type(base_model(self.model)).__name__} does not keep packed sequences apart, log-probabilities "
                f"differ by {error:.3g}: packing must be False"
            )

    def _without_adapters(self) -> Any:
        return self.model.disable_adapter() if has_adapters(self.model) else contextlib.nullcontext()

    def _model_inputs(self, rollout: Rollout) -> ModelInputs:
        mask, arguments = rollout.completion_mask.bool(), forward_arguments(self._known, rollout)
        if not self.packing:
            return ModelInputs(arguments, mask.shape[1], mask)
        attention = _attention_of(base_model(self.model))
        if attention != self._attention:
            raise ValueError(
                f"packing was checked with attn_implementation={self._attention!r} and is now run with {attention!r}: "
                "make the loop again"
            )
        kept = arguments.pop("attention_mask").bool()
        is_completion = nn.functional.pad(mask, (rollout.prompt_ids.shape[1], 0))
        packed = {name: arguments[name][kept][None] for name in ("input_ids", "position_ids")}
        return ModelInputs(arguments | packed | {"logits_to_keep": is_completion[kept].nonzero()[:, 0] - 1}, 0, mask)


def _check_only_adapters_train(model: Any) -> None:
    """Raises ValueError where the model without its adapters, which is the reference, would move with the policy."""
    infixes = [f".{name}" for name in model.peft_config]
    moving = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(f"{infix}." in f"{name}." for infix in infixes)
    ]
    if moving:
        raise ValueError(
            f"with beta the reference is the model without its adapters, so they alone may train, got {moving[0]} (and "
            f"{len(moving) - 1} more)"
        )


def _attention_of(base: Any) -> str | None:
    return getattr(base.config.get_text_config(), "_attn_implementation", None)


def _aux_loss_coef(base: Any, coef: float | None) -> float:
    config = base.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if coef:
            raise ValueError(
                f"router_aux_loss_coef is {coef}, but {type(base).__name__} is no mixture of experts with one"
            )
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) if coef is None else coef)


@contextlib.contextmanager
def training_mode(model: Any, active: bool) -> Iterator[None]:
    """Train mode inside, which gradient checkpointing waits for; the models have no dropout."""
    model.train(active)
    try:
        yield
    finally:
        model.eval()
