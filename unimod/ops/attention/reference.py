"""Interval attention, the slow truth: pad the rows to one length, build the boolean mask, call torch's SDPA.

    softmax_j(q_i . k_j * scale) v_j   over   lo_i <= j < hi_i
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def interval_attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """Attention of packed tokens.

    q: [H, T, d]; k, v: [H_kv, T, d] (H a multiple of H_kv); lo, hi: int64 [T]; lengths: tokens of each row, adding up to T.
    An interval never leaves its row. Returns [T, H, d] in q's dtype.
    """
    n = max(lengths)
    if min(lengths) == n:                                       # equal rows: padding would be the identity
        unpad = slice(None)
        batch = [x.unflatten(1, (-1, n)).transpose(0, 1) for x in (q, k, v)]
        start = torch.arange(len(lengths), device=q.device) * n
        low, high = lo.view(-1, n) - start[:, None], hi.view(-1, n) - start[:, None]
    else:
        size = torch.tensor(lengths)
        row = torch.repeat_interleave(torch.arange(len(lengths)), size, output_size=sum(lengths))
        begin = size.cumsum(0) - size
        unpad = (row * n + torch.arange(sum(lengths)) - begin[row]).to(q.device)
        batch = [x.new_zeros(x.shape[0], len(lengths) * n, x.shape[2]).index_copy(1, unpad, x).unflatten(1, (-1, n)).transpose(0, 1) for x in (q, k, v)]
        offset = begin[row].to(q.device)
        low = lo.new_zeros(len(lengths) * n).index_copy(0, unpad, lo - offset).view(-1, n)
        high = hi.new_full((len(lengths) * n,), n).index_copy(0, unpad, hi - offset).view(-1, n)   # pads see all: no empty softmax
    j = torch.arange(n, device=q.device)
    allow = (j >= low[..., None]) & (j < high[..., None])
    out = F.scaled_dot_product_attention(*batch, attn_mask=allow[:, None], scale=scale, enable_gqa=q.shape[0] != k.shape[0])
    return out.transpose(1, 2).flatten(0, 1)[unpad]             # [B, H, n, d] -> [T, H, d]
