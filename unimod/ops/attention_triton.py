"""Triton kernels of `attention_received` and `attention_mass`: blocks of queries by blocks of keys, never T x T
numbers.

What each query gives (`mass_kernel`: masses, entropy, distance, and the log-sum-exp of its logits) goes over the keys
of a block of queries once. What each key receives needs that log-sum-exp, and then goes over the queries of a block of
keys. Sums are float32 and in a fixed order: no atomics, runs repeat bit by bit. A query head reads its group's key head
in place.

    received_j = sum_i w_i exp(s_ij - lse_i)         with  s = q . k * scale
    entropy_i  = ln l - t / l                        with  m = max_j s_ij,  l = sum_j exp(s_ij - m)
                                                     and   t = sum_j exp(s_ij - m) (s_ij - m)

When a later block raises m to m', every sum shrinks by a = exp(m - m'), and t becomes a (t + (m - m') l).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import launch

BLOCK = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}
"""Queries and keys of a block; an exact float32 product runs outside the tensor cores, where a larger block spills."""
WIDEN = triton.knobs.runtime.interpret
"""Whether q and k become float32 before their product: the interpreter multiplies the bits of bfloat16."""


@triton.jit
def _load(x, at, head, length, stride_head, stride_token, D: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr):
    """Tokens `at` of one head of [H, T, D], zeros behind the ends: [len(at), WIDTH]."""
    d = tl.arange(0, WIDTH)
    where = x + tl.cast(head, tl.int64) * stride_head + at[:, None].to(tl.int64) * stride_token + d[None, :]
    found = tl.load(where, mask=(at < length)[:, None] & (d < D)[None, :], other=0.0)
    return found.to(tl.float32) if WIDEN else found


@triton.jit
def mass_kernel(q, k, lo, hi, label, position, lse, mass, entropy, distance, length, scale, group, qh, qt, kh, kt,
                D: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr, LABELS: tl.constexpr, KINDS: tl.constexpr,
                M: tl.constexpr, N: tl.constexpr):
    """One block of queries of one head; with LABELS = 0 it writes only the log-sum-exp. Grid: (query blocks, H)."""
    head = tl.program_id(1)
    i = tl.program_id(0) * M + tl.arange(0, M)
    real = i < length
    low, high = tl.load(lo + i, mask=real, other=length), tl.load(hi + i, mask=real, other=0)
    query = _load(q, i, head, length, qh, qt, D, WIDTH, WIDEN)
    top = tl.full([M], float("-inf"), tl.float32)
    total, spread, far = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    given = tl.zeros([M, KINDS], tl.float32)
    at = tl.load(position + i, mask=real, other=0)
    begin = tl.min(low, 0) // N * N
    for start in range(begin, tl.max(high, 0), N):
        j = start + tl.arange(0, N)
        key = _load(k, j, head // group, length, kh, kt, D, WIDTH, WIDEN)
        s = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new > float("-inf"), new, 0.0)                      # a query that has seen no key yet
        shrink = tl.exp(top - base)
        p = tl.exp(s - base[:, None])
        spread = shrink * (spread + tl.where(total > 0, top - base, 0.0) * total)
        spread += tl.sum(p * tl.where(seen, s - base[:, None], 0.0), 1)
        total = shrink * total + tl.sum(p, 1)
        if LABELS > 0:
            there = tl.load(position + j, mask=j < length, other=0)
            kind = tl.load(label + j, mask=j < length, other=-1)
            far = shrink * far + tl.sum(p * tl.abs(at[:, None] - there[None, :]).to(tl.float32), 1)
            hot = (kind[:, None] == tl.arange(0, KINDS)[None, :]).to(tl.float32)
            given = shrink[:, None] * given + tl.dot(p, hot, input_precision="ieee")
        top = new
    out = tl.cast(head, tl.int64) * length + i
    total = tl.where(real, total, 1.0)
    if LABELS > 0:
        kinds = tl.arange(0, KINDS)
        wanted = real[:, None] & (kinds < LABELS)[None, :]
        tl.store(mass + out[:, None] * LABELS + kinds[None, :], given / total[:, None], mask=wanted)
        tl.store(entropy + out, tl.log(total) - spread / total, mask=real)
        tl.store(distance + out, far / total, mask=real)
    else:
        tl.store(lse + out, top + tl.log(total), mask=real)


@triton.jit
def received_kernel(q, k, lo, hi, segment, first, last, lse, received, length, scale, group, heads, qh, qt, kh, kt,
                    D: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """One block of keys, all heads; its queries lie in the segments of these keys. Grid: (key blocks,)."""
    j = tl.program_id(0) * N + tl.arange(0, N)
    real = j < length
    mine = tl.load(segment + j, mask=real, other=-1)
    begin = tl.min(tl.load(first + j, mask=real, other=length), 0) // M * M
    end = tl.max(tl.load(last + j, mask=real, other=0), 0)
    got, asked = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for head in range(heads):
        key = _load(k, j, head // group, length, kh, kt, D, WIDTH, WIDEN)
        for start in range(begin, end, M):
            i = start + tl.arange(0, M)
            there = i < length
            low, high = tl.load(lo + i, mask=there, other=length), tl.load(hi + i, mask=there, other=0)
            of = tl.load(segment + i, mask=there, other=-2)
            counts = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None]) & (of[:, None] == mine[None, :])
            query = _load(q, i, head, length, qh, qt, D, WIDTH, WIDEN)
            s = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            norm = tl.load(lse + tl.cast(head, tl.int64) * length + i, mask=there, other=0.0)
            p = tl.exp(tl.where(counts, s - norm[:, None], float("-inf")))
            got += tl.sum(p * (high - low).to(tl.float32)[:, None], 0)
            asked += tl.sum(counts.to(tl.float32), 0)
    tl.store(received + j, got / tl.maximum(asked, 1.0), mask=real)         # both counted once per head


@torch.library.custom_op("unimod::attention_received", mutates_args=())
def attention_received(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, segment: Tensor, scale: float) -> Tensor:
    """`attention.attention_received`: float32 [T]. The intervals are absolute, so the sequences' lengths are not
    needed."""
    lse, received = q.new_empty(q.shape[:2], dtype=torch.float32), q.new_empty(q.shape[1], dtype=torch.float32)
    _launch_mass(q, k, lo, hi, scale, lse=lse)
    first, last = torch.searchsorted(segment, segment), torch.searchsorted(segment, segment, right=True)
    tensors, sizes, constants = _arguments(q, k, scale)
    launch(received_kernel, (triton.cdiv(q.shape[1], constants["N"]),), *tensors, lo, hi, segment, first, last, lse,
           received, *sizes[:3], q.shape[0], *sizes[3:], **constants)
    return received


@attention_received.register_fake
def _(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, segment: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[1], dtype=torch.float32)


@torch.library.custom_op("unimod::attention_mass", mutates_args=())
def attention_mass(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, label: Tensor, position: Tensor, labels: int,
                   scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`attention.attention_mass`: mass [H, T, labels], entropy and distance [H, T], float32."""
    out = _like_mass(q, k, lo, hi, label, position, labels, scale)
    _launch_mass(q, k, lo, hi, scale, label=label, position=position, labels=labels, out=out)
    return out


