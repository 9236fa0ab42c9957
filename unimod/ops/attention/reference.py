"""Attention of packed tokens over intervals, the slow truth: pad the rows to one length, build the boolean mask, use torch's own operators.

    interval_attention    softmax_j(q_i . k_j * scale) v_j            over   lo_i <= j < hi_i
    attention_received    what the softmax gave each token j, relative to an even share
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ENTRIES = 2**24
"""Entries of attention maps that `attention_received` holds at a time."""


def interval_attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """Attention of packed tokens.

    q: [H, T, d]; k, v: [H_kv, T, d] (H a multiple of H_kv); lo, hi: int64 [T]; lengths: tokens of each row, adding up to T.
    An interval never leaves its row. Returns [T, H, d] in q's dtype.
    """
    rows = _Rows(lengths, q.device)
    low, high = rows.intervals(lo, hi)
    j = torch.arange(rows.n, device=q.device)
    allow = (j >= low[..., None]) & (j < high[..., None])
    out = F.scaled_dot_product_attention(*map(rows.pad, (q, k, v)), attn_mask=allow[:, None], scale=scale, enable_gqa=q.shape[0] != k.shape[0])
    return out.transpose(1, 2).flatten(0, 1)[rows.place]        # [B, H, n, d] -> [T, H, d]


@torch.no_grad()
def attention_received(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, segment: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """Attention that each token receives from the queries of its own segment, 1 for an even share: float32 [T].

        r_j = mean over queries i of j's segment with lo_i <= j < hi_i of (hi_i - lo_i) * mean over heads of A_ij

    A-MoD's score (arXiv 2412.20875) where a segment is the whole row and sees all of itself; queries of later segments, which may not exist yet,
    have no say. Arguments as for `interval_attention`; segment: int64 [T], the number of each token's segment.
    """
    rows = _Rows(lengths, q.device)
    low, high = rows.intervals(lo, hi)
    query, key = rows.pad(q), rows.pad(k).repeat_interleave(q.shape[0] // k.shape[0], 1)
    of = rows.pad((segment + 1)[None, :, None])[:, 0, :, 0]     # 0 for a pad
    j = torch.arange(rows.n, device=q.device)
    total, asked = (torch.zeros(len(lengths), rows.n, device=q.device) for _ in range(2))
    for some in torch.arange(rows.n, device=q.device).split(max(1, ENTRIES // (query.shape[0] * query.shape[1] * rows.n))):
        allow = (j >= low[:, some, None]) & (j < high[:, some, None])
        a = ((query[:, :, some] @ key.transpose(2, 3)).float() * scale).masked_fill(~allow[:, None], -torch.inf).softmax(-1).mean(1)
        counts = allow & (of[:, some, None] == of[:, None])
        total += (a * (high - low)[:, some, None] * counts).sum(1)
        asked += counts.sum(1)
    return (total / asked.clamp(min=1)).flatten()[rows.place]


class _Rows:
    """Packed rows as a batch of n slots each. `place`: where each packed token lies among the slots of all rows."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.lengths, self.n = lengths, max(lengths)
        size = torch.tensor(lengths)
        row = torch.repeat_interleave(torch.arange(len(lengths)), size, output_size=sum(lengths))
        begin = (size.cumsum(0) - size)[row]
        self.even = min(lengths) == self.n                      # then padding is the identity
        self.begin = begin.to(device)
        self.place = slice(None) if self.even else (row * self.n + torch.arange(sum(lengths)) - begin).to(device)

    def pad(self, x: Tensor) -> Tensor:
        """[H, T, d] -> [B, H, n, d], zeros where there is no token."""
        if not self.even:
            x = x.new_zeros(x.shape[0], len(self.lengths) * self.n, x.shape[2]).index_copy(1, self.place, x)
        return x.unflatten(1, (-1, self.n)).transpose(0, 1)

    def intervals(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals within the rows, each [B, n]; pads see all, so that no softmax is empty."""
        low, high = lo - self.begin, hi - self.begin
        if not self.even:
            low = lo.new_zeros(len(self.lengths) * self.n).index_copy(0, self.place, low)
            high = hi.new_full((len(self.lengths) * self.n,), self.n).index_copy(0, self.place, high)
        return low.view(-1, self.n), high.view(-1, self.n)
