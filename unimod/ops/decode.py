"""Decode steps: one new token of each sequence, at one size, so that a CUDA graph can hold the step.

    attend_appended   the token's key and value go into the cache; attention over what the cache holds, and itself
    apply_decision    a routed layer's output where the token is kept, the residual stream where it is not
    rms_norm          Llama's RMSNorm as one operation

B sequences, H heads, H_kv key heads, d per head, D width. Without gradients the Triton kernels of `decode_triton` run
where there are any; this file is the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .gather_scatter import Norm, reference_norm
from .select import by_triton as runs_triton


def attend_appended(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, used: Tensor, active: Tensor | None,
                    scale: float) -> Tensor:
    """Write k and v behind what the cache holds, and attend over all of it: [B, H, d] in the cache's dtype.

    q: [H, B, d]; k, v: [H_kv, B, d], rounded to the cache's dtype. keys, values: [B, H_kv, room, d], of which row b
    holds used[b] < room tokens (int64 [B]). `used` grows by one where `active` (bool [B]; None: everywhere); elsewhere
    the token is seen by itself only, and the next one takes its place.
    """
    if by_triton(v):
        from . import decode_triton

        return decode_triton.attend_appended(q, k, v, keys, values, used, active, scale)
    q, k, rows = q.to(v.dtype), k.to(v.dtype), torch.arange(len(used), device=v.device)
    keys[rows, :, used] = k.transpose(0, 1)
    values[rows, :, used] = v.transpose(0, 1)
    allow = torch.arange(keys.shape[2], device=v.device) <= used[:, None]
    used.add_(1 if active is None else active.long())
    return attend_one(q, keys, values, allow, scale)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, allow: Tensor, scale: float) -> Tensor:
    """One query per sequence, [H, B, d], over keys and values [B, H_kv, n, d] where allow [B, n] says so: [B, H, d]."""
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[:, :, None], keys, values, attn_mask=allow[:, None, None],
                                         scale=scale, enable_gqa=q.shape[0] != keys.shape[1])
    return out[:, :, 0]


def apply_decision(h: Tensor, y: Tensor, kept: Tensor, gate: Tensor, gated: Tensor | None = None,
                   scale_skipped: bool = False) -> Tensor:
    """y + (gate - 1) * gated where the token is kept, elsewhere h, or gate * h with `scale_skipped`: like h.

    h, y, gated: [1, B, D], gated = y - h by default; kept: bool [B]; gate: float32 [B].
    """
    if by_triton(h):
        from . import decode_triton

        return decode_triton.apply_decision(h, y, kept, gate, gated, scale_skipped)
    kept, gate = kept[:, None], gate[:, None]
    gated = y - h if gated is None else gated
    skipped = h * gate.to(y.dtype) if scale_skipped else h
    return torch.where(kept, (y + (gate - 1).to(y.dtype) * gated).to(y.dtype), skipped)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x / sqrt(mean of x^2 + eps), rounded to x's dtype, times the weight: like x."""
    if by_triton(x) and norm.weight.dtype == x.dtype:
        from . import decode_triton

        return decode_triton.rms_norm(x, norm.weight, norm.eps)
    return reference_norm(x, norm)


def by_triton(x: Tensor) -> bool:
    """Whether the kernels run for x; they have no backward pass."""
    return not (torch.is_grad_enabled() and x.requires_grad) and runs_triton(x)
