"""Queries and keys of one forward, layer by layer, and the attention numbers that follow from them.

For 1,155 tokens of Show-o queries and keys are 9 times smaller than the maps, for 8,200 of Emu3 51 times; a map is
computed only on request. A routed layer has the kept tokens only: `record.batch(layer)` is its own, smaller batch.

Letters: H query heads, H_kv key heads, d head width, K tokens that a layer processed, n of them in one row, m queries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .batch import Batch, Segment, Task, lengths_of
from .config import expanded
from .mask import IntervalMask
from .ops import attention
from .ops.attention import attention_mass, attention_weights, within

BINS = 32  # side of a pooled map
COLUMNS = ("ids", "row", "position", "task", "modality", "target")  # of a batch, beside the bounds of its mask


class CaptureError(LookupError):
    """A record or a folder does not hold what was asked for: the message names the request and what is available."""


def check_layer(layer: int, layers: Sequence[int], what: str) -> None:
    if layer not in layers:
        there = ", ".join(map(str, layers))
        raise CaptureError(f"layer {layer} was not captured; this {what} holds layers {there}.")


def check_place(name: str, value: int, end: int) -> None:
    if not 0 <= value < end:
        raise CaptureError(f"{name} {value} does not exist here; allowed: 0 to {end - 1}.")


def one_head(head: int | None, heads: int) -> slice:
    """The slice of one head, of all for None."""
    if head is None:
        return slice(None)
    check_place("head", head, heads)
    return slice(head, head + 1)


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention. q: [H, K, d], k: [H_kv, K, d], both after norm and rotary embedding.

    span: slice of one row in the K packed tokens; queries: int64 [m], places in that row (default: all n).
    """

    q: Tensor
    k: Tensor
    scale: float
    batch: Batch

    def weights(self, span: slice, queries: Tensor | None = None, heads: slice = slice(None)) -> Tensor:
        """softmax_j(q_i . k_j * scale) over lo_i <= j < hi_i, in one piece: float32 [H, m, n]."""
        return next(self.blocks(span, queries, heads, whole=True))[1]

    def blocks(self, span: slice, queries: Tensor | None = None, heads: slice = slice(None),
               whole: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some queries, int64 [m], and their `weights`, `attention.ENTRIES` at most (`whole`: all of them)."""
        n = span.stop - span.start
        queries = torch.arange(n) if queries is None else queries
        of_head = torch.arange(len(self.q))[heads] // (len(self.q) // len(self.k))
        k = self.k[:, span][of_head].float()                    # float32 as in kernels' sums: no logit is rounded
        j = torch.arange(span.start, span.stop, device=k.device)
        size = len(queries) if whole else attention.ENTRIES // max(1, len(k) * n)
        for some in queries.split(max(1, size)):
            at = some.to(k.device) + span.start
            allow = within(self.batch.mask.lo[at], self.batch.mask.hi[at], j)
            yield some, attention_weights(self.q[heads][:, at].float(), k, allow, self.scale)

    def tile(self, span: slice, queries: slice = slice(None), keys: slice = slice(None), bins: int = BINS,
             heads: slice = slice(None)) -> Tensor:
        """A part of a row's maps pooled to at most bins x bins (`edges`): float32 [H, bins, bins].

        Mean over the queries of a bin, sum over its keys. The unpooled map is never held.
        """
        n = span.stop - span.start
        asked, visible = torch.arange(n)[queries], torch.arange(n)[keys]
        down, across = edges(len(asked), bins), edges(len(visible), bins)
        query_bin = torch.repeat_interleave(torch.arange(len(down) - 1), down.diff())
        pool = torch.zeros(n, len(across) - 1, device=self.q.device)
        pool[visible, torch.repeat_interleave(torch.arange(len(across) - 1), across.diff())] = 1.0
        out, done = torch.zeros(len(self.q[heads]), len(down) - 1, pool.shape[1], device=pool.device), 0
        for some, a in self.blocks(span, asked, heads):
            out.index_add_(1, query_bin[done: done + len(some)].to(pool.device), a @ pool)
            done += len(some)
        return out / down.diff()[:, None].to(out)

    def received(self, span: slice, queries: Tensor) -> Tensor:
        """Weight on each token of a row, mean over some queries (bool [n]); nan without any: float32 [H, n]."""
        asked = queries.cpu().nonzero()[:, 0]
        if not len(asked):
            return torch.full((len(self.q), span.stop - span.start), torch.nan, device=self.q.device)
        return sum(a.sum(1) for _, a in self.blocks(span, asked)) / len(asked)

    def mass(self, label: Tensor, labels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mass on each kind of key, entropy and distance of every query: `ops.attention.attention_mass`.

        label: int64 [K] in [0, labels). Returns float32 [H, K, labels], [H, K] and [H, K].
        """
        b = self.batch
        return attention_mass(self.q, self.k, b.mask.lo, b.mask.hi, label, labels, b.lengths, self.scale, b.position)


@dataclass(eq=False)
class AttentionRecord:
    """Queries and keys of the last forward, per layer.

    Methods raise `CaptureError` for a row, layer, head or query that the record does not hold.
    """

    captured: dict[int, LayerAttention] = field(default_factory=dict)
    whole: Batch | None = None  # as the model received it, before any layer dropped tokens
    about: dict[str, str] = field(default_factory=dict)  # properties of the model: its `model` kind

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the captured layers, ascending."""
        self._first()
        return tuple(sorted(self.captured))

    @property
    def heads(self) -> int:
        return self._first().q.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of all queries and keys in bytes."""
        return sum(layer.q.nbytes + layer.k.nbytes for layer in self.captured.values())

    def layer(self, layer: int) -> LayerAttention:
        check_layer(layer, self.layers, "record")
        return self.captured[layer]

    def batch(self, layer: int) -> Batch:
        """The tokens that a layer processed, with their intervals."""
        return self.layer(layer).batch

    def span(self, row: int, layer: int) -> slice:
        """Slice of a row in a layer's tokens."""
        spans = self.batch(layer).rows()
        check_place("row", row, len(spans))
        return spans[row]

    def rows(self, task: Task) -> tuple[int, ...]:
        """The rows of one task. Raises `CaptureError` when the batch has none."""
        self._first()
        found = tuple(row for row, other in enumerate(self.whole.tasks) if other == task)
        if not found:
            there = ", ".join(sorted({other.name.lower() for other in self.whole.tasks}))
            raise CaptureError(f"This record has no {task.name.lower()} row; its batch holds {there}. "
                               "Capture a batch of that task.")
        return found

    def map(self, row: int, layer: int, head: int | None = None) -> Tensor:
        """Post-softmax attention map of one row, query by key: float32 [n, n], of all heads [H, n, n]."""
        found = self.layer(layer).weights(self.span(row, layer), heads=one_head(head, self.heads))
        return found if head is None else found[0]

    def row_weights(self, row: int, layer: int, head: int | None, query: int) -> Tensor:
        """Attention from one query (negative: from the end): float32 [n]. head None: mean over heads."""
        span = self.span(row, layer)
        n = span.stop - span.start
        check_place("query", query + n * (query < 0), n)
        heads = one_head(head, self.heads)
        return self.layer(layer).weights(span, torch.tensor([query % n]), heads)[:, 0].mean(0)

    def tile(self, row: int, layer: int, queries: slice = slice(None), keys: slice = slice(None), bins: int = BINS,
             head: int | None = None) -> Tensor:
        """`LayerAttention.tile` of a row: float32 [H, bins, bins], of one head [1, bins, bins]."""
        span = self.span(row, layer)
        n = span.stop - span.start
        if not (len(range(n)[queries]) and len(range(n)[keys])):
            raise CaptureError(f"tile: queries {queries} or keys {keys} are none of the {n} tokens of row {row} "
                               f"in layer {layer}.")
        return self.layer(layer).tile(span, queries, keys, bins, one_head(head, self.heads))

    def save(self, folder: str | Path, layers: Sequence[int] | None = None) -> Path:
        """Write `attention.safetensors`: queries and keys of these layers (default: all) and their batches.

        Returns the folder. Two layers of Show-o take 36 MiB for a row of 1,155 tokens in float32, their overview
        (`analysis.attention.Overview`) 0.6 MiB.
        """
        chosen = {number: self.layer(number) for number in (self.layers if layers is None else layers)}
        # dense layers share one batch: each is stored once, the whole batch first
        batches = list({id(batch): batch for batch in (self.whole, *(a.batch for a in chosen.values()))}.values())
        tensors, notes = {}, {"about": self.about, "batches": [], "layers": {}}
        for n, batch in enumerate(batches):
            columns = {name: getattr(batch, name) for name in COLUMNS} | {"lo": batch.mask.lo, "hi": batch.mask.hi}
            tensors |= {f"batch{n}.{name}": column for name, column in columns.items()}
            segments = [[s.row, int(s.task), s.length, s.rule] for s in batch.segments]
            notes["batches"].append({"masks": batch.mask.kinds, "segments": segments})
        for number, a in chosen.items():
            tensors |= {f"layer{number}.q": a.q, f"layer{number}.k": a.k}
            notes["layers"][number] = {"scale": a.scale, "batch": [batch is a.batch for batch in batches].index(True)}
        return write_tensors(folder, "attention", tensors, notes)

    @classmethod
    def load(cls, folder: str | Path) -> AttentionRecord:
        """Read what `save` wrote. Raises `CaptureError` for a folder without a record, or with a damaged one."""
        what = ("attention record", "AttentionRecord.save", "attention.npz")
        with read_tensors(folder, "attention", *what) as (tensors, notes):
            batches, captured = [], {}
            for n, host in enumerate(notes["batches"]):
                segments = tuple(Segment(row, Task(task), length, rule) for row, task, length, rule in host["segments"])
                lo, hi, *columns = (tensors[f"batch{n}.{name}"] for name in ("lo", "hi", *COLUMNS))
                mask = IntervalMask(lo, hi, lengths_of(segments), tuple(host["masks"]))
                batches.append(Batch(*columns, mask=mask, segments=segments))
            for number, a in notes["layers"].items():
                q, k = tensors[f"layer{number}.q"], tensors[f"layer{number}.k"]
                captured[int(number)] = LayerAttention(q, k, a["scale"], batches[a["batch"]])
            return cls(captured, batches[0], notes["about"])

    def _first(self) -> LayerAttention:
        if not self.captured:
            raise CaptureError("No layer was captured: run the model inside the block "
                               "(with capture(model) as record: model(batch)).")
        return next(iter(self.captured.values()))


def places(whole: Batch, part: Batch) -> Tensor:
    """Places in `whole` of the tokens of `part`, which are some of its tokens in the same order: int64 [K]."""
    span = int(whole.position.max()) + 1
    key = whole.row * span + whole.position
    order = key.argsort()                                   # features are packed before the tokens that they follow
    return order[torch.searchsorted(key[order], part.row * span + part.position)]


def edges(n: int, bins: int = BINS) -> Tensor:
    """First token of each bin of n pooled tokens, and n: int64 [at most bins + 1]."""
    return torch.linspace(0, n, min(n, bins) + 1).round().long()


def write_tensors(folder: str | Path, name: str, tensors: Mapping[str, Tensor], notes: Mapping) -> Path:
    """Write `<name>.safetensors`, whole or not at all, with `notes` as JSON in its metadata. Returns the folder."""
    folder = Path(expanded(folder))
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory, as the columns of a batch may
    own = {key: x.detach().cpu().clone(memory_format=torch.contiguous_format) for key, x in tensors.items()}
    save_file(own, folder / f"{name}.part", metadata={"unimod": json.dumps(notes)})
    os.replace(folder / f"{name}.part", folder / f"{name}.safetensors")
    return folder


@contextmanager
def read_tensors(folder: str | Path, name: str, what: str, writer: str,
                 former: str) -> Iterator[tuple[dict[str, Tensor], dict]]:
    """Tensors and notes that `write_tensors` wrote.

    Raises `CaptureError` for a folder that holds no `what` or one of an earlier version (its file is `former`), and for
    a damaged one, also where the damage shows only inside the block.
    """
    folder = Path(expanded(folder))
    file = folder / f"{name}.safetensors"
    if not file.is_file() and (folder / former).is_file():
        raise CaptureError(f"{folder} holds an {what} of an earlier version ({former}), which this one cannot read: "
                           f"capture the same batch again and write it with {writer}.")
    if not file.is_file():
        raise CaptureError(f"{folder} holds no {what}: {file.name} missing. Give a folder that {writer} wrote.")
    try:
        with safe_open(file, "pt") as store:
            notes = json.loads(store.metadata()["unimod"])
            tensors = {key: store.get_tensor(key) for key in store.keys()}  # noqa: SIM118
        yield tensors, notes
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise CaptureError(f"{folder} cannot be read as an {what} ({type(error).__name__}: {error}). "
                           "Save it again.") from error
