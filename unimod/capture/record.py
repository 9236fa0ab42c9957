"""What one forward attended with, layer by layer, and every number that follows from it.

Letters: H heads, K tokens a layer processed, d width of a head, n tokens of one row in one layer, R rows, m queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..batch import Batch, Task
from ..config import expanded
from ..ops.attention import attention_mass
from . import files
from .folder import CaptureError

ENTRIES = 2**23
"""Entries of maps held at a time where a map is only passed through."""
BINS = 32
"""Side of a pooled map."""


@dataclass(frozen=True)
class LayerAttention:
    """What one layer attended with. q: [H, K, d], k: [H_kv, K, d], both after norm and rotary embedding."""

    q: Tensor
    k: Tensor
    scale: float
    packed: Batch

    def weights(self, span: slice, queries: Tensor, heads: slice = slice(None)) -> Tensor:
        """softmax_j(q_i . k_j * scale) over lo_i <= j < hi_i: float32 [H, m, n]. span: the row in packed order; queries: int64 [m], counted in the row."""
        return self._weights(self._keys(span, heads), span, queries, heads)

    def _keys(self, span: slice, heads: slice) -> Tensor:
        """The keys of a row for each of these query heads: float32 [H, n, d]."""
        return self.k[:, span][torch.arange(len(self.q))[heads] // (len(self.q) // len(self.k))].float()     # as kernels multiply: no logit is rounded

    def _weights(self, k: Tensor, span: slice, queries: Tensor, heads: slice) -> Tensor:
        at = queries.to(self.q.device) + span.start
        logits = (self.q[heads][:, at].float() @ k.transpose(1, 2)).mul_(self.scale)
        j = torch.arange(span.start, span.stop, device=logits.device)
        seen = (j >= self.packed.lo[at, None]) & (j < self.packed.hi[at, None])
        return logits.masked_fill_(~seen, -torch.inf).softmax(-1)

    def blocks(self, span: slice, queries: Tensor | None = None, heads: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        """The maps of a row, some queries at a time, in bounded memory: int64 [m] and float32 [H, m, n]."""
        n = span.stop - span.start
        queries, k = torch.arange(n) if queries is None else queries, self._keys(span, heads)
        for some in queries.split(max(1, ENTRIES // max(1, len(k) * n))):
            yield some, self._weights(k, span, some, heads)

    def tile(self, span: slice, queries: slice = slice(None), keys: slice = slice(None), bins: int = BINS, heads: slice = slice(None)) -> Tensor:
        """A part of the maps of a row, pooled to at most bins x bins: mean over the queries of a bin, sum over its keys. float32 [H, bins, bins]; the whole
        of it is never held. `edges` says what a bin holds."""
        n = span.stop - span.start
        asked, seen = (torch.arange(n)[s] for s in (queries, keys))
        down, across = edges(len(asked), bins), edges(len(seen), bins)
        rows = torch.repeat_interleave(torch.arange(len(down) - 1), down.diff())
        pool = torch.zeros(n, len(across) - 1, device=self.q.device)
        pool[seen, torch.repeat_interleave(torch.arange(len(across) - 1), across.diff())] = 1.0
        out, done = torch.zeros(len(self.q[heads]), len(down) - 1, pool.shape[1], device=pool.device), 0
        for some, a in self.blocks(span, asked, heads):
            out.index_add_(1, rows[done: done + len(some)].to(pool.device), a @ pool)
            done += len(some)
        return out / down.diff()[:, None].to(out)

    def received(self, span: slice, queries: Tensor) -> Tensor:
        """What each token of a row gets from some of its tokens (bool [n]), mean over them: float32 [H, n], sums to 1; nan where there is none."""
        asked = queries.cpu().nonzero()[:, 0]
        if not len(asked):
            return torch.full((len(self.q), span.stop - span.start), torch.nan, device=self.q.device)
        return sum(a.sum(1) for _, a in self.blocks(span, asked, slice(None))) / len(asked)

    def mass(self, label: Tensor, labels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of every query: what it gives to each kind of key [H, K, labels], its entropy in nats and its mean distance in tokens, both [H, K], float32.

        label: int64 [K] in [0, labels). No map is made (`ops.attention.attention_mass`).
        """
        p = self.packed
        return attention_mass(self.q, self.k, p.lo, p.hi, label, labels, p.lengths, self.scale, p.position)


