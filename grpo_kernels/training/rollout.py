"""From prompts to scored completions: the one way that training, evaluation, filters and rejection sampling take."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.integrations.transformers.model_head import Head
from grpo_kernels.rewards.scoring import RewardFunction, RewardLog, columns_of, score
from grpo_kernels.training.data.files import Row
from grpo_kernels.training.data.templates import PromptFormat, encode_prompts, render_prompts, whole_completion


class Rollout(NamedTuple):
    """B completions with their prompts. P and T are the longest prompt and completion."""

    prompt_ids: Tensor  # [B, P], padded on the left
    prompt_mask: Tensor  # [B, P], 0 on padding
    completion_ids: Tensor  # [B, T], padded on the right
    completion_mask: Tensor  # [B, T], 1 up to and including the end token
    sampling_logprobs: Tensor | None = None  # [B, T], nats, by the engine that sampled; 0 on padding

    def select(self, indices: Tensor) -> Rollout:
        """The completions at ``indices``, without the columns that are padding for all of them."""
        prompt_mask, completion_mask = self.prompt_mask[indices], self.completion_mask[indices]
        first = int((prompt_mask.sum(dim=0) == 0).sum())
        length = max(1, int(completion_mask.sum(dim=1).max()))
        return Rollout(
            self.prompt_ids[indices, first:],
            prompt_mask[:, first:],
            self.completion_ids[indices, :length],
            completion_mask[:, :length],
            None if self.sampling_logprobs is None else self.sampling_logprobs[indices, :length],
        )


class Scored(NamedTuple):
    """B completions of one process with their rewards, group after group."""

    rollout: Rollout
    rewards: Tensor  # [B, K], on the host
    prompts: list[str]  # as the model saw them
    completions: list[str]  # as the rewards did
    extras: list[dict[str, Any]]  # what reward functions logged of each
    metrics: dict[str, list[float]]  # and of them all

    def groups(self, indices: Tensor, num_generations: int) -> Scored:
        """The groups at ``indices``."""
        rows = (indices[:, None] * num_generations + torch.arange(num_generations)).flatten()
        prompts, completions, extras = ([values[i] for i in rows.tolist()] for values in self[2:5])
        rollout = self.rollout.select(rows.to(self.rollout.completion_ids.device))
        return Scored(rollout, self.rewards[rows], prompts, completions, extras, self.metrics)


class Sampler(Protocol):
    """What draws completions from the model that is trained; every process calls it alike."""

    context_length: int | None  # tokens of a prompt and its completion; None where there is no bound
    end_ids: list[int]  # the tokens that end a completion

    def __call__(
        self, prompts: Sequence[str], *, step: int = 0, group_size: int = 1, temperature: float | None = None
    ) -> Rollout:
        """A completion of each prompt of this process.

        Args:
            prompts: As rendered; each is repeated ``group_size`` times in a row.
            step: Optimizer steps so far, by which a server knows whether its weights are old.
            group_size: Completions of one prompt.
            temperature: Divides the logits; 0 is greedy. None: the temperature that the sampler was made with.
        """


def score_rollout(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    reward_functions: Mapping[str, RewardFunction],
    *,
    prompt_format: PromptFormat,
    step: int = 0,
    max_steps: int = 0,
    group_size: int = 1,
    temperature: float | None = None,
) -> Scored:
    """Renders the prompts of rows, samples a completion of each and scores it.

    Args:
        sampler: Draws the completions.
        tokenizer: Of prompts and completions.
        rows: B problems, each ``group_size`` times in a row.
        reward_functions: By the names that metrics and errors show.
        prompt_format: How prompts are rendered.
        step: Optimizer steps so far.
        max_steps: Of the training, for reward functions to read.
        group_size: Completions of one problem.
        temperature: As for the sampler.

    Raises:
        ThirdPartyError: A reward function or a chat template failed.
        ValueError: A reward is not finite, or there is not one per completion.
    """
    prompts = render_prompts(rows, tokenizer, prompt_format)
    rollout = sampler(prompts, step=step, group_size=group_size, temperature=temperature)
    texts = completion_texts(rollout, tokenizer, sampler.end_ids)
    completions = [whole_completion(*each) for each in zip(rows, prompts, texts, strict=True)]
    log = RewardLog(step, max_steps)
    columns = columns_of(rows, completion_tokens(rollout))
    rewards = score(reward_functions, [row["prompt"] for row in rows], completions, columns, log)
    return Scored(rollout, rewards, prompts, completions, log.rows(len(rows)), log.metrics)


def concat_scored(parts: Sequence[Scored]) -> Scored:
    """All of them in one."""
    if len(parts) == 1:
        return parts[0]
    prompts, completions, extras = ([value for part in parts for value in part[k]] for k in (2, 3, 4))
    names = dict.fromkeys(name for part in parts for name in part.metrics)
    metrics = {name: [value for part in parts for value in part.metrics.get(name, ())] for name in names}
    rewards = torch.cat([part.rewards for part in parts])
    rollout = concat_rollouts([part.rollout for part in parts])
    return Scored(rollout, rewards, prompts, completions, extras, metrics)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_completion_length: int,
    temperature: float,
    synced: bool = False,
) -> Rollout:
    """Samples one completion per prompt from the whole distribution (no top-k, top-p or penalty), or the greedy one.

    The model's own generation config is set aside, so that the sampled distribution is the one that the loss sees.

    Args:
        model: Any causal language model, on any device.
        tokenizer: Must have a pad token; pads on the left here whatever it is set to.
        prompts: B texts. Repeat a prompt for a group.
        max_completion_length: Tokens at most.
        temperature: Divides the logits; 0 is greedy.
        synced: Every process goes on until the last is done, as models whose parameters are divided need.
    """
    prompt_ids, prompt_mask = (ids.to(model.device) for ids in _padded_prompts(tokenizer, prompts))
    config = generation_config(model, tokenizer, max_completion_length, temperature)
    models_own = model.generation_config
    model.generation_config = GenerationConfig()  # generate() fills what is unset from here
    try:
        with torch.no_grad():
            sequences = model.generate(
                prompt_ids, attention_mask=prompt_mask, generation_config=config, synced_gpus=synced
            )
    finally:
        model.generation_config = models_own
    completion_ids = sequences[:, prompt_ids.shape[1] :].contiguous()
    return Rollout(prompt_ids, prompt_mask, completion_ids, end_mask(completion_ids, config.eos_token_id))


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_completion_length: int, temperature: float
) -> GenerationConfig:
    """What samples from the whole distribution of the logits over ``temperature``; greedily at 0."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return GenerationConfig(
        max_new_tokens=max_completion_length,
        eos_token_id=end_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )


