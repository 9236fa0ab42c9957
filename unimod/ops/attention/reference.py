"""The slow truth: pad the rows to one length, build the boolean mask, use torch's own operators. What is computed is said in `__init__`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ENTRIES = 2**23
"""Entries of attention maps that the statistics hold at a time."""


class Rows:
    """Batch rows as a batch of n slots each. `place`: where each packed token lies among the slots of all rows."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.lengths, self.n = lengths, max(lengths)
        size = torch.tensor(lengths)
        row = torch.repeat_interleave(torch.arange(len(lengths)), size, output_size=sum(lengths))
        begin = (size.cumsum(0) - size)[row]
        self.even = min(lengths) == self.n                      # then padding is the identity
        self.begin = begin.to(device, non_blocking=True)
        self.place = slice(None) if self.even else (row * self.n + torch.arange(sum(lengths)) - begin).to(device, non_blocking=True)

    def pad(self, x: Tensor) -> Tensor:
        """[H, T, d] -> [B, H, n, d], zeros where there is no token."""
        if not self.even:
            x = x.new_zeros(x.shape[0], len(self.lengths) * self.n, x.shape[2]).index_copy(1, self.place, x)
        return x.unflatten(1, (-1, self.n)).transpose(0, 1)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, n, ...] -> [T, ...]."""
        return x.flatten(0, 1)[self.place]

    def intervals(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals within the rows, each [B, n]; pads see all, so that no softmax is empty."""
        low, high = lo - self.begin, hi - self.begin
        if not self.even:
            low = lo.new_zeros(len(self.lengths) * self.n).index_copy(0, self.place, low)
            high = hi.new_full((len(self.lengths) * self.n,), self.n).index_copy(0, self.place, high)
        return low.view(-1, self.n), high.view(-1, self.n)


def prepare(lo: Tensor, hi: Tensor, lengths: tuple[int, ...], masks: tuple[str, ...]) -> tuple[Rows, Tensor | None]:
    """The rows and who sees whom among their slots, bool [B, 1, n, n]; None where every row is causal."""
    rows = Rows(lengths, lo.device)
    if set(masks) == {"causal"}:
        return rows, None
    low, high = rows.intervals(lo, hi)
    j = torch.arange(rows.n, device=lo.device)
    return rows, ((j >= low[..., None]) & (j < high[..., None]))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, plan: tuple[Rows, Tensor | None], scale: float, name: str = "sdpa") -> Tensor:
    """`interval_attention` by torch's scaled_dot_product_attention."""
    rows, allow = plan
    out = F.scaled_dot_product_attention(*map(rows.pad, (q, k, v)), attn_mask=allow, is_causal=allow is None, scale=scale,
                                         enable_gqa=q.shape[0] != k.shape[0])
    return rows.unpad(out.transpose(1, 2))                      # [B, H, n, d] -> [T, H, d]


@torch.no_grad()
def attention_received(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, segment: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """`attention_received`, from maps of a few queries at a time."""
    rows = Rows(lengths, q.device)
    low, high = rows.intervals(lo, hi)
    of = rows.pad((segment + 1)[None, :, None])[:, 0, :, 0]     # 0 for a pad
    total, asked = (torch.zeros(len(lengths), rows.n, device=q.device) for _ in range(2))
    for some, allow, a in _maps(q, k, rows, low, high, scale):
        counts = allow & (of[:, some, None] == of[:, None])
        total += (a.mean(1) * (high - low)[:, some, None] * counts).sum(1)
        asked += counts.sum(1)
    return rows.unpad(total / asked.clamp(min=1))


@torch.no_grad()
def attention_mass(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, label: Tensor, labels: int, lengths: tuple[int, ...], scale: float,
                   position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_mass`, from maps of a few queries at a time."""
    rows = Rows(lengths, q.device)
    low, high = rows.intervals(lo, hi)
    kinds = rows.pad(F.one_hot(label, labels).float()[None])    # [B, 1, n, labels]
    at = rows.pad(position[None, :, None])[:, :, :, 0].float()  # [B, 1, n]
    size = len(lengths), q.shape[0], rows.n
    found = torch.empty(*size, labels, device=q.device), torch.empty(size, device=q.device), torch.empty(size, device=q.device)
    for some, _, a in _maps(q, k, rows, low, high, scale):      # results of every block kept in between would leave the heap full of holes
        mass, entropy, distance = (x[:, :, some[0]: some[-1] + 1] for x in found)
        mass[:] = a @ kinds
        entropy[:] = -torch.xlogy(a, a).sum(-1)
        distance[:] = (at[:, :, some, None] - at[:, :, None]).abs_().mul(a).sum(-1)
    return tuple(rows.unpad(x.transpose(1, 2)).transpose(0, 1) for x in found)


def _maps(q: Tensor, k: Tensor, rows: Rows, low: Tensor, high: Tensor, scale: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some queries at a time, int64 [m]: whom they may see, bool [B, m, n], and how much they do, float32 [B, H, m, n]."""
    query, key = rows.pad(q).float(), rows.pad(k).float().repeat_interleave(q.shape[0] // k.shape[0], 1)     # as kernels multiply: no logit is rounded
    j = torch.arange(rows.n, device=q.device)
    for some in j.split(max(1, ENTRIES // (query.shape[0] * query.shape[1] * rows.n))):
        allow = (j >= low[:, some, None]) & (j < high[:, some, None])
        logits = (query[:, :, some] @ key.transpose(2, 3)).mul_(scale)
        yield some, allow, logits.masked_fill_(~allow[:, None], -torch.inf).softmax(-1)
