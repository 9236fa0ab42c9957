"""Routers: one score per token, from the router of the token's task at this layer.

    score -> top-k in each segment (or a threshold) -> gate -> `Routing`

UniMoD (arXiv 2502.06474) gives each task its own router; Mixture-of-Depths (MoD, arXiv 2404.02258) has one. Both are
the `TaskRouter` of this file, with `shared` off or on; what other methods do otherwise is in `baselines`. What depends
on the batch and the capacities alone is worked out once per batch, on the host: `routing_plan`.

How to add a router: override what it does otherwise, most often `scores`, and name the class when routing a model.

    class ChangeRouter(TaskRouter):
        '''Prefers tokens that differ from the one before them.'''

        def scores(self, h, batch, state):
            change = (h - h.roll(1, dims=0)).float().norm(dim=-1)
            return super().scores(h, batch, state) + change / change.mean()

    model, image_tokenizer = from_pretrained(shipped("showo-tiny"))
    apply_mod(model, last_half(len(model.layers)), RouterConfig(gate="sigmoid"), router=ChangeRouter)

A class without weights of its own goes with RouterConfig(score="random", gate="none"). `layer_plan` is worked out once
for all layers of one class, configuration and capacity. What it routes is saved as any
model and loaded by from_pretrained(folder, router=ChangeRouter).

A published method that users should be able to name goes into `baselines.ROUTERS` and `baselines.PRESETS`, with its
formula on three tokens in `tests/core/test_routers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Batch, Segment, Task, spread
from .config import RouterConfig
from .ops.decode import by_triton
from .ops.route import GATE, Scorer, route_gather
from .ops.select import prefix_count, segment_sizes, select
from .routing import Gather, LayerPlan, Routing, RoutingState
from .upload import upload

Selected = tuple[Tensor, Tensor, Tensor, tuple[Segment, ...]]
"""`Routing.index`, `.kth`, `.rank` and `.segments`."""


class TaskRouter(nn.Module):
    """Scores and selects the tokens of one layer.

    `capacity` maps t2i, mmu and lm to the fraction of a segment that is kept; 1 leaves the task alone. The number kept
    is known on the host: of a segment with n tokens, a of which are always kept, k = a + max(1, round(capacity * (n -
    a))).
    """

    needs_attention = False
    """Whether scores are the attention received in the layer before."""

    def __init__(self, width: int, capacity: Mapping[str, float], config: RouterConfig | None = None) -> None:
        super().__init__()
        self.config = config or RouterConfig()
        self.capacity = tuple(capacity[task.name.lower()] for task in Task)
        if self.config.score == "learned":
            self.proj = scorer(width, self.config)
        if self.config.predictor:
            self.predict = scorer(width, self.config)
        self.learned = None
        """`capacity.LearnedCapacity`, where capacities are learned."""
        self.register_buffer("threshold", torch.full((len(Task),), math.nan))

    def forward(self, h: Tensor, batch: Batch, state: RoutingState | None = None, plan: LayerPlan | None = None,
                gather: Gather | None = None) -> Routing:
        """Route h: [T, D]. gather: also gather the kept tokens in the same op, where `fuses` says so, of h [1, T, D].
        Raises RuntimeError for a threshold segment before `generate.calibrate` was called."""
        state, plan = state or RoutingState(), plan or self.plan_of(batch)
        if gather is not None:
            scorer = Scorer(self.proj.weight, self.proj.bias, self.config.gate, self.config.gain)
            found = route_gather(h, scorer, batch.task, plan.eligible, plan.lengths, plan.kept, plan.sizes, gather.norm,
                                 gather.cos, gather.sin, gather.bounds, gather.flags, plan.widest)
            return Routing(found.index, found.weight, found.score, plan.segments, found.kth, plan.eligible,
                           rank=found.rank, gathered=found)
        # detached: the predictor learns what the router decides and must not move what it decides from (MoD, 3.5 b)
        predicted = self._of_task(self.predict(h.detach()), batch) if self.config.predictor else None
        score = self.scores(h, batch, state)
        ranked, eligible = self.candidates(score, batch, plan, state)
        index, kth, rank, segments = self.select(ranked, batch, plan)
        if plan.threshold_tasks:
            passes = self.passes(ranked, _judged(predicted, batch), batch, plan.threshold_tasks)
            index, segments = self._apply_threshold(passes, index, batch, plan)
            rank = prefix_count(index, len(batch))
        # 1, not the gate, where there was no choice: such a token goes through the layer as in the dense model
        gate = torch.where(eligible, self.gate(score), 1.0)
        # index_select below: the backward of gate[index] sorts its indices, 11 kernels where this takes 2
        skip_scale = gate if self.config.scale_skipped else None
        return Routing(index, gate.index_select(0, index), score, segments, kth, eligible, predicted, skip_scale, rank)

    def fuses(self, batch: Batch, plan: LayerPlan) -> bool:
        """Whether a linear score and its top-k are all that decides here: then `route_gather` does in three kernels
        what takes about 30 ops otherwise."""
        c = self.config
        other = c.hidden or c.normalised or c.predictor or c.scale_skipped or (c.noise and self.training)
        held = batch.score_source is not None or plan.always is not None or plan.threshold_tasks
        return type(self) is TaskRouter and type(self.proj) is Float32Linear and not other and not held

    def decode(self, h: Tensor, batch: Batch, state: RoutingState) -> tuple[Tensor, Tensor] | None:
        """Route a decode step, one token of every sequence, at one size and without waiting for the device: which
        tokens are kept, bool [T], and the gate on each one's update, float32 [T]. None where the rule keeps all.
        Thresholds are as `generate.calibrate` left them."""
        if not self.may_drop(batch.segments[0]):
            return None
        kinds = self.config.always_keep
        if kinds not in state.of_kind:                      # the same in all layers of a forward
            state.of_kind[kinds] = batch.of_kind(kinds)
        always = state.of_kind[kinds]
        if self._one_launch(h):
            return self._decide(h, batch, always if kinds else None)
        score = self.scores(h, batch, state)
        predicted = self._of_task(self.predict(h), batch) if self.config.predictor else None
        kept = self._above_threshold(_judged(score, batch), _judged(predicted, batch), batch)
        return always | kept, torch.where(always, 1.0, self.gate(score))

    def _one_launch(self, h: Tensor) -> bool:
        """Whether a kernel can decide: the scores, gate and thresholds of this class by linear maps, in evaluation."""
        own = type(self).scores, type(self).gate, type(self)._above_threshold
        if own != (TaskRouter.scores, TaskRouter.gate, TaskRouter._above_threshold) or self.training:
            return False
        scorers = [self.proj, self.predict] if self.config.predictor else [self.proj]
        linear = all(type(scorer) is Float32Linear for scorer in scorers) and not self.config.normalised
        return linear and by_triton(h)

    def _decide(self, h: Tensor, batch: Batch, always: Tensor | None) -> tuple[Tensor, Tensor]:
        """`decode` in one launch."""
        from .ops import decode_triton

        judge = self.predict if self.config.predictor else self.proj
        return decode_triton.decide(h, (self.proj.weight, self.proj.bias), (judge.weight, judge.bias), batch.task,
                                    batch.score_source, always, self.threshold, self.config.gate, self.config.gain,
                                    self.config.predictor)

    def plan_of(self, batch: Batch) -> LayerPlan:
        """`layer_plan` on the device of the batch."""
        return upload(self.layer_plan(batch.host or batch), batch.ids.device)

    def layer_plan(self, batch: Batch) -> LayerPlan:
        """What routing this layer needs of a batch on the host, apart from hidden states."""
        lengths, kept = tuple(s.length for s in batch.segments), self.kept_counts(batch)
        drops = [self.may_drop(s) for s in batch.segments]
        eligible = spread(torch.tensor(drops), lengths, batch.ids.device)
        # None, not a mask of False: most methods always keep nothing, and every mask costs each layer two kernels
        always = batch.of_kind(self.config.always_keep) if self.config.always_keep else None
        tasks = frozenset(s.task for s, may in zip(batch.segments, drops) if may and s.rule == "threshold")
        if tasks and "labelled" in self.config.always_keep:
            raise RuntimeError("always_keep='labelled' asks for targets, which a token that is generated has not; "
                               "generate with another kind or none.")
        segments = tuple(replace(s, length=k) for s, k in zip(batch.segments, kept))
        return LayerPlan(lengths, kept, segments, eligible if always is None else eligible & ~always, always, tasks,
                         segment_sizes(lengths, kept))

    def capacities(self) -> tuple[float, ...]:
        """Capacity of each task."""
        return self.capacity

    def kept_counts(self, batch: Batch) -> tuple[int, ...]:
        """Tokens of each segment that are processed, before a threshold is applied: [S], on the host."""
        always = batch.count_of_kind(self.config.always_keep)
        return tuple(a + share(self.capacity[int(s.task)], s.length - a)
                     if self.may_drop(s) and s.rule != "threshold" else s.length
                     for s, a in zip(batch.segments, always))

    def may_drop(self, segment: Segment) -> bool:
        """Whether a segment's tokens compete at all.

        All that decides who may be dropped: the plan (capacity below 1 for the segment's task in this layer) and the
        layout (a segment of rule "keep", such as an answer, never is) here; `RouterConfig.always_keep` in `layer_plan`.
        """
        return self.capacity[int(segment.task)] < 1 and segment.rule != "keep"

    def scores(self, h: Tensor, batch: Batch, state: RoutingState) -> Tensor:
        """One score per token: float32 [T]. h: [T, D], all sequences behind one another; `batch.row` tells which."""
        if self.config.normalised:
            h = F.layer_norm(h.to(torch.promote_types(h.dtype, torch.float32)), h.shape[-1:])
        score = self._of_task(self.proj(h), batch)
        # the logistic is the difference of two Gumbel variables: keep against drop, as in the paper's competition
        if self.training and self.config.noise:
            score = score + self.config.noise * torch.rand_like(score).clamp(1e-6, 1 - 1e-6).logit()
        return score

    def candidates(self, score: Tensor, batch: Batch, plan: LayerPlan, state: RoutingState) -> tuple[Tensor, Tensor]:
        """What is ranked, float [T] without a gradient and inf for tokens that are always kept, and which tokens are
        eligible, bool [T]."""
        # top-k has no slope: what is ranked carries no gradient, the gate does
        ranked = _judged(score.detach(), batch)
        return ranked if plan.always is None else ranked.masked_fill(plan.always, torch.inf), plan.eligible

    def select(self, ranked: Tensor, batch: Batch, plan: LayerPlan) -> Selected:
        """Top-k of every segment."""
        return *select(ranked, plan.lengths, plan.kept, plan.sizes, plan.widest), plan.segments

    def gate(self, score: Tensor) -> Tensor:
        """What multiplies the update, by score: [T]."""
        return GATE[self.config.gate](score, self.config.gain)

    def passes(self, score: Tensor, predicted: Tensor | None, batch: Batch, tasks: Iterable[Task]) -> Tensor:
        """The causal decision of each token by itself: bool [T], True for those that the predictor expects to be kept,
        else for those above the threshold. Raises RuntimeError when there is neither."""
        if predicted is None and torch.isnan(self.threshold[list(tasks)]).any():
            raise RuntimeError("Token-by-token generation needs calibrated thresholds: call "
                               "unimod.generate.calibrate(model, batch) first.")
        return self._above_threshold(score, predicted, batch)

    def flops(self) -> int:
        """FLOPs of one token's scores."""
        scorers = [part for name, part in self.named_children() if name in ("proj", "predict")]
        return sum(2 * p.numel() for part in scorers for p in part.parameters() if p.ndim > 1)

    def _of_task(self, scores: Tensor, batch: Batch) -> Tensor:
        """[T, 1] or [T, tasks] -> [T]."""
        return scores[:, 0] if self.config.shared else scores.gather(1, batch.task[:, None])[:, 0]

    def _above_threshold(self, score: Tensor, predicted: Tensor | None, batch: Batch) -> Tensor:
        return score >= self.threshold[batch.task] if predicted is None else predicted > 0

    def _apply_threshold(self, passes: Tensor, index: Tensor, batch: Batch,
                         plan: LayerPlan) -> tuple[Tensor, tuple[Segment, ...]]:
        """Drop the tokens of threshold segments that do not pass; the sizes are read from the device."""
        passes = passes if plan.always is None else passes | plan.always
        # a threshold keeps as many as pass: the one place in this class that waits for the device
        stay, segments, at = torch.ones_like(index, dtype=torch.bool), [], 0
        for s, n in zip(batch.segments, plan.kept):
            if s.rule == "threshold" and self.may_drop(s):
                stay[at:at + n] = passes[index[at:at + n]]
            segments.append(replace(s, length=int(stay[at:at + n].sum())))
            at += n
        return index[stay], tuple(segments)


def routing_plan(routers: Mapping[int, TaskRouter], batch: Batch) -> dict[int, LayerPlan]:
    """The `LayerPlan` of every routed layer for a batch on the host, by layer number; layers of the same router and
    capacity share one."""
    made: dict[tuple, LayerPlan] = {}
    found = {}
    for number, router in routers.items():
        # 24 routed layers of Show-o at one capacity: one plan and one upload in place of 24
        key = type(router), router.config, router.capacities(), router.training
        if key not in made:
            made[key] = router.layer_plan(batch)
        found[number] = made[key]
    return found


def share(capacity: float, n: int) -> int:
    """How many of n tokens a capacity keeps: rounded half up, at least one of any."""
    # at least one: a segment without a token would leave its router without a gradient; half up, since Python's round
    # sends 0.5 to 0 and 1.5 to 2
    return min(n, max(1, math.floor(capacity * n + 0.5)))


def _judged(score: Tensor | None, batch: Batch) -> Tensor | None:
    """The score by which each token is judged: its own, or that of its score source."""
    return score if score is None or batch.score_source is None else score[batch.score_source]


class Float32Linear(nn.Linear):
    """A linear map in no less than float32 whatever its weights' and input's dtype, or autocast, say.

    In bfloat16 scores a rounding apart would tie, and ties go to the earlier token; and a gate near 1 has no room.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, D] -> float32 [T, out]."""
        if x.dtype in (torch.float16, torch.bfloat16):
            return _HalfPrecisionScores.apply(x, self.weight.to(x.dtype), self.bias.float())
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class _HalfPrecisionScores(torch.autograd.Function):
    """x W^T + b of half-precision x and W, summed and returned in float32; the backward pass keeps x as it is, not a
    float32 copy."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return (torch.mm(x, weight.T, out_dtype=torch.float32) if x.is_cuda
                    else x.float() @ weight.float().T) + bias

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (x, weight), g = ctx.saved_tensors, grad.to(ctx.saved_tensors[0].dtype)
        return g @ weight, g.T @ x, grad.sum(0)


def scorer(width: int, config: RouterConfig) -> nn.Module:
    """From a token's hidden state to one score, or to one per task: a linear map, or one behind a hidden layer."""
    outputs = 1 if config.shared else len(Task)
    last = Float32Linear(config.hidden or width, outputs)
    nn.init.normal_(last.weight, std=config.std)
    nn.init.zeros_(last.bias)
    return nn.Sequential(Float32Linear(width, config.hidden), nn.SiLU(), last) if config.hidden else last
