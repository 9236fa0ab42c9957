"""Look at attention without changing it: keep q and k of every layer, from which any map follows exactly.

    record = observe(model, packed)                   # or: with capture(model) as record: model(packed)
    record.map(row=0, layer=3, head=1)                # [n, n], rows sum to 1
    record.row_weights(row=0, layer=3, head=1, query=-1)

q and k are taken after norm and rotary embedding, inside the registered attention function, so no eager attention is needed and
the logits are the same bit for bit. They are 11 to 52 times smaller than the maps, which are made only when asked for.
In a routed layer a record knows the kept tokens only: `record.packed(layer)` is that layer's own, smaller batch.

Letters: H heads, K tokens a layer processed, d width of a head, n tokens of one row in one layer, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .models.backbone import UnifiedModel, observe_attention
from .tokens import Packed, Task


class CaptureError(LookupError):
    """Something a record does not hold: the message names what was asked for and what there is."""


@dataclass(frozen=True)
class LayerAttention:
    """What one layer attended with. q: [H, K, d], k: [H_kv, K, d], both after norm and rotary embedding."""

    q: Tensor
    k: Tensor
    scale: float
    packed: Packed


@dataclass(frozen=True)
class AttentionRecord:
    """Queries and keys of the last forward, per layer. Every method raises `CaptureError` outside the ranges it holds."""

    seen: dict[int, LayerAttention] = field(default_factory=dict)
    batch: list[Packed] = field(default_factory=list)
    """The batch as the model was given it (one entry)."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that were seen, ascending."""
        self._any()
        return tuple(sorted(self.seen))

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self._any().q.shape[0]

    @property
    def whole(self) -> Packed:
        """The batch as the model was given it, before any layer dropped tokens."""
        self._any()
        return self.batch[0]

    @property
    def nbytes(self) -> int:
        """Size of all queries and keys in bytes."""
        return sum(x.numel() * x.element_size() for layer in self.seen.values() for x in (layer.q, layer.k))

    def packed(self, layer: int) -> Packed:
        """The tokens this layer processed, with their intervals."""
        return self._layer(layer).packed

    def index(self, layer: int) -> Tensor:
        """Where this layer's tokens lie in `whole`: int64 [K], ascending."""
        whole, part = self.whole, self.packed(layer)
        span = int(whole.position.max()) + 1
        key = whole.row * span + whole.position
        order = key.argsort()                               # features are packed before the tokens they follow
        return order[torch.searchsorted(key[order], part.row * span + part.position)]

    def rows(self, task: Task) -> tuple[int, ...]:
        """The rows of one task. Raises `CaptureError` when the batch has none."""
        found = tuple(b for b, t in enumerate(self.whole.tasks) if t == task)
        if not found:
            there = ", ".join(sorted({t.name.lower() for t in self.whole.tasks}))
            raise CaptureError(f"This record has no {task.name.lower()} row; its batch holds {there}. Capture a batch of that task.")
        return found

    def map(self, row: int, layer: int, head: int) -> Tensor:
        """Post-softmax attention map of one row: float32 [n, n], query by key."""
        self._check("head", head, self.heads)
        return self.maps([row], layer)[0, head]

    def row_weights(self, row: int, layer: int, head: int, query: int) -> Tensor:
        """What one query token (negative: counted from the end) looks at: float32 [n], without making the whole map."""
        self._check("head", head, self.heads)
        n = self.packed(layer).lengths[self._row(row, layer)]
        self._check("query", query + n * (query < 0), n)
        return self._weights([row], layer, slice(query, query + 1 or None))[0, head, 0]

    def maps(self, rows: Sequence[int], layer: int) -> Tensor:
        """Maps of several rows that have one length in this layer: float32 [R, H, n, n]."""
        return self._weights(rows, layer, slice(None))

    def by_length(self, rows: Sequence[int], layer: int) -> list[list[int]]:
        """Rows grouped by their length in this layer, so that each group is one batch of `maps`; empty rows are left out."""
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(self.packed(layer).lengths[self._row(row, layer)], []).append(row)
        return [group for n, group in groups.items() if n]

    def _weights(self, rows: Sequence[int], layer: int, queries: slice) -> Tensor:
        """softmax_j(q_i . k_j * scale) over lo_i <= j < hi_i: float32 [R, H, queries, n]."""
        of, spans = self._layer(layer), self.packed(layer).rows()
        where = [spans[self._row(row, layer)] for row in rows]
        lengths = sorted({span.stop - span.start for span in where})
        if len(lengths) != 1:
            raise CaptureError(f"Rows {list(rows)} have different lengths {lengths} in layer {layer}; ask for groups of `by_length`.")
        k = of.k.repeat_interleave(of.q.shape[0] // of.k.shape[0], 0)
        out = []
        for span in where:
            logits = (of.q[:, span][:, queries] @ k[:, span].transpose(1, 2)).float() * of.scale
            j = torch.arange(span.start, span.stop, device=logits.device)
            lo, hi = of.packed.lo[span][queries, None], of.packed.hi[span][queries, None]
            out.append(logits.masked_fill(~((j >= lo) & (j < hi)), -torch.inf).softmax(-1))
        return torch.stack(out)

    def _any(self) -> LayerAttention:
        if not self.seen:
            raise CaptureError("No layer was seen: run the model inside the block (with capture(model) as record: model(packed)).")
        return next(iter(self.seen.values()))

    def _layer(self, layer: int) -> LayerAttention:
        if layer not in self.seen:
            raise CaptureError(f"layer {layer} was not seen; this record holds layers {', '.join(map(str, self.layers))}.")
        return self.seen[layer]

    def _row(self, row: int, layer: int) -> int:
        self._check("row", row, len(self.packed(layer).lengths))
        return row

    @staticmethod
    def _check(name: str, value: int, end: int) -> None:
        if not 0 <= value < end:
            raise CaptureError(f"{name} {value} does not exist here; allowed: 0 to {end - 1}.")


@contextmanager
def capture(model: UnifiedModel) -> Iterator[AttentionRecord]:
    """Record the attention of the last forward of `model` inside the block; gradients are not kept."""
    record = AttentionRecord()
    number = {part: i for i, layer in enumerate(model.layers) for part in layer.modules()}

    def begin(_: nn.Module, args: tuple) -> None:
        record.seen.clear()
        record.batch[:] = [args[0]]

    def look(module: nn.Module, q: Tensor, k: Tensor, packed: Packed) -> None:
        record.seen[number[module]] = LayerAttention(q.detach(), k.detach(), module.scaling, packed)

    hook = model.register_forward_pre_hook(begin)
    try:
        with observe_attention(look):
            yield record
    finally:
        hook.remove()


@torch.no_grad()
def observe(model: UnifiedModel, packed: Packed) -> AttentionRecord:
    """Run the model on a batch and hand back its record."""
    with capture(model) as record:
        model(packed.to(model.device))
    return record
