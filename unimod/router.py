"""Routers: one score per token, from the router of the token's task at this layer.

UniMoD (arXiv 2502.06474) gives each task its own router; Mixture-of-Depths (arXiv 2404.02258) has one. Both are the same
module with `shared` off or on. What a router returns is a `Routing`, the only currency between router, layer, loss and view.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .config import ParameterError
from .ops.select import segment_topk
from .tokens import Packed, Segment, Task

GATES = ("tanh", "sigmoid", "raw")


@dataclass(frozen=True)
class RouterConfig:
    """How tokens are scored and how the score enters the layer's update."""

    shared: bool = False
    """One router for all tasks (MoD) instead of one per task (UniMoD)."""
    gate: str = "tanh"
    """What multiplies the update: tanh 1 + gain * tanh(score) (p-MoD; the identity at the start), sigmoid(score), or the raw score (MoD)."""
    gain: float = 0.2
    """Reach of the tanh gate."""
    std: float = 1.0e-3
    """Spread of the initial weights: exactly zero would tie in the top-k and keep the first tokens."""

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ParameterError(f"gate={self.gate!r} is not known. Allowed: {', '.join(GATES)}.")


@dataclass(frozen=True)
class Routing:
    """A router's decision for one layer and one batch of T tokens, K of them kept."""

    index: Tensor
    """int64 [K], ascending: the tokens that are processed."""
    weight: Tensor
    """[K]: factor on each kept token's update; exactly 1 for a token that was not up for choice."""
    score: Tensor
    """[T]: the raw scores."""
    segments: tuple[Segment, ...]
    """The segments of the kept tokens, for `Packed.take`."""
    last: Tensor
    """int64 [S]: the token that each segment took last, whose score is the segment's own threshold."""


class TaskRouter(nn.Module):
    """Scores and selects the tokens of one layer.

    `capacity` maps t2i, mmu and lm to the fraction of a segment that is kept; 1 leaves the task alone. The number kept is
    known on the host: k = max(1, round(capacity * n)) of a segment of n tokens.
    """

    def __init__(self, width: int, capacity: Mapping[str, float], config: RouterConfig | None = None) -> None:
        super().__init__()
        self.config = config or RouterConfig()
        self.capacity = tuple(capacity[task.name.lower()] for task in Task)
        self.proj = nn.Linear(width, 1 if self.config.shared else len(Task))
        nn.init.normal_(self.proj.weight, std=self.config.std)
        nn.init.zeros_(self.proj.bias)
        self.register_buffer("threshold", torch.full((len(Task),), math.nan))

    def forward(self, h: Tensor, packed: Packed) -> Routing:
        """Route h: [T, D] under `packed`. Raises RuntimeError for a threshold segment before `calibrate` was called."""
        scores = self.proj(h)                                                       # [T, 1] or [T, tasks]
        score = scores[:, 0] if self.config.shared else scores.gather(1, packed.task[:, None])[:, 0]
        lengths = tuple(s.length for s in packed.segments)
        keep = tuple(self.kept(s) for s in packed.segments)
        index, last = segment_topk(score.detach(), lengths, keep)
        segments = tuple(replace(s, length=k) for s, k in zip(packed.segments, keep))
        if any(self._by_threshold(s) for s in packed.segments):
            index, segments = self._apply_threshold(score.detach(), index, packed)
        free = torch.tensor([self.capacity[s.task] < 1 and s.rule != "keep" for s in segments])
        chosen = torch.repeat_interleave(free, torch.tensor([s.length for s in segments])).to(h.device)
        weight = torch.where(chosen, self._gate(score[index]), 1.0)
        return Routing(index, weight, score, segments, last)

    def kept(self, segment: Segment) -> int:
        """Tokens of the segment that are processed (before a threshold is applied)."""
        if segment.rule != "topk" or segment.length == 0:
            return segment.length
        return max(1, math.floor(self.capacity[segment.task] * segment.length + 0.5))

    def _by_threshold(self, segment: Segment) -> bool:
        return segment.rule == "threshold" and self.capacity[segment.task] < 1

    def _apply_threshold(self, score: Tensor, index: Tensor, packed: Packed) -> tuple[Tensor, tuple[Segment, ...]]:
        """Drop the tokens of threshold segments that score below their task's threshold; the sizes are read from the device."""
        tasks = {s.task for s in packed.segments if self._by_threshold(s)}
        if torch.isnan(self.threshold[list(tasks)]).any():
            raise RuntimeError("Token-by-token generation needs calibrated thresholds: call unimod.generate.calibrate(model, batches) first.")
        stay, segments, at = torch.ones_like(index, dtype=torch.bool), [], 0
        for s in packed.segments:
            n = self.kept(s)
            if self._by_threshold(s):
                stay[at:at + n] = score[index[at:at + n]] >= self.threshold[s.task]
            segments.append(replace(s, length=int(stay[at:at + n].sum())))
            at += n
        return index[stay], tuple(segments)

    def _gate(self, score: Tensor) -> Tensor:
        if self.config.gate == "tanh":
            return 1 + self.config.gain * torch.tanh(score)
        return torch.sigmoid(score) if self.config.gate == "sigmoid" else score
