"""ARank: the numerical rank of attention maps, the spectra it is read from, and intervals by resampling.

    found = spectra(record, Task.T2I)               # singular values, computed once
    found.arank(tolerance=1e-2).share.mean(1)       # ARank over sequence length, per layer
    arank(record, Task.T2I, None, GAMMA_MOD)        # as gamma-MoD's released code counts
    drift(before, after)                            # change by training, per layer
    shares(model, batches, samples=16)              # every task, as plan.from_arank takes it

ARank (UniMoD, arXiv 2502.06474, section 3; gamma-MoD, arXiv 2410.13859) is the mean over heads of the rank of the
post-softmax map: how many singular values exceed tolerance * the largest; here divided by the number of queries. The
papers leave the map's mask, diagonal and queries (`Reading`), the tolerance and the number of samples open: they are
arguments, and stand in every table. Effective rank (Roy and Vetterli, EUSIPCO 2007), exp of the entropy of the singular
values over their sum, needs no tolerance.

Letters: L layers, N samples, H heads, n tokens of a row, m queries that are counted, S singular values (as many as the
longest row has queries; shorter rows end in zeros).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..batch import Modality, Task
from ..capture import AttentionRecord, capture_batch
from ..config import ParameterError, one_of
from ..data.batches import Batches
from ..models.unified import UnifiedModel

TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4)  # tolerances of the sensitivity analysis
ALLOWED = {"mask": ("attention", "causal"), "diagonal": ("kept", "zero"), "tokens": ("all", "text", "image")}
MIN_SAMPLES = 5  # samples or seeds below which no `Finding` is decided
DRAWS = 2000  # resamples behind the interval of a `Finding`


def resampled_means(values: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Means of `draws` resamples with replacement over the last axis, nan left out: [..., N] -> [..., draws]."""
    # not scipy.stats.bootstrap: its generator is numpy's, and the committed records were drawn with torch's
    n = values.shape[-1]
    picks = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    return values[..., picks].nanmean(-1)


