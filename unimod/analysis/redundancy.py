"""How much of an attention map is new: ARank, the numerical rank of the map, effective rank, and the spectra both are read from.

    found = spectra(record, Task.T2I)               # singular values, once
    found.arank(tolerance=1e-2).share.mean(1)       # ARank over sequence length, per layer
    arank(record, Task.T2I, None, GAMMA_MOD)        # as gamma-MoD's released code counts
    drift(before, after)                            # what training changed, per layer
    shares(model, batches, samples=16)              # of every task, as plan.from_arank takes it

ARank (UniMoD, arXiv 2502.06474, section 3; gamma-MoD, 2410.13859) is the mean over heads of the rank of the post-softmax map. What
the papers leave open is a `Reading` of the map (mask, diagonal, tokens), a tolerance and a number of samples: arguments, that stand in every table.
Rank: singular values above tolerance * the largest. Normalised by the number of queries. Effective rank (Roy and Vetterli, EUSIPCO 2007): exp of the
entropy of the singular values over their sum; it needs no tolerance.
A causal map has a positive diagonal and hence full rank in exact arithmetic: without a tolerance the number says little.

Letters: L layers, N samples, H heads, n tokens of a row, m queries that are looked at, S singular values (the longest row; shorter ones end in zeros).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..batch import Modality, Task
from ..capture import AttentionRecord, capture_batch
from ..config import ParameterError
from ..data.batches import Batches
from ..models.unified import UnifiedModel

TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4)
"""Tolerances of the sensitivity analysis."""
ALLOWED = {"mask": ("attention", "causal"), "diagonal": ("kept", "zero"), "tokens": ("all", "text", "image")}


@dataclass(frozen=True)
class Reading:
    """Which numbers of a post-softmax map count. Raises `ParameterError` for another word than `ALLOWED`."""

    mask: str = "attention"
    """attention: the map as it was used, bidirectional where the model is; causal: times the causal triangle, not normalised again."""
    diagonal: str = "kept"
    """zero: what a token gives to itself does not count."""
    tokens: str = "all"
    """Whose rows count: those of all queries, or of the text or image tokens alone (special tokens are neither). The keys stay: what is asked
    is whether these tokens collect the same thing, from wherever."""

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ParameterError(f"{name}={getattr(self, name)!r} is not known. Allowed: {', '.join(allowed)}.")

    def of(self, maps: Tensor, modality: Tensor) -> Tensor:
        """maps: [..., n, n], modality: int64 [n] -> [..., m, n]."""
        maps = maps.tril() if self.mask == "causal" else maps
        maps = maps * (1 - torch.eye(maps.shape[-1], device=maps.device)) if self.diagonal == "zero" else maps
        return maps if self.tokens == "all" else maps[..., modality == Modality[self.tokens.upper()], :]


AS_USED = Reading()
GAMMA_MOD = Reading("causal", "zero")
"""gamma-MoD's released code; with tolerance None, its default."""


@dataclass(frozen=True)
class Bootstrap:
    """Mean over samples and the 95 % interval of that mean from resampling them; float32, without the axis of samples."""

    mean: Tensor
    low: Tensor
    high: Tensor


def bootstrap(values: Tensor, draws: int = 1000, seed: int = 0) -> Bootstrap:
    """values: [..., N], nan where a sample has none."""
    n = values.shape[-1]
    picks = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    means = values[..., picks].nanmean(-1)
    return Bootstrap(values.nanmean(-1), means.nanquantile(0.025, -1), means.nanquantile(0.975, -1))


@dataclass(frozen=True)
class ARank:
    """ARank of one task."""

    task: Task
    layers: tuple[int, ...]
    tolerance: float | None
    rank: Tensor
    """float32 [L, N]: mean over heads, in directions."""
    length: Tensor
    """float32 [L, N]: queries of the row in that layer."""
    effective: Tensor
    """float32 [L, N]: effective rank, mean over heads, in directions."""
    reading: Reading = AS_USED

    @property
    def share(self) -> Tensor:
        """Rank over length, in [0, 1]: float32 [L, N]; nan where a routed layer holds no token of the row."""
        return self.rank / self.length

    def bootstrap(self, draws: int = 1000, seed: int = 0) -> Bootstrap:
        """Mean share per layer with its 95 % interval over samples."""
        return bootstrap(self.share, draws, seed)

    def table(self) -> list[dict[str, object]]:
        """One row per layer: share and effective share with their intervals, rank and length in tokens, and all that was chosen."""
        b, e = self.bootstrap(), bootstrap(self.effective / self.length)
        same = {"task": self.task.name.lower(), "tolerance": self.tolerance, **asdict(self.reading), "samples": self.rank.shape[1]}
        columns = {"share": b.mean, "low": b.low, "high": b.high, "rank": self.rank.nanmean(1), "length": self.length.nanmean(1),
                   "effective": e.mean, "effective_low": e.low, "effective_high": e.high}
        return [same | {"layer": layer} | {name: float(values[i]) for name, values in columns.items()} for i, layer in enumerate(self.layers)]


