"""The start of a routed layer in one op: scores, selection, gates, and the gather of all that the kept tokens bring
along.

    score = h . weight[task] + bias[task]     index = top-k of score in each segment
    weight = gate(score)[index]               x = h[index],  normed = norm(x)

`route_triton` takes 3 kernels forward and 2 backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .gather_scatter import Norm, reference_norm
from .select import LONGEST, by_triton, check_sizes, select


@dataclass(frozen=True)
class Scorer:
    """A linear router's score and gate."""

    weight: Tensor
    """[n, D]: n = 1 for all tasks, or one row for each of at most three."""
    bias: Tensor
    """[n]."""
    gate: str
    """A key of `GATE`."""
    gain: float
    """Of tanh."""


class Routed(NamedTuple):
    """T tokens routed, K of them kept, in S segments."""

    h: Tensor
    """[T, D]: h itself. Who uses it from here on gives its gradient to the op's one backward kernel; autograd would
    take another kernel, of 3 T rows, to add it."""
    x: Tensor
    """[K, D]: h[index]."""
    normed: Tensor
    """[K, D]: norm(x)."""
    weight: Tensor
    """float32 [K]: where(eligible, gate(score), 1)[index]."""
    score: Tensor
    """float32 [T]."""
    index: Tensor
    """int64 [K], as `select` returns it, and so the next two."""
    kth: Tensor
    """int64 [S]."""
    rank: Tensor
    """int64 [T + 1]."""
    cos: Tensor
    """float32 [K, R]: cos[index]."""
    sin: Tensor
    """float32 [K, R]: sin[index]."""
    bounds: Tensor | None
    """int32 [C]: rank[bounds]."""
    flags: Tensor | None
    """bool [K]: flags[index]."""


def route_gather(h: Tensor, scorer: Scorer, task: Tensor, eligible: Tensor, lengths: tuple[int, ...],
                 kept: tuple[int, ...], sizes: Tensor, norm: Norm, cos: Tensor, sin: Tensor,
                 bounds: Tensor | None, flags: Tensor | None, longest: int = 0) -> Routed:
    """Score all tokens and gather the `kept[s]` best of each segment s.

    h: [T, D], or with a leading 1 as x and normed then; task: int64 [T]; eligible: bool [T], the tokens that are gated;
    lengths, kept: host sizes per segment; sizes: their `segment_sizes` on h's device; cos, sin: float32 [T, R],
    or with a leading 1 as what becomes of them then; bounds: int32 [C], each in 0 ... T; flags: bool [T]. All but h are
    contiguous. longest: as for `select`. Scores are sums in float32 (float64 for float64) of h and the weight rounded
    to h's dtype. Gradients: to h, the scorer and the norm, from h, x, normed, weight and score. Raises ValueError as
    `select`.
    """
    longest = longest or max(lengths)
    if longest <= LONGEST and by_triton(h):
        check_sizes(task, lengths, kept)
        from .route_triton import RouteGather

        return Routed(*RouteGather.apply(
            h, scorer.weight, scorer.bias, norm.weight, norm.bias, task, eligible, sizes, cos, sin, bounds, flags,
            scorer.gate, scorer.gain, norm.eps, norm.kind == "layer", longest, sum(kept)))
    score = reference_score(h.flatten(0, -2), scorer, task)
    index, kth, rank = select(score.detach(), lengths, kept, sizes)
    # 1, not the gate, where there was no choice: such a token goes through the layer as in the dense model
    gate = torch.where(eligible, GATE[scorer.gate](score, scorer.gain), 1.0)
    x = h.index_select(-2, index)
    edges = None if bounds is None else rank.index_select(0, bounds).to(torch.int32)
    marks = None if flags is None else flags.index_select(0, index)
    return Routed(h, x, reference_norm(x, norm), gate.index_select(0, index), score, index, kth, rank,
                  cos.index_select(-2, index), sin.index_select(-2, index), edges, marks)


def reference_score(h: Tensor, scorer: Scorer, task: Tensor) -> Tensor:
    """The score of each token in torch's own operators: float32 (or float64) [T]."""
    wide = torch.promote_types(h.dtype, torch.float32)
    scores = h.to(wide) @ scorer.weight.to(h.dtype).to(wide).T + scorer.bias.to(wide)
    return scores[:, 0] if len(scorer.weight) == 1 else scores.gather(1, task[:, None])[:, 0]


def _straight_through(score: Tensor, gain: float) -> Tensor:
    soft = torch.sigmoid(score)
    return 1 + (soft - soft.detach())


GATE = {
    "tanh": lambda score, gain: 1 + gain * torch.tanh(score),
    "sigmoid": lambda score, gain: torch.sigmoid(score),
    "raw": lambda score, gain: score.clone(),
    "none": lambda score, gain: torch.ones_like(score),
    "straight-through": _straight_through,
}
"""The gates of `config.GATES`: float32 [T] scores -> float32 [T] factors on the update."""
