"""One row's attention in a few megabytes: everything a viewer shows of all layers and heads, made without keeping queries, keys or maps.

    found = look(model, packed, row=0, picture=sample.image)        # or overview(record, row=0, ...) where there is a record
    found.looks(layer=3, head=None, query=Modality.TEXT)            # [n]: what text looks at, mean over heads
    found.save("row"), Overview.load("row")                         # row.parquet, statistics.parquet, maps.npz

Maps are pooled to 32 x 32; what each token receives is kept for every kind of query. So a row of Show-o's 1,155 tokens, 24 layers and 32 heads
takes a few megabytes instead of 4 GB of maps, and can be made where the GPU is and looked at elsewhere.

Letters: L layers, H heads, n tokens of the row, b bins; the kinds are ordered as `Modality` (text, image, special).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Modality, Task
from ..capture import AttentionRecord, CaptureError, LayerAttention, reduced
from ..capture.folder import reading, write
from ..capture.record import edges, places
from ..config import expanded
from ..models.unified import UnifiedModel
from .patterns import NAMES, Patterns, assemble, statistics

TABLES = ("row", "statistics")
VALUES = ("entropy", "evenness", "sink", "distance")


@dataclass(frozen=True)
class Overview:
    """All of one row's attention, pooled; tensors on the CPU."""

    about: Mapping[str, str]
    """What is known of the model: its `model` kind."""
    task: Task
    tokens: tuple[str, ...]
    """Names of the tokens: [n]."""
    modality: Tensor
    """int64 [n]."""
    grid: tuple[int, int]
    """Rows and columns of the row's picture tokens: the model's where there are as many, else a square, else one line; (0, 0) where there are none."""
    picture: np.ndarray | None
    """uint8 [height, width, 3], or None."""
    layers: tuple[int, ...]
    kept: Tensor
    """bool [L, n]: the tokens that each layer processed."""
    maps: Tensor
    """float16 [L, H, b, b]: from bins of queries (mean) to bins of keys (sum), of the tokens that the layer processed."""
    received: Tensor
    """float16 [L, H, 3, n]: what each token gets from the queries of a kind, mean over them; nan where it or they are not in the layer."""
    patterns: Patterns
    """Statistics of this one row."""

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.maps.shape[1]

    def looks(self, layer: int, head: int | None, query: Modality | int) -> Tensor:
        """What the tokens of a kind look at, or one token of the row (its place, int; as its bin of the pooled map does): float32 [n], nan where
        nothing is known. head None: mean over heads. Raises `CaptureError` outside what there is."""
        i = self._at(layer, head)
        some = slice(None) if head is None else slice(head, head + 1)
        if isinstance(query, Modality):
            return self.received[i, some, query].float().mean(0)
        if not 0 <= query < len(self.tokens):
            raise CaptureError(f"token {query} does not exist here; allowed: 0 to {len(self.tokens) - 1}.")
        out = torch.full((len(self.tokens),), torch.nan)
        if self.kept[i, query]:
            bins = edges(int(self.kept[i].sum()), self.maps.shape[-1])
            mine = int(torch.searchsorted(bins, self.kept[i, :query].sum(), right=True)) - 1
            size = bins.diff()
            out[self.kept[i]] = (self.maps[i, some, mine, : len(size)].float().mean(0) / size).repeat_interleave(size)
        return out

    def blocks(self, layer: int, head: int | None) -> Tensor:
        """From kind to kind: float32 [3, 3], nan where there is no such query."""
        mass = self.patterns.mass[self._at(layer, head), 0]
        return mass.mean(0) if head is None else mass[head]

    def on_picture(self, values: Tensor) -> Tensor:
        """Values of the row's tokens, [..., n], on the picture's grid: [..., h, w]."""
        return values[..., self.modality == Modality.IMAGE].unflatten(-1, self.grid)

    def save(self, folder: str | Path) -> Path:
        """Write `row.parquet` (its tokens), `statistics.parquet` and `maps.npz`; a record of the same row may lie beside them. Returns the folder."""
        L, H = len(self.layers), self.heads
        p = self.patterns
        columns = {"layer": np.repeat(self.layers, H), "head": np.tile(range(H), L)} | {name: getattr(p, name)[:, 0].flatten().numpy() for name in VALUES}
        columns |= {f"to_{k}": p.received[:, 0, :, j].flatten().numpy() for j, k in enumerate(NAMES)}
        columns |= {f"{q}_to_{k}": p.mass[:, 0, :, i, j].flatten().numpy() for i, q in enumerate(NAMES) for j, k in enumerate(NAMES)}
        arrays = {"even": p.even[:, 0].numpy()} | {name: getattr(self, name).numpy() for name in ("kept", "maps", "received")}
        return write(Path(expanded(folder)), {"row": {"token": self.tokens, "modality": self.modality.numpy()}, "statistics": columns}, "maps",
                     arrays | ({} if self.picture is None else {"picture": self.picture}),
                     {"about": dict(self.about), "task": int(self.task), "grid": self.grid, "layers": self.layers})

    @classmethod
    def load(cls, folder: str | Path) -> Overview:
        """Read what `save` wrote. Raises `CaptureError` for a folder that holds none, or a damaged one."""
        with reading(Path(expanded(folder)), TABLES, "maps", "overview of attention", "Overview.save") as ((tokens, table), arrays, notes):
            task, layers, tensors = Task(notes["task"]), tuple(notes["layers"]), {k: torch.from_numpy(arrays[k]) for k in ("kept", "maps", "received", "even")}
            read = lambda name: torch.tensor(table[name].to_numpy()).view(len(layers), 1, -1)  # noqa: E731
            mass = torch.stack([torch.stack([read(f"{q}_to_{k}") for k in NAMES], -1) for q in NAMES], -2)
            patterns = Patterns(task, layers, mass, torch.stack([read(f"to_{k}") for k in NAMES], -1), tensors["even"][:, None], *map(read, VALUES))
            return cls(notes["about"], task, tuple(tokens["token"].to_pylist()), torch.tensor(tokens["modality"].to_numpy()), tuple(notes["grid"]),
                       arrays.get("picture"), layers, tensors["kept"], tensors["maps"], tensors["received"], patterns)

    def _at(self, layer: int, head: int | None) -> int:
        if layer not in self.layers:
            raise CaptureError(f"layer {layer} was not seen; this overview holds layers {', '.join(map(str, self.layers))}.")
        if head is not None and not 0 <= head < self.heads:
            raise CaptureError(f"head {head} does not exist here; allowed: 0 to {self.heads - 1}.")
        return self.layers.index(layer)