@dataclass(frozen=True)
class Spectra:
    """Singular values of every map of one task."""

    task: Task
    layers: tuple[int, ...]
    values: Tensor
    """float32 [L, N, H, S], descending; zeros beyond the row's length."""
    length: Tensor
    """float32 [L, N]: queries of the row in that layer, nan where it has none."""
    reading: Reading = AS_USED

    def arank(self, tolerance: float | None = 1e-2, samples: int | None = None) -> ARank:
        """ARank at a tolerance (None: queries * eps of float32, numpy's and torch's default for a square map) of the first `samples` samples (None: all).

        Raises `ParameterError` for a tolerance outside (0, 1) or more samples than there are.
        """
        if tolerance is not None and not 0 < tolerance < 1:
            raise ParameterError(f"tolerance={tolerance!r} must lie between 0 and 1 (both excluded), or be None for the numerical default.")
        if samples is not None and not 1 <= samples <= self.values.shape[1]:
            raise ParameterError(f"samples={samples} but these spectra hold 1 to {self.values.shape[1]}.")
        values, length = self.values[:, :samples], self.length[:, :samples]
        cut = length[..., None, None] * torch.finfo(torch.float32).eps if tolerance is None else tolerance
        rank = (values > cut * values[..., :1]).sum(-1).float().mean(-1)
        p = values / values.sum(-1, keepdim=True)           # exp(-sum p log p), p = s / sum s
        effective = (-torch.xlogy(p, p).sum(-1)).exp().mean(-1)
        return ARank(self.task, self.layers, tolerance, rank, length, effective, self.reading)

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


def spectra(record: AttentionRecord, task: Task, reading: Reading = AS_USED) -> Spectra:
    """Singular values of all maps of a task. Raises `CaptureError` when the record holds no row of it."""
    rows = record.rows(task)
    longest = max(record.whole.lengths[row] for row in rows)
    values = torch.zeros(len(record.layers), len(rows), record.heads, longest)
    length = torch.full((len(record.layers), len(rows)), torch.nan)
    for i, layer in enumerate(record.layers):
        modality, spans = record.batch(layer).modality, record.batch(layer).rows()
        for at, row in enumerate(rows):
            read = reading.of(record.map(row, layer), modality[spans[row]])         # [H, m, n]
            if read.shape[1]:
                found = torch.linalg.svdvals(read).cpu()
                values[i, at, :, : found.shape[-1]], length[i, at] = found, float(read.shape[1])
    return Spectra(task, record.layers, values, length, reading)


def arank(record: AttentionRecord, task: Task, tolerance: float | None = 1e-2, reading: Reading = AS_USED) -> ARank:
    """ARank of a task; see `Spectra.arank`."""
    return spectra(record, task, reading).arank(tolerance)


def readings(record: AttentionRecord, task: Task, tolerance: float = 1e-2) -> list[dict[str, object]]:
    """ARank tables under every reading that differs from the map as used in one choice, and gamma-MoD's, which also has its own tolerance; the column
    `varied` names it."""
    one_by_one = {word: replace(AS_USED, **{name: word}) for name, words in ALLOWED.items() for word in words[1:]}
    tables = {"as used": arank(record, task, tolerance)} | {word: arank(record, task, tolerance, reading) for word, reading in one_by_one.items()}
    tables["gamma-MoD"] = arank(record, task, None, GAMMA_MOD)
    return [row | {"varied": name} for name, found in tables.items() for row in found.table()]


def drift(before: ARank, after: ARank) -> list[dict[str, object]]:
    """What changed between two ARanks of the same rows, one row per layer: mean share before and after, and the mean of the change, sample by sample,
    with its 95 % interval over samples.

    Raises `ParameterError` when task, layers, tolerance, reading or number of samples differ.
    """
    for name in ("task", "layers", "tolerance", "reading"):
        if getattr(before, name) != getattr(after, name):
            raise ParameterError(f"{name} was {getattr(before, name)} before and is {getattr(after, name)} after: measure both with the same.")
    if before.rank.shape != after.rank.shape:
        raise ParameterError(f"{before.rank.shape[1]} samples before, {after.rank.shape[1]} after: measure the same rows twice.")
    b, means = bootstrap(after.share - before.share), [found.share.nanmean(1) for found in (before, after)]
    return [{"task": before.task.name.lower(), "layer": layer, "before": float(means[0][i]), "after": float(means[1][i]), "change": float(b.mean[i]),
             "low": float(b.low[i]), "high": float(b.high[i]), "samples": before.rank.shape[1]} for i, layer in enumerate(before.layers)]


def shares(model: UnifiedModel, batches: Batches, samples: int, tolerance: float | None = 1e-2) -> dict[str, list[float]]:
    """ARank over sequence length of every task (t2i, mmu, lm) and layer, mean over `samples` training rows of the task."""
    found = {}
    for task in Task:
        record = capture_batch(model, batches.single_task(task, "train", samples))
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
