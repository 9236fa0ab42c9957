"""Triton kernels of decode steps: see `decode` for what they compute. No atomics: runs repeat bit by bit.

Attention of one query per sequence reads the cache once and does little else, so it has to keep the whole GPU reading:
the used part of a sequence is cut into equal runs of keys, one program each (`partial_kernel`), and a second launch
adds up the runs and the new token (`combine_kernel`). The new token is taken from k and v, never from the cache, so no
program waits for another one's write. Queries of one key head share a program, as rows of one product.

    over a run:  m = max_j s_j,  l = sum_j exp(s_j - m),  o = sum_j exp(s_j - m) v_j     with  s_j = q . k_j * scale
    in all:      (sum over runs of exp(m_r - m) o_r) / (sum over runs of exp(m_r - m) l_r)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import launch
from .kernels_triton import gate_value, row_block
from .route_triton import standard

PROGRAMS = 264
"""Programs that read the cache: two per multiprocessor of an H200."""
MOST_RUNS = 64
BLOCK = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}
"""Keys of a block, as in `attention_triton`."""
WIDEN = triton.knobs.runtime.interpret
"""Whether products are of float32: the interpreter multiplies the bits of bfloat16."""


@triton.jit
def partial_kernel(q, keys, values, used, place, top, total, partial, scale, heads, kv_heads, room, runs, qh, qt,
                   GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr, M: tl.constexpr,
                   N: tl.constexpr):
    """One run of keys of one key head. Grid: (B * H_kv, runs). top, total: float32 [B, H, runs]; partial: float32 [B,
    H, runs, D]; place: int64 [B], a copy of `used`, which the next launch changes."""
    pair, run = tl.program_id(0), tl.program_id(1)
    b, head = pair // kv_heads, pair % kv_heads
    n = tl.load(used + b)
    if run == 0 and head == 0:
        tl.store(place + b, n)
    g, d = tl.arange(0, M), tl.arange(0, WIDTH)
    real, inside = g < GROUP, d < D
    query = tl.load(q + (head * GROUP + g)[:, None] * qh + b * qt + d[None, :], mask=real[:, None] & inside[None, :],
                    other=0.0).to(keys.dtype.element_ty)
    query = query.to(tl.float32) if WIDEN else query
    m, denominator = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    o = tl.zeros([M, WIDTH], tl.float32)
    length = tl.cdiv(tl.cdiv(n, runs), N) * N
    end = tl.minimum((run + 1) * length, n)
    row = tl.cast(pair, tl.int64) * room * D
    for start in range(run * length, end, N):
        j = start + tl.arange(0, N)
        where = row + j[:, None] * D + d[None, :]
        there = (j < end)[:, None] & inside[None, :]
        key, value = tl.load(keys + where, mask=there, other=0.0), tl.load(values + where, mask=there, other=0.0)
        key, value = (key.to(tl.float32), value.to(tl.float32)) if WIDEN else (key, value)
        s = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        s = tl.where((j < end)[None, :], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        shrink, p = tl.exp(m - new), tl.exp(s - new[:, None])
        denominator = shrink * denominator + tl.sum(p, 1)
        o = shrink[:, None] * o + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        m = new
    out = (tl.cast(b, tl.int64) * heads + head * GROUP + g) * runs + run
    tl.store(top + out, m, mask=real)
    tl.store(total + out, denominator, mask=real)
    tl.store(partial + out[:, None] * D + d[None, :], o, mask=real[:, None] & inside[None, :])


@triton.jit
def combine_kernel(q, k, v, keys, values, used, place, active, top, total, partial, out, scale, heads, room, runs, qh,
                   qt, kh, kt, vh, vt, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, RUNS: tl.constexpr):
    """One query head: the runs and the new token, which goes into the cache. Grid: (B, H)."""
    b, head = tl.program_id(0), tl.program_id(1)
    kv = head // GROUP
    d, i = tl.arange(0, WIDTH), tl.arange(0, RUNS)
    inside = d < D
    stored = keys.dtype.element_ty
    query = tl.load(q + head * qh + b * qt + d, mask=inside, other=0.0).to(stored)
    key = tl.load(k + kv * kh + b * kt + d, mask=inside, other=0.0).to(stored)
    value = tl.load(v + kv * vh + b * vt + d, mask=inside, other=0.0).to(stored)
    s = tl.sum(query.to(tl.float32) * key.to(tl.float32), 0) * scale
    row = tl.cast(b, tl.int64) * heads + head
    m_run = tl.load(top + row * runs + i, mask=i < runs, other=float("-inf"))
    l_run = tl.load(total + row * runs + i, mask=i < runs, other=0.0)
    o_run = tl.load(partial + (row * runs + i)[:, None] * D + d[None, :], mask=(i < runs)[:, None] & inside[None, :],
                    other=0.0)
    m = tl.maximum(tl.max(m_run, 0), s)
    weight, own = tl.exp(m_run - m), tl.exp(s - m)
    o = tl.sum(weight[:, None] * o_run, 0) + own * value.to(tl.float32)
    tl.store(out + row * D + d, o / (tl.sum(weight * l_run, 0) + own), mask=inside)
    at = tl.load(place + b)
    if head % GROUP == 0:
        new = (row // GROUP * room + at) * D + d
        tl.store(keys + new, key, mask=inside)
        tl.store(values + new, value, mask=inside)
    if head == 0:
        step = 1 if active is None else tl.load(active + b).to(tl.int64)
        tl.store(used + b, at + step)


def attend_appended(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, used: Tensor, active: Tensor | None,
                    scale: float) -> Tensor:
    """`decode.attend_appended`; keys and values are contiguous."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (rows, kv_heads, room, d), heads, block = keys.shape, len(q), BLOCK[keys.dtype]
    runs = max(1, min(MOST_RUNS, -(-room // block), PROGRAMS // (rows * kv_heads)))
    top, total = (q.new_empty(rows, heads, runs, dtype=torch.float32) for _ in range(2))
    partial = q.new_empty(rows, heads, runs, d, dtype=torch.float32)
    place, out = torch.empty_like(used), keys.new_empty(rows, heads, d)
    width = max(16, triton.next_power_of_2(d))
    sizes = {"GROUP": heads // kv_heads, "D": d, "WIDTH": width}
    launch(partial_kernel, (rows * kv_heads, runs), q, keys, values, used, place, top, total, partial, scale, heads,
           kv_heads, room, runs, *q.stride()[:2], **sizes, WIDEN=WIDEN,
           M=max(16, triton.next_power_of_2(heads // kv_heads)), N=block)
    launch(combine_kernel, (rows, heads), q, k, v, keys, values, used, place, active, top, total, partial, out, scale,
           heads, room, runs, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], **sizes,
           RUNS=triton.next_power_of_2(runs))
    return out


@triton.jit
def linear_score(h, weight, bias, row, task, d, inside, D):
    """One score of a token, float32: products of h's dtype, summed in float32, as `router.Float32Linear`."""
    x = tl.load(h + row * D + d, mask=inside, other=0)
    w = tl.load(weight + task * D + d, mask=inside, other=0).to(x.dtype)
    return tl.sum(x.to(tl.float32) * w.to(tl.float32), 0) + tl.load(bias + task).to(tl.float32)


@triton.jit
def decide_kernel(h, weight, bias, judge_weight, judge_bias, task, source, always, threshold, kept, gate, gain, D,
                  SHARED: tl.constexpr, PREDICTED: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr):
    """Which tokens a decode step keeps, and their gates. Grid: (B,)."""
    b = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    own = tl.load(task + b)
    score = linear_score(h, weight, bias, b, 0 if SHARED else own, d, inside, D)
    other = b if source is None else tl.load(source + b)
    judged = linear_score(h, judge_weight, judge_bias, other, 0 if SHARED else tl.load(task + other), d, inside, D)
    keep = judged > 0 if PREDICTED else judged >= tl.load(threshold + own)
    factor = gate_value(score, gain, GATE)
    if always is not None:
        fixed = tl.load(always + b)
        keep, factor = keep | fixed, tl.where(fixed, 1.0, factor)
    tl.store(kept + b, keep)
    tl.store(gate + b, factor)


def decide(h: Tensor, scorer: tuple[Tensor, Tensor], judge: tuple[Tensor, Tensor], task: Tensor, source: Tensor | None,
           always: Tensor | None, threshold: Tensor, gate: str, gain: float,
           predicted: bool) -> tuple[Tensor, Tensor]:
    """`router.TaskRouter.decode` for linear scores: kept, bool [B], and gate, float32 [B].

    h: [B, D]; scorer and judge: weight [tasks or 1, D] and bias of what the gate is made of and of what the token is
    judged by, the same unless `predicted`; task, source: int64 [B]; always: bool [B]; threshold: float32 [tasks].
    """
    h, (rows, width) = h.contiguous(), h.shape
    kept, factor = h.new_empty(rows, dtype=torch.bool), h.new_empty(rows, dtype=torch.float32)
    launch(decide_kernel, (rows,), h, *scorer, *judge, task, source, always, threshold, kept, factor, gain, width,
           SHARED=len(scorer[0]) == 1, PREDICTED=predicted, GATE=gate, **row_block(width))
    return kept, factor


@triton.jit
def apply_kernel(h, y, gated, kept, gate, out, D, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """One token. Grid: (B,)."""
    b = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside, row = d < D, b * D + d
    old = tl.load(h + row, mask=inside).to(tl.float32)
    factor = tl.load(gate + b)
    if tl.load(kept + b):
        new = tl.load(y + row, mask=inside).to(tl.float32)
        update = new - old if gated is None else tl.load(gated + row, mask=inside).to(tl.float32)
        tl.store(out + row, new + (factor - 1) * update, mask=inside)
    else:
        tl.store(out + row, old * factor if SCALED else old, mask=inside)


def apply_decision(h: Tensor, y: Tensor, kept: Tensor, gate: Tensor, gated: Tensor | None,
                   scale_skipped: bool) -> Tensor:
    """`decode.apply_decision`."""
    h, y = h.contiguous(), y.contiguous()
    out = torch.empty_like(h)
    gated, width = None if gated is None else gated.contiguous(), h.shape[-1]
    launch(apply_kernel, (len(kept),), h, y, gated, kept, gate, out, width, SCALED=scale_skipped, **row_block(width))
    return out


@triton.jit
def norm_kernel(x, weight, out, D, eps, BLOCK: tl.constexpr):
    """One row, rounded where Llama's norm rounds."""
    d = tl.arange(0, BLOCK)
    inside, at = d < D, tl.program_id(0).to(tl.int64) * D + d
    row = tl.load(x + at, mask=inside, other=0)
    v, _ = standard(row.to(tl.float32), inside, D, eps, False)
    v = v.to(row.dtype).to(tl.float32)
    tl.store(out + at, v * tl.load(weight + d, mask=inside, other=0).to(tl.float32), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`decode.rms_norm`."""
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    launch(norm_kernel, (x.numel() // width,), x, weight, out, width, eps, **row_block(width))
    return out
