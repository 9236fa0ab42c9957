"""Selection of the tokens a routed layer processes."""

from __future__ import annotations

from torch import Tensor

from ..backend import backend
from . import reference
from .reference import prefix_count, segment_rank, segment_topk

LONGEST = 2**14
"""Tokens of the longest segment that the kernel takes: one program holds a whole segment."""


def select(score: Tensor, lengths: tuple[int, ...], keep: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """`segment_topk`, and with it the prefix count of what is kept, from which `Batch.take` reads the new intervals.

    Returns `index` (int64 [K]), `last` (int64 [S]; of a segment without tokens, any token) and `rank` (int64 [T + 1]): how many kept tokens lie
    before each token. Raises ValueError on sizes that do not fit.
    """
    reference.check_sizes(score, lengths, keep)
    if max(lengths) <= LONGEST and backend("kernels", score.device.type, score.dtype) == "triton":
        from . import triton

        return triton.select(score, lengths, keep)
    return reference.select(score, lengths, keep)


__all__ = ["prefix_count", "segment_rank", "segment_topk", "select"]
