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
    if sum(lengths) != len(score) or len(lengths) != len(keep) or any(not 0 <= k <= n for k, n in zip(keep, lengths)):
        raise ValueError(f"segment_topk: keep={keep} does not fit lengths={lengths} of {len(score)} scores.")
    size, k = torch.tensor(lengths), torch.tensor(keep)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), size, output_size=sum(lengths)).to(score.device)
    order = torch.argsort(score, descending=True, stable=True)
    order = order[torch.argsort(segment[order], stable=True)]    # by segment, best first
    start = size.cumsum(0) - size
    slot = torch.arange(sum(keep)) + torch.repeat_interleave(start - (k.cumsum(0) - k), k, output_size=sum(keep))
    index = order[slot.to(score.device)].sort().values
    last = order[(start + (k - 1).clamp(min=0)).clamp(max=len(score) - 1).to(score.device)]
    return index, last
