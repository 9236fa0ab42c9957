"""The weighted residual scatter in one pass over the tokens, forward and backward: one program per token, no atomics.

Rows are unique, so each program writes its own row of h's gradient and, where the token was kept, its own row of y's. Bytes moved, in rows of D
entries: forward 2T + K (3K in place), backward 2T + 3K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import row_block


@triton.jit
def forward_kernel(h, y, gated, weight, rank, out, D, GATED: tl.constexpr, INPLACE: tl.constexpr, BLOCK: tl.constexpr):
    """out_t = y + (w - 1) * m of a kept token, m = gated or y - h_t; h_t of any other (INPLACE: it is there already)."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside, row = d < D, t * D + d
    slot = tl.load(rank + t)
    if tl.load(rank + t + 1) > slot:
        new = tl.load(y + slot * D + d, mask=inside).to(tl.float32)
        update = tl.load(gated + slot * D + d, mask=inside).to(tl.float32) if GATED else new - tl.load(h + row, mask=inside).to(tl.float32)
        tl.store(out + row, new + (tl.load(weight + slot).to(tl.float32) - 1) * update, mask=inside)
    elif not INPLACE:
        tl.store(out + row, tl.load(h + row, mask=inside), mask=inside)


@triton.jit
def backward_kernel(grad, h, y, gated, weight, rank, dh, dy, dgated, dweight, D, GATED: tl.constexpr, LEARNED: tl.constexpr, BLOCK: tl.constexpr):
    """Of a kept token: dh = (1 - w) g, dy = w g, dw = <g, y - h>; where `gated` is weighted: dh = 0, dy = g, dgated = (w - 1) g, dw = <g, gated>."""
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
                update = tl.load(y + small, mask=inside, other=0).to(tl.float32) - tl.load(h + row, mask=inside, other=0).to(tl.float32)
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


def _forward(h: Tensor, y: Tensor, gated: Tensor | None, weight: Tensor, rank: Tensor, out: Tensor) -> None:
    with torch.cuda.device_of(h):
        forward_kernel[(len(h),)](h, y.contiguous(), y if gated is None else gated.contiguous(), weight.contiguous(), rank, out, h.shape[1],
                                  GATED=gated is not None, INPLACE=out is h, **row_block(h.shape[1]))


@torch.library.custom_op("unimod::scatter", mutates_args=())
def scatter(h: Tensor, y: Tensor, gated: Tensor | None, weight: Tensor, rank: Tensor) -> Tensor:
    """h: [T, D]; y, gated: [K, D]; weight: [K]; rank: int64 [T + 1]. Returns [T, D]."""
    h = h.contiguous()
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    _forward(h, y, gated, weight, rank, out)
    return out


@scatter.register_fake
def _(h: Tensor, y: Tensor, gated: Tensor | None, weight: Tensor, rank: Tensor) -> Tensor:
    return h.new_empty(h.shape)


@torch.library.custom_op("unimod::scatter_", mutates_args=("h",))
def scatter_(h: Tensor, y: Tensor, gated: Tensor | None, weight: Tensor, rank: Tensor) -> None:
    """The same written into h, which is contiguous."""
    _forward(h, y, gated, weight, rank, h)


@torch.library.custom_op("unimod::scatter_backward", mutates_args=())
def scatter_backward(grad: Tensor, h: Tensor | None, y: Tensor | None, gated: Tensor | None, weight: Tensor, rank: Tensor, like: Tensor,
                     weighs_gated: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, y, gated and weight. Without h, y and gated: weight's stays empty. `like`: [0], of y's dtype; `weighs_gated`: whether the
    weight multiplied `gated`; its gradient is empty otherwise."""
    learned = y is not None or gated is not None
    K, D = len(weight), grad.shape[1]
    grad, none = grad.contiguous(), grad.new_empty(0)
    dh, dy = torch.empty_like(grad), torch.empty(K, D, dtype=like.dtype, device=grad.device)
    dgated = torch.empty_like(dy) if weighs_gated else like.new_empty(0)
    dweight = torch.empty(K if learned else 0, dtype=weight.dtype, device=grad.device)
    h, y, gated = (none if t is None else t.contiguous() for t in (h, y, gated))
    with torch.cuda.device_of(grad):
        backward_kernel[(len(grad),)](grad, h, y, gated, weight.contiguous(), rank, dh, dy, dgated, dweight, D, GATED=weighs_gated, LEARNED=learned,
                                      **row_block(D))
    return dh, dy, dgated, dweight


@scatter_backward.register_fake
def _(grad: Tensor, h: Tensor | None, y: Tensor | None, gated: Tensor | None, weight: Tensor, rank: Tensor, like: Tensor,
      weighs_gated: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = like.new_empty(len(weight), grad.shape[1])
    learned = y is not None or gated is not None
    return grad.new_empty(grad.shape), dy, like.new_empty(dy.shape if weighs_gated else 0), weight.new_empty(len(weight) if learned else 0)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    h, y, gated, weight, rank = inputs
    ctx.weighs_gated, ctx.learned = gated is not None, ctx.needs_input_grad[3]
    rows = (None, None, None) if not ctx.learned else (h, y, None) if gated is None else (None, None, gated)
    ctx.save_for_backward(*rows, weight, rank, y.new_empty(0))


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    dh, dy, dgated, dweight = scatter_backward(grad, *ctx.saved_tensors, ctx.weighs_gated)
    return dh, dy, dgated if ctx.weighs_gated else None, dweight if ctx.learned else None, None


scatter.register_autograd(_backward, setup_context=_save)
