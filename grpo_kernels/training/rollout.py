"""From prompts to scored completions: the one way that training, evaluation, filters and rejection sampling take."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
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

    def predicting(self, hidden: Tensor) -> Tensor:  # [B, T + 1 or more, H] -> [B, T, H]
        """The hidden states that predict the completions' tokens."""
        return hidden[:, -(self.completion_ids.shape[1] + 1) : -1]


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
    """What draws completions from the model that is trained; every process calls it alike.

    Draws, or their seeds, come from torch's generator, so that a resumed run and an evaluation repeat them.
    """

    context_length: int | None  # tokens of a prompt and its completion; None where there is no bound
    end_ids: list[int]  # the tokens that end a completion
    gives_logprobs: bool  # whether rollouts have sampling_logprobs, at the loss's temperature: they correct the loss

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
    rows: Sequence[Row],  # B problems, each group_size times in a row
    reward_functions: Mapping[str, RewardFunction],  # by the names that metrics and errors show
    *,
    prompt_format: PromptFormat,
    step: int = 0,  # optimizer steps so far
    max_steps: int = 0,  # of the training, for reward functions to read
    group_size: int = 1,
    temperature: float | None = None,  # as for the sampler
) -> Scored:
    """Renders the prompts of rows, samples a completion of each and scores it.

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


def pad_rollout(
    prompts: Sequence[Sequence[int]],  # B lists of ids
    completions: Sequence[Sequence[int]],  # an empty one has no token in the mask
    end_ids: Sequence[int],  # the tokens that end a completion
    *,
    pad_id: int,
    device: torch.device,
    logprobs: Sequence[Sequence[float]] | None = None,  # of each completion's tokens, in nats, by what sampled them
) -> Rollout:
    """Prompts and completions of unequal lengths as a rollout; what stands after an end token does not count."""
    prompt_ids, prompt_mask = (rows.to(device) for rows in pad(prompts, pad_id, "left"))
    ids, mask = (rows.to(device) for rows in pad(completions, pad_id, "right"))
    mask = mask * end_mask(ids, end_ids)
    if logprobs is None:
        return Rollout(prompt_ids, prompt_mask, ids, mask)
    sampling_logprobs = pad(logprobs, 0.0, "right")[0].to(device)
    return Rollout(prompt_ids, prompt_mask, ids, mask, sampling_logprobs * mask)


def pad(values: Sequence[Sequence[float]], fill: float, side: str) -> tuple[Tensor, Tensor]:
    """Lists of unequal lengths as rows, and their mask; where all are empty one column, for a model to read."""
    length = max(1, *map(len, values))
    gaps = [(length - len(row), 0) if side == "left" else (0, length - len(row)) for row in values]
    rows = [[fill] * left + list(row) + [fill] * right for row, (left, right) in zip(values, gaps, strict=True)]
    mask = [[0] * left + [1] * len(row) + [0] * right for row, (left, right) in zip(values, gaps, strict=True)]
    return torch.tensor(rows), torch.tensor(mask)


def concat_rollouts(rollouts: Sequence[Rollout]) -> Rollout:
    """The completions of several rollouts in one, padded to the longest prompt and completion of them all."""
    if len(rollouts) == 1:
        return rollouts[0]

    def concat(parts: Sequence[Tensor], side: str) -> Tensor:
        length = max(part.shape[1] for part in parts)
        pads = [(length - part.shape[1], 0) if side == "left" else (0, length - part.shape[1]) for part in parts]
        return torch.cat([nn.functional.pad(part, pad) for part, pad in zip(parts, pads, strict=True)])

    columns = [[part for part in column if part is not None] for column in zip(*rollouts, strict=True)]
    sides = ("left", "left", "right", "right", "right")
    return Rollout(*(concat(parts, side) if parts else None for parts, side in zip(columns, sides, strict=True)))


def teacher_forced(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]) -> Rollout:
    """Given completions, ended by the end token, in the shape of sampled ones."""
    ids = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
    ended = [[*completion, tokenizer.eos_token_id] for completion in ids]
    pad_id = tokenizer.pad_token_id
    return Rollout(*pad(encode_prompts(prompts, tokenizer), pad_id, "left"), *pad(ended, pad_id, "right"))


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
    So are ``end_ids``, which end a completion beside the tokenizer's own.
    """
    names = (name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if name != "additional_special_tokens")
    roles = {*end_ids, *(getattr(tokenizer, f"{name}_id") for name in names)}
    ids = [[token for token in tokens if token not in roles] for tokens in completion_tokens(rollout)]
    return tokenizer.batch_decode(ids)


def completion_tokens(rollout: Rollout) -> list[list[int]]:
    """The ids of each completion, without padding."""
    lengths = rollout.completion_mask.sum(dim=1).tolist()
    return [row[:n] for row, n in zip(rollout.completion_ids.tolist(), lengths, strict=True)]


def forward_with_head(model: PreTrainedModel, rollout: Rollout, head: Head) -> Any:
    """What ``head`` makes of the hidden states [B, T+1, H], or of more before them; of a model by ``open_head``.

    The last T+1 are those whose position t predicts completion token t, and one more.
    """
    return model(**forward_arguments(inspect.signature(model.forward).parameters, rollout), head=head).result


def forward_arguments(known: Collection[str], rollout: Rollout) -> dict[str, Any]:
    """What a model's forward is given to read whole completions with their prompts, of what is ``known`` to it."""
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
    arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in known:
        arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if "logits_to_keep" in known:
        arguments["logits_to_keep"] = rollout.completion_ids.shape[1] + 1
    return arguments


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those the model's generation config adds."""
    own = model.generation_config.eos_token_id
    extra = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *extra})
