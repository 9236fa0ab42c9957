"""Top-k of every segment in one pass, one program per segment, which it holds whole.

A score's bits, read as an integer, keep its order. Bisection over these bits finds the k-th best score without sorting; what is above it is kept, of
what equals it the earlier tokens; two prefix sums put the kept tokens in order.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = tl.constexpr(-(2**31))
MOST = tl.constexpr(2**31 - 1)


@triton.jit
def select_kernel(score, sizes, index, last, rank, T, S, BLOCK: tl.constexpr):
    """sizes: int32 [S, 4] = start, tokens n, kept k, kept in the segments before."""
    s = tl.program_id(0)
    start, n, k, before = tl.load(sizes + 4 * s), tl.load(sizes + 4 * s + 1), tl.load(sizes + 4 * s + 2), tl.load(sizes + 4 * s + 3)
    i = tl.arange(0, BLOCK)
    inside = i < n
    x = tl.load(score + start + i, mask=inside, other=0).to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)              # -0.0 equals 0.0
    key = tl.where(bits < 0, bits ^ MOST, bits)
    key = tl.where(inside, tl.where(x != x, MOST, key), LEAST)              # nan goes first, as in torch's descending sort

    places = tl.maximum(k, 1)                                               # k = 0: only to find the best
    edge = tl.full((), LEAST, tl.int32)
    for bit in range(32):                                                   # the largest edge with at least k keys on or above it
        higher = edge ^ (tl.full((), 1, tl.int32) << (31 - bit))
        edge = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= places, higher, edge)

    above, tie = key > edge, key == edge
    free = places - tl.sum(above.to(tl.int32), 0)
    kept = above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= free))
    tl.store(last + s, tl.minimum(start + tl.max(tl.where(kept & tie, i, 0), 0), T - 1))
    kept = kept & (k > 0)
    slot = before + tl.cumsum(kept.to(tl.int32), 0) - kept.to(tl.int32)
    tl.store(index + slot, (start + i).to(tl.int64), mask=kept)
    tl.store(rank + start + i, slot.to(tl.int64), mask=inside)
    if s == S - 1:
        tl.store(rank + T, (before + k).to(tl.int64))


@lru_cache(maxsize=256)
def _sizes(lengths: tuple[int, ...], keep: tuple[int, ...], device: torch.device) -> Tensor:
    """The kernel's table on the device: one upload per batch and number kept, which nothing waits for."""
    rows = zip(accumulate(lengths, initial=0), lengths, keep, accumulate(keep, initial=0))
    return torch.tensor(list(rows), dtype=torch.int32).to(device, non_blocking=True)


@torch.library.custom_op("unimod::select", mutates_args=(), schema="(Tensor score, SymInt[] lengths, SymInt[] keep) -> (Tensor, Tensor, Tensor)")
def _select(score: Tensor, lengths: list[int], keep: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    index, last, rank = (torch.empty(n, dtype=torch.long, device=score.device) for n in (sum(keep), len(keep), len(score) + 1))
    block = max(16, 1 << (max(lengths) - 1).bit_length())
    with torch.cuda.device_of(score):
        select_kernel[(len(keep),)](score.contiguous(), _sizes(tuple(lengths), tuple(keep), score.device), index, last, rank, len(score), len(keep),
                                    BLOCK=block, num_warps=min(32, max(4, block // 512)))
    return index, last, rank


@_select.register_fake
def _(score: Tensor, lengths: list[int], keep: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(score.new_empty(n, dtype=torch.long) for n in (sum(keep), len(keep), len(score) + 1))


def select(score: Tensor, lengths: tuple[int, ...], keep: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.select.select`, for segments that fit a program."""
    return _select(score.detach(), lengths, keep)
