"""Interval attention by torch's FlexAttention, with the sparse block mask built from the intervals, never from a T x T evaluation.

A block of queries sees keys from its lowest lo to its highest hi. Key blocks of that range are visited; those that every query of the block sees
whole are visited without asking the mask. Only blocks x blocks numbers exist, (T / 128)^2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


def prepare(lo: Tensor, hi: Tensor, lengths: tuple[int, ...], masks: tuple[str, ...]) -> BlockMask:
    """The block mask of packed tokens; nothing is read back from the device."""
    count = -(-len(lo) // BLOCK)
    inside = torch.arange(count * BLOCK, device=lo.device).clamp(max=len(lo) - 1).view(count, BLOCK)
    low, high, block = lo[inside], hi[inside], torch.arange(count, device=lo.device)
    touched = (block >= low.amin(1)[:, None] // BLOCK) & (block * BLOCK < high.amax(1)[:, None])
    whole = (block * BLOCK >= low.amax(1)[:, None]) & ((block + 1) * BLOCK <= high.amin(1)[:, None])
    return BlockMask.from_kv_blocks(*_ordered(touched & ~whole), *_ordered(whole), BLOCK_SIZE=BLOCK, seq_lengths=(len(lo), len(lo)),
                                    mask_mod=lambda b, h, i, j: (j >= lo[i]) & (j < hi[i]))


def attend(q: Tensor, k: Tensor, v: Tensor, plan: BlockMask, scale: float, name: str = "flex") -> Tensor:
    """`interval_attention` by FlexAttention, which has no backward pass on a CPU."""
    run = _compiled() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return run(q[None], k[None], v[None], block_mask=plan, scale=scale, enable_gqa=q.shape[0] != k.shape[0])[0].transpose(0, 1)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of bool [blocks, blocks] has, and which, first in the order: int32 [1, 1, blocks] and [1, 1, blocks, blocks]."""
    return blocks.sum(1, dtype=torch.int32)[None, None], blocks.int().argsort(dim=1, descending=True, stable=True).int()[None, None]


@cache
def _compiled() -> Callable[..., Tensor]:
    """One kernel for all lengths: uncompiled, FlexAttention stores all scores."""
    return torch.compile(flex_attention, dynamic=True)
