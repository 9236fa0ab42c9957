"""The norm at the start of a routed layer, and the scatter at its end, which puts the layer's output back.

    scatter        out = h,  except  out[index] = y + (weight - 1) * (y - h[index])
                                                = h[index] + weight * (y - h[index])

The Triton kernel of scatter takes one pass (`kernels_triton`); the norm goes with the gather (`route`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .select import by_triton, prefix_count


@dataclass(frozen=True)
class Norm:
    """A norm over the width D. `kind`: layer (LayerNorm), or rms (RMSNorm that rounds to the input's dtype before it
    multiplies, as Llama's)."""

    weight: Tensor
    """[D], of the dtype of what is normalised."""
    bias: Tensor | None
    """[D]; LayerNorm only."""
    eps: float
    kind: str


def reference_norm(x: Tensor, norm: Norm) -> Tensor:
    """`norm` of x, [K, D], in torch's own operators."""
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def scatter(h: Tensor, y: Tensor, index: Tensor, weight: Tensor, *, x: Tensor | None = None,
            gated: Tensor | None = None, rank: Tensor | None = None) -> Tensor:
    """The residual stream after a routed layer, in a tensor of its own: [T, D] in h's dtype.

    h: [T, D], or with a leading 1 as y, gated and x then; y: [K, D], the layer's output on the tokens `index` (int64
    [K], ascending, unique); weight: [K]. `gated`: [K, D], what the weight multiplies where that is not y - h[index].
    Computed in float32 (float64 for float64), and exactly y at weight 1. What the caller has already saves work: `x`,
    which is h[index], and `rank`, the prefix count of index (`select.select`).
    """
    if by_triton(h):
        from .kernels_triton import Scatter

        return Scatter.apply(h, y, gated, weight, prefix_count(index, h.shape[-2]) if rank is None else rank)
    return h.index_copy(-2, index, _updated(h, y, index, weight, x, gated))


def scatter_(h: Tensor, y: Tensor, index: Tensor, weight: Tensor, *, gated: Tensor | None = None,
             rank: Tensor | None = None) -> Tensor:
    """`scatter` written into h, which is returned: for an h that nobody else holds. No backward: RuntimeError where h
    requires a gradient."""
    if h.requires_grad:
        raise RuntimeError("scatter_ overwrites h and has no backward; use scatter, or torch.no_grad().")
    if h.is_contiguous() and by_triton(h):
        from .kernels_triton import launch_scatter

        return launch_scatter(h, y, gated, weight, prefix_count(index, h.shape[-2]) if rank is None else rank, h)
    return h.index_copy_(-2, index, _updated(h, y, index, weight, None, gated))


def _updated(h: Tensor, y: Tensor, index: Tensor, weight: Tensor, x: Tensor | None, gated: Tensor | None) -> Tensor:
    """The new rows: y + (weight - 1) * gated, gated = y - h[index] by default: [K, D] in h's dtype."""
    wide = torch.promote_types(h.dtype, torch.float32)
    new = y.to(wide)
    if gated is None:
        gated = new - (h.index_select(-2, index) if x is None else x)
    return (new + (weight.to(wide) - 1)[:, None] * gated).to(h.dtype)