def padded(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    *,
    pad_id: int,
    device: torch.device,
    logprobs: Sequence[Sequence[float]] | None = None,
) -> Rollout:
    """B prompts and completions of unequal lengths as a rollout; what stands after an end token does not count.

    Args:
        prompts: Ids of tokens.
        completions: Ids of tokens; one may be empty, and then has no token in the mask.
        end_ids: The tokens that end a completion.
        pad_id: Fills the rows.
        device: Of the tensors.
        logprobs: Of each completion's tokens, in nats, by what sampled them.
    """

    def rows(values: Sequence[Sequence[float]], fill: float, dtype: torch.dtype, side: str = "right") -> Tensor:
        tensors = [torch.tensor(list(value), dtype=dtype) for value in values]
        found = pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)
        if not found.shape[1]:  # all are empty: one column, for a model to read
            found = torch.full((len(tensors), 1), fill, dtype=dtype)
        return found.to(device)

    def ones(values: Sequence[Sequence[int]]) -> list[list[int]]:
        return [[1] * len(value) for value in values]

    ids = rows(completions, pad_id, torch.long)
    mask = rows(ones(completions), 0, torch.long) * end_mask(ids, end_ids)
    sampling_logprobs = None if logprobs is None else rows(logprobs, 0.0, torch.float32) * mask
    prompt_ids = rows(prompts, pad_id, torch.long, "left")
    return Rollout(prompt_ids, rows(ones(prompts), 0, torch.long, "left"), ids, mask, sampling_logprobs)


