"""Attention statistics per layer, head and task, and all heads of one row pooled to a few megabytes.

    found = patterns(record, Task.MMU)
    found.received[:, :, :, Modality.IMAGE].mean((1, 2))            # mass on image tokens, per layer
    found.table()                                                   # a row per layer and head: means over samples
    capture_patterns(model, batches, Task.MMU)                      # the same without a record: for thousands of tokens

    found = capture_overview(model, batch, row=0, picture=image)    # or overview(record, row=0, ...)
    found.attention_from(layer=3, head=None, query=Modality.TEXT)   # [n]: from the text tokens, mean over heads
    found.save("row"), Overview.load("row")                         # overview.safetensors

First analysis of UniMoD (arXiv 2502.06474, section 3): which modality dominates, and whether that flips between tasks.
The paper does not say over which queries it averages: here over all tokens of a row, and `mass` also splits by the
query's modality. A mask alone favours some keys, so `even` holds what evenly spread attention would give. An overview
of Show-o's 1,155 tokens, 24 layers and 32 heads takes 7 MB instead of 4 GB of maps.

Letters: L layers, N samples, H heads, T tokens of a batch, n of a row, b bins; modalities: text, image, special.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import attention_record
from ..attention_record import AttentionRecord, CaptureError, LayerAttention
from ..batch import Batch, Modality, Task
from ..capture import capture_summary
from ..models.unified import UnifiedModel
from .redundancy import mean_sd

NAMES = tuple(modality.name.lower() for modality in Modality)
PER_HEAD = ("entropy", "evenness", "sink", "distance")
STATISTICS = ("mass", "received", "even", *PER_HEAD)


@dataclass(frozen=True)
class Patterns:
    """Statistics of every map of one task; float32 on the CPU. nan where a routed layer holds no token of a row."""

    task: Task
    layers: tuple[int, ...]
    mass: Tensor  # [L, N, H, 3, 3]: from query to key modality, mean over that modality's queries; nan without any
    received: Tensor  # [L, N, H, 3]: mass on the keys of each modality, mean over all queries; sums to 1
    even: Tensor  # [L, N, 3]: the same if every query spread its attention evenly over its visible keys
    entropy: Tensor  # [L, N, H]: in nats, mean over queries
    evenness: Tensor  # [L, N, H]: entropy over the log of the visible keys, mean over queries that see at least two
    sink: Tensor  # [L, N, H]: mass on the row's first token that the layer processed; mean over the queries behind it
    distance: Tensor  # [L, N, H]: mean |position of key - position of query| in tokens, weighted by attention

    def table(self) -> list[dict[str, object]]:
        """One row per layer and head: means over the samples, and `_sd`, the standard deviation over samples."""
        rows, task = [], self.task.name.lower()
        for (i, layer), head in itertools.product(enumerate(self.layers), range(self.entropy.shape[2])):
            columns = {f"to_{name}": self.received[i, :, head, m] for m, name in enumerate(NAMES)}
            columns |= {name: getattr(self, name)[i, :, head] for name in PER_HEAD}
            rows.append({"task": task, "layer": layer, "head": head} | mean_sd(columns))
        return rows

    def flows(self) -> list[dict[str, object]]:
        """One row per layer, key and query modality ("any": all tokens): mass, its spread, and `even`."""
        rows, task = [], self.task.name.lower()
        for (i, layer), (k, key) in itertools.product(enumerate(self.layers), enumerate(NAMES)):
            masses = {"any": self.received[i, ..., k]}
            masses |= {name: self.mass[i, :, :, q, k] for q, name in enumerate(NAMES)}
            for query, mass in masses.items():
                even = float(self.even[i, :, k].nanmean()) if query == "any" else math.nan
                rows.append({"task": task, "layer": layer, "key": key, "query": query, "even": even}
                            | mean_sd({"mass": mass.mean(1)}))
        return rows


def patterns(record: AttentionRecord, task: Task) -> Patterns:
    """Statistics of all rows of a task. Raises `CaptureError` when the record holds no row of it."""
    rows = record.rows(task)
    return _assembled(task, [{i: statistics(record.layer(i), rows) for i in record.layers}])


def capture_patterns(model: UnifiedModel, batches: Sequence[Batch], task: Task) -> Patterns:
    """`patterns` of all rows of a task in several batches, computed inside the attention in the memory of one layer.

    Raises `CaptureError` when a batch has no row of the task.
    """
    found = []
    for batch in batches:
        rows = [row for row, other in enumerate(batch.tasks) if other == task]
        if not rows:
            raise CaptureError(f"A batch has no {task.name.lower()} row; give batches of that task.")
        found.append(capture_summary(model, batch, lambda attention, rows=rows: statistics(attention, rows)))
    return _assembled(task, found)


def statistics(attention: LayerAttention, rows: Sequence[int]) -> dict[str, Tensor]:
    """One layer's `STATISTICS` without a map: name -> float32 [N, ...] on the CPU; nan for a row without tokens."""
    batch, spans, H, kinds = attention.batch, attention.batch.rows(), len(attention.q), len(NAMES)
    sizes = {"mass": (H, kinds, kinds), "received": (H, kinds), "even": (kinds,)} | dict.fromkeys(PER_HEAD, (H,))
    out = {name: torch.full((len(rows), *size), torch.nan) for name, size in sizes.items()}
    if not len(batch):
        return out
    head = torch.tensor([span.start for span in spans], device=batch.row.device)[batch.row]     # first of its row
    first = head == torch.arange(len(head), device=head.device)
    # a row's first token is a kind of its own, so that one pass also gives the sink; `to` adds it to its modality again
    given, entropy, distance = attention.mass(torch.where(first, kinds, batch.modality), kinds + 1)
    one_hot = F.one_hot(batch.modality, kinds).to(given)        # [T, 3]
    to = given[..., :-1] + given[..., -1:] * one_hot[head]      # [H, T, 3]
    sums = F.pad(one_hot.cumsum(0), (0, 0, 1, 0))
    visible = (batch.mask.hi - batch.mask.lo).to(given)
    even = (sums[batch.mask.hi] - sums[batch.mask.lo]) / visible[:, None]
    relative = entropy / visible.clamp(min=2).log()
    for n, span in enumerate(spans[row] for row in rows):
        own, able = one_hot[span], visible[span] > 1
        if not len(own):
            continue
        out["mass"][n] = torch.einsum("tq,htk->hqk", own / own.sum(0), to[:, span]).cpu()  # 0 / 0 = nan: no such query
        out["received"][n] = to[:, span].mean(1).cpu()
        out["even"][n] = even[span].mean(0).cpu()
        out["entropy"][n] = entropy[:, span].mean(1).cpu()
        out["evenness"][n] = relative[:, span][:, able].mean(1).cpu()
        out["sink"][n] = given[:, span][:, 1:, -1].mean(1).cpu()
        out["distance"][n] = distance[:, span].mean(1).cpu()
    return out