@dataclass(frozen=True)
class AttentionRecord:
    """Queries and keys of the last forward, per layer. Every method raises `CaptureError` outside the ranges it holds."""

    seen: dict[int, LayerAttention] = field(default_factory=dict)
    batch: list[Batch] = field(default_factory=list)
    """The batch as the model was given it (one entry)."""
    about: dict[str, str] = field(default_factory=dict)
    """What is known of the model: its `model` kind."""

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
    def whole(self) -> Batch:
        """The batch as the model was given it, before any layer dropped tokens."""
        self._any()
        return self.batch[0]

    @property
    def nbytes(self) -> int:
        """Size of all queries and keys in bytes."""
        return sum(x.numel() * x.element_size() for layer in self.seen.values() for x in (layer.q, layer.k))

    def packed(self, layer: int) -> Batch:
        """The tokens this layer processed, with their intervals."""
        return self.layer(layer).packed

    def index(self, layer: int) -> Tensor:
        """Where this layer's tokens lie in `whole`: int64 [K], ascending."""
        return places(self.whole, self.packed(layer))

    def rows(self, task: Task) -> tuple[int, ...]:
        """The rows of one task. Raises `CaptureError` when the batch has none."""
        found = tuple(b for b, t in enumerate(self.whole.tasks) if t == task)
        if not found:
            there = ", ".join(sorted({t.name.lower() for t in self.whole.tasks}))
            raise CaptureError(f"This record has no {task.name.lower()} row; its batch holds {there}. Capture a batch of that task.")
        return found

    def map(self, row: int, layer: int, head: int) -> Tensor:
        """Post-softmax attention map of one row: float32 [n, n], query by key."""
        span = self.span(row, layer)
        return self.layer(layer).weights(span, torch.arange(span.stop - span.start), self._head(head))[0]

    def row_weights(self, row: int, layer: int, head: int | None, query: int) -> Tensor:
        """What one query token (negative: counted from the end) looks at: float32 [n], without making the whole map. head None: mean over heads."""
        span = self.span(row, layer)
        n = span.stop - span.start
        self._check("query", query + n * (query < 0), n)
        return self.layer(layer).weights(span, torch.tensor([query % n]), slice(None) if head is None else self._head(head))[:, 0].mean(0)

    def tile(self, row: int, layer: int, queries: slice = slice(None), keys: slice = slice(None), bins: int = BINS, head: int | None = None) -> Tensor:
        """`LayerAttention.tile` of a row: float32 [H, bins, bins], of one head [1, bins, bins]."""
        span = self.span(row, layer)
        n = span.stop - span.start
        if not (len(range(n)[queries]) and len(range(n)[keys])):
            raise CaptureError(f"tile: queries {queries} or keys {keys} are none of the {n} tokens of row {row} in layer {layer}.")
        return self.layer(layer).tile(span, queries, keys, bins, slice(None) if head is None else self._head(head))

    def received(self, row: int, layer: int, queries: Tensor) -> Tensor:
        """`LayerAttention.received` of a row: float32 [H, n]."""
        return self.layer(layer).received(self.span(row, layer), queries)

    def maps(self, rows: Sequence[int], layer: int) -> Tensor:
        """Maps of several rows that have one length in this layer: float32 [R, H, n, n]."""
        spans = [self.span(row, layer) for row in rows]
        lengths = sorted({span.stop - span.start for span in spans})
        if len(lengths) != 1:
            raise CaptureError(f"Rows {list(rows)} have different lengths {lengths} in layer {layer}; ask for groups of `by_length`.")
        return torch.stack([self.layer(layer).weights(span, torch.arange(lengths[0])) for span in spans])

    def by_length(self, rows: Sequence[int], layer: int) -> list[list[int]]:
        """Rows grouped by their length in this layer, so that each group is one batch of `maps`; empty rows are left out."""
        groups: dict[int, list[int]] = {}
        for row in rows:
            span = self.span(row, layer)
            groups.setdefault(span.stop - span.start, []).append(row)
        return [group for n, group in groups.items() if n]

    def layer(self, layer: int) -> LayerAttention:
        """What one layer attended with."""
        self._any()
        if layer not in self.seen:
            raise CaptureError(f"layer {layer} was not seen; this record holds layers {', '.join(map(str, self.layers))}.")
        return self.seen[layer]

    def span(self, row: int, layer: int) -> slice:
        """Where a row lies among the layer's tokens."""
        spans = self.packed(layer).rows()
        self._check("row", row, len(spans))
        return spans[row]

    def save(self, folder: str | Path, layers: Sequence[int] | None = None) -> Path:
        """Write a folder of `attention.npz` (queries and keys of these layers, default all, as they are) and `tokens.parquet`. Returns the folder.

        Two layers of Show-o take 33 MiB for a row of 1,155 tokens in float32; what a viewer shows of them takes 352 KiB (`analysis.overview`;
        `notebooks/records/bench-cpu-looking.json`).
        """
        return files.save(Path(expanded(folder)), {i: self.layer(i) for i in (self.layers if layers is None else layers)}, self.whole, self.about)

    @classmethod
    def load(cls, folder: str | Path) -> AttentionRecord:
        """Read what `save` wrote. Raises `CaptureError` for a folder that holds no record, or a damaged one."""
        seen, whole, about = files.load(Path(expanded(folder)))
        return cls({i: LayerAttention(*parts) for i, parts in seen.items()}, [whole], about)

    def _any(self) -> LayerAttention:
        if not self.seen:
            raise CaptureError("No layer was seen: run the model inside the block (with capture(model) as record: model(packed)).")
        return next(iter(self.seen.values()))

    def _head(self, head: int) -> slice:
        self._check("head", head, self.heads)
        return slice(head, head + 1)

    @staticmethod
    def _check(name: str, value: int, end: int) -> None:
        if not 0 <= value < end:
            raise CaptureError(f"{name} {value} does not exist here; allowed: 0 to {end - 1}.")


def places(whole: Batch, part: Batch) -> Tensor:
    """Where the tokens of `part`, some of those of `whole` in their order, lie in it: int64 [K]."""
    span = int(whole.position.max()) + 1
    key = whole.row * span + whole.position
    order = key.argsort()                                   # features are packed before the tokens they follow
    return order[torch.searchsorted(key[order], part.row * span + part.position)]


def edges(n: int, bins: int = BINS) -> Tensor:
    """Where the bins of n pooled tokens begin, and n: int64, at most bins + 1."""
    return torch.linspace(0, n, min(n, bins) + 1).round().long()
