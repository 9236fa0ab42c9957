"""Triton kernels of `route_gather`, forward and backward: see `kernels_triton`, which has the selection.

Bytes moved, in rows of D entries, for T tokens of which K are kept: score T, gather 3 K; backward 2 T + 3 K (and T - K
more where a loss asks for the scores of dropped tokens). Show-o's 9,288 x 2,048 bfloat16 at half the tokens: 95 MB and
133 MB, which an H200 moves in about 60 us; by torch's own operators the same took about 30 launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .backend import launch
from .kernels_triton import gate_slope, launch_select, row_block

PROGRAMS = 264
"""Programs of the backward, at most: two for each of an H200's 132 multiprocessors, as many as its registers hold at a
width of 2,048 (128 a thread). Each leaves up to 6 rows of float32 sums, 49 kB."""
LINES, COLUMNS = 32, 64
"""The tile by which the programs' sums are added up."""


@triton.jit
def score_kernel(h, task, scorer, shift, score, D, TASKS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per token; the [TASKS, D] weights come from the cache."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    own = tl.load(task + t) if TASKS > 1 else 0
    x = tl.load(h + t * D + d, mask=inside, other=0)
    w = tl.load(scorer + own * D + d, mask=inside, other=0).to(x.dtype)     # rounded, as for a product in x's dtype
    total = tl.sum(x.to(tl.float32) * w.to(tl.float32), 0)
    tl.store(score + t, total + tl.load(shift + own).to(tl.float32))


# The norm. With c = x - mean (rms: x), s = 1 / sqrt(mean(c^2) + eps), v = c s and u = dn * weight:
#  dx = s (u - [mean(u)] - v mean(u v)),    dweight = sum over tokens of dn * v,    dbias = sum of dn
# where [] is for LayerNorm only. The scorer: ds = dscore, and + gate'(score) dfactor of a token that is kept and
# eligible;  dh += ds * scorer[task],    dscorer[task] = sum of ds * h,    dshift[task] = sum of ds


@triton.jit
def standard(x, inside, D, eps, CENTRED: tl.constexpr):
    """v and s of one row."""
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / D, 0)
    s = 1 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    return x * s, s


@triton.jit
def gather_kernel(h, index, weight, bias, rotary, flags, bounds, rank, x, n, rotary_out, flags_out, bounds_out, K, D, R,
                  C, eps, CENTRED: tl.constexpr, ANGLES: tl.constexpr, BLOCK: tl.constexpr):
    """Per kept token one program: a row of x = h[index], of n = norm(x), of rotary[index], an entry of flags[index].
    The programs after the K-th look up rank[bounds], BLOCK entries each."""
    slot = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    if slot < K:
        inside, small = d < D, slot * D + d
        t = tl.load(index + slot)
        row = tl.load(h + t * D + d, mask=inside, other=0)
        tl.store(x + small, row, mask=inside)
        v, _ = standard(row.to(tl.float32), inside, D, eps, CENTRED)
        if not CENTRED:
            v = v.to(row.dtype).to(tl.float32)              # Llama's rounds here, LayerNorm once at the end
        out = v * tl.load(weight + d, mask=inside, other=0).to(tl.float32)
        if bias is not None:
            out += tl.load(bias + d, mask=inside, other=0).to(tl.float32)
        tl.store(n + small, out, mask=inside)
        r = tl.arange(0, ANGLES)
        tl.store(rotary_out + slot * R + r, tl.load(rotary + t * R + r, mask=r < R), mask=r < R)
        if flags is not None:
            tl.store(flags_out + slot, tl.load(flags + t))
    elif bounds is not None:
        at = (slot - K) * BLOCK + d
        there = tl.load(bounds + at, mask=at < C, other=0)
        tl.store(bounds_out + at, tl.load(rank + there, mask=at < C, other=0).to(tl.int32), mask=at < C)


