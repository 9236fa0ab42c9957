"""Published methods beside UniMoD: each a configuration of the router, or a small class of its own where it decides
otherwise.

    apply_mod(model, plan, PRESETS["early-exit"])
    learned = learn_capacity(apply_mod(model, plan), saving=0.3)     # capacities that training moves
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .batch import Batch, Segment, Task, spread
from .capacity import LearnedCapacity
from .config import TASKS, ParameterError, RouterConfig
from .ops.select import segment_rank, select
from .plan import CapacityPlan
from .router import Selected, TaskRouter, share
from .routing import LayerPlan, Routing, RoutingState

PRESETS = {
    "unimod": RouterConfig(),
    "mod": RouterConfig(shared=True, gate="raw", std=0.02),
    "gamma-mod": RouterConfig(shared=True, shared_layers=True, gate="sigmoid", branch="mlp", always_keep=("question",)),
    "p-mod": RouterConfig(shared=True, branch="mlp", always_keep=("text", "special"), scale_skipped=True),
    "a-mod": RouterConfig(score="attention", gate="none"),
    "router-tuning": RouterConfig(shared=True, freeze_backbone=True),
    "random": RouterConfig(score="random", gate="none"),
    "tread": RouterConfig(score="random", gate="none", decision_scope="span"),
    "early-exit": RouterConfig(decision_scope="exit"),
    "layer-drop": RouterConfig(score="random", gate="none", topk_scope="sequences"),
    "competitive": RouterConfig(shared=True, gate="straight-through", noise=1.0, topk_scope="batch"),
}
"""UniMoD (arXiv 2502.06474), Mixture-of-Depths (2404.02258), gamma-MoD (2410.13859; its softmax over two logits is a
sigmoid of their difference), p-MoD (2412.04449), A-MoD (2412.20875), Router-Tuning (2410.13184), random routing in one
layer and over a span of layers (TREAD, 2501.04765), early exit of tokens, layer dropping (LayerDrop, 1909.11556), and
UniMoD's competitive experiment. The plan is chosen apart."""


class RandomRouter(TaskRouter):
    """No weights: a fresh draw at every training step, and every token kept in evaluation."""

    def may_drop(self, segment: Segment) -> bool:
        """Whether a segment's tokens compete at all."""
        return self.training and super().may_drop(segment)

    def scores(self, h: Tensor, batch: Batch, state: RoutingState) -> Tensor:
        """Uniform in [0, 1): float32 [T]."""
        return torch.rand(len(batch), device=h.device)


class AttentionRouter(TaskRouter):
    """A-MoD (arXiv 2412.20875): no weights; the score is the attention that a token received in the layer before."""

    needs_attention = True

    def scores(self, h: Tensor, batch: Batch, state: RoutingState) -> Tensor:
        """Attention received: float32 [T]. Raises RuntimeError where no layer has run before."""
        if state.received is not None:
            return state.received
        if any(self.may_drop(s) and s.rule == "topk" for s in batch.segments):
            raise RuntimeError("score='attention' looks at the layer before, and none has run: leave the first layer "
                               "dense, and do not skip it.")
        return torch.zeros(len(batch), device=h.device)     # a decode step, where the predictor decides

    def passes(self, score: Tensor, predicted: Tensor | None, batch: Batch, tasks: set[Task]) -> Tensor:
        """As `TaskRouter.passes`, by the predictor alone. Raises RuntimeError without one."""
        if predicted is None:
            raise RuntimeError("score='attention' cannot judge a token before others have looked at it; "
                               "token-by-token generation needs predictor=True.")
        return super().passes(score, predicted, batch, tasks)


class Span:
    """One decision for all routed layers that follow without a dense one between (TREAD): the first of them decides."""

    follows = False
    """Whether this layer repeats the decision of the routed layer before it."""

    def forward(self, h: Tensor, batch: Batch, state: RoutingState | None = None,
                plan: LayerPlan | None = None) -> Routing:
        """As `TaskRouter.forward`."""
        state = state or RoutingState()
        if not (self.follows and state.routing is not None):
            state.routing = super().forward(h, batch, state, plan)
        return state.routing

    def decode(self, h: Tensor, batch: Batch, state: RoutingState) -> tuple[Tensor, Tensor] | None:
        """As `TaskRouter.decode`."""
        if not (self.follows and state.decision is not None):
            state.decision = super().decode(h, batch, state)
        return state.decision

    def flops(self) -> int:
        """FLOPs of one token's scores."""
        return 0 if self.follows else super().flops()


