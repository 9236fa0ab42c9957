"""Gather and norm in torch's own operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_norm(h: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """x = h[index] and its LayerNorm (centred) or RMSNorm."""
    x = h[index]
    if centred:
        return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return x, weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
