"""What a batch costs, counted from host-known sizes: no forward is needed; `measured` asks torch's own counter for
comparison.

    cost = count(model, batch, image_tokenizer)
    cost.stack, cost.total, cost.dense_stack, cost.dense_total          # forward FLOPs
    1 - cost.stack / cost.dense_stack                                   # share saved in the layer stack
    1 - cost.step / cost.dense_step                                     # in a training step, with reading the pictures

One multiply-add is 2 FLOPs. A token costs 2 FLOPs per weight of every linear layer it passes, attention 4 n^2 d per
layer for a row of n tokens in heads of total width d (the masked half is not subtracted: it is computed), a router 2 D
per score, or half an attention where the score is the attention received, the head 2 D V per labelled token, a picture
what the convolutions, linear layers and attention of its tokenizer's encoder take. The embedding is a lookup: 0 FLOPs.
Norms, activations and the search for the nearest code are left out (well below 1 %).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import seam
from .batch import Batch, Segment, Task, TokenSequence, pack
from .config import RouterConfig
from .layers import MoDLayer, apply_mod, remove_mod, stock_parameters
from .losses import losses
from .models.image_tokenizer import ImageTokenizer
from .models.unified import UnifiedModel
from .plan import CapacityPlan

BACKWARD = 2
"""A backward pass costs twice its forward where every weight is trained."""


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
    backward: float
    """Backward pass of stack and head: frozen weights get no gradient, and nothing below the first trained layer
    does."""
    attention_scores: float = 0.0
    """Attention received, for routers that score by it; no backward."""
    tokenizer: float = 0.0
    """The picture tokenizer's encoder, once per row with a picture; it is frozen, so no backward."""

    @property
    def total(self) -> float:
        """Forward: stack, head, and the scores that are attention received."""
        return self.stack + self.head + self.attention_scores

    @property
    def dense_total(self) -> float:
        """Stack and head of the dense model."""
        return self.dense_stack + self.head

    @property
    def step(self) -> float:
        """A training step: the pictures' codes, forward and backward."""
        return self.tokenizer + self.total + self.backward

    @property
    def dense_step(self) -> float:
        """A training step of the dense model, every weight trained."""
        return self.tokenizer + (1 + BACKWARD) * self.dense_total

    @property
    def saved(self) -> float:
        """Share of the dense stack's FLOPs that is saved."""
        return 1 - (self.stack + self.attention_scores) / self.dense_stack

    @property
    def saved_paper(self) -> float:
        """Share saved when only kept tokens are counted, as the paper does."""
        return 1 - self.token_layers / self.dense_token_layers


def count(model: UnifiedModel, batch: Batch, image_tokenizer: ImageTokenizer | None = None) -> Cost:
    """Forward cost of `batch` under the model's routing (threshold segments count as dense: their number is not known
    before).

    `image_tokenizer` adds what it takes to make the codes of the rows' pictures.
    """
    stack, dense, received, backward, token_layers = 0.0, 0.0, 0.0, 0.0, 0
    # a gradient reaches this depth
    flows = _trained(model.embedding) or (model.projector is not None and _trained(model.projector))
    for layer, following in zip(model.layers, [*model.layers[1:], None]):
        routed = isinstance(layer, MoDLayer)
        segments = list(zip(batch.segments, layer.router.kept_counts(batch) if routed
                            else [s.length for s in batch.segments]))
        inner = layer.layer if routed else layer
        stack += _layer(inner, segments)
        backward += _backward(inner, segments, flows)
        flows = flows or any(p.requires_grad for p in stock_parameters(inner))
        if routed:
            scoring = layer.router.flops() * len(batch)
            stack += scoring
            backward += scoring * (_trained(layer.router) + flows)
            flows = flows or _trained(layer.router)
        if isinstance(following, MoDLayer) and following.router.needs_attention:
            received += _attention(layer, segments) / 2     # the map once more, without the values
        token_layers += sum(k for _, k in segments)
        dense += _layer(inner, [(s, s.length) for s in batch.segments])
    head = 2.0 * model.head.weight.numel() * sum(batch.target_counts)
    codes = _pictures(batch.tasks) * encoding(image_tokenizer, model.layout.grid) if image_tokenizer else 0.0
    return Cost(stack, head, dense, token_layers, len(batch) * len(model.layers), backward
                + head * (_trained(model.head) + flows), received, codes)


