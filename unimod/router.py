"""Routers: one score per token, from the router of the token's task at this layer.

UniMoD (arXiv 2502.06474) gives each task its own router; Mixture-of-Depths (arXiv 2404.02258) has one. Both are the same
module with `shared` off or on, and so are the other published ways to skip layers (`baselines.PRESETS`). What a router returns is a `Routing`, the
only currency between router, layer, loss and view.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Batch, Segment, Task
from .capacity import LearnedCapacity
from .config import RouterConfig
from .ops.select import prefix_count, segment_rank, select


@dataclass(frozen=True)
class Routing:
    """A router's decision for one layer and one batch of T tokens, K of them kept."""

    index: Tensor
    """int64 [K], ascending: the tokens that are processed."""
    weight: Tensor
    """float32 [K]: factor on each kept token's update; exactly 1 for a token that was not up for choice."""
    score: Tensor
    """float32 [T]: the raw scores."""
    segments: tuple[Segment, ...]
    """The segments of the kept tokens, for `Batch.take`."""
    last: Tensor
    """int64 [S]: the token that each segment took last, whose score is the segment's own threshold."""
    open: Tensor
    """bool [T]: the tokens that were up for choice."""
    predicted: Tensor | None = None
    """[T]: logits of the predictor, if there is one, that a token is kept."""
    passing: Tensor | None = None
    """[T]: factor on the tokens that pass by, where it is not 1."""
    rank: Tensor | None = None
    """int64 [T + 1]: how many kept tokens lie before each token; for `Batch.take` and the kernels."""

    @property
    def stays(self) -> Tensor:
        """bool [T]: the tokens that go through the layer, chosen or kept by rule."""
        return torch.zeros_like(self.open).index_fill(0, self.index, True)


@dataclass
class Trail:
    """What one forward hands from layer to layer, for routers that look back."""

    routing: Routing | None = None
    """What the last routed layer decided."""
    inside: Tensor | None = None
    """bool [T]: the tokens that no layer has dropped so far; None: all."""
    alone: tuple[Tensor, Tensor] | None = None
    """What the last routed layer decided in a static step: `TaskRouter.alone`."""
    received: Tensor | None = None
    """[T]: attention received in the last layer that processed the token (`ops.attention.attention_received`)."""
    watched: bool = False
    """Whether the layer that runs now must say what attention its tokens received."""


@dataclass
class ForwardState:
    """What one forward carries through the decoder layers beside the hidden states, under the one keyword that is ours: `layer(h, unimod=state)`.

    A layer of transformers passes keywords that it does not know on to its attention; a name that a later release takes for a parameter of its
    own never arrives there. So there is one, with our own name, and whatever else has to travel becomes a field here.
    """

    packed: Batch
    """The tokens that the layer is given."""
    cache: object | None = None
    """Keys and values of earlier tokens (`models.cache.KVCache`), read and written."""
    trail: Trail | None = None
    """What routers that look back share from layer to layer."""
    keep: Tensor | None = None
    """bool [B]: in a static step the rows whose token stays in this layer; None: all."""
    compiled: bool = False
    """Whether the layers are compiled, each for itself: attention then stays outside their graphs."""


