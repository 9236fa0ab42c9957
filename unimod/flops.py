"""What a batch costs, counted from host-known sizes: no forward is needed; `measured` asks torch's own counter for comparison.

    cost = count(model, packed)
    cost.stack, cost.total, cost.dense_stack, cost.dense_total          # forward FLOPs
    1 - cost.stack / cost.dense_stack                                   # share saved in the layer stack

One multiply-add is 2 FLOPs. A token costs 2 FLOPs per weight of every linear layer it passes, attention 4 n^2 d per layer
for a row of n tokens in heads of total width d (the masked half is not subtracted: it is computed), a router 2 D per score,
the head 2 D V per labelled token. Norms, activations and the embedding lookup are left out (well below 1 %).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .layers import MoDLayer, apply_mod, remove_mod
from .methods import RouterConfig
from .models.backbone import UnifiedModel, losses
from .plan import CapacityPlan
from .tokens import Packed, Segment, TokenSequence, pack

BACKWARD = 2
"""A backward pass costs twice its forward."""


@dataclass(frozen=True)
class Cost:
    """Forward FLOPs of one batch, and token-layer computations (the paper's counting: one per kept token and layer)."""

    stack: float
    """All layers, attention and routers included."""
    head: float
    """Logits of the labelled tokens."""
    dense_stack: float
    """The same layers with every token kept and no router."""
    token_layers: int
    dense_token_layers: int

    @property
    def total(self) -> float:
        """Stack and head."""
        return self.stack + self.head

    @property
    def dense_total(self) -> float:
        """Stack and head of the dense model."""
        return self.dense_stack + self.head

    @property
    def saved(self) -> float:
        """Share of the dense stack's FLOPs that is saved."""
        return 1 - self.stack / self.dense_stack

    @property
    def saved_paper(self) -> float:
        """Share saved when only kept tokens are counted, as the paper does."""
        return 1 - self.token_layers / self.dense_token_layers


def count(model: UnifiedModel, packed: Packed) -> Cost:
    """Forward cost of `packed` under the model's routing (threshold segments count as dense: their number is not known before)."""
    stack, kept_tokens = 0.0, 0
    dense = 0.0
    for layer in model.layers:
        routed = isinstance(layer, MoDLayer)
        segments = list(zip(packed.segments, layer.router.kept(packed) if routed else [s.length for s in packed.segments]))
        stack += _layer(layer.layer if routed else layer, segments)
        stack += layer.router.flops() * len(packed) if routed else 0
        kept_tokens += sum(k for _, k in segments)
        dense += _layer(layer.layer if routed else layer, [(s, s.length) for s in packed.segments])
    head = 2.0 * model.head.weight.numel() * sum(packed.target_counts)
    return Cost(stack, head, dense, kept_tokens, len(packed) * len(model.layers))


def measured(model: UnifiedModel, rows: Sequence[TokenSequence]) -> float:
    """FLOPs of real forwards and backwards, one per row, as torch's counter sees them on the meta device: all shapes, no numbers.

    The model may be on any device; a copy is used where it holds numbers.
    """
    model = model if model.device.type == "meta" else deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter:
        for row in rows:
            losses(model, pack([row]).to("meta")).total.backward()
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class Savings:
    """Share of FLOPs that a plan saves on a batch, three ways."""

    paper: float
    """Kept tokens per layer, both tasks weighing the same: quadratic term, head and kept-by-rule tokens ignored (as the paper counts)."""
    full: float
    """`count`: attention's quadratic term, routers and head included; tokens kept by rule count as kept."""
    measured: float
    """`measured`: torch's counter, forward and backward."""


def savings(model: UnifiedModel, plan: CapacityPlan, rows: Sequence[TokenSequence], config: RouterConfig | None = None) -> Savings:
    """What a plan saves on rows of a dense model, which is left as it was. Raises `ParameterError` as `apply_mod`."""
    dense = measured(model, rows)
    apply_mod(model, plan, config)
    try:
        cost, routed = count(model, pack(rows)), measured(model, rows)
    finally:
        remove_mod(model)
    return Savings((plan.saving("t2i") + plan.saving("mmu")) / 2, 1 - cost.total / cost.dense_total, 1 - routed / dense)


def _layer(layer: nn.Module, kept: Iterable[tuple[Segment, int]]) -> float:
    rows: dict[int, int] = {}
    for segment, k in kept:
        rows[segment.row] = rows.get(segment.row, 0) + k
    weights = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    attention = layer.self_attn
    width = attention.q_proj.out_features
    return 2.0 * weights * sum(rows.values()) + 4.0 * width * sum(n * n for n in rows.values())