def look(model: UnifiedModel, packed: Batch, row: int = 0, picture: np.ndarray | None = None) -> Overview:
    """Run the model on a batch and keep one row's overview, worked out inside the attention: memory as of one layer."""
    packed = packed.to(model.device)
    found = reduced(model, packed, lambda attention: _layer(packed, attention, row))
    return _together(found, packed, row, {"model": model.layout.kind}, model.layout.token, model.layout.grid, picture)


def overview(record: AttentionRecord, row: int, name: Callable[[int], str], grid: tuple[int, int], picture: np.ndarray | None = None) -> Overview:
    """The overview of one row of a record. name: from a token's id to its name; grid: rows and columns of a picture's codes."""
    return _together({i: _layer(record.whole, record.layer(i), row) for i in record.layers}, record.whole, row, record.about, name, grid, picture)


def _layer(whole: Batch, attention: LayerAttention, row: int) -> dict[str, object]:
    """All that an overview holds of one layer."""
    part, all_of = attention.packed, whole.rows()[row]
    span = part.rows()[row]
    at = (places(whole, part)[span] - all_of.start).cpu()
    n, modality = all_of.stop - all_of.start, part.modality[span]
    kept = torch.zeros(n, dtype=torch.bool)
    kept[at] = True
    received = torch.full((len(attention.q), len(NAMES), n), torch.nan)
    for kind in Modality if len(at) else ():
        received[:, kind, at] = attention.received(span, modality == kind).cpu()
    pooled = attention.tile(span).cpu() if len(at) else torch.zeros(len(attention.q), 0, 0)
    return {"kept": kept, "received": received.half(), "maps": pooled.half(), "statistics": statistics(attention, [row])}


def _together(found: Mapping[int, dict], whole: Batch, row: int, about: Mapping[str, str], name: Callable[[int], str], grid: tuple[int, int],
              picture: np.ndarray | None) -> Overview:
    span, layers, task = whole.rows()[row], tuple(sorted(found)), whole.tasks[row]
    bins = max(one["maps"].shape[-1] for one in found.values())
    maps = torch.zeros(len(layers), *found[layers[0]]["received"].shape[:1], bins, bins, dtype=torch.half)
    for i, layer in enumerate(layers):
        pooled = found[layer]["maps"]
        maps[i, :, : pooled.shape[1], : pooled.shape[2]] = pooled
    modality = whole.modality[span].cpu()
    count = int((modality == Modality.IMAGE).sum())             # vision features may be fewer or more than the codes of a picture
    side = math.isqrt(count)
    grid = tuple(grid) if math.prod(grid) == count else (side, side) if side * side == count else (1, count)
    return Overview(about, task, tuple(map(name, whole.ids[span].tolist())), modality, grid, picture, layers,
                    torch.stack([found[i]["kept"] for i in layers]), maps, torch.stack([found[i]["received"] for i in layers]),
                    assemble(task, [{i: found[i]["statistics"] for i in layers}]))
