"""Who looks at whom: how attention mass is spread over text, picture and special tokens, per layer, head and task.

    found = patterns(record, Task.MMU)
    found.received[:, :, :, Modality.IMAGE].mean((1, 2))     # mass that flows to the picture, per layer
    found.table()                                            # one row per layer and head, means over samples and their spread
    measure(model, packs, Task.MMU)                          # the same without keeping anything: for thousands of tokens

First analysis of UniMoD (arXiv 2502.06474, section 3): which modality dominates, and whether that flips between tasks. The
paper does not say over which queries it averages: here over all tokens of a row, and `mass` also splits by query modality.
A mask alone already favours some keys, so `even` holds what attention spread evenly over the visible keys would give.

Letters: L layers, N samples, H heads, n tokens of a row; the modality axes are ordered as `Modality` (text, image, special).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Batch, Modality, Task
from ..capture import AttentionRecord, CaptureError, LayerAttention, reduced
from ..models.unified import UnifiedModel

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
    """[L, N, H]: mass on the row's first token, of those that the layer processed; mean over the queries behind it."""
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
    """Statistics of all rows of a task. Raises `CaptureError` when the record holds no row of it."""
    rows = record.rows(task)
    return assemble(task, [{i: statistics(record.layer(i), rows) for i in record.layers}])


def measure(model: UnifiedModel, packs: Sequence[Batch], task: Task) -> Patterns:
    """`patterns` of all rows of a task in several batches, worked out inside the attention: no queries or keys are kept, so the memory is that of one
    layer and the length of rows is bounded by the model alone. Raises `CaptureError` when a batch has no row of the task."""
    found = []
    for packed in packs:
        rows = [b for b, t in enumerate(packed.tasks) if t == task]
        if not rows:
            raise CaptureError(f"A batch has no {task.name.lower()} row; give batches of that task.")
        found.append(reduced(model, packed, lambda attention, rows=rows: statistics(attention, rows)))
    return assemble(task, found)


def statistics(attention: LayerAttention, rows: Sequence[int]) -> dict[str, Tensor]:
    """What `Patterns` holds of one layer: name -> float32 [N, ...] on the CPU, one entry per row; nan for a row without tokens. No map is made."""
    packed, spans = attention.packed, attention.packed.rows()
    out = {name: torch.full((len(rows), *size), torch.nan) for name, size in _sizes(len(attention.q)).items()}
    if not len(packed):
        return out
    first = torch.zeros_like(packed.row, dtype=torch.bool)
    starts = torch.tensor([span.start for span in spans if span.stop > span.start], device=first.device)
    first[starts] = True
    given, entropy, distance = attention.mass(torch.where(first, len(NAMES), packed.modality), len(NAMES) + 1)    # a sink is a kind of its own
    kinds = F.one_hot(packed.modality, len(NAMES)).to(given)    # [T, 3]
    head = torch.zeros_like(packed.row)                         # the first token of every token's row
    for span in spans:
        head[span] = span.start
    to = given[..., :-1] + given[..., -1:] * kinds[head]        # [H, T, 3]
    sums = F.pad(kinds.cumsum(0), (0, 0, 1, 0))
    visible = (packed.hi - packed.lo).to(given)
    sees = (sums[packed.hi] - sums[packed.lo]) / visible[:, None]
    relative = entropy / visible.clamp(min=2).log()
    for n, span in enumerate(spans[row] for row in rows):
        mine, able = kinds[span], visible[span] > 1
        if not len(mine):
            continue
        out["mass"][n] = torch.einsum("tq,htk->hqk", mine / mine.sum(0), to[:, span]).cpu()    # 0 / 0 = nan: no such query
        out["received"][n] = to[:, span].mean(1).cpu()
        out["even"][n] = sees[span].mean(0).cpu()
        out["entropy"][n] = entropy[:, span].mean(1).cpu()
        out["evenness"][n] = (relative[:, span][:, able].mean(1)).cpu()
        out["sink"][n] = given[:, span][:, 1:, -1].mean(1).cpu()
        out["distance"][n] = distance[:, span].mean(1).cpu()
    return out


def _sizes(heads: int) -> dict[str, tuple[int, ...]]:
    kinds = len(NAMES)
    return {"mass": (heads, kinds, kinds), "received": (heads, kinds), "even": (kinds,)} | dict.fromkeys(("entropy", "evenness", "sink", "distance"), (heads,))


def assemble(task: Task, batches: list[dict[int, dict[str, Tensor]]]) -> Patterns:
    """Per batch, layer and name: [N, ...] -> [L, N of all batches, ...]."""
    layers = tuple(sorted(batches[0]))
    return Patterns(task, layers, **{name: torch.stack([torch.cat([b[i][name] for b in batches]) for i in layers]) for name in batches[0][layers[0]]})


def _mean(name: str, values: Tensor) -> dict[str, float]:
    """Mean and standard deviation over samples; a single sample has no spread (nan)."""
    known = values[~values.isnan()]
    return {name: float(known.mean()) if len(known) else float("nan"), f"{name}_sd": float(known.std()) if len(known) > 1 else float("nan")}
