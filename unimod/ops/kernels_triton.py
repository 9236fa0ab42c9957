"""Triton kernels of `select` and `scatter`, forward and backward. No atomics: runs repeat bit by bit.

Imported when the first of them runs, so that the package needs no triton. Each op is a `torch.autograd.Function` around
`backend.launch`.
"""

# A custom_op costs the host 13 us per forward, a Function 3.7 us: at 24 routed layers and 3 ops a layer 0.7 ms a step.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .backend import launch

LEAST = tl.constexpr(-(2**31))
MOST = tl.constexpr(2**31 - 1)


def row_block(width: int) -> dict[str, int]:
    """The block that holds a row of `width` entries, and its warps: keyword arguments of a launch."""
    block = max(16, 1 << (width - 1).bit_length())
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


# Selection. A score's bits, read as an integer, keep its order. Bisection over these bits finds the k-th best score
# without sorting; what is above it is kept, of what equals it the earlier tokens; two prefix sums put the kept tokens
# in order.


@triton.jit
def gate_value(score, gain, GATE: tl.constexpr):
    """`route.GATE` of float32 scores."""
    if GATE == "tanh":
        value = 1 + gain * (2 * tl.sigmoid(2 * score) - 1)              # tanh x = 2 sigmoid(2 x) - 1, which is 0 at 0
    elif GATE == "sigmoid":
        value = tl.sigmoid(score)
    elif GATE == "raw":
        value = score
    else:                                                               # none, and straight-through
        value = tl.zeros_like(score) + 1
    return value


@triton.jit
def gate_slope(score, gain, GATE: tl.constexpr):
    """Its derivative."""
    if GATE == "tanh":
        s = tl.sigmoid(2 * score)
        slope = gain * (4 * s * (1 - s))
    elif GATE == "raw":
        slope = tl.zeros_like(score) + 1
    else:                                                               # sigmoid, and straight-through
        s = tl.sigmoid(score)
        slope = s * (1 - s)
    return slope


@triton.jit
def select_kernel(score, sizes, eligible, index, last, rank, factor, T, S, gain, GATE: tl.constexpr,
                  BLOCK: tl.constexpr):
    """One program per segment, which it holds whole. sizes: int32 [S, 4] = start, tokens n, kept k, kept in the
    segments before. factor: None, or float32 [K]: the gate of kept tokens' scores, 1 where not eligible."""
    s = tl.program_id(0)
    row = sizes + 4 * s
    start, n, k, before = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    i = tl.arange(0, BLOCK)
    inside = i < n
    x = tl.load(score + start + i, mask=inside, other=0).to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)          # -0.0 equals 0.0
    key = tl.where(bits < 0, bits ^ MOST, bits)
    key = tl.where(inside, tl.where(x != x, MOST, key), LEAST)          # nan goes first, as in torch's descending sort

    places = tl.maximum(k, 1)                                           # k = 0: only to find the best
    edge = tl.full((), LEAST, tl.int32)
    for bit in range(32):                                               # the largest edge with at least k keys >= it
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
    if factor is not None:
        chosen = tl.load(eligible + start + i, mask=inside, other=0)
        tl.store(factor + slot, tl.where(chosen, gate_value(x, gain, GATE), 1.0), mask=kept)
    if s == S - 1:
        tl.store(rank + T, (before + k).to(tl.int64))