def _assembled(task: Task, batches: Sequence[Mapping[int, Mapping[str, Tensor]]]) -> Patterns:
    layers = tuple(sorted(batches[0]))
    parts = {name: torch.stack([torch.cat([b[i][name] for b in batches]) for i in layers]) for name in STATISTICS}
    return Patterns(task, layers, **parts)


@dataclass(frozen=True)
class Overview:
    """Attention of one row in all layers and heads, pooled; tensors on the CPU."""

    about: Mapping[str, str]  # properties of the model: its `model` kind
    task: Task
    tokens: tuple[str, ...]  # [n]: their names
    modality: Tensor  # int64 [n]
    grid: tuple[int, int]  # of the row's image tokens: the model's where the number fits, else a square, else one line
    picture: np.ndarray | None  # uint8 [height, width, 3]
    layers: tuple[int, ...]
    kept: Tensor  # bool [L, n]: the tokens that each layer processed
    maps: Tensor  # float16 [L, H, b, b]: bins of queries (mean) by bins of keys (sum), of the tokens that it processed
    received: Tensor  # float16 [L, H, 3, n]: weight on each token, mean over a modality's queries; nan without either
    patterns: Patterns  # statistics of this one row

    @property
    def heads(self) -> int:
        return self.maps.shape[1]

    def attention_from(self, layer: int, head: int | None, query: Modality | int) -> Tensor:
        """Attention from the tokens of a modality, or from one token, given by its place in the row: float32 [n].

        One token's is that of its bin of the pooled map. nan where nothing is known. head None: mean over heads.
        Raises `CaptureError` for a layer, head or token that the overview does not hold.
        """
        i, some = self._at(layer, head)
        if isinstance(query, Modality):
            return self.received[i, some, query].float().mean(0)
        attention_record.check_place("token", query, len(self.tokens))
        out = torch.full((len(self.tokens),), torch.nan)
        if self.kept[i, query]:
            bins = attention_record.edges(int(self.kept[i].sum()), self.maps.shape[-1])
            own = int(torch.searchsorted(bins, self.kept[i, :query].sum(), right=True)) - 1
            size = bins.diff()
            out[self.kept[i]] = (self.maps[i, some, own, : len(size)].float().mean(0) / size).repeat_interleave(size)
        return out

    def modality_mass(self, layer: int, head: int | None) -> Tensor:
        """`Patterns.mass` of one head (None: mean over heads), query by key modality: float32 [3, 3]."""
        i, some = self._at(layer, head)
        return self.patterns.mass[i, 0, some].mean(0)

    def on_picture(self, values: Tensor) -> Tensor:
        """Values of the row's tokens, [..., n], on the grid of its image tokens: [..., h, w]."""
        return values[..., self.modality == Modality.IMAGE].unflatten(-1, self.grid)

    def save(self, folder: str | Path) -> Path:
        """Write `overview.safetensors`; a record of the same row may lie beside it. Returns the folder."""
        tensors = {name: getattr(self, name) for name in ("modality", "kept", "maps", "received")}
        tensors |= {f"patterns.{name}": getattr(self.patterns, name) for name in STATISTICS}
        tensors |= {} if self.picture is None else {"picture": torch.tensor(self.picture)}
        notes = {"about": dict(self.about), "task": int(self.task), "tokens": self.tokens, "grid": self.grid,
                 "layers": self.layers}
        return attention_record.write_tensors(folder, "overview", tensors, notes)

    @classmethod
    def load(cls, folder: str | Path) -> Overview:
        """Read what `save` wrote. Raises `CaptureError` for a folder without an overview, or with a damaged one."""
        what = ("overview of attention", "Overview.save", "maps.npz")
        with attention_record.read_tensors(folder, "overview", *what) as (tensors, notes):
            task, layers = Task(notes["task"]), tuple(notes["layers"])
            found = Patterns(task, layers, *(tensors[f"patterns.{name}"] for name in STATISTICS))
            picture = tensors["picture"].numpy() if "picture" in tensors else None
            return cls(notes["about"], task, tuple(notes["tokens"]), tensors["modality"], tuple(notes["grid"]), picture,
                       layers, tensors["kept"], tensors["maps"], tensors["received"], found)

    def _at(self, layer: int, head: int | None) -> tuple[int, slice]:
        """Index of a layer, and of a head (None: all)."""
        attention_record.check_layer(layer, self.layers, "overview")
        return self.layers.index(layer), attention_record.one_head(head, self.heads)


