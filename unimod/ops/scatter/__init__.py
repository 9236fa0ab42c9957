"""Weighted residual scatter: what a routed layer computed goes back among the tokens that it skipped.

    out = h,  except   out[index] = y + (weight - 1) * (y - h[index])  =  h[index] + weight * (y - h[index])
"""

from __future__ import annotations

from torch import Tensor

from ..backend import backend
from ..select.reference import prefix_count
from . import reference


def scatter(h: Tensor, y: Tensor, index: Tensor, weight: Tensor, *, x: Tensor | None = None, gated: Tensor | None = None,
            rank: Tensor | None = None) -> Tensor:
    """The residual stream after a routed layer, in a tensor of its own: [T, D] in h's dtype.

    h: [T, D]; y: [K, D], the layer's output on the tokens `index` (int64 [K], ascending, unique); weight: [K]. `gated`: [K, D], what the weight
    multiplies where that is not y - h[index]. Computed in float32 (float64 for float64), and exactly y at weight 1. What the caller has already
    saves work: `x`, which is h[index], and `rank`, the prefix count of index (`ops.select.select`).
    """
    if backend("kernels", h.device.type, h.dtype) == "triton":
        from . import triton

        return triton.scatter(h, y, gated, weight, prefix_count(index, len(h)) if rank is None else rank)
    return reference.scatter(h, y, index, weight, x, gated)


def scatter_(h: Tensor, y: Tensor, index: Tensor, weight: Tensor, *, gated: Tensor | None = None, rank: Tensor | None = None) -> Tensor:
    """The same written into h, which it returns: for an h that nobody else holds, and without gradients (RuntimeError where h asks for one)."""
    if h.requires_grad:
        raise RuntimeError("scatter_ overwrites h and has no backward; use scatter, or torch.no_grad().")
    if h.is_contiguous() and backend("kernels", h.device.type, h.dtype) == "triton":
        from . import triton

        triton.scatter_(h, y, gated, weight, prefix_count(index, len(h)) if rank is None else rank)
        return h
    return h.index_copy_(0, index, reference.updated(h, y, index, weight, None, gated))


__all__ = ["scatter", "scatter_"]