def launch_select(score: Tensor, longest: int, kept: int, sizes: Tensor, *, eligible: Tensor | None = None,
                  factor: Tensor | None = None, gate: str | None = None,
                  gain: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`select.select` of `kept` tokens in all; segments of at most `longest` <= `select.LONGEST` tokens. Also fills
    `factor`."""
    index, last, rank = (score.new_empty(n, dtype=torch.long) for n in (kept, len(sizes), len(score) + 1))
    block = max(16, 1 << (longest - 1).bit_length())
    launch(select_kernel, (len(sizes),), score, sizes, eligible, index, last, rank, factor, len(score), len(sizes),
           gain, GATE=gate, BLOCK=block, num_warps=min(32, max(4, block // 512)))
    return index, last, rank


# Scatter: one program per token, forward and backward. Kept rows are unique, so each program writes its own row of h's
# gradient and, where the token was kept, its own row of y's. Rows of D entries moved: forward 2T + K (3K in place),
# backward 2T + 3K.


@triton.jit
def scatter_kernel(h, y, gated, weight, rank, out, D, INPLACE: tl.constexpr, BLOCK: tl.constexpr):
    """out_t = y + (w - 1) * m of a kept token, m = gated or y - h_t; h_t of any other (INPLACE: it is there
    already)."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside, row = d < D, t * D + d
    slot = tl.load(rank + t)
    if tl.load(rank + t + 1) > slot:
        new = tl.load(y + slot * D + d, mask=inside).to(tl.float32)
        update = tl.load(gated + slot * D + d, mask=inside).to(tl.float32) if gated is not None else (
            new - tl.load(h + row, mask=inside).to(tl.float32))
        tl.store(out + row, new + (tl.load(weight + slot).to(tl.float32) - 1) * update, mask=inside)
    elif not INPLACE:
        tl.store(out + row, tl.load(h + row, mask=inside), mask=inside)


@triton.jit
def scatter_backward_kernel(grad, h, y, gated, weight, rank, dh, dy, dgated, dweight, D, BLOCK: tl.constexpr):
    """Of a kept token: dh = (1 - w) g, dy = w g, dw = <g, y - h>; where `gated` is weighted: dh = 0, dy = g,
    dgated = (w - 1) g, dw = <g, gated>."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside, row = d < D, t * D + d
    given = tl.load(grad + row, mask=inside, other=0)
    slot = tl.load(rank + t)
    if tl.load(rank + t + 1) > slot:
        g = given.to(tl.float32)
        w = tl.load(weight + slot).to(tl.float32)
        small = slot * D + d
        if dweight is not None:
            if gated is not None:
                update = tl.load(gated + small, mask=inside, other=0).to(tl.float32)
            else:
                update = tl.load(y + small, mask=inside, other=0).to(tl.float32)
                update -= tl.load(h + row, mask=inside, other=0).to(tl.float32)
            tl.store(dweight + slot, tl.sum(g * update, 0))
        if dgated is not None:
            tl.store(dh + row, tl.zeros_like(g), mask=inside)
            tl.store(dy + small, g, mask=inside)
            tl.store(dgated + small, (w - 1) * g, mask=inside)
        else:
            tl.store(dh + row, (1 - w) * g, mask=inside)
            tl.store(dy + small, w * g, mask=inside)
    else:
        tl.store(dh + row, given, mask=inside)


class Scatter(torch.autograd.Function):
    """`gather_scatter.scatter`, one launch each way. h: [T, D]; y, gated: [K, D]; weight: [K]; rank: int64 [T + 1]."""

    @staticmethod
    def forward(ctx: FunctionCtx, h: Tensor, y: Tensor, gated: Tensor | None, weight: Tensor, rank: Tensor) -> Tensor:
        ctx.weighs_gated, ctx.learned, ctx.dtype = gated is not None, ctx.needs_input_grad[3], y.dtype
        rows = (None, None, None)                       # nothing to learn: no [K, D] is kept for the backward
        if ctx.learned:
            rows = (h, y, None) if gated is None else (None, None, gated)
        ctx.save_for_backward(*rows, weight, rank)
        h = h.contiguous()
        return launch_scatter(h, y, gated, weight, rank, h.new_empty(h.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *rows, weight, rank = ctx.saved_tensors
        h, y, gated = (None if x is None else x.contiguous() for x in rows)
        grad, (T, D) = grad.contiguous(), grad.shape[-2:]
        dh, dy = torch.empty_like(grad), grad.new_empty(*grad.shape[:-2], len(weight), D, dtype=ctx.dtype)
        dgated = torch.empty_like(dy) if ctx.weighs_gated else None
        dweight = torch.empty_like(weight) if ctx.learned else None
        launch(scatter_backward_kernel, (T,), grad, h, y, gated, weight.contiguous(), rank, dh, dy, dgated, dweight, D,
               **row_block(D))
        return dh, dy, dgated, dweight, None


def launch_scatter(h: Tensor, y: Tensor, gated: Tensor | None, weight: Tensor, rank: Tensor, out: Tensor) -> Tensor:
    """Fill `out`, which may be h itself; both are contiguous."""
    gated = None if gated is None else gated.contiguous()
    T, D = h.shape[-2:]
    launch(scatter_kernel, (T,), h, y.contiguous(), gated, weight.contiguous(), rank, out, D, INPLACE=out is h,
           **row_block(D))
    return out
