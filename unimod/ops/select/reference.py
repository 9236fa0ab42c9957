"""Top-k inside every segment of a packed batch: two sorts, no loop over sequences, no size that is read from the device."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_topk(score: Tensor, lengths: tuple[int, ...], keep: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The `keep[s]` best-scored tokens of each segment s.

    score: [T] float; lengths, keep: host sizes per segment, lengths adding up to T and 0 <= keep[s] <= lengths[s].
    Returns `index` (int64 [K], ascending) and `last` (int64 [S]): the token each segment took last, i.e. its k-th best (for
    keep[s] = 0 its best). Ties go to the earlier token. Raises ValueError on sizes that do not fit.
    """
    check_sizes(score, lengths, keep)
    size, k = torch.tensor(lengths), torch.tensor(keep)
    order = _best_first(score, lengths)
    start = size.cumsum(0) - size
    slot = torch.arange(sum(keep)) + torch.repeat_interleave(start - (k.cumsum(0) - k), k, output_size=sum(keep))
    index = order[slot.to(score.device, non_blocking=True)].sort().values
    last = order[(start + (k - 1).clamp(min=0)).clamp(max=len(score) - 1).to(score.device, non_blocking=True)]
    return index, last


def select(score: Tensor, lengths: tuple[int, ...], keep: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """`segment_topk` and the prefix count of its index."""
    index, last = segment_topk(score, lengths, keep)
    return index, last, prefix_count(index, len(score))


def prefix_count(index: Tensor, n: int) -> Tensor:
    """How many of `index` (int64 [K], ascending, unique, below n) lie before each of n tokens, and before the end: int64 [n + 1]."""
    return torch.zeros(n + 1, dtype=torch.long, device=index.device).index_fill_(0, index + 1, 1).cumsum(0)


def check_sizes(score: Tensor, lengths: tuple[int, ...], keep: tuple[int, ...]) -> None:
    """Raise ValueError on sizes that do not fit."""
    if sum(lengths) != len(score) or len(lengths) != len(keep) or any(not 0 <= k <= n for k, n in zip(keep, lengths)):
        raise ValueError(f"segment_topk: keep={keep} does not fit lengths={lengths} of {len(score)} scores.")


def segment_rank(score: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Rank of every token in its segment, the best 0: int64 [T]. Arguments as for `segment_topk`."""
    size = torch.tensor(lengths)
    slot = torch.arange(sum(lengths)) - torch.repeat_interleave(size.cumsum(0) - size, size, output_size=sum(lengths))
    return torch.empty_like(slot, device=score.device).index_copy_(0, _best_first(score, lengths), slot.to(score.device, non_blocking=True))


def _best_first(score: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Tokens by segment, best first: int64 [T]."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths), output_size=sum(lengths)).to(score.device, non_blocking=True)
    order = torch.argsort(score, descending=True, stable=True)
    return order[torch.argsort(segment[order], stable=True)]
