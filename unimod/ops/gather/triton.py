"""Gather and norm in one pass: forward one program per kept token, backward a few programs that go through all tokens in turn.

Backward, with c = x - mean (RMSNorm: x), s = 1 / sqrt(mean(c^2) + eps), v = c s and u = dn * weight:

    dx = s (u - [mean(u)] - v mean(u v)),    dweight = sum over tokens of dn * v,    dbias = sum of dn        ([] LayerNorm only)

Each program of the backward sums dweight and dbias of its own tokens; the sums are added up after. No atomics, so runs repeat bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import row_block

PROGRAMS = 512
"""Of the backward, at most: about four per multiprocessor of an H200."""


@triton.jit
def standard(x, inside, D, eps, CENTRED: tl.constexpr):
    """v and s of one row."""
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / D, 0)
    s = 1 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    return x * s, s


@triton.jit
def forward_kernel(h, index, weight, bias, x, n, D, eps, CENTRED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
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
def backward_kernel(dx, dn, x, weight, rank, dh, dweight, dbias, T, D, eps, CENTRED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
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
def gather_norm(h: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, rank: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """h: [T, D]; index: int64 [K]; weight, bias: [D]; rank: int64 [T + 1]. Returns x and n, both [K, D]."""
    h, D = h.contiguous(), h.shape[1]
    x, n = (torch.empty(len(index), D, dtype=h.dtype, device=h.device) for _ in range(2))
    if len(index):
        with torch.cuda.device_of(h):
            forward_kernel[(len(index),)](h, index, weight, weight if bias is None else bias, x, n, D, eps, CENTRED=centred, BIAS=bias is not None,
                                          **row_block(D))
    return x, n


@gather_norm.register_fake
def _(h: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, rank: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    return h.new_empty(len(index), h.shape[1]), h.new_empty(len(index), h.shape[1])


@torch.library.custom_op("unimod::gather_norm_backward", mutates_args=())
def gather_norm_backward(dx: Tensor, dn: Tensor, x: Tensor, weight: Tensor, rank: Tensor, eps: float, centred: bool,
                         bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h [T, D], weight [D] and, where there is a bias, of the bias [D] (else empty)."""
    T, D = len(rank) - 1, x.shape[1]
    programs = min(T, PROGRAMS)
    dh = torch.empty(T, D, dtype=x.dtype, device=x.device)
    dweight, dbias = (torch.empty(programs if there else 0, D, dtype=torch.float32, device=x.device) for there in (True, bias))
    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](dx.contiguous(), dn.contiguous(), x, weight, rank, dh, dweight, dbias, T, D, eps, CENTRED=centred, BIAS=bias,
                                     **row_block(D))
    return dh, dweight.sum(0).to(weight.dtype), (dbias.sum(0) if bias else dbias.view(0)).to(weight.dtype)


@gather_norm_backward.register_fake
def _(dx: Tensor, dn: Tensor, x: Tensor, weight: Tensor, rank: Tensor, eps: float, centred: bool, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(len(rank) - 1, x.shape[1]), torch.empty_like(weight), weight.new_empty(len(weight) if bias else 0)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, bias, rank, ctx.eps, ctx.centred = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(output[0], weight, rank)


def _backward(ctx: torch.autograd.function.FunctionCtx, dx: Tensor, dn: Tensor) -> tuple[Tensor | None, ...]:
    dh, dweight, dbias = gather_norm_backward(dx, dn, *ctx.saved_tensors, ctx.eps, ctx.centred, ctx.bias)
    return dh, None, dweight, dbias if ctx.bias else None, None, None, None


gather_norm.register_autograd(_backward, setup_context=_save)
