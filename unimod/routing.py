"""What routing decides and what a forward carries: data only.

    Routing       a router's decision for one layer: the only currency between router, layer, loss and view
    LayerPlan     what routing one layer needs of a batch
    BatchPlan     all that is worked out once per batch and not per layer: routing, attention, targets
    RoutingState  what earlier decisions mean for later layers
    ForwardState  all that goes through the decoder layers beside the hidden states
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .batch import Batch, Segment, Targets, Task, lengths_of
from .mask import IntervalMask, KeptMask
from .ops.attention import Ready
from .ops.gather_scatter import Norm
from .ops.route import Routed
from .ops.select import prefix_count


@dataclass(frozen=True)
class Routing:
    """A router's decision for one layer and one batch of T tokens, K of them kept."""

    index: Tensor
    """int64 [K], ascending: the kept tokens."""
    weight: Tensor
    """float32 [K]: gate on each kept token's update; exactly 1 for a token that was not eligible."""
    score: Tensor
    """float32 [T]: the raw scores."""
    segments: tuple[Segment, ...]
    """The segments of the kept tokens."""
    kth: Tensor
    """int64 [S]: index of each segment's k-th best token, whose score is the segment's own threshold."""
    eligible: Tensor
    """bool [T]: the tokens that the router may drop."""
    predicted: Tensor | None = None
    """[T]: logits of the predictor, if there is one, that a token is kept."""
    skip_scale: Tensor | None = None
    """[T]: factor on the skipped tokens, where it is not 1 (p-MoD)."""
    rank: Tensor | None = None
    """int64 [T + 1]: how many kept tokens lie before each token; for masks and kernels."""
    gathered: Routed | None = None
    """The kept tokens, where one op scored, chose and gathered them."""

    @property
    def kept(self) -> Tensor:
        """bool [T]: the tokens that go through the layer, chosen or always kept."""
        return torch.zeros_like(self.eligible).index_fill(0, self.index, True)


@dataclass(frozen=True)
class LayerPlan:
    """What routing one layer needs of a batch that no hidden state changes: S segments, T tokens."""

    lengths: tuple[int, ...]
    """Tokens of each segment: [S]."""
    kept: tuple[int, ...]
    """Places in each segment: [S]. All tokens of a segment under a threshold, which are judged one by one."""
    segments: tuple[Segment, ...]
    """The segments of the kept tokens."""
    eligible: Tensor
    """bool [T]: the tokens that may be dropped."""
    always: Tensor | None
    """bool [T]: the tokens that are always kept; None where there are none."""
    threshold_tasks: frozenset[Task]
    """Tasks with a segment that is judged by a threshold."""
    sizes: Tensor
    """int32 [S, 4]: `ops.select.segment_sizes` of lengths and kept."""
    longest: int = 0
    """A bound of the tokens kept of a sequence, where kernels are to be given the same for every batch; 0: the most."""
    widest: int = 0
    """Likewise a bound of the tokens of a segment."""


@dataclass(frozen=True)
class Gather:
    """What the kept tokens of a layer bring along: the arguments of `ops.route.route_gather` that are not the
    router's."""

    norm: Norm
    cos: Tensor
    sin: Tensor
    bounds: Tensor | None
    flags: Tensor | None


@dataclass(frozen=True)
class BatchPlan:
    """What a forward needs of a batch that no weight or hidden state changes; `UnifiedModel.plan` makes it on the host
    and moves it in one copy."""

    layers: Mapping[int, LayerPlan] = field(default_factory=dict)
    """By number, of each routed layer."""
    attention: dict = field(default_factory=dict)
    """`ops.attention.prepared` of the batch's mask."""
    targets: Targets | None = None
    """What the losses ask for; None where nothing is labelled."""
    segment: Tensor | None = None
    """int64 [T]: `Batch.segment_numbers`, where a router asks for the attention that tokens receive."""


@dataclass
class RoutingState:
    """What one forward hands from layer to layer for the methods whose decisions look back (`baselines`)."""

    routing: Routing | None = None
    """The decision that holds for a span of routed layers."""
    decision: tuple[Tensor, Tensor] | None = None
    """The same in a decode step: see `TaskRouter.decode`."""
    active: Tensor | None = None
    """bool [T]: the tokens that no layer has dropped so far (early exit); None: all."""
    received: Tensor | None = None
    """float32 [T]: attention received in the last layer that processed the token
    (`ops.attention.attention_received`)."""
    of_kind: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    """`Batch.of_kind` of a decode step's tokens, by kinds."""
    needs_attention: bool = False
    """Whether the layer that runs now must fill `received`, because the next one scores by it."""


@dataclass
class ForwardState:
    """What one forward carries through the decoder layers beside the hidden states, under one keyword: `layer(h,
    unimod=state)`.

    A layer of transformers passes keywords that it does not know on to its attention; a name that a later release takes
    for a parameter of its own never arrives there. So there is one, with our own name, and whatever else has to travel
    becomes a field here.
    """

    batch: Batch
    """The whole batch."""
    mask: IntervalMask | KeptMask | None = None
    """Whom the tokens that the layer is given may attend to; default: the batch's own mask."""
    index: Tensor | None = None
    """int64 [K]: which tokens of the batch the layer is given; None: all."""
    segments: tuple[Segment, ...] = ()
    """The segments of these tokens, where there is an `index`."""
    plan: BatchPlan = field(default_factory=BatchPlan)
    """What was worked out from the batch beforehand."""
    earlier: RoutingState = field(default_factory=RoutingState)
    """Decisions of earlier layers, for methods that look back."""
    cache: object | None = None
    """Keys and values of earlier tokens (`models.cache.KVCache`), read and written."""
    decode: bool = False
    """Whether this is a decode step of one size: one further token of every sequence, dropped by a mask, so that
    nothing waits for the device."""
    active: Tensor | None = None
    """bool [B]: in a decode step the sequences whose token is kept in this layer; None: all."""
    attention: dict = field(default_factory=dict)
    """What attention works out from the batch's mask, for all layers: `plan.attention`, and what that lacks."""
    compiled: bool = False
    """Whether the layers are compiled, each for itself."""
    ready: Ready | None = None
    """Attention as a compiled layer has it in its graph; None: as it comes, outside of graphs."""

    def __post_init__(self) -> None:
        self.mask = self.batch.mask if self.mask is None else self.mask

    def of_kept(self, routing: Routing, longest: int = 0) -> ForwardState:
        """The state for the tokens that a routed layer keeps. longest: `LayerPlan.longest`."""
        # positions are not taken: kept tokens keep their rotary angles (gamma-MoD numbers them anew)
        rank = prefix_count(routing.index, len(self.batch)) if routing.rank is None else routing.rank
        found = routing.gathered
        mask = KeptMask(self.batch.mask, routing.index, rank, lengths_of(routing.segments), longest,
                        *((found.bounds, found.flags) if found else ()))
        ready = self.ready and self.ready.of_kept(mask, self.attention)
        return replace(self, mask=mask, index=routing.index, segments=routing.segments, ready=ready)

    def given(self) -> Batch:
        """The tokens that the layer is given, as a batch: for observers only, since it gathers every field."""
        return self.batch if self.index is None else self.batch.take(self.index, self.segments)
