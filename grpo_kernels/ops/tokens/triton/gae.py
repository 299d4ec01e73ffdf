"""The Triton kernel of ``gae`` and its launcher. A program scans one completion from its end, in blocks of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.ops.tokens.triton.launch import as_bytes, check_tokens

_BLOCK = 1024  # tokens per block


@triton.jit
def _compose(scale, offset, next_scale, next_offset):
    """``x -> next_scale (scale x + offset) + next_offset``."""
    return scale * next_scale, next_scale * offset + next_offset


@triton.jit(do_not_specialize=["tokens"])
def _gae_kernel(
    rewards_ptr,  # [N], like the next two
    values_ptr,
    mask_ptr,
    offsets_ptr,  # [S + 1]
    out_ptr,  # [N]
    tokens,
    gamma: tl.float64,
    lam: tl.float64,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(offsets_ptr + s), 0)
    end = tl.minimum(tl.load(offsets_ptr + s + 1), tokens)  # not checked on a GPU: keep reads in bounds
    discount = tl.full([], gamma, tl.float64)
    decay = discount * tl.full([], lam, tl.float64)
    lanes = tl.arange(0, BLOCK)
    last = lanes == BLOCK - 1
    value_after = tl.full([], 0.0, tl.float64)  # of the first unmasked token after the block
    advantage_after = tl.full([], 0.0, tl.float64)
    for start in range(0, end - begin, BLOCK):
        n = end - 1 - start - lanes  # from the end
        inside = n >= begin
        live = tl.load(mask_ptr + n, mask=inside, other=0) != 0
        value = tl.load(values_ptr + n, mask=live, other=0.0).to(tl.float64)
        reward = tl.load(rewards_ptr + n, mask=live, other=0.0).to(tl.float64)
        # the value of the next unmasked token in the block, by a scan
        has_follower = inside & (lanes > 0)
        follows = tl.load(mask_ptr + n + 1, mask=has_follower, other=0) != 0
        follower = tl.load(values_ptr + n + 1, mask=follows, other=0.0).to(tl.float64)
        carry, next_in_block = tl.associative_scan((tl.where(follows, 0.0, 1.0).to(tl.float64), follower), 0, _compose)
        delta = reward + discount * (carry * value_after + next_in_block) - value
        # a masked token passes the advantage of the next token on
        scale = tl.where(live, decay, 1.0)
        scale, offset = tl.associative_scan((scale, tl.where(live, delta, 0.0)), 0, _compose)
        advantage = scale * advantage_after + offset
        tl.store(out_ptr + n, tl.where(live, advantage, 0.0).to(out_ptr.dtype.element_ty), mask=inside)
        value_after = tl.sum(tl.where(last, tl.where(live, value, carry * value_after + next_in_block), 0.0), 0)
        advantage_after = tl.sum(tl.where(last, advantage, 0.0), 0)


def gae(
    rewards: Tensor,  # [N], completions end to end
    values: Tensor,  # [N]
    mask: Tensor,  # [N]
    offsets: Tensor,  # [S + 1]
    gamma: float,
    lam: float,
) -> Tensor:  # [N]
    """The registered op."""
    tokens = values.shape[0]
    check_tokens(tokens, values.dtype, rewards=rewards, values=values)
    check_tokens(tokens, torch.bool, mask=mask)
    check_tokens(offsets.numel(), torch.int64, offsets=offsets)
    advantages = torch.empty_like(values)
    if offsets.shape[0] > 1:
        arguments = (rewards, values, as_bytes(mask), offsets, advantages, tokens, gamma, lam)
        _gae_kernel[(offsets.shape[0] - 1,)](*arguments, BLOCK=_BLOCK)
    return advantages