@attention_mass.register_fake
def _like_mass(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, label: Tensor, position: Tensor, labels: int,
               scale: float) -> tuple[Tensor, Tensor, Tensor]:
    mass, entropy, distance = (q.new_empty(*q.shape[:2], *last, dtype=torch.float32) for last in ((labels,), (), ()))
    return mass, entropy, distance


def _launch_mass(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, scale: float, *, lse: Tensor | None = None,
                 label: Tensor | None = None, position: Tensor | None = None, labels: int = 0,
                 out: tuple[Tensor | None, ...] = (None, None, None)) -> None:
    """Launch `mass_kernel`; for an argument that is not given, q or lo stands in, which the kernel then never
    touches."""
    label, position = (lo if x is None else x for x in (label, position))
    lse, *out = (q if x is None else x for x in (lse, *out))
    tensors, sizes, constants = _arguments(q, k, scale)
    launch(mass_kernel, (triton.cdiv(q.shape[1], constants["M"]), q.shape[0]), *tensors, lo, hi, label, position, lse,
           *out, *sizes, **constants, LABELS=labels, KINDS=_width(labels))


def _arguments(q: Tensor, k: Tensor, scale: float) -> tuple[tuple[Tensor, Tensor], tuple, dict]:
    """What both kernels take: q and k with a dense last dimension, which is walked by one; sizes and strides;
    constants."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    block = BLOCK[q.dtype]
    constants = {"D": q.shape[2], "WIDTH": _width(q.shape[2]), "WIDEN": WIDEN, "M": block, "N": block}
    return (q, k), (q.shape[1], scale, q.shape[0] // k.shape[0], *q.stride()[:2], *k.stride()[:2]), constants


def _width(n: int) -> int:
    """The smallest width of a matrix product that holds n."""
    return max(16, triton.next_power_of_2(n))