def concat_rollouts(rollouts: Sequence[Rollout]) -> Rollout:
    """The completions of several rollouts in one, padded to the longest prompt and completion of them all."""
    if len(rollouts) == 1:
        return rollouts[0]
    prompt, completion = (max(r[k].shape[1] for r in rollouts) for k in (0, 2))

    def left(values: Tensor) -> Tensor:
        return nn.functional.pad(values, (prompt - values.shape[1], 0))

    def right(values: Tensor) -> Tensor:
        return nn.functional.pad(values, (0, completion - values.shape[1]))

    scored = rollouts[0].sampling_logprobs is not None
    return Rollout(
        torch.cat([left(r.prompt_ids) for r in rollouts]),
        torch.cat([left(r.prompt_mask) for r in rollouts]),
        torch.cat([right(r.completion_ids) for r in rollouts]),
        torch.cat([right(r.completion_mask) for r in rollouts]),
        torch.cat([right(r.sampling_logprobs) for r in rollouts]) if scored else None,
    )


def teacher_forced(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]) -> Rollout:
    """Given completions, ended by the end token, in the shape of sampled ones."""
    ids = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
    ended = [[*completion, tokenizer.eos_token_id] for completion in ids]
    padded = tokenizer.pad({"input_ids": ended}, padding_side="right", return_tensors="pt")
    return Rollout(*_padded_prompts(tokenizer, prompts), padded["input_ids"], padded["attention_mask"])


def _padded_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The tokens of prompts and their mask, both [B, P]."""
    ids = {"input_ids": encode_prompts(prompts, tokenizer)}
    encoded = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def end_mask(completion_ids: Tensor, end_ids: Sequence[int]) -> Tensor:  # [B, T] -> [B, T]
    """1 up to and including each completion's first end token, 0 after it; also where padding is an end token."""
    is_end = torch.isin(completion_ids, torch.tensor(end_ids, device=completion_ids.device)).long()
    return (is_end.cumsum(dim=1) - is_end == 0).long()


def ends(rollout: Rollout, end_ids: Sequence[int]) -> Tensor:  # [B]
    """Whether each completion has an end token, rather than being cut off at the length limit."""
    is_end = torch.isin(rollout.completion_ids, torch.tensor(end_ids, device=rollout.completion_ids.device))
    return (is_end & rollout.completion_mask.bool()).any(dim=1)


def completion_texts(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int] = ()) -> list[str]:
    """The decoded completions, as reward functions read them.

    Tokens with a role are left out: those that begin, end, pad or mask a text, and the unknown one. Any other stands in
    the text as the model wrote it, also one that the tokenizer calls special, as ``<think>`` often is.

    Args:
        rollout: B completions.
        tokenizer: Theirs.
        end_ids: Tokens that end a completion beside the tokenizer's own.
    """
    names = (name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if name != "additional_special_tokens")
    roles = {*end_ids, *(getattr(tokenizer, f"{name}_id") for name in names)}
    ids = [[token for token in tokens if token not in roles] for tokens in completion_tokens(rollout)]
    return tokenizer.batch_decode(ids)


def completion_tokens(rollout: Rollout) -> list[list[int]]:
    """The ids of each completion, without padding."""
    lengths = rollout.completion_mask.sum(dim=1).tolist()
    return [row[:n] for row, n in zip(rollout.completion_ids.tolist(), lengths, strict=True)]


def run_head(model: PreTrainedModel, rollout: Rollout, head: Head) -> Any:
    """What ``head`` makes of the hidden states [B, T+1, H], or of more before them; of a model by ``open_head``.

    The last T+1 are those whose position t predicts completion token t, and one more.
    """
    return model(**forward_arguments(inspect.signature(model.forward).parameters, rollout), head=head).result


def forward_arguments(known: Collection[str], rollout: Rollout) -> dict[str, Any]:
    """What a model's forward is given to read whole completions with their prompts.

    Args:
        known: The arguments that it takes: of positions and of logits to keep only what is in there is given.
        rollout: B completions.
    """
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
    found = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in known:
        found["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if "logits_to_keep" in known:
        found["logits_to_keep"] = rollout.completion_ids.shape[1] + 1
    return found


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those the model's generation config adds."""
    own = model.generation_config.eos_token_id
    extra = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *extra})
