"""The weighted residual scatter in torch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor


def scatter(h: Tensor, y: Tensor, index: Tensor, weight: Tensor, x: Tensor | None, gated: Tensor | None) -> Tensor:
    """h with the rows `index` replaced. Arguments as for `ops.scatter.scatter`."""
    return h.index_copy(0, index, updated(h, y, index, weight, x, gated))


def updated(h: Tensor, y: Tensor, index: Tensor, weight: Tensor, x: Tensor | None, gated: Tensor | None) -> Tensor:
    """The new rows: y + (weight - 1) * gated, gated = y - h[index] by default: [K, D] in h's dtype."""
    wide = torch.promote_types(h.dtype, torch.float32)
    new = y.to(wide)
    if gated is None:
        gated = new - (h[index] if x is None else x)
    return (new + (weight.to(wide) - 1)[:, None] * gated).to(h.dtype)