@triton.jit
def route_backward_kernel(h, rank, weight, grad_h, grad_x, grad_n, score, task, eligible, scorer, grad_factor,
                          grad_score, dh, sums, T, D, eps, gain, CENTRED: tl.constexpr, BIAS: tl.constexpr,
                          NORM: tl.constexpr, SCORER: tl.constexpr, GATE: tl.constexpr, TASKS: tl.constexpr,
                          BLOCK: tl.constexpr):
    """dh [T, D], and in `sums` (float32 [programs, rows, D]) what each program's tokens add to the gradients of norm
    weight, norm bias, scorer weights and, as first entries of the last row, scorer biases. A few programs go through
    all tokens in turn. A gradient that is None has nobody asked for."""
    SCORED: tl.constexpr = (grad_factor is not None) or (grad_score is not None)
    p = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    multiply = tl.load(weight + d, mask=inside, other=0).to(tl.float32)
    sum_weight, sum_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    # a name per task: an array of registers cannot be indexed by the token's task
    sum_0, sum_1, sum_2 = sum_weight, sum_weight, sum_weight
    nothing = tl.full((), 0, tl.float32)
    shift_0, shift_1, shift_2 = nothing, nothing, nothing
    for t in range(p, T, tl.num_programs(0)):
        at = tl.cast(t, tl.int64) * D + d
        slot = tl.load(rank + t)
        kept = tl.load(rank + t + 1) > slot
        small = slot * D + d
        ds = tl.full((), 0, tl.float32)
        if grad_score is not None:
            ds += tl.load(grad_score + t)
        # one mask for the norm's and the scorer's need of the row, known before the gate's gradient arrives
        x = tl.load(h + at, mask=inside & (kept | (ds != 0)), other=0).to(tl.float32)
        if grad_factor is not None:
            chosen = kept & tl.load(eligible + t)
            dw = tl.load(grad_factor + slot, mask=chosen, other=0)
            ds += tl.where(chosen, dw * gate_slope(tl.load(score + t), gain, GATE), 0)
        out = tl.zeros((BLOCK,), tl.float32)
        if grad_h is not None:
            out += tl.load(grad_h + at, mask=inside, other=0).to(tl.float32)
        if kept:
            if grad_n is not None:
                g = tl.load(grad_n + small, mask=inside, other=0).to(tl.float32)
            if grad_x is not None:
                out += tl.load(grad_x + small, mask=inside, other=0).to(tl.float32)
            if grad_n is not None:
                v, s = standard(x, inside, D, eps, CENTRED)
                if NORM:
                    sum_weight += g * v
                    if BIAS:
                        sum_bias += g
                u = g * multiply
                part = u - v * (tl.sum(u * v, 0) / D)
                if CENTRED:
                    part -= tl.sum(u, 0) / D
                out += part * s
        if SCORED and ds != 0:
            own = tl.load(task + t) if TASKS > 1 else tl.full((), 0, tl.int64)
            w = tl.load(scorer + own * D + d, mask=inside, other=0).to(h.dtype.element_ty).to(tl.float32)
            out += ds * w
            if SCORER:
                own_0 = tl.where(own == 0, ds, 0)
                sum_0 += own_0 * x
                shift_0 += own_0
                if TASKS > 1:
                    own_1 = tl.where(own == 1, ds, 0)
                    sum_1 += own_1 * x
                    shift_1 += own_1
                if TASKS > 2:
                    own_2 = tl.where(own == 2, ds, 0)
                    sum_2 += own_2 * x
                    shift_2 += own_2
        tl.store(dh + at, out, mask=inside)
    AHEAD: tl.constexpr = (1 + BIAS) if NORM else 0
    ROWS: tl.constexpr = AHEAD + (TASKS + 1 if SCORER else 0)
    row = sums + p * ROWS * D
    if NORM:
        tl.store(row + d, sum_weight, mask=inside)
        if BIAS:
            tl.store(row + D + d, sum_bias, mask=inside)
    if SCORER:
        row += AHEAD * D
        tl.store(row + d, sum_0, mask=inside)
        tl.store(row + TASKS * D, shift_0)
        if TASKS > 1:
            tl.store(row + D + d, sum_1, mask=inside)
            tl.store(row + TASKS * D + 1, shift_1)
        if TASKS > 2:
            tl.store(row + 2 * D + d, sum_2, mask=inside)
            tl.store(row + TASKS * D + 2, shift_2)