def encoding(image_tokenizer: ImageTokenizer, grid: tuple[int, int]) -> float:
    """Forward FLOPs of making the codes [h, w] of one picture; 0 for the patch dictionary.

    Walks the encoder in the order of its modules, which is the order of the data: a convolution of stride s leaves 1/s
    of the places per side.
    """
    h, w = (n * image_tokenizer.downsample for n in grid)
    frames, total = getattr(image_tokenizer.config, "temporal", 1), 0.0
    for name, m in image_tokenizer.stored().named_modules():
        if not name.startswith(("encoder.", "quant_conv")):
            continue
        if isinstance(m, (nn.Conv2d, nn.Conv3d)):
            h, w = h // m.stride[-2], w // m.stride[-1]
            frames //= m.stride[0] if isinstance(m, nn.Conv3d) else 1
        if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.Linear)):
            total += 2.0 * m.weight.numel() * h * w * (frames if isinstance(m, nn.Conv3d) else 1)
        if name.endswith((".q", ".q_proj")):                # an attention over all places begins here
            total += 4.0 * m.weight.shape[0] * (h * w) ** 2
    return total


def measured(model: UnifiedModel, rows: Sequence[TokenSequence],
             image_tokenizer: ImageTokenizer | None = None) -> float:
    """FLOPs of real forwards and backwards, one per row, as torch's counter sees them on the meta device: all shapes,
    no numbers.

    The model and the picture tokenizer may be on any device; copies are used where they hold numbers.
    """
    model = model if model.device.type == "meta" else deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter:
        for row in rows:
            losses(model, pack([row]).to("meta")).total.backward()
    total = float(counter.get_total_flops())
    if image_tokenizer is None or not encoding(image_tokenizer, model.layout.grid):
        return total
    picture = torch.empty(1, 3, *(n * image_tokenizer.downsample for n in model.layout.grid), dtype=torch.uint8,
                          device="meta")
    with FlopCounterMode(display=False) as counter:
        deepcopy(image_tokenizer).to("meta").encode(picture)
    return total + float(counter.get_total_flops()) * _pictures([row.task for row in rows])


@dataclass(frozen=True)
class Savings:
    """Share of a training step's FLOPs that a plan saves on a batch."""

    paper: float
    """Kept tokens per layer, both tasks weighing the same: quadratic term, head and always kept tokens ignored (as the
    paper counts)."""
    full: float
    """`count`: attention's quadratic term, routers, head and picture tokenizer included; tokens that are always kept
    count as kept."""
    measured: float
    """`measured`: torch's counter, forward and backward, on the model and on the picture tokenizer."""
    model: float
    """The full counting without the picture tokenizer."""


@contextmanager
def planned(model: UnifiedModel, plan: CapacityPlan, config: RouterConfig | None = None) -> Iterator[UnifiedModel]:
    """A dense model as it trains under a plan; afterwards it is as it was. Raises `ParameterError` as `apply_mod`."""
    training = model.training
    apply_mod(model, plan, config).train()
    try:
        yield model
    finally:
        remove_mod(model).train(training)


def savings(model: UnifiedModel, plan: CapacityPlan, rows: Sequence[TokenSequence], config: RouterConfig | None = None,
            image_tokenizer: ImageTokenizer | None = None) -> Savings:
    """What a plan saves on rows of a dense model, which is left as it was. Raises `ParameterError` as `apply_mod`."""
    before = measured(model, rows, image_tokenizer)
    with planned(model, plan, config):
        cost, after = count(model, pack(rows), image_tokenizer), measured(model, rows, image_tokenizer)
    return Savings((plan.saving("t2i") + plan.saving("mmu")) / 2, 1 - cost.step / cost.dense_step, 1 - after / before,
                   1 - (cost.step - cost.tokenizer) / (cost.dense_step - cost.tokenizer))


def _pictures(tasks: Iterable[Task]) -> int:
    """Rows with a picture: all but plain text."""
    return sum(task != Task.LM for task in tasks)


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _backward(layer: nn.Module, kept: Sequence[tuple[Segment, int]], flows: bool) -> float:
    """One product per trained weight for its own gradient, one per weight for its input's, where anything there or
    below is trained."""
    if not (flows or any(p.requires_grad for p in stock_parameters(layer))):
        return 0.0
    weights = sum(m.weight.numel() * (1 + m.weight.requires_grad) for m in _linears(layer))
    return 2.0 * weights * sum(k for _, k in kept) + BACKWARD * _attention(layer, kept)


def _linears(layer: nn.Module) -> list[nn.Linear]:
    """The products of a layer, without those of a router that shares its children."""
    return [m for name, m in layer.named_modules() if isinstance(m, nn.Linear) and not name.startswith("router.")]


def _layer(layer: nn.Module, kept: Sequence[tuple[Segment, int]]) -> float:
    weights = sum(m.weight.numel() for m in _linears(layer))
    return 2.0 * weights * sum(k for _, k in kept) + _attention(layer, kept)


def _attention(layer: nn.Module, kept: Iterable[tuple[Segment, int]]) -> float:
    rows: dict[int, int] = {}
    for segment, k in kept:
        rows[segment.row] = rows.get(segment.row, 0) + k
    return 4.0 * seam.query_projection(layer).out_features * sum(n * n for n in rows.values())