class TaskRouter(nn.Module):
    """Scores and selects the tokens of one layer.

    `capacity` maps t2i, mmu and lm to the fraction of a segment that is kept; 1 leaves the task alone. The number kept is
    known on the host: of a segment with n tokens, a of which are never dropped, k = a + max(1, round(capacity * (n - a))). A router that
    `follows` repeats the decision of the layer before it.
    """

    def __init__(self, width: int, capacity: Mapping[str, float], config: RouterConfig | None = None, follows: bool = False) -> None:
        super().__init__()
        self.config, self.follows = config or RouterConfig(), follows
        self.capacity = tuple(capacity[task.name.lower()] for task in Task)
        if self.config.score == "learned":
            self.proj = scorer(width, self.config)
        if self.config.predictor:
            self.predict = scorer(width, self.config)
        self.register_buffer("threshold", torch.full((len(Task),), math.nan))
        self.learned: LearnedCapacity | None = None
        self.row = 0

    @property
    def looks_back(self) -> bool:
        """Whether a decision depends on what earlier layers did."""
        return self.config.score == "attention" or self.config.reach != "layer"

    def forward(self, h: Tensor, packed: Batch, trail: Trail | None = None) -> Routing:
        """Route h: [T, D] under `packed`. Raises RuntimeError for a threshold segment before `calibrate` was called."""
        trail = trail or Trail()
        if self.follows and trail.routing is not None:
            return trail.routing
        if self.learned is not None:
            self.capacity = self.learned.host(self.row)
        predicted = self._of_task(self.predict(h.detach()), packed) if self.config.predictor else None
        score, lengths = self.scores(h, packed, trail), tuple(s.length for s in packed.segments)
        free = torch.tensor([self._chooses(s) for s in packed.segments])
        free = torch.repeat_interleave(free, torch.tensor(lengths), output_size=sum(lengths)).to(h.device, non_blocking=True)
        always, _ = packed.always(self.config.keep)
        if self.config.compete == "batch":
            always = ~free                                  # places are for all; who has no choice has one
        judged = slice(None) if packed.twin is None else packed.twin
        ranked = score.detach()[judged].masked_fill(always, torch.inf)
        up = free & ~always
        if trail.inside is not None:
            ranked, up = ranked.masked_fill(~(trail.inside | always), -torch.inf), up & trail.inside
        index, last, rank, segments = self._select(ranked, lengths, packed)
        if any(self._by_threshold(s) for s in packed.segments):
            if "labelled" in self.config.keep:
                raise RuntimeError("keep='labelled' asks for targets, which a token that is generated has not; generate with another kind or none.")
            tasks = {s.task for s in packed.segments if self._by_threshold(s)}
            passes = self.passes(ranked, None if predicted is None else predicted[judged], packed, tasks) & (ranked > -torch.inf)
            index, segments = self._apply_threshold(passes | always, index, packed)
            rank = prefix_count(index, len(packed))
        factor = torch.where(up, self._gate(score), 1.0)
        weight = factor[index]
        if self.learned is not None and self.training:
            weight = weight * self._fading(ranked, index, up, lengths, packed)
        trail.routing = Routing(index, weight, score, segments, last, up, predicted, factor if self.config.scale_skipped else None, rank)
        if self.config.reach == "exit":
            trail.inside = torch.zeros_like(up).index_fill(0, index, True)
        return trail.routing

    def alone(self, h: Tensor, packed: Batch, trail: Trail | None = None) -> tuple[Tensor, Tensor] | None:
        """Judge one token of every row by itself, at one size and without waiting (`Batch.static`): which stay, bool [T], and the factor on each
        one's update, float32 [T]. None where the rule keeps all. Thresholds are as `calibrate` left them."""
        if not self._chooses(packed.segments[0]):
            return None
        trail = trail or Trail()
        if not (self.follows and trail.alone is not None):
            judged = slice(None) if packed.twin is None else packed.twin
            score, always = self.scores(h, packed, trail), packed.of_kind(self.config.keep)
            passes = self._lets_through(score[judged], self._of_task(self.predict(h), packed)[judged] if self.config.predictor else None, packed)
            passes = passes if trail.inside is None else passes & trail.inside
            trail.alone = always | passes, torch.where(always, 1.0, self._gate(score))
            if self.config.reach == "exit":
                trail.inside = trail.alone[0]
        return trail.alone

    def scores(self, h: Tensor, packed: Batch, trail: Trail) -> Tensor:
        """One score per token: float32 [T]."""
        if self.config.score == "random":
            return torch.rand(len(packed), device=h.device)
        if self.config.score == "attention":
            if trail.received is None and any(self._chooses(s) and s.rule == "topk" for s in packed.segments):
                raise RuntimeError("score='attention' looks at the layer before, and none has run: leave the first layer dense, and do not skip it.")
            return torch.zeros(len(packed), device=h.device) if trail.received is None else trail.received
        score = self._of_task(self.proj(F.layer_norm(h.to(torch.promote_types(h.dtype, torch.float32)), h.shape[-1:]) if self.config.normalised else h), packed)
        if self.training and self.config.noise:
            score = score + self.config.noise * torch.rand_like(score).clamp(1e-6, 1 - 1e-6).logit()
        return score

    def _of_task(self, scores: Tensor, packed: Batch) -> Tensor:
        """[T, 1] or [T, tasks] -> [T]."""
        return scores[:, 0] if self.config.shared else scores.gather(1, packed.task[:, None])[:, 0]

    def kept(self, packed: Batch, rows: set[int] | None = None) -> tuple[int, ...]:
        """Tokens of each segment that are processed, before a threshold is applied. Where whole rows compete, those of `rows` (default: the first
        ones, for counting); where the whole batch does, each segment's fair share."""
        if self.config.compete == "rows":
            rows = self._rows(packed, drawn=False) if rows is None else rows
            return tuple(s.length if s.row in rows or not self._chooses(s) else 0 for s in packed.segments)
        _, counts = packed.always(self.config.keep)
        return tuple(a + share(self.capacity[int(s.task)], s.length - a) if self._chooses(s) and s.rule != "threshold" else s.length
                     for s, a in zip(packed.segments, counts))

    def flops(self) -> int:
        """FLOPs of one token's scores."""
        scorers = [part for name, part in self.named_children() if name in ("proj", "predict")]
        return 0 if self.follows else sum(2 * p.numel() for part in scorers for p in part.parameters() if p.ndim > 1)

    def _select(self, ranked: Tensor, lengths: tuple[int, ...], packed: Batch) -> tuple[Tensor, Tensor, Tensor, tuple[Segment, ...]]:
        """The kept tokens, the token that each segment took last, how many kept ones lie before each token, and the segments of the kept ones."""
        if self.config.compete == "batch":                  # who gets how much is read from the device
            places = sum((self.capacity[int(s.task)] if self._chooses(s) else 1) * s.length for s in packed.segments)
            keep = self.kept(packed)
            k = sum(keep) if ranked.is_meta else share(places / len(ranked), len(ranked))
            index, last, rank = select(ranked, (len(ranked),), (k,))
            if not index.is_meta:                           # where there are no numbers, everyone gets a fair share
                of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[index.cpu()]
                keep = torch.bincount(of, minlength=len(lengths)).tolist()
            last = last.expand(len(lengths))
        else:
            keep = self.kept(packed, self._rows(packed, drawn=True) if self.config.compete == "rows" else None)
            index, last, rank = select(ranked, lengths, keep)
        return index, last, rank, tuple(replace(s, length=k) for s, k in zip(packed.segments, keep))

    def _rows(self, packed: Batch, drawn: bool) -> set[int]:
        """Of each task's rows the share of its capacity, drawn at random or the first ones."""
        stay: set[int] = set()
        for task in Task:
            mine = [row for row, t in enumerate(packed.tasks) if t == task]
            order = torch.randperm(len(mine)).tolist() if drawn else range(len(mine))
            stay |= {mine[i] for i in order[:share(self.capacity[int(task)], len(mine))]}
        return stay

    def _chooses(self, segment: Segment) -> bool:
        """Whether a segment's tokens compete at all."""
        by_rule = segment.rule == "keep" and self.config.compete == "segment"
        return self.capacity[int(segment.task)] < 1 and not by_rule and (self.training or self.config.score != "random")

    def _by_threshold(self, segment: Segment) -> bool:
        return segment.rule == "threshold" and self._chooses(segment)

    def passes(self, score: Tensor, predicted: Tensor | None, packed: Batch, tasks: set[Task]) -> Tensor:
        """Which tokens of these tasks a decision of their own lets through: those that the predictor expects to be kept, else those above the
        threshold: bool [T]. Raises RuntimeError when there is neither."""
        if predicted is None and self.config.score == "attention":
            raise RuntimeError("score='attention' cannot judge a token before others have looked at it; token-by-token generation needs predictor=True.")
        if predicted is None and torch.isnan(self.threshold[list(tasks)]).any():
            raise RuntimeError("Token-by-token generation needs calibrated thresholds: call unimod.generate.calibrate(model, batches) first.")
        return self._lets_through(score, predicted, packed)

    def _lets_through(self, score: Tensor, predicted: Tensor | None, packed: Batch) -> Tensor:
        return score >= self.threshold[packed.task] if predicted is None else predicted > 0

    def _apply_threshold(self, passes: Tensor, index: Tensor, packed: Batch) -> tuple[Tensor, tuple[Segment, ...]]:
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
        if self.config.gate == "straight-through":
            soft = torch.sigmoid(score)
            return 1 + (soft - soft.detach())
        return {"sigmoid": torch.sigmoid, "raw": torch.Tensor.clone, "none": torch.ones_like}[self.config.gate](score)

    def _fading(self, ranked: Tensor, index: Tensor, up: Tensor, lengths: tuple[int, ...], packed: Batch) -> Tensor:
        """Factor by which each kept token enters while capacities are learned: [K]."""
        _, always = packed.always(self.config.keep)
        places, fixed = (torch.repeat_interleave(torch.tensor(x), torch.tensor(lengths), output_size=len(ranked)).to(ranked.device, non_blocking=True)[index]
                         for x in (lengths, always))
        factor = self.learned.edge(self.row, packed.task[index], segment_rank(ranked, lengths)[index] - fixed, (places - fixed).clamp(min=1))
        return torch.where(up[index], factor, 1.0)


