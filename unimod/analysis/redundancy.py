"""How much of an attention map is new: ARank, the numerical rank of the map, and the spectra it is read from.

    found = spectra(record, Task.T2I)               # singular values, once
    found.arank(tolerance=1e-2).share.mean(1)       # ARank over sequence length, per layer
    arank(record, Task.T2I, tolerance=1e-2)         # both at once
    shares(model, batches, samples=16)              # of every task, as plan.from_arank takes it

ARank (UniMoD, arXiv 2502.06474, section 3; gamma-MoD, 2410.13859) is the mean over heads of the rank of the post-softmax map. What
the papers leave open is stated here. Map: as attention used it, so bidirectional where the mask is, diagonal included, all tokens
of the row. Rank: singular values above tolerance * the largest. Normalised by the number of tokens.
A causal map has a positive diagonal and hence full rank in exact arithmetic: without a tolerance the number says little.

Letters: L layers, N samples, H heads, n tokens of a row, S singular values (the longest row; shorter ones end in zeros).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..capture import AttentionRecord, observe
from ..config import ParameterError
from ..data.batches import Batches
from ..models.backbone import UnifiedModel
from ..tokens import Task

TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4)
"""Tolerances of the sensitivity analysis."""


@dataclass(frozen=True)
class Bootstrap:
    """Mean over samples and the 95 % interval of that mean from resampling them; float32 [L]."""

    mean: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class ARank:
    """ARank of one task."""

    task: Task
    layers: tuple[int, ...]
    tolerance: float | None
    rank: Tensor
    """float32 [L, N]: mean over heads, in directions."""
    length: Tensor
    """float32 [L, N]: tokens of the row in that layer."""

    @property
    def share(self) -> Tensor:
        """Rank over length, in [0, 1]: float32 [L, N]; nan where a routed layer holds no token of the row."""
        return self.rank / self.length

    def bootstrap(self, draws: int = 1000, seed: int = 0) -> Bootstrap:
        """Mean share per layer with its 95 % interval over samples."""
        n = self.share.shape[1]
        picks = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
        means = self.share[:, picks].nanmean(-1)
        return Bootstrap(self.share.nanmean(1), means.nanquantile(0.025, 1), means.nanquantile(0.975, 1))

    def table(self) -> list[dict[str, object]]:
        """One row per layer: share with its interval, rank and length in tokens."""
        b = self.bootstrap()
        same = {"task": self.task.name.lower(), "tolerance": self.tolerance, "samples": self.rank.shape[1]}
        columns = {"share": b.mean, "low": b.low, "high": b.high, "rank": self.rank.nanmean(1), "length": self.length.nanmean(1)}
        return [
            same | {"layer": layer} | {name: float(values[i]) for name, values in columns.items()} for i, layer in enumerate(self.layers)
        ]


@dataclass(frozen=True)
class Spectra:
    """Singular values of every map of one task."""

    task: Task
    layers: tuple[int, ...]
    values: Tensor
    """float32 [L, N, H, S], descending; zeros beyond the row's length."""
    length: Tensor
    """float32 [L, N]."""

    def arank(self, tolerance: float | None = 1e-2, samples: int | None = None) -> ARank:
        """ARank at a tolerance (None: numpy's and torch's default, length * eps of float32) of the first `samples` samples (None: all).

        Raises `ParameterError` for a tolerance outside (0, 1) or more samples than there are.
        """
        if tolerance is not None and not 0 < tolerance < 1:
            raise ParameterError(f"tolerance={tolerance!r} must lie between 0 and 1 (both excluded), or be None for the numerical default.")
        if samples is not None and not 1 <= samples <= self.values.shape[1]:
            raise ParameterError(f"samples={samples} but these spectra hold 1 to {self.values.shape[1]}.")
        values, length = self.values[:, :samples], self.length[:, :samples]
        cut = length[..., None, None] * torch.finfo(torch.float32).eps if tolerance is None else tolerance
        rank = (values > cut * values[..., :1]).sum(-1).float().mean(-1)
        return ARank(self.task, self.layers, tolerance, rank, length)

    def curve(self, points: int = 32) -> Tensor:
        """Mean spectrum per layer, float32 [L, points]: value over the largest, at evenly spaced shares of the row's length from 0 to 1."""
        at = torch.linspace(0, 1, points)
        index = (at * (self.length[..., None] - 1).clamp(min=0)).round().long()  # [L, N, points]
        relative = self.values / self.values[..., :1]
        return relative.gather(-1, index[:, :, None].expand(-1, -1, self.values.shape[2], -1)).nanmean((1, 2))

    def table(self, points: int = 32) -> list[dict[str, object]]:
        """One row per layer and point of the mean spectrum."""
        curve = self.curve(points)
        return [
            {"task": self.task.name.lower(), "layer": layer, "place": j / (points - 1), "value": float(curve[i, j])}
            for i, layer in enumerate(self.layers)
            for j in range(points)
        ]

    def sensitivity(self, tolerances: Sequence[float] = TOLERANCES, samples: Sequence[int] = ()) -> list[dict[str, object]]:
        """ARank tables at several tolerances with all samples, and at 1e-2 with the first `samples` samples each."""
        rows = [row | {"varied": "tolerance"} for t in tolerances for row in self.arank(t).table()]
        return rows + [row | {"varied": "samples"} for n in samples for row in self.arank(1e-2, n).table()]


def spectra(record: AttentionRecord, task: Task) -> Spectra:
    """Singular values of all maps of a task. Raises `CaptureError` when the record holds no row of it."""
    rows = record.rows(task)
    longest = max(record.whole.lengths[row] for row in rows)
    values = torch.zeros(len(record.layers), len(rows), record.heads, longest)
    length = torch.full((len(record.layers), len(rows)), torch.nan)
    for i, layer in enumerate(record.layers):
        for group in record.by_length(rows, layer):
            found = torch.linalg.svdvals(record.maps(group, layer)).cpu()  # [R, H, n]
            at = [rows.index(row) for row in group]
            values[i, at, :, : found.shape[-1]] = found
            length[i, at] = float(found.shape[-1])
    return Spectra(task, record.layers, values, length)


def arank(record: AttentionRecord, task: Task, tolerance: float | None = 1e-2) -> ARank:
    """ARank of a task; see `Spectra.arank`."""
    return spectra(record, task).arank(tolerance)


def shares(model: UnifiedModel, batches: Batches, samples: int, tolerance: float | None = 1e-2) -> dict[str, list[float]]:
    """ARank over sequence length of every task (t2i, mmu, lm) and layer, mean over `samples` training rows of the task."""
    found = {}
    for task in Task:
        record = observe(model, batches.single_task(task, "train", samples))
        found[task.name.lower()] = arank(record, task, tolerance).share.nanmean(1).tolist()
    return found


def mask_arank(record: AttentionRecord, task: Task, tolerance: float | None = 1e-2) -> ARank:
    """ARank of attention spread evenly over what each token may see: what the mask alone contributes, in every layer."""
    rows = record.rows(task)
    longest = max(record.whole.lengths[row] for row in rows)
    values, length = torch.zeros(1, len(rows), 1, longest), torch.zeros(1, len(rows))
    for j, row in enumerate(rows):
        span = record.whole.rows()[row]
        size = (record.whole.hi - record.whole.lo)[span].cpu()
        even = (torch.arange(len(size)) < size[:, None]) / size[:, None]
        values[0, j, 0, : len(size)], length[0, j] = torch.linalg.svdvals(even), float(len(size))
    return Spectra(task, (record.layers[0],), values, length).arank(tolerance)