def bootstrap(values: Tensor, draws: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the last axis and the ends of its 95 % percentile interval: [..., N], nan where there is none."""
    means = resampled_means(values, draws, seed)
    return values.nanmean(-1), means.nanquantile(0.025, -1), means.nanquantile(0.975, -1)


def mean_sd(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean and standard deviation (`_sd`) of the values of every column, [N], nan left out; a single one has no sd."""
    row = {}
    for name, values in columns.items():
        known = values[~values.isnan()]
        row |= {name: float(known.mean()), f"{name}_sd": float(known.std()) if len(known) > 1 else math.nan}
    return row


def cells(name: str, values: Tensor, **axes: Sequence) -> list[dict[str, object]]:
    """One row per entry of `values`: its place, by the names and labels of the axes, and its number as `name`."""
    places = itertools.product(*axes.values())
    return [dict(zip(axes, place)) | {name: value} for place, value in zip(places, values.flatten().tolist())]


@dataclass(frozen=True)
class Reading:
    """Which entries of a post-softmax map count. Raises `ParameterError` for a value that `ALLOWED` does not list."""

    mask: str = "attention"  # attention: the map as used; causal: times the causal triangle, not normalised again
    diagonal: str = "kept"  # zero: what a token attends to itself does not count
    # all keys stay: the question is whether these tokens collect the same information, from wherever
    tokens: str = "all"  # whose rows count: all queries, or only text or image tokens (special ones are neither)

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            one_of(name, getattr(self, name), allowed)

    def of(self, maps: Tensor, modality: Tensor) -> Tensor:
        """The entries that count. maps: [..., n, n], modality: int64 [n] -> [..., m, n]."""
        if self.mask == "causal":
            maps = maps.tril()
        if self.diagonal == "zero":
            maps = maps * (1 - torch.eye(maps.shape[-1], device=maps.device))
        return maps if self.tokens == "all" else maps[..., modality == Modality[self.tokens.upper()], :]


GAMMA_MOD = Reading("causal", "zero")  # gamma-MoD's released code; its tolerance is None, the numerical default


@dataclass(frozen=True)
class ARank:
    task: Task
    layers: tuple[int, ...]
    tolerance: float | None
    rank: Tensor  # float32 [L, N]: number of singular values above the cut, mean over heads
    length: Tensor  # float32 [L, N]: queries of the row in that layer
    effective: Tensor  # float32 [L, N]: effective rank, mean over heads
    reading: Reading = Reading()

    @property
    def share(self) -> Tensor:
        """Rank over length, in [0, 1]: float32 [L, N]; nan where a routed layer holds no token of the row."""
        return self.rank / self.length

    def table(self) -> list[dict[str, object]]:
        """One row per layer: rank and effective rank over length with their intervals over samples, rank and length in
        tokens, and every choice behind them."""
        same = {"task": self.task.name.lower(), "tolerance": self.tolerance, **asdict(self.reading),
                "samples": self.rank.shape[1]}
        columns = dict(zip(("share", "low", "high"), bootstrap(self.share)))
        columns |= {"rank": self.rank.nanmean(1), "length": self.length.nanmean(1)}
        columns |= zip(("effective", "effective_low", "effective_high"), bootstrap(self.effective / self.length))
        return [same | {"layer": layer} | {name: float(values[i]) for name, values in columns.items()}
                for i, layer in enumerate(self.layers)]


@dataclass(frozen=True)
class Spectra:
    task: Task
    layers: tuple[int, ...]
    values: Tensor  # float32 [L, N, H, S], descending; zeros beyond the row's length
    length: Tensor  # float32 [L, N]: queries of the row in that layer, nan where it has none
    reading: Reading = Reading()

    def arank(self, tolerance: float | None = 1e-2, samples: int | None = None) -> ARank:
        """ARank at a tolerance (None: queries * eps of float32, torch's default for a square map) of the first
        `samples` samples (None: all). Raises `ParameterError` for a tolerance outside (0, 1) or too many samples."""
        if tolerance is not None and not 0 < tolerance < 1:
            raise ParameterError(f"tolerance={tolerance!r} must lie between 0 and 1 (both excluded), or be None for "
                                 "the numerical default.")
        if samples is not None and not 1 <= samples <= self.values.shape[1]:
            raise ParameterError(f"samples={samples} but these spectra hold 1 to {self.values.shape[1]}.")
        values, length = self.values[:, :samples], self.length[:, :samples]
        # the default says little of a causal map: its diagonal is positive, so its rank is full in exact arithmetic
        cut = length[..., None, None] * torch.finfo(torch.float32).eps if tolerance is None else tolerance
        rank = (values > cut * values[..., :1]).sum(-1).float().mean(-1)
        effective = torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp().mean(-1)
        return ARank(self.task, self.layers, tolerance, rank, length, effective, self.reading)

    def curve(self, points: int = 32) -> Tensor:
        """Mean spectrum per layer over samples and heads, float32 [L, points]: value over the largest, at evenly spaced
        places from the first (0) to the last singular value of the row (1)."""
        at = torch.linspace(0, 1, points)
        index = (at * (self.length[..., None] - 1).clamp(min=0)).round().long()          # [L, N, points]
        relative = self.values / self.values[..., :1]
        return relative.gather(-1, index[:, :, None].expand(-1, -1, self.values.shape[2], -1)).nanmean((1, 2))

    def table(self, points: int = 32) -> list[dict[str, object]]:
        """One row per layer and point of the mean spectrum."""
        place = [j / (points - 1) for j in range(points)]
        return cells("value", self.curve(points), task=(self.task.name.lower(),), layer=self.layers, place=place)

    def sensitivity(self, tolerances: Sequence[float] = TOLERANCES, samples: Sequence[int] = ()) -> list[dict]:
        """ARank tables at several tolerances with all samples, and at 1e-2 with the first `samples` samples each."""
        rows = [row | {"varied": "tolerance"} for t in tolerances for row in self.arank(t).table()]
        return rows + [row | {"varied": "samples"} for n in samples for row in self.arank(1e-2, n).table()]


def spectra(record: AttentionRecord, task: Task, reading: Reading | None = None) -> Spectra:
    """Singular values of all maps of a task. Raises `CaptureError` when the record holds no row of it."""
    reading, rows = reading or Reading(), record.rows(task)
    longest = max(record.whole.lengths[row] for row in rows)
    values = torch.zeros(len(record.layers), len(rows), record.heads, longest)
    length = torch.full(values.shape[:2], torch.nan)
    for (i, layer), (at, row) in itertools.product(enumerate(record.layers), enumerate(rows)):
        modality = record.batch(layer).modality[record.span(row, layer)]
        counted = reading.of(record.map(row, layer), modality)                      # [H, m, n]
        if counted.shape[1]:
            found = torch.linalg.svdvals(counted).cpu()
            values[i, at, :, : found.shape[-1]], length[i, at] = found, float(counted.shape[1])
    return Spectra(task, record.layers, values, length, reading)


def arank(record: AttentionRecord, task: Task, tolerance: float | None = 1e-2, reading: Reading | None = None) -> ARank:
    """ARank of a task; see `Spectra.arank`."""
    return spectra(record, task, reading).arank(tolerance)


def mask_arank(record: AttentionRecord, task: Task, tolerance: float | None = 1e-2) -> ARank:
    """ARank of attention spread evenly over the visible keys: the mask's own part, the same in every layer."""
    rows = record.rows(task)
    longest = max(record.whole.lengths[row] for row in rows)
    values, length = torch.zeros(1, len(rows), 1, longest), torch.zeros(1, len(rows))
    for j, row in enumerate(rows):
        visible = (record.whole.mask.hi - record.whole.mask.lo)[record.whole.rows()[row]].cpu()
        even = (torch.arange(len(visible)) < visible[:, None]) / visible[:, None]
        values[0, j, 0, : len(visible)], length[0, j] = torch.linalg.svdvals(even), float(len(visible))
    return Spectra(task, (record.layers[0],), values, length).arank(tolerance)


def readings(record: AttentionRecord, task: Task, tolerance: float = 1e-2) -> list[dict[str, object]]:
    """ARank tables under every reading that differs from the default in one choice, and gamma-MoD's, which also has its
    own tolerance; the column `varied` names it."""
    tables = {"as used": arank(record, task, tolerance)}
    for name, values in ALLOWED.items():
        tables |= {value: arank(record, task, tolerance, replace(Reading(), **{name: value})) for value in values[1:]}
    tables["gamma-MoD"] = arank(record, task, None, GAMMA_MOD)
    return [row | {"varied": name} for name, found in tables.items() for row in found.table()]


def drift(before: ARank, after: ARank) -> list[dict[str, object]]:
    """Change between two ARanks of the same rows, one table row per layer: mean share before and after, and the mean
    change per sample with its 95 % interval. Raises `ParameterError` when the two differ in anything but the model."""
    for name in ("task", "layers", "tolerance", "reading"):
        if (a := getattr(before, name)) != (b := getattr(after, name)):
            raise ParameterError(f"{name} was {a} before and is {b} after: measure both with the same.")
    samples = before.rank.shape[1]
    if before.rank.shape != after.rank.shape:
        raise ParameterError(f"{samples} samples before, {after.rank.shape[1]} after: measure the same rows twice.")
    columns = {"before": before.share.nanmean(1), "after": after.share.nanmean(1)}
    columns |= zip(("change", "low", "high"), bootstrap(after.share - before.share))
    return [{"task": before.task.name.lower(), "layer": layer, **{name: float(v[i]) for name, v in columns.items()},
             "samples": samples} for i, layer in enumerate(before.layers)]


def shares(model: UnifiedModel, batches: Batches, samples: int, tolerance: float | None = 1e-2) -> dict[str, list]:
    """ARank over sequence length of every task (t2i, mmu, lm) and layer, mean over `samples` training rows per task."""
    found = {}
    for task in Task:
        record = capture_batch(model, batches.single_task(task, "train", samples))
        found[task.name.lower()] = arank(record, task, tolerance).share.nanmean(1).tolist()
    return found


@dataclass(frozen=True)
class Finding:
    """One finding of the paper, tested here by a number that is above 0 when the finding is right."""

    name: str  # number in the paper's order and the claim
    outcome: str  # yes or no where the 95 % interval lies above or below 0, else undecided
    one: float
    other: float  # one, other: the two numbers that are compared, as `sentence` states them
    low: float
    high: float  # low, high: 95 % interval of the number that is above 0 when the finding is right
    n: int
    over: str  # what is resampled: samples, batches, runs or seeds
    sentence: str

    def table(self) -> list[dict[str, object]]:
        """One row: all fields."""
        fields = asdict(self)
        return [{"finding": fields.pop("name"), **fields}]


def decide(name: str, draws: Tensor, one: float, other: float, n: int, over: str, sentence: str) -> Finding:
    """The finding of resampled means `draws` [DRAWS]: undecided where their interval holds 0 or is nan, or n is low."""
    low, high = draws.quantile(torch.tensor([0.025, 0.975])).tolist()
    # with 3 samples all fall on one side by chance one time in four, with 5 one time in sixteen
    outcome = "undecided" if n < MIN_SAMPLES or not (low > 0 or high < 0) else "yes" if low > 0 else "no"
    return Finding(name, outcome, one, other, low, high, n, over, sentence)


def arank_falls(found: ARank) -> Finding:
    """(2b) Whether ARank over tokens is higher in the early half of the layers than in the late half, per sample."""
    middle = len(found.layers) // 2
    early, late = found.share[:middle].nanmean(0), found.share[middle:].nanmean(0)
    one, other = float(early.mean()), float(late.mean())
    return decide(f"2b. ARank falls with depth, {found.task.name.lower()}", resampled_means(early - late), one, other,
                  len(early), "samples", f"ARank / tokens {one:.3f} in the early half, {other:.3f} in the late half")


def arank_higher(t2i: ARank, mmu: ARank) -> Finding:
    """(2c) Whether ARank over tokens, mean over layers, is higher for T2I than for MMU; the samples are not paired."""
    a, b = t2i.share.nanmean(0), mmu.share.nanmean(0)
    return decide("2c. ARank is higher for drawing", resampled_means(a) - resampled_means(b, seed=1), float(a.mean()),
                  float(b.mean()), min(len(a), len(b)), "samples",
                  f"ARank / tokens {float(a.mean()):.3f} T2I, {float(b.mean()):.3f} MMU")