class EarlyExit:
    """A token that a layer drops never comes back: only active tokens are ranked."""

    def candidates(self, score: Tensor, batch: Batch, plan: LayerPlan, state: RoutingState) -> tuple[Tensor, Tensor]:
        """As `TaskRouter.candidates`, -inf for tokens that have left."""
        ranked, eligible = super().candidates(score, batch, plan, state)
        if state.active is None:
            return ranked, eligible
        there = state.active if plan.always is None else state.active | plan.always
        return ranked.masked_fill(~there, -torch.inf), eligible & state.active

    def forward(self, h: Tensor, batch: Batch, state: RoutingState | None = None,
                plan: LayerPlan | None = None) -> Routing:
        """As `TaskRouter.forward`."""
        state = state or RoutingState()
        routing = super().forward(h, batch, state, plan)
        state.active = routing.kept
        return routing

    def passes(self, score: Tensor, predicted: Tensor | None, batch: Batch, tasks: set[Task]) -> Tensor:
        """As `TaskRouter.passes`, False for tokens that have left, whatever a predictor says."""
        return super().passes(score, predicted, batch, tasks) & (score > -torch.inf)

    def decode(self, h: Tensor, batch: Batch, state: RoutingState) -> tuple[Tensor, Tensor] | None:
        """As `TaskRouter.decode`."""
        decision = super().decode(h, batch, state)
        if decision is None:
            return None
        kept, gate = decision
        if state.active is not None:
            kept = batch.of_kind(self.config.always_keep) | (kept & state.active)
        state.active = kept
        return kept, gate


class BatchRouter(TaskRouter):
    """UniMoD's competitive experiment: all tokens of all sequences and tasks compete for the places of the batch,
    whatever their segment's rule."""

    def may_drop(self, segment: Segment) -> bool:
        """Whether a segment's tokens compete at all."""
        return self.capacity[int(segment.task)] < 1

    def layer_plan(self, batch: Batch) -> LayerPlan:
        """As `TaskRouter.layer_plan`; tokens of dense tasks take places, too, and always get one."""
        plan = super().layer_plan(batch)
        return replace(plan, always=~plan.eligible)

    def select(self, ranked: Tensor, batch: Batch, plan: LayerPlan) -> Selected:
        """As `TaskRouter.select`; who gets how much is read from the device."""
        places = sum((self.capacity[int(s.task)] if self.may_drop(s) else 1) * s.length for s in batch.segments)
        k = sum(plan.kept) if ranked.is_meta else share(places / len(ranked), len(ranked))
        index, kth, rank = select(ranked, (len(ranked),), (k,))
        kept = plan.kept                                    # where there are no numbers, everyone gets a fair share
        if not index.is_meta:
            of = spread(torch.arange(len(plan.lengths)), plan.lengths)[index.cpu()]
            kept = torch.bincount(of, minlength=len(plan.lengths)).tolist()
        segments = tuple(replace(s, length=n) for s, n in zip(batch.segments, kept))
        return index, kth.expand(len(plan.lengths)), rank, segments


class SequenceRouter(RandomRouter):
    """Layer dropping (LayerDrop, arXiv 1909.11556): whole sequences are drawn, of each task the share of its
    capacity."""

    def may_drop(self, segment: Segment) -> bool:
        """Whether a segment's sequence may be dropped, whatever the segment's rule."""
        return self.training and self.capacity[int(segment.task)] < 1

    def kept_counts(self, batch: Batch) -> tuple[int, ...]:
        """As `TaskRouter.kept_counts`, of the first sequences: for counting."""
        return self._kept(batch, drawn=False)

    def select(self, ranked: Tensor, batch: Batch, plan: LayerPlan) -> Selected:
        """As `TaskRouter.select`, of sequences drawn anew."""
        kept = self._kept(batch, drawn=True)
        segments = tuple(replace(s, length=k) for s, k in zip(batch.segments, kept))
        return *select(ranked, plan.lengths, kept), segments

    def _kept(self, batch: Batch, drawn: bool) -> tuple[int, ...]:
        stay: set[int] = set()
        for task in Task:
            mine = [row for row, t in enumerate(batch.tasks) if t == task]
            order = torch.randperm(len(mine)).tolist() if drawn else range(len(mine))
            stay |= {mine[i] for i in order[:share(self.capacity[int(task)], len(mine))]}
        return tuple(s.length if s.row in stay or not self.may_drop(s) else 0 for s in batch.segments)