@triton.jit
def total_kernel(sums, weight, bias, scorer, shift, programs, D, ROWS: tl.constexpr, AHEAD: tl.constexpr,
                 TASKS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums of all programs, each in its parameter's dtype. Grid: (blocks of columns, rows)."""
    row = tl.program_id(1)
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.arange(0, LINES)
    inside = d < tl.where(row == AHEAD + TASKS, TASKS, D)               # the last row holds a bias per task
    total = tl.zeros((LINES, COLUMNS), tl.float32)
    for first in range(0, programs, LINES):
        line = first + p[:, None]
        total += tl.load(sums + (line * ROWS + row) * D + d[None, :], mask=(line < programs) & inside[None, :], other=0)
    out = tl.sum(total, 0)
    if weight is not None:
        tl.store(weight + d, out, mask=inside & (row == 0))
        if bias is not None:
            tl.store(bias + d, out, mask=inside & (row == 1))
    if scorer is not None:
        own = row - AHEAD
        tl.store(scorer + own * D + d, out, mask=inside & (own >= 0) & (own < TASKS))
        tl.store(shift + d, out, mask=inside & (own == TASKS))


def backward_block(width: int) -> dict[str, int]:
    """As `row_block`, for the backward: twice the warps, since the sums of three tasks beside a norm's would take 254
    registers of each thread, and here take 128."""
    block = row_block(width)
    return block | {"num_warps": min(16, 2 * block["num_warps"])}


class RouteGather(torch.autograd.Function):
    """`route.route_gather`, 3 launches forward and 2 backward. Outputs as `route.Routed` has them. `kept`: tokens kept
    in all; `longest`: tokens of the longest segment."""

    @staticmethod
    def forward(ctx: FunctionCtx, h: Tensor, scorer: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None,
                task: Tensor, eligible: Tensor, sizes: Tensor, rotary: Tensor, bounds: Tensor | None,
                flags: Tensor | None, gate: str, gain: float, eps: float, centred: bool, longest: int,
                kept: int) -> tuple[Tensor | None, ...]:
        stream, (T, D), block = h.contiguous(), h.shape[-2:], row_block(h.shape[-1])
        score, factor = (h.new_empty(n, dtype=torch.float32) for n in (T, kept))
        launch(score_kernel, (T,), stream, task, scorer, shift, score, D, TASKS=len(scorer), **block)
        index, kth, rank = launch_select(score, longest, kept, sizes, eligible=eligible, factor=factor, gate=gate,
                                         gain=gain)
        x, normed = (h.new_empty(*h.shape[:-2], kept, D) for _ in range(2))
        angles = rotary.new_empty(kept, rotary.shape[1])
        edges = None if bounds is None else torch.empty_like(bounds)
        marks = None if flags is None else flags.new_empty(kept)
        C = 0 if bounds is None else len(bounds)
        if programs := kept + triton.cdiv(C, block["BLOCK"]):
            launch(gather_kernel, (programs,), stream, index, weight, bias, rotary, flags, bounds, rank, x, normed,
                   angles, marks, edges, kept, D, rotary.shape[1], C, eps, CENTRED=centred,
                   ANGLES=triton.next_power_of_2(rotary.shape[1]), **block)
        ctx.save_for_backward(stream, rank, weight, bias, score, task, eligible, scorer, shift)
        ctx.constants = eps, centred, gate, gain
        ctx.set_materialize_grads(False)
        fixed = [tensor for tensor in (index, kth, rank, angles, edges, marks) if tensor is not None]
        # a gate that is 1 throughout has no slope: the scatter then keeps nothing for it
        ctx.mark_non_differentiable(*fixed, *([factor] if gate == "none" else []))
        return h, x, normed, factor, score, index, kth, rank, angles, edges, marks

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        h, rank, weight, bias, score, task, eligible, scorer, shift = ctx.saved_tensors
        eps, centred, gate, gain = ctx.constants
        (T, D), tasks, wanted = h.shape[-2:], len(scorer), ctx.needs_input_grad[1:5]
        grad_h, grad_x, grad_n, grad_factor, grad_score = (None if g is None else g.contiguous() for g in grads[:5])
        norm = grad_n is not None and any(wanted[2:])
        scores = any(wanted[:2]) and not (grad_factor is None and grad_score is None)
        ahead = (1 if bias is None else 2) if norm else 0
        rows, programs = ahead + (tasks + 1 if scores else 0), min(T, PROGRAMS)
        dh, sums = torch.empty_like(h), h.new_empty(programs, rows, D, dtype=torch.float32)
        launch(route_backward_kernel, (programs,), h, rank, weight, grad_h, grad_x, grad_n, score, task, eligible,
               scorer, grad_factor, grad_score, dh, sums, T, D, eps, gain, CENTRED=centred, BIAS=bias is not None,
               NORM=norm, SCORER=scores, GATE=gate, TASKS=tasks, **backward_block(D))
        made = [torch.empty_like(tensor) if there and tensor is not None else None
                for tensor, there in ((scorer, scores), (shift, scores), (weight, norm), (bias, norm))]
        if rows:
            launch(total_kernel, (triton.cdiv(D, COLUMNS), rows), sums, *made[2:], *made[:2], programs, D, ROWS=rows,
                   AHEAD=ahead, TASKS=tasks, LINES=LINES, COLUMNS=COLUMNS)
        return dh, *(tensor if asked else None for tensor, asked in zip(made, wanted)), *[None] * 12