def capture_overview(model: UnifiedModel, batch: Batch, row: int = 0, picture: np.ndarray | None = None) -> Overview:
    """Run the model on a batch and keep one row's overview, computed inside the attention: memory as of one layer."""
    batch = batch.to(model.device)
    found = capture_summary(model, batch, lambda layer: _pooled(batch, layer, row))
    return _overview(found, batch, row, {"model": model.layout.kind}, model.layout.token, model.layout.grid, picture)


def overview(record: AttentionRecord, row: int, name: Callable[[int], str], grid: tuple[int, int],
             picture: np.ndarray | None = None) -> Overview:
    """Overview of one row of a record. name: from a token's id to its name; grid: rows and columns of image tokens."""
    found = {i: _pooled(record.whole, record.layer(i), row) for i in record.layers}
    return _overview(found, record.whole, row, record.about, name, grid, picture)


def _pooled(whole: Batch, attention: LayerAttention, row: int) -> dict[str, object]:
    """What an overview holds of one layer."""
    part, in_whole = attention.batch, whole.rows()[row]
    span = part.rows()[row]
    at = (attention_record.places(whole, part)[span] - in_whole.start).cpu()
    n, modality = in_whole.stop - in_whole.start, part.modality[span]
    kept = torch.zeros(n, dtype=torch.bool)
    kept[at] = True
    received = torch.full((len(attention.q), len(NAMES), n), torch.nan)
    for kind in Modality if len(at) else ():
        received[:, kind, at] = attention.received(span, modality == kind).cpu()
    maps = attention.tile(span).cpu() if len(at) else torch.zeros(len(attention.q), 0, 0)
    return {"kept": kept, "received": received.half(), "maps": maps.half(), "statistics": statistics(attention, [row])}


def _overview(found: Mapping[int, dict], whole: Batch, row: int, about: Mapping[str, str], name: Callable[[int], str],
              grid: tuple[int, int], picture: np.ndarray | None) -> Overview:
    span, layers, task = whole.rows()[row], tuple(sorted(found)), whole.tasks[row]
    b = max(one["maps"].shape[-1] for one in found.values())
    maps = [F.pad(m, (0, b - m.shape[2], 0, b - m.shape[1])) for m in (found[i]["maps"] for i in layers)]
    modality = whole.modality[span].cpu()
    # features of a vision tower may be fewer or more than the image tokens of a picture
    count = int((modality == Modality.IMAGE).sum())
    side = math.isqrt(count)
    grid = tuple(grid) if math.prod(grid) == count else (side, side) if side * side == count else (1, count)
    kept, received = (torch.stack([found[i][part] for i in layers]) for part in ("kept", "received"))
    return Overview(about, task, tuple(map(name, whole.ids[span].tolist())), modality, grid, picture, layers, kept,
                    torch.stack(maps), received, _assembled(task, [{i: found[i]["statistics"] for i in layers}]))
