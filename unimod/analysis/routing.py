"""What routers do: which tokens they keep, by task, layer, modality and place in the picture; how alike they choose.

    log = routings(model, batch)                        # or what layers.record_routing gave, on the device of `batch`
    kept(log, batch), neighbours(log, batch), histograms(log, batch)         # rows of tables
    positions(log, batch, grid=(6, 6))                  # share kept: [L, 2, h, w]
    tasks(routings(model, pairs), pairs)                # pairs = batches.paired("test", 16): pictures in both tasks
    diagnose(model, batches)                            # all of these at once

`batch` is the batch as the model got it, before any layer. A router is judged by its eligible tokens.
Tokens always kept (answers, modalities that are never dropped, tasks at capacity 1, everything under a random router
in evaluation) are no evidence of it and count in one column only, `processed` of `kept`. Collapse: `analysis.layers`.

Two choices A and B among the same n tokens, of every pool of competing tokens (a segment; a picture), are compared by

    overlap = sum |A & B| / sum min(|A|, |B|)              1: in every pool the smaller choice lies in the larger one
    chance  = sum |A| |B| / n / sum min(|A|, |B|)          its mean over independent uniform choices of these sizes
    excess  = (overlap - chance) / (1 - chance)            0: as by chance, 1: the same, below 0: they avoid one another

Unlike Jaccard's index this reaches 1 when two layers have different capacities, and its chance has a closed form.
Letters: L routed layers, T tokens, N tokens of a picture (h x w), P pools.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Batch, Modality, Task
from ..data.batches import Batches
from ..layers import record_routing
from ..models.unified import UnifiedModel
from ..routing import Routing

Log = Mapping[int, Routing]
Row = dict[str, object]
BOTH = (Task.T2I, Task.MMU)
BINS = 24
SIDE = 32  # cells along a side of a map in `diagnose`, at most


@torch.no_grad()
def routings(model: UnifiedModel, batch: Batch) -> dict[int, Routing]:
    """The routing of every routed layer on a batch, on the CPU, in the model's present mode; {} for a dense model."""
    with record_routing() as log:
        model(batch.to(model.device))
    return {layer: replace(r, **{f.name: x.cpu() for f in fields(r) if isinstance(x := getattr(r, f.name), Tensor)})
            for layer, r in log.items()}


def choosing(log: Log) -> bool:
    """Whether any token was eligible: none in a dense model, or under random routers in evaluation."""
    return any(bool(routing.eligible.any()) for routing in log.values())


def kept(log: Log, batch: Batch) -> list[Row]:
    """One row per layer, task and modality that the batch has.

    kept: share of the `up` eligible tokens that the router kept (nan for none); processed: share of all `tokens` that
    go through the layer, those always kept included, which is what the layer costs.
    """
    rows = []
    for (layer, routing), task, modality in itertools.product(log.items(), dict.fromkeys(batch.tasks), Modality):
        mine = (batch.task == task) & (batch.modality == modality)
        if mine.any():
            up, through = mine & routing.eligible, routing.kept
            rows.append({"layer": layer, "task": _name(task), "modality": _name(modality), "kept": _mean(through[up]),
                         "up": int(up.sum()), "processed": _mean(through[mine]), "tokens": int(mine.sum())})
    return rows


def pictures(batch: Batch, task: Task) -> Tensor:
    """Packed places of the image tokens of a task's rows, in raster order: int64 [rows, N], [0, 0] for none.

    Raises ValueError for pictures of different sizes.
    """
    where = ((batch.modality == Modality.IMAGE) & (batch.task == task)).nonzero()[:, 0]
    _, sizes = batch.row[where].unique_consecutive(return_counts=True)
    if len(sizes.unique()) > 1:
        raise ValueError(f"The pictures of the {_name(task)} rows have between {int(sizes.min())} and "
                         f"{int(sizes.max())} tokens; their positions compare only at one size.")
    return where.view(len(sizes), -1) if len(sizes) else where.view(0, 0)


def positions(log: Log, batch: Batch, grid: tuple[int, int]) -> Tensor:
    """Share of the rows that keep each image token: float32 [L, 2, h, w], layers in the log's order, tasks t2i and mmu.

    nan where no token was eligible. Raises ValueError when the pictures of the batch are not of this grid.
    """
    out = torch.full((len(log), len(BOTH), *grid), torch.nan)
    for t, task in enumerate(BOTH):
        where = pictures(batch, task)
        if len(where) and where.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"The pictures of the {_name(task)} rows have {where.shape[1]} tokens, a grid of {grid} "
                             f"has {grid[0] * grid[1]}; give model.layout.grid and whole pictures.")
        for i, routing in enumerate(log.values()):
            up = routing.eligible[where]
            if up.any():
                out[i, t] = ((routing.kept[where] & up).sum(0) / up.sum(0)).view(grid).cpu()
    return out


def overlap(both: Tensor, a: Tensor, b: Tensor, n: Tensor) -> Row:
    """Overlap, chance and excess from counts per pool, each [P]: tokens in both choices, in each, and in the pool.

    excess is nan where there was nothing to choose.
    """
    both, a, b, n = (x.double() for x in (both, a, b, n))
    smaller = torch.minimum(a, b).sum()
    found, chance = both.sum() / smaller, (a * b / n).nansum() / smaller
    return {"overlap": float(found), "chance": float(chance), "excess": float((found - chance) / (1 - chance)),
            "tokens": int(n.sum())}


