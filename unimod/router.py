"""Routers: one score per token, from the router of the token's task at this layer.

UniMoD (arXiv 2502.06474) gives each task its own router; Mixture-of-Depths (arXiv 2404.02258) has one. Both are the same
module with `shared` off or on. What a router returns is a `Routing`, the only currency between router, layer, loss and view.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ParameterError
from .ops.select import segment_topk
from .tokens import KINDS, Packed, Segment, Task

GATES = ("tanh", "sigmoid", "raw", "none")
BRANCHES = ("update", "mlp")
SCORES = ("learned", "random")


@dataclass(frozen=True)
class RouterConfig:
    """How tokens are scored, which of them may be dropped, and how the score enters the layer's update."""

    shared: bool = False
    """One router for all tasks (MoD) instead of one per task (UniMoD)."""
    across: bool = False
    """The same weights in all routed layers (gamma-MoD) instead of each layer's own."""
    score: str = "learned"
    """learned, or random: no weights, a fresh draw at every training step and every token kept in evaluation (TREAD)."""
    hidden: int = 0
    """Width of a hidden layer (SiLU); 0 scores by a linear map."""
    normalised: bool = False
    """Score the layer-normalised input instead of the raw one."""
    gate: str = "tanh"
    """What multiplies the update: tanh 1 + gain * tanh(score) (p-MoD; the identity at the start), sigmoid(score), the raw score (MoD), or none: 1."""
    branch: str = "update"
    """What the gate multiplies: the whole update of the layer, or its MLP's part of it (gamma-MoD, p-MoD)."""
    gain: float = 0.2
    """Reach of the tanh gate."""
    std: float = 1.0e-3
    """Spread of the initial weights: exactly zero would tie in the top-k and keep the first tokens."""
    keep: tuple[str, ...] = ()
    """Tokens that are never dropped: any of `tokens.KINDS`. The capacity is of the others."""
    predictor: bool = False
    """A second scorer that learns, on a stopped gradient, whether the first will keep a token; it decides where a token must be judged by itself
    (Mixture-of-Depths, section 3.5)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        for name, allowed in (("gate", GATES), ("branch", BRANCHES), ("score", SCORES)):
            if getattr(self, name) not in allowed:
                raise ParameterError(f"{name}={getattr(self, name)!r} is not known. Allowed: {', '.join(allowed)}.")
        for kind in self.keep:
            if kind not in KINDS:
                raise ParameterError(f"keep={self.keep!r}: {kind!r} is not known. Allowed: {', '.join(KINDS)}.")
        if self.hidden < 0:
            raise ParameterError(f"hidden={self.hidden} is not a width. Give 0 for a linear map, or a positive number.")
        if self.score == "random" and (self.gate != "none" or self.predictor):
            raise ParameterError(f"gate={self.gate!r}, predictor={self.predictor}: both need a learned score; a random one goes with gate='none' alone.")


PRESETS = {
    "unimod": RouterConfig(),
    "mod": RouterConfig(shared=True, gate="raw", std=0.02),
    "gamma-mod": RouterConfig(shared=True, across=True, gate="sigmoid", branch="mlp", keep=("question",)),
    "p-mod": RouterConfig(shared=True, branch="mlp", keep=("text", "special")),
    "random": RouterConfig(score="random", gate="none"),
}
"""Published methods: UniMoD (arXiv 2502.06474), Mixture-of-Depths (2404.02258), gamma-MoD (2410.13859; its softmax over two logits is a sigmoid of
their difference), p-MoD (2412.04449; without its scaling of skipped tokens) and random routing (2501.04765). The plan is chosen apart."""


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
    open: Tensor
    """bool [T]: the tokens that were up for choice."""
    predicted: Tensor | None = None
    """[T]: logits of the predictor, if there is one, that a token is kept."""


class TaskRouter(nn.Module):
    """Scores and selects the tokens of one layer.

    `capacity` maps t2i, mmu and lm to the fraction of a segment that is kept; 1 leaves the task alone. The number kept is
    known on the host: of a segment with n tokens, a of which are never dropped, k = a + max(1, round(capacity * (n - a))).
    """

    def __init__(self, width: int, capacity: Mapping[str, float], config: RouterConfig | None = None) -> None:
        super().__init__()
        self.config = config or RouterConfig()
        self.capacity = tuple(capacity[task.name.lower()] for task in Task)
        if self.config.score == "learned":
            self.proj = scorer(width, self.config)
        if self.config.predictor:
            self.predict = scorer(width, self.config)
        self.register_buffer("threshold", torch.full((len(Task),), math.nan))

    def forward(self, h: Tensor, packed: Packed) -> Routing:
        """Route h: [T, D] under `packed`. Raises RuntimeError for a threshold segment before `calibrate` was called."""
        score, predicted = self.scores(h, packed), None
        if self.config.predictor:
            predicted = self._of_task(self.predict(h.detach()), packed)
        lengths, keep = tuple(s.length for s in packed.segments), self.kept(packed)
        always, _ = packed.always(self.config.keep)
        ranked = score.detach().masked_fill(always, torch.inf)
        index, last = segment_topk(ranked, lengths, keep)
        segments = tuple(replace(s, length=k) for s, k in zip(packed.segments, keep))
        if any(self._by_threshold(s) for s in packed.segments):
            index, segments = self._apply_threshold(self._passes(ranked, predicted, packed) | always, index, packed)
        free = torch.tensor([self._chooses(s) for s in packed.segments])
        up = torch.repeat_interleave(free, torch.tensor(lengths), output_size=sum(lengths)).to(h.device) & ~always
        weight = torch.where(up[index], self._gate(score[index]), 1.0)
        return Routing(index, weight, score, segments, last, up, predicted)

    def scores(self, h: Tensor, packed: Packed) -> Tensor:
        """One score per token: [T]."""
        if self.config.score == "random":
            return torch.rand(len(packed), device=h.device, dtype=h.dtype)
        return self._of_task(self.proj(F.layer_norm(h, h.shape[-1:]) if self.config.normalised else h), packed)

    def _of_task(self, scores: Tensor, packed: Packed) -> Tensor:
        """[T, 1] or [T, tasks] -> [T]."""
        return scores[:, 0] if self.config.shared else scores.gather(1, packed.task[:, None])[:, 0]

    def kept(self, packed: Packed) -> tuple[int, ...]:
        """Tokens of each segment that are processed (before a threshold is applied)."""
        _, counts = packed.always(self.config.keep)
        return tuple(a + max(1, math.floor(self.capacity[int(s.task)] * (s.length - a) + 0.5)) if self._chooses(s) and s.rule == "topk" and a < s.length
                     else s.length for s, a in zip(packed.segments, counts))

    def flops(self) -> int:
        """FLOPs of one token's scores."""
        return sum(2 * p.numel() for p in self.parameters() if p.ndim > 1)

    def _chooses(self, segment: Segment) -> bool:
        """Whether a segment's tokens compete at all."""
        return self.capacity[int(segment.task)] < 1 and segment.rule != "keep" and (self.training or self.config.score != "random")

    def _by_threshold(self, segment: Segment) -> bool:
        return segment.rule == "threshold" and self._chooses(segment)

    def _passes(self, score: Tensor, predicted: Tensor | None, packed: Packed) -> Tensor:
        """Which tokens a decision of their own lets through: those the predictor expects to be kept, or above their task's threshold: bool [T]."""
        if predicted is not None:
            return predicted > 0
        tasks = {s.task for s in packed.segments if self._by_threshold(s)}
        if torch.isnan(self.threshold[list(tasks)]).any():
            raise RuntimeError("Token-by-token generation needs calibrated thresholds: call unimod.generate.calibrate(model, batches) first.")
        return score >= self.threshold[packed.task]

    def _apply_threshold(self, passes: Tensor, index: Tensor, packed: Packed) -> tuple[Tensor, tuple[Segment, ...]]:
        """Drop the tokens of threshold segments that do not pass; the sizes are read from the device."""
        stay, segments, at = torch.ones_like(index, dtype=torch.bool), [], 0
        for s, n in zip(packed.segments, self.kept(packed)):
            if self._by_threshold(s):
                stay[at:at + n] = passes[index[at:at + n]]
            segments.append(replace(s, length=int(stay[at:at + n].sum())))
            at += n
        return index[stay], tuple(segments)

    def _gate(self, score: Tensor) -> Tensor:
        if self.config.gate == "tanh":
            return 1 + self.config.gain * torch.tanh(score)
        return {"sigmoid": torch.sigmoid, "raw": torch.Tensor.clone, "none": torch.ones_like}[self.config.gate](score)


def scorer(width: int, config: RouterConfig) -> nn.Module:
    """From a token's hidden state to one score, or to one per task: a linear map, or one behind a hidden layer."""
    outputs = 1 if config.shared else len(Task)
    last = nn.Linear(config.hidden or width, outputs)
    nn.init.normal_(last.weight, std=config.std)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, config.hidden), nn.SiLU(), last) if config.hidden else last