def share(capacity: float, n: int) -> int:
    """How many of n tokens a capacity keeps: rounded half up, at least one of any."""
    return min(n, max(1, math.floor(capacity * n + 0.5)))


class Exact(nn.Linear):
    """A linear map in no less than float32 whatever its weights' and input's dtype, or autocast, say: scores a rounding apart would tie, and ties go to the
    earlier token; and a gate near 1 has no room in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, D] -> float32 [T, out]."""
        if x.dtype in (torch.float16, torch.bfloat16):
            return _Scores.apply(x, self.weight.to(x.dtype), self.bias.float())
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class _Scores(torch.autograd.Function):
    """x W^T + b of half-precision x and W, summed and handed out in float32; what is kept for the backward is x as it is."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return (torch.mm(x, weight.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ weight.float().T) + bias

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (x, weight), g = ctx.saved_tensors, grad.to(ctx.saved_tensors[0].dtype)
        return g @ weight, g.T @ x, grad.sum(0)


def scorer(width: int, config: RouterConfig) -> nn.Module:
    """From a token's hidden state to one score, or to one per task: a linear map, or one behind a hidden layer."""
    outputs = 1 if config.shared else len(Task)
    last = Exact(config.hidden or width, outputs)
    nn.init.normal_(last.weight, std=config.std)
    nn.init.zeros_(last.bias)
    return nn.Sequential(Exact(width, config.hidden), nn.SiLU(), last) if config.hidden else last