def _between(a: Tensor, b: Tensor, pool: Tensor) -> Row:
    """`overlap` of two choices, bool [M] each, among M tokens of the pools int64 [M]."""
    return overlap(*(torch.bincount(pool, weights=x.double()) for x in (a & b, a, b, torch.ones_like(a))))


def neighbours(log: Log, batch: Batch) -> list[Row]:
    """One row per routed layer, the `next` routed one, and task: overlap of their choices, pooled by segment."""
    rows, segment = [], batch.segment_numbers()
    for (layer, first), (following, second) in itertools.pairwise(log.items()):
        for task in dict.fromkeys(batch.tasks):
            up = first.eligible & second.eligible & (batch.task == task)
            if up.any():
                rows.append({"layer": layer, "next": following, "task": _name(task),
                             **_between(first.kept[up], second.kept[up], segment[up])})
    return rows


def tasks(log: Log, batch: Batch) -> list[Row]:
    """One row per layer: overlap of the tasks' choices on the same pictures, pooled by picture.

    batch: rows of t2i, then the same pictures as rows of mmu, no token masked, as `Batches.paired` writes them (a
    masked token has no content to compare). How many image tokens a row keeps beside its text is taken as given. Raises
    ValueError for other batches.
    """
    t2i, mmu = (pictures(batch, task).flatten() for task in BOTH)
    if not len(t2i) or not torch.equal(batch.ids[t2i], batch.ids[mmu]):
        raise ValueError("The rows of t2i and of mmu do not show the same pictures in the same order, with every code "
                         "known; write them with Batches.paired.")
    rows = []
    for layer, routing in log.items():
        up, through = routing.eligible[t2i] & routing.eligible[mmu], routing.kept
        if up.any():
            rows.append({"layer": layer, "task": "t2i and mmu",
                         **_between(through[t2i][up], through[mmu][up], batch.row[t2i][up])})
    return rows


def histograms(log: Log, batch: Batch, bins: int = BINS) -> list[Row]:
    """One row per layer, task, value and bin: share of the task's tokens in it, from `low` to `high`; the bins span the
    task's values in the layer. value: "score" of the eligible tokens, or "gate", the factor on a kept one's update."""
    rows = []
    for layer, routing in log.items():
        chosen = routing.eligible[routing.index]
        values = {"score": (routing.score[routing.eligible], batch.task[routing.eligible]),
                  "gate": (routing.weight[chosen], batch.task[routing.index[chosen]])}
        for (value, (numbers, of)), task in itertools.product(values.items(), Task):
            mine = numbers[of == task].detach().double().cpu()
            if len(mine):
                low, high = float(mine.min()), float(mine.max())
                low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
                edges, counts = torch.linspace(low, high, bins + 1).tolist(), torch.histc(mine, bins, low, high)
                rows += [{"layer": layer, "task": _name(task), "value": value, "low": a, "high": b,
                          "share": float(n) / len(mine)} for a, b, n in zip(edges, edges[1:], counts)]
    return rows


def figures(log: Log, batch: Batch, start: Log) -> dict[str, float]:
    """Scalars of one evaluation for curves over training, means over the routed layers; {} where no token was eligible.

    routing/kept_<task>_<modality>, routing/neighbours_<task> (excess), routing/same_<task>: share of the tokens kept in
    `start`, the routings of the same batch before training, that are still kept; routing/score: median |score|;
    routing/gate and gate_sd: its mean and spread.
    """
    found = [(f"kept_{row['task']}_{row['modality']}", row["kept"]) for row in kept(log, batch)
             if row["task"] != "lm" and row["modality"] != "special"]
    found += [(f"neighbours_{row['task']}", row["excess"]) for row in neighbours(log, batch) if row["task"] != "lm"]
    for layer, routing in log.items():
        for task in BOTH:
            before = start[layer].kept & start[layer].eligible & (batch.task == task)
            found.append((f"same_{_name(task)}", _mean(routing.kept[before])))
        gate = routing.weight[routing.eligible[routing.index]].double()
        found += [("score", float(routing.score[routing.eligible].abs().median())), ("gate", float(gate.mean()))]
        found += [("gate_sd", float(gate.var(correction=0).sqrt()))] if len(gate) else []
    known = {name: [v for other, v in found if other == name and v == v] for name, _ in found}         # without nan
    return {f"routing/{name}": sum(values) / len(values) for name, values in known.items() if values}


def diagnose(model: UnifiedModel, batches: Batches, count: int = 16) -> dict[str, list[Row]]:
    """The tables of a model on `count` held-out pictures per task: kept, positions, overlaps (neighbours, then tasks)
    and histograms; {} when no token is eligible. Maps of large pictures are pooled to SIDE x SIDE cells."""
    batch, pairs = batches.held_out("test", count), batches.paired("test", count)
    log = routings(model, batch)
    if not choosing(log):
        return {}
    maps = positions(log, batch, batches.layout.grid)
    maps = F.adaptive_avg_pool2d(maps, tuple(min(side, SIDE) for side in maps.shape[2:]))
    shares = [{"layer": layer, "task": _name(task), "row": y, "column": x, "kept": share}
              for layer, of_layer in zip(log, maps) for task, table in zip(BOTH, of_layer) if not table.isnan().all()
              for y, line in enumerate(table.tolist()) for x, share in enumerate(line)]
    alike = neighbours(log, batch) + tasks(routings(model, pairs), pairs)
    return {"kept": kept(log, batch), "positions": shares, "overlaps": alike, "histograms": histograms(log, batch)}


def _name(kind: Task | Modality) -> str:
    return kind.name.lower()


def _mean(chosen: Tensor) -> float:
    return float(chosen.double().mean())
