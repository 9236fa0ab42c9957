"""Top-k of the scores inside every segment of a packed batch: the tokens that a routed layer processes.

The reference takes two sorts, no loop over sequences and no size that is read from the device; `kernels_triton` one
pass.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .backend import backend

LONGEST = 2**14
"""Tokens of the longest segment that the Triton kernel takes: one program holds a whole segment."""


def select(score: Tensor, lengths: tuple[int, ...], keep: tuple[int, ...],
           sizes: Tensor | None = None, longest: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The `keep[s]` best-scored tokens of each segment s.

    score: float [T]; lengths, keep: host sizes per segment, lengths adding up to T and 0 <= keep[s] <= lengths[s];
    sizes: their `segment_sizes` on the device, which saves an upload; longest: a bound of the lengths, where the kernel
    is to be the same for every batch; 0: the most. Ties go to the earlier token; a NaN of either sign counts as the
    best score, and -0 equals 0. Returns `index` (int64 [K], ascending), `last` (int64 [S]: the k-th best token of each
    segment; its best for keep[s] = 0; any token where the segment is empty) and `rank` (int64 [T + 1], the prefix count
    of index, from which `IntervalMask.take` reads the new intervals). Raises ValueError on sizes that do not fit.
    """
    check_sizes(score, lengths, keep)
    longest = longest or max(lengths)
    if longest <= LONGEST and by_triton(score):
        from . import kernels_triton

        sizes = _uploaded(tuple(lengths), tuple(keep), score.device) if sizes is None else sizes
        return kernels_triton.launch_select(score.detach().contiguous(), longest, sum(keep), sizes)
    return reference_select(score, lengths, keep)


def by_triton(x: Tensor) -> bool:
    """Whether the Triton kernels run on x. Not in a graph that is compiled or exported: the compiler fuses the
    reference."""
    return not torch.compiler.is_compiling() and backend("kernels", x.device.type, x.dtype) == "triton"


def check_sizes(score: Tensor, lengths: tuple[int, ...], keep: tuple[int, ...]) -> None:
    """Raise ValueError where `keep` or `score` does not fit `lengths`."""
    if sum(lengths) != len(score) or len(lengths) != len(keep) or any(not 0 <= k <= n for k, n in zip(keep, lengths)):
        raise ValueError(f"select: keep={keep} does not fit lengths={lengths} of {len(score)} scores.")


def segment_sizes(lengths: tuple[int, ...], keep: tuple[int, ...]) -> Tensor:
    """What the kernel must know of each segment, on the host: int32 [S, 4] = first token, tokens, tokens kept, tokens
    kept in the segments before."""
    rows = zip(accumulate(lengths, initial=0), lengths, keep, accumulate(keep, initial=0))
    return torch.tensor(list(rows), dtype=torch.int32)


@lru_cache(maxsize=256)
def _uploaded(lengths: tuple[int, ...], keep: tuple[int, ...], device: torch.device) -> Tensor:
    """One upload per batch and number kept, which nothing waits for."""
    return segment_sizes(lengths, keep).to(device, non_blocking=True)


def reference_select(score: Tensor, lengths: tuple[int, ...], keep: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """`select` in torch's own operators. Sizes are not checked."""
    size, k = torch.tensor(lengths), torch.tensor(keep)
    order = _best_first(score, lengths)
    start = size.cumsum(0) - size
    slot = torch.arange(sum(keep)) + torch.repeat_interleave(start - (k.cumsum(0) - k), k, output_size=sum(keep))
    index = order[slot.to(score.device, non_blocking=True)].sort().values
    kth = (start + (k - 1).clamp(min=0)).clamp(max=len(score) - 1)
    return index, order[kth.to(score.device, non_blocking=True)], prefix_count(index, len(score))


def prefix_count(index: Tensor, n: int) -> Tensor:
    """How many of `index` (int64 [K], ascending, unique, below n) lie before each of n tokens, and before the end:
    int64 [n + 1]."""
    return torch.zeros(n + 1, dtype=torch.long, device=index.device).index_fill_(0, index + 1, 1).cumsum(0)


def segment_rank(score: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Rank of every token in its segment, the best 0: int64 [T]. Arguments and order as for `select`."""
    size = torch.tensor(lengths)
    start = torch.repeat_interleave(size.cumsum(0) - size, size, output_size=sum(lengths))
    slot = (torch.arange(sum(lengths)) - start).to(score.device, non_blocking=True)
    return torch.empty_like(slot).index_copy_(0, _best_first(score, lengths), slot)


def _best_first(score: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Tokens by segment, best first: int64 [T]."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths), output_size=sum(lengths))
    segment = segment.to(score.device, non_blocking=True)
    score = score.masked_fill(score.isnan(), torch.nan)     # CUDA sorts a bfloat16 NaN with the sign bit last
    order = torch.argsort(score, descending=True, stable=True)
    return order[torch.argsort(segment[order], stable=True)]
