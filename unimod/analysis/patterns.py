"""Who looks at whom: how attention mass is spread over text, picture and special tokens, per layer, head and task.

    found = patterns(record, Task.MMU)
    found.received[:, :, :, Modality.IMAGE].mean((1, 2))     # mass that flows to the picture, per layer
    found.table()                                            # one row per layer and head, means over samples and their spread

First analysis of UniMoD (arXiv 2502.06474, section 3): which modality dominates, and whether that flips between tasks. The
paper does not say over which queries it averages: here over all tokens of a row, and `mass` also splits by query modality.
A mask alone already favours some keys, so `even` holds what attention spread evenly over the visible keys would give.

Letters: L layers, N samples, H heads, n tokens of a row; the modality axes are ordered as `Modality` (text, image, special).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture import AttentionRecord
from ..tokens import Modality, Task

NAMES = tuple(m.name.lower() for m in Modality)


@dataclass(frozen=True)
class Patterns:
    """Statistics of every map of one task; float32 on the CPU. A routed layer may hold no token of a row: nan there."""

    task: Task
    layers: tuple[int, ...]
    mass: Tensor
    """[L, N, H, 3, 3]: from query modality to key modality, mean over the queries of that modality; nan where there is none."""
    received: Tensor
    """[L, N, H, 3]: mass that flows to each modality, mean over all queries; sums to 1."""
    even: Tensor
    """[L, N, 3]: the same if every query spread its attention evenly over what it may see."""
    entropy: Tensor
    """[L, N, H]: in nats, mean over queries."""
    evenness: Tensor
    """[L, N, H]: entropy over the log of the number of visible keys, in [0, 1], mean over queries that see at least two."""
    sink: Tensor
    """[L, N, H]: mass on the row's first token, mean over the queries behind it."""
    distance: Tensor
    """[L, N, H]: mean |position of key - position of query| in tokens, weighted by attention."""

    def table(self) -> list[dict[str, object]]:
        """One row per layer and head: means over the samples, and `_sd`, the standard deviation over samples."""
        rows = []
        for i, layer in enumerate(self.layers):
            for head in range(self.entropy.shape[2]):
                row: dict[str, object] = {"task": self.task.name.lower(), "layer": layer, "head": head}
                for m, name in enumerate(NAMES):
                    row |= _mean(f"to_{name}", self.received[i, :, head, m])
                for name in ("entropy", "evenness", "sink", "distance"):
                    row |= _mean(name, getattr(self, name)[i, :, head])
                rows.append(row)
        return rows

    def flows(self) -> list[dict[str, object]]:
        """One row per layer, query modality ("any" for all tokens) and key modality: mass, its spread, and what even attention gives."""
        rows = []
        for i, layer in enumerate(self.layers):
            for k, key in enumerate(NAMES):
                base = {"task": self.task.name.lower(), "layer": layer, "key": key}
                even = float(self.even[i, :, k].nanmean())
                rows.append(base | {"query": "any", "even": even} | _mean("mass", self.received[i, ..., k].mean(1)))
                for q, query in enumerate(NAMES):
                    rows.append(base | {"query": query, "even": float("nan")} | _mean("mass", self.mass[i, :, :, q, k].mean(1)))
        return rows


def patterns(record: AttentionRecord, task: Task) -> Patterns:
    """Statistics of all maps of a task. Raises `CaptureError` when the record holds no row of it."""
    rows = record.rows(task)
    shape = (len(record.layers), len(rows))
    heads = (record.heads,)
    sizes = {"mass": (*heads, 3, 3), "received": (*heads, 3), "even": (3,)}
    sizes |= dict.fromkeys(("entropy", "evenness", "sink", "distance"), heads)
    out = {name: torch.full((*shape, *size), torch.nan) for name, size in sizes.items()}
    for i, layer in enumerate(record.layers):
        packed, spans = record.packed(layer), record.packed(layer).rows()
        for group in record.by_length(rows, layer):
            maps = record.maps(group, layer)
            modality = torch.stack([packed.modality[spans[row]] for row in group])
            position = torch.stack([packed.position[spans[row]] for row in group]).float()
            visible = torch.stack([(packed.hi - packed.lo)[spans[row]] for row in group])
            at = [rows.index(row) for row in group]
            for name, value in _statistics(maps, modality, position, visible).items():
                out[name][i, at] = value.cpu()
    return Patterns(task, record.layers, **out)


def picture_attention(record: AttentionRecord, row: int, layer: int, grid: tuple[int, int], query: Modality) -> Tensor:
    """How much the tokens of one modality look at each picture token: float32 [h, w], mean over heads and queries.

    A picture token that a routed layer skipped, or a query modality that sees no picture at all, gives nan.
    """
    packed, span = record.packed(layer), record.packed(layer).rows()[row]
    modality, index = packed.modality[span], record.index(layer)[span]
    out = torch.full((record.whole.lengths[row],), torch.nan)
    asks, seen = modality == query, modality == Modality.IMAGE
    if asks.any() and seen.any():
        received = record.maps([row], layer)[0][:, asks].mean((0, 1))
        if received[seen].sum() > 0:
            out[(index - record.whole.rows()[row].start)[seen].cpu()] = received[seen].cpu()
    return out[(record.whole.modality[record.whole.rows()[row]] == Modality.IMAGE).cpu()].view(grid)


def _statistics(maps: Tensor, modality: Tensor, position: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """maps: [R, H, n, n]; modality, position, visible: [R, n]. All rows start at their first visible key (lo = row start)."""
    n = maps.shape[-1]
    kinds = F.one_hot(modality, 3).to(maps)  # [R, n, 3]
    to = maps @ kinds[:, None]  # [R, H, n, 3]
    share = kinds / kinds.sum(1, keepdim=True)  # 0 / 0 = nan: no such query
    sees = (torch.arange(n, device=maps.device) < visible[..., None]) / visible[..., None]
    entropy = -torch.xlogy(maps, maps).sum(-1)  # [R, H, n]
    able = (visible > 1)[:, None].expand_as(entropy)
    relative = entropy / visible.clamp(min=2).log()[:, None]
    return {
        "mass": torch.einsum("rnq,rhnk->rhqk", share, to),
        "received": to.mean(2),
        "even": (sees @ kinds).mean(1),
        "entropy": entropy.mean(-1),
        "evenness": torch.where(able, relative, 0.0).sum(-1) / able.sum(-1),
        "sink": maps[:, :, 1:, 0].mean(-1),
        "distance": (maps * (position[:, :, None] - position[:, None]).abs()[:, None]).sum(-1).mean(-1),
    }


def _mean(name: str, values: Tensor) -> dict[str, float]:
    """Mean and standard deviation over samples; a single sample has no spread (nan)."""
    known = values[~values.isnan()]
    return {name: float(known.mean()) if len(known) else float("nan"), f"{name}_sd": float(known.std()) if len(known) > 1 else float("nan")}
