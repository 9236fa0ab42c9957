"""Triton kernels of `select`, `gather_norm` and `scatter`, forward and backward. No atomics: runs repeat bit by bit.

Imported when the first of them runs, so that the package needs no triton.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""Programs of the backward of `gather_norm`, at most: about four per multiprocessor of an H200."""
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
def select_kernel(score, sizes, index, last, rank, T, S, BLOCK: tl.constexpr):
    """One program per segment, which it holds whole. sizes: int32 [S, 4] = start, tokens n, kept k, kept in the
    segments before."""
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
    if s == S - 1:
        tl.store(rank + T, (before + k).to(tl.int64))


@lru_cache(maxsize=256)
def _sizes(lengths: tuple[int, ...], keep: tuple[int, ...], device: torch.device) -> Tensor:
    """The kernel's table on the device: one upload per batch and number kept, which nothing waits for."""
    rows = zip(accumulate(lengths, initial=0), lengths, keep, accumulate(keep, initial=0))
    return torch.tensor(list(rows), dtype=torch.int32).to(device, non_blocking=True)


@torch.library.custom_op("unimod::select", mutates_args=(),
                         schema="(Tensor score, SymInt[] lengths, SymInt[] keep) -> (Tensor, Tensor, Tensor)")
def select(score: Tensor, lengths: list[int], keep: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """`select.select`, for segments of at most `select.LONGEST` tokens."""
    index, last, rank = _selected(score, lengths, keep)
    block = max(16, 1 << (max(lengths) - 1).bit_length())
    sizes = _sizes(tuple(lengths), tuple(keep), score.device)
    with torch.cuda.device_of(score):
        select_kernel[(len(keep),)](score.contiguous(), sizes, index, last, rank, len(score), len(keep),
                                    BLOCK=block, num_warps=min(32, max(4, block // 512)))
    return index, last, rank


@select.register_fake
def _selected(score: Tensor, lengths: list[int], keep: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    index, last, rank = (score.new_empty(n, dtype=torch.long) for n in (sum(keep), len(keep), len(score) + 1))
    return index, last, rank


# Gather and norm. Forward: one program per kept token. Backward: a few programs that go through all tokens in turn;
# each sums dweight and dbias of its own tokens, and the sums are added up after. With c = x - mean (rms: x), s = 1 /
# sqrt(mean(c^2) + eps), v = c s and u = dn * weight:
#  dx = s (u - [mean(u)] - v mean(u v)),    dweight = sum over tokens of dn * v,    dbias = sum of dn        ([]
# LayerNorm only)


@triton.jit
def standard(x, inside, D, eps, CENTRED: tl.constexpr):
    """v and s of one row."""
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / D, 0)
    s = 1 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    return x * s, s


@triton.jit
def gather_kernel(h, index, weight, bias, x, n, D, eps, CENTRED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """One row of x = h[index] and n = norm(x)."""
    slot = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside, small = d < D, slot * D + d
    row = tl.load(h + tl.load(index + slot) * D + d, mask=inside, other=0)
    tl.store(x + small, row, mask=inside)
    v, _ = standard(row.to(tl.float32), inside, D, eps, CENTRED)
    if not CENTRED:
        v = v.to(row.dtype).to(tl.float32)                  # Llama's rounds here, LayerNorm once at the end
    out = v * tl.load(weight + d, mask=inside, other=0).to(tl.float32)
    if BIAS:
        out += tl.load(bias + d, mask=inside, other=0).to(tl.float32)
    tl.store(n + small, out, mask=inside)


@triton.jit
def gather_backward_kernel(dx, dn, x, weight, rank, dh, dweight, dbias, T, D, eps, CENTRED: tl.constexpr,
                           BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """dh: [T, D], zero where a token was not kept; dweight, dbias: float32 [programs, D]."""
    p = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    gain = tl.load(weight + d, mask=inside, other=0).to(tl.float32)
    sum_weight, sum_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for t in range(p, T, tl.num_programs(0)):
        slot = tl.load(rank + t)
        out = tl.zeros((BLOCK,), tl.float32)
        if tl.load(rank + t + 1) > slot:
            small = slot * D + d
            v, s = standard(tl.load(x + small, mask=inside, other=0).to(tl.float32), inside, D, eps, CENTRED)
            g = tl.load(dn + small, mask=inside, other=0).to(tl.float32)
            sum_weight += g * v
            if BIAS:
                sum_bias += g
            u = g * gain
            out = u - v * (tl.sum(u * v, 0) / D)
            if CENTRED:
                out -= tl.sum(u, 0) / D
            out = out * s + tl.load(dx + small, mask=inside, other=0).to(tl.float32)
        tl.store(dh + tl.cast(t, tl.int64) * D + d, out, mask=inside)
    tl.store(dweight + p * D + d, sum_weight, mask=inside)
    if BIAS:
        tl.store(dbias + p * D + d, sum_bias, mask=inside)


@torch.library.custom_op("unimod::gather_norm", mutates_args=())
def gather_norm(h: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, rank: Tensor, eps: float,
                centred: bool) -> tuple[Tensor, Tensor]:
    """h: [T, D]; index: int64 [K]; weight, bias: [D]; rank: int64 [T + 1]. Returns x and n, both [K, D]."""
    h, D = h.contiguous(), h.shape[1]
    x, n = _gathered(h, index, weight, bias, rank, eps, centred)
    if len(index):
        with torch.cuda.device_of(h):
            gather_kernel[(len(index),)](h, index, weight, weight if bias is None else bias, x, n, D, eps,
                                         CENTRED=centred, BIAS=bias is not None, **row_block(D))
    return x, n


@gather_norm.register_fake
def _gathered(h: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, rank: Tensor, eps: float,
              centred: bool) -> tuple[Tensor, Tensor]:
    return h.new_empty(len(index), h.shape[1]), h.new_empty(len(index), h.shape[1])


@torch.library.custom_op("unimod::gather_norm_backward", mutates_args=())
def gather_norm_backward(dx: Tensor, dn: Tensor, x: Tensor, weight: Tensor, rank: Tensor, eps: float, centred: bool,
                         bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h [T, D], weight [D] and, where there is a bias, of the bias [D] (else empty)."""
    T, D = len(rank) - 1, x.shape[1]
    programs = min(T, PROGRAMS)
    dh = x.new_empty(T, D)
    dweight, dbias = (x.new_empty(programs if there else 0, D, dtype=torch.float32) for there in (True, bias))
    with torch.cuda.device_of(x):
        gather_backward_kernel[(programs,)](dx.contiguous(), dn.contiguous(), x, weight, rank, dh, dweight, dbias, T, D,
                                            eps, CENTRED=centred, BIAS=bias, **row_block(D))
    return dh, dweight.sum(0).to(weight.dtype), (dbias.sum(0) if bias else dbias.view(0)).to(weight.dtype)


@gather_norm_backward.register_fake
def _(dx: Tensor, dn: Tensor, x: Tensor, weight: Tensor, rank: Tensor, eps: float, centred: bool,
      bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(len(weight) if bias else 0)
    return x.new_empty(len(rank) - 1, x.shape[1]), torch.empty_like(weight), dbias


def _save_gather(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, bias, rank, ctx.eps, ctx.centred = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(output[0], weight, rank)


def _backward_gather(ctx: torch.autograd.function.FunctionCtx, dx: Tensor, dn: Tensor) -> tuple[Tensor | None, ...]:
    dh, dweight, dbias = gather_norm_backward(dx, dn, *ctx.saved_tensors, ctx.eps, ctx.centred, ctx.bias)
    return dh, None, dweight, dbias if ctx.bias else None, None, None, None


gather_norm.register_autograd(_backward_gather, setup_context=_save_gather)


# Scatter: one program per token, forward and backward. Kept rows are unique, so each program writes its own row of h's
# gradient and, where the token was kept, its own row of y's. Rows of D entries moved: forward 2T + K (3K in place),
# backward 2T + 3K.


@triton.jit
def scatter_kernel(h, y, gated, weight, rank, out, D, GATED: tl.constexpr, INPLACE: tl.constexpr, BLOCK: tl.constexpr):
    """out_t = y + (w - 1) * m of a kept token, m = gated or y - h_t; h_t of any other (INPLACE: it is there
    already)."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside, row = d < D, t * D + d
    slot = tl.load(rank + t)
    if tl.load(rank + t + 1) > slot:
        new = tl.load(y + slot * D + d, mask=inside).to(tl.float32)
        update = tl.load(gated + slot * D + d, mask=inside).to(tl.float32) if GATED else (
            new - tl.load(h + row, mask=inside).to(tl.float32))
        tl.store(out + row, new + (tl.load(weight + slot).to(tl.float32) - 1) * update, mask=inside)
    elif not INPLACE:
        tl.store(out + row, tl.load(h + row, mask=inside), mask=inside)


@triton.jit
def scatter_backward_kernel(grad, h, y, gated, weight, rank, dh, dy, dgated, dweight, D, GATED: tl.constexpr,
                            LEARNED: tl.constexpr, BLOCK: tl.constexpr):
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
        if LEARNED:
            if GATED:
                update = tl.load(gated + small, mask=inside, other=0).to(tl.float32)
            else:
                update = tl.load(y + small, mask=inside, other=0).to(tl.float32)
                update -= tl.load(h + row, mask=inside, other=0).to(tl.float32)
            tl.store(dweight + slot, tl.sum(g * update, 0))
        if GATED:
            tl.store(dh + row, tl.zeros_like(g), mask=inside)
            tl.store(dy + small, g, mask=inside)
            tl.store(dgated + small, (w - 1) * g, mask=inside)
        else:
            tl.store(dh + row, (1 - w) * g, mask=inside)
            tl.store(dy + small, w * g, mask=inside)
    else:
        tl.store(dh + row, given, mask=inside)


def _scatter(h: Tensor, y: Tensor, gated: Tensor | None, weight: Tensor, rank: Tensor, out: Tensor) -> None:
    gate = y if gated is None else gated.contiguous()
    with torch.cuda.device_of(h):
        scatter_kernel[(len(h),)](h, y.contiguous(), gate, weight.contiguous(), rank, out, h.shape[1],
                                  GATED=gated is not None, INPLACE=out is h, **row_block(h.shape[1]))


@torch.library.custom_op("unimod::scatter", mutates_args=())
def scatter(h: Tensor, y: Tensor, gated: Tensor | None, weight: Tensor, rank: Tensor) -> Tensor:
    """h: [T, D]; y, gated: [K, D]; weight: [K]; rank: int64 [T + 1]. Returns [T, D]."""
    h = h.contiguous()
    out = h.new_empty(h.shape)
    _scatter(h, y, gated, weight, rank, out)
    return out


@scatter.register_fake
def _(h: Tensor, y: Tensor, gated: Tensor | None, weight: Tensor, rank: Tensor) -> Tensor:
    return h.new_empty(h.shape)


@torch.library.custom_op("unimod::scatter_", mutates_args=("h",))
def scatter_(h: Tensor, y: Tensor, gated: Tensor | None, weight: Tensor, rank: Tensor) -> None:
    """`scatter` written into h, which is contiguous."""
    _scatter(h, y, gated, weight, rank, h)


@torch.library.custom_op("unimod::scatter_backward", mutates_args=())
def scatter_backward(grad: Tensor, h: Tensor | None, y: Tensor | None, gated: Tensor | None, weight: Tensor,
                     rank: Tensor, like: Tensor, weighs_gated: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, y, gated and weight. Without h, y and gated the weight's is empty. `like`: [0], of y's dtype;
    `weighs_gated`: whether the weight multiplied `gated`, whose gradient is empty otherwise."""
    grad, none = grad.contiguous(), grad.new_empty(0)
    dh, dy, dgated, dweight = out = _scattered(grad, h, y, gated, weight, rank, like, weighs_gated)
    learned = y is not None or gated is not None
    h, y, gated = (none if x is None else x.contiguous() for x in (h, y, gated))
    with torch.cuda.device_of(grad):
        scatter_backward_kernel[(len(grad),)](
            grad, h, y, gated, weight.contiguous(), rank, dh, dy, dgated, dweight, grad.shape[1],
            GATED=weighs_gated, LEARNED=learned, **row_block(grad.shape[1]))
    return out


@scatter_backward.register_fake
def _scattered(grad: Tensor, h: Tensor | None, y: Tensor | None, gated: Tensor | None, weight: Tensor, rank: Tensor,
               like: Tensor, weighs_gated: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    learned = y is not None or gated is not None
    dy = like.new_empty(len(weight), grad.shape[1])
    dgated = like.new_empty(dy.shape if weighs_gated else 0)
    return grad.new_empty(grad.shape), dy, dgated, weight.new_empty(len(weight) if learned else 0)


def _save_scatter(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    h, y, gated, weight, rank = inputs
    ctx.weighs_gated, ctx.learned = gated is not None, ctx.needs_input_grad[3]
    rows = (None, None, None)                               # nothing to learn: no [K, D] is kept for the backward
    if ctx.learned:
        rows = (h, y, None) if gated is None else (None, None, gated)
    ctx.save_for_backward(*rows, weight, rank, y.new_empty(0))


def _backward_scatter(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    dh, dy, dgated, dweight = scatter_backward(grad, *ctx.saved_tensors, ctx.weighs_gated)
    return dh, dy, dgated if ctx.weighs_gated else None, dweight if ctx.learned else None, None


scatter.register_autograd(_backward_scatter, setup_context=_save_scatter)