class Fading:
    """Capacities that are learned (`capacity.LearnedCapacity`): in training the last kept tokens fade, so that the loss
    has a slope in them."""

    learned: LearnedCapacity
    row: int
    """Row of this layer in what is learned."""

    def capacities(self) -> tuple[float, ...]:
        """Capacity of each task as it is now."""
        self.capacity = self.learned.host(self.row)
        return self.capacity

    def layer_plan(self, batch: Batch) -> LayerPlan:
        """As `TaskRouter.layer_plan`, for the capacities as they are now."""
        self.capacities()
        return super().layer_plan(batch)

    def forward(self, h: Tensor, batch: Batch, state: RoutingState | None = None,
                plan: LayerPlan | None = None) -> Routing:
        """As `TaskRouter.forward`."""
        state, plan = state or RoutingState(), plan or self.plan_of(batch)
        routing = super().forward(h, batch, state, plan)
        if not self.training:
            return routing
        index = routing.index
        ranked, _ = self.candidates(routing.score, batch, plan, state)
        fixed = batch.count_of_kind(self.config.always_keep)
        places, fixed = (spread(torch.tensor(x), plan.lengths, ranked.device)[index] for x in (plan.lengths, fixed))
        rank = segment_rank(ranked, plan.lengths)[index] - fixed
        edge = self.learned.edge(self.row, batch.task[index], rank, (places - fixed).clamp(min=1))
        return replace(routing, weight=routing.weight * torch.where(routing.eligible[index], edge, 1.0))


class SpanRouter(Span, TaskRouter):
    """A span of layers decided by a learned score."""


class RandomSpanRouter(Span, RandomRouter):
    """TREAD (arXiv 2501.04765)."""


class AttentionSpanRouter(Span, AttentionRouter):
    """A span of layers decided by attention received."""


class EarlyExitRouter(EarlyExit, TaskRouter):
    """Early exit of tokens by a learned score."""


class RandomExitRouter(EarlyExit, RandomRouter):
    """Early exit of random tokens."""


class AttentionExitRouter(EarlyExit, AttentionRouter):
    """Early exit by attention received."""


class FadingRouter(Fading, TaskRouter):
    """Learned capacity with a learned score."""


class FadingRandomRouter(Fading, RandomRouter):
    """Learned capacity with random scores."""


class FadingAttentionRouter(Fading, AttentionRouter):
    """Learned capacity with attention received."""


ROUTERS = {
    ("learned", "segment", "layer"): TaskRouter,
    ("learned", "segment", "span"): SpanRouter,
    ("learned", "segment", "exit"): EarlyExitRouter,
    ("random", "segment", "layer"): RandomRouter,
    ("random", "segment", "span"): RandomSpanRouter,
    ("random", "segment", "exit"): RandomExitRouter,
    ("attention", "segment", "layer"): AttentionRouter,
    ("attention", "segment", "span"): AttentionSpanRouter,
    ("attention", "segment", "exit"): AttentionExitRouter,
    ("learned", "batch", "layer"): BatchRouter,
    ("random", "sequences", "layer"): SequenceRouter,
}
"""The class that carries out a configuration, by its score, who competes, and how far a decision reaches."""
FADING = {TaskRouter: FadingRouter, RandomRouter: FadingRandomRouter, AttentionRouter: FadingAttentionRouter}


def router_class(config: RouterConfig) -> type[TaskRouter]:
    """The class that carries out a configuration."""
    return ROUTERS[config.score, config.topk_scope, config.decision_scope]


def fade(router: TaskRouter, learned: LearnedCapacity, row: int) -> None:
    """Let row `row` of what is learned be the capacities of a router, in place."""
    if not isinstance(router, Fading):                      # else a second budget for the same router
        # in place: its layer, hooks and optimisers hold this very module
        router.__class__ = FADING[type(router)]
    router.learned, router.row = learned, row
    router.capacities()


def own_class(router: TaskRouter) -> bool:
    """Whether a router is of a class that its configuration does not name: `apply_mod(..., router=...)`."""
    return type(router) not in (router_class(router.config), FADING.get(router_class(router.config)))


def suits(plan: CapacityPlan, config: RouterConfig) -> None:
    """Raise `ParameterError` for a plan that a router which looks back at earlier layers cannot carry out."""
    routed = plan.routed()
    if config.score == "attention" and 0 in routed:
        raise ParameterError("score='attention' looks at the layer before, so layer 0 cannot be routed; give a plan "
                             "that leaves it dense.")
    for task in TASKS:
        for i, (c, following) in enumerate(zip(plan.capacity[task], plan.capacity[task][1:])):
            if config.decision_scope == "exit" and following > c:
                raise ParameterError(f"decision_scope='exit': a token that was dropped never comes back, but {task} "
                                     f"keeps {c:g} in layer {i} and {following:g} in "
                                     f"layer {i + 1}; give capacities that do not rise with depth, such as last_half.")
            if config.decision_scope == "span" and {i, i + 1} <= set(routed) and following != c:
                raise ParameterError(f"decision_scope='span': one decision holds for neighbouring routed layers, but "
                                     f"{task} keeps {c:g} in layer {i} and "
                                     f"{following:g} in layer {i + 1}; give them one capacity, such as last_half does.")
