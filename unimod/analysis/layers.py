"""What single layers do: the damage of leaving one out, and routers that have collapsed.

    batches = [session.batches.single_task(Task.MMU, "validation", 4, start=4 * i) for i in range(4)]
    found = importance(model, batches, Task.MMU)
    found.damage.mean(1)          # rise of the loss per layer, in nats
    1 - found.cosine.mean(1)      # the cheap proxy: how far a layer turns the residual stream
    right = importance(model, starts, Task.MMU, lambda model, start: share_right(model, start), name="questions right")

    for finding in collapsed(routings(model, batch), batch, gate="tanh"):      # [] when all routers are healthy
        print(finding)

Importance is the second analysis of UniMoD (arXiv 2502.06474, section 3), which skipped odd layers and measured GQA for
understanding only; here every layer, both tasks and any metric, with the spread over seeds or batches. A layer that
turns the stream little is often, not always, one to skip. Letters: L layers, N batches, T tokens.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Batch, Modality, Task
from ..config import ParameterError
from ..losses import losses
from ..models.unified import UnifiedModel, without
from ..routing import Routing
from ..seam import layer_output
from .redundancy import Finding, decide, mean_sd, resampled_means
from .routing import Log, overlap, pictures

Metric = Callable[[UnifiedModel, object], float]
"""A number that a model earns on a batch; a batch is whatever the metric takes."""


@dataclass(frozen=True)
class Importance:
    """What every layer contributes to one task; float32."""

    task: Task
    base: Tensor  # [N]: the metric with all layers; the loss in nats per target
    value: Tensor  # [L, N]: the metric without the layer
    cosine: Tensor  # [L, N]: cosine of a layer's input and output, all layers running, mean over tokens; nan: no Batch
    metric: str = "loss"
    seeds: tuple[int, ...] = ()  # [N]: the seed that each batch was made with; empty: one for all

    @property
    def damage(self) -> Tensor:
        """Change of the metric without the layer: [L, N]. Damage is a loss that rises or a share right that falls."""
        return self.value - self.base

    def per_seed(self, values: Tensor) -> Tensor:
        """[..., N] -> [..., seeds]: mean over each seed's batches, seeds ascending; unchanged for one seed."""
        kinds = sorted(set(self.seeds))
        if len(kinds) < 2:
            return values
        return torch.stack([values[..., torch.tensor(self.seeds) == kind].mean(-1) for kind in kinds], -1)

    def table(self) -> list[dict[str, object]]:
        """One row per layer: means over the batches and `_sd`, the standard deviation over seeds, or over batches where
        there is one seed (nan for a single one)."""
        same = {"base": float(self.base.mean()), "batches": len(self.base), "seeds": max(1, len(set(self.seeds)))}
        rows = []
        for layer in range(len(self.value)):
            rows.append({"task": self.task.name.lower(), "metric": self.metric, "layer": layer} | same)
            for name in ("value", "damage", "cosine"):
                values = getattr(self, name)[layer]
                rows[-1] |= mean_sd({name: self.per_seed(values)}) | {name: float(values.mean())}
        return rows


@torch.no_grad()
def importance(model: UnifiedModel, batches: Sequence, task: Task, metric: Metric | None = None, *, name: str = "loss",
               seeds: Sequence[int] = ()) -> Importance:
    """Skip every layer in turn on every batch and measure `metric`, called `name` in tables (default: the task's loss).

    seeds: the seed that each batch was made with, so that the spread is one over seeds. Raises `ParameterError` for
    another number of seeds than batches, and ValueError for the loss of a batch without targets of the task.
    """
    if len(seeds) not in (0, len(batches)):
        raise ParameterError(f"{len(seeds)} seeds for {len(batches)} batches: give one per batch, or none.")

    def loss(model: UnifiedModel, batch: Batch) -> float:
        if not batch.target_counts[task]:
            raise ValueError(f"A batch has no {task.name.lower()} target, so its loss cannot be measured; "
                             "give batches of that task.")
        return losses(model, batch.to(model.device)).per_task[task].item()

    metric, value = metric or loss, []
    base = torch.tensor([metric(model, batch) for batch in batches])
    cosine = torch.full((len(model.layers), len(batches)), torch.nan)
    for n, batch in enumerate(batches):
        if isinstance(batch, Batch):
            cosine[:, n] = _cosine(model, batch, task)
    for layer in range(len(model.layers)):
        with without(model, layer):
            value.append([metric(model, batch) for batch in batches])
    return Importance(task, base, torch.tensor(value), cosine, name, tuple(seeds))


def _cosine(model: UnifiedModel, batch: Batch, task: Task) -> Tensor:
    """Cosine between every layer's input and output, mean over the task's tokens: float32 [L]."""
    batch, found = batch.to(model.device), []
    mine = batch.task == task

    def compare(_: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        x, y = args[0][0, mine].float(), layer_output(output)[0, mine].float()
        found.append(F.cosine_similarity(x, y, dim=-1).mean())

    with ExitStack() as hooks:
        for layer in model.layers:
            hooks.enter_context(layer.register_forward_hook(compare))
        model(batch)
    return torch.stack(found).cpu()


def early_matters(found: Importance, start: int = 0) -> Finding:
    """(2a) Whether skipping a layer of the early half, from `start` on, raises the loss more than of the late half."""
    middle, last = len(found.value) // 2, len(found.value) - 1
    early, late = found.damage[start:middle].mean(0), found.damage[middle:].mean(0)
    one, other = float(early.mean()), float(late.mean())
    name = f"2a. early layers matter more, {found.task.name.lower()}" + (f", from layer {start} on" if start else "")
    return decide(name, resampled_means(early - late), one, other, len(early), "batches", f"{found.metric} without one "
                  f"layer of {start} to {middle - 1} {one:+.3f}, of {middle} to {last} {other:+.3f}")


TIES = 8  # constant: the scores of a segment differ by at most this many roundings of their size, so ties decide
POSITIONAL = 0.95  # positional: excess overlap (`analysis.routing`) between rows of different pictures of at least this
ONE_SIDED = 0.01  # one-sided: all but this share of a modality's tokens that compete with others are kept, or dropped
FLAT = 0.01  # saturated: the gate's slope is at most this share of its largest, so no gradient reaches the router
DEAD = 0.01  # dead gate: the factor on the update is at most this: kept tokens are computed for nothing
NEARLY_ALL = 0.95  # saturated and dead gate: for at least this share of the kept tokens
EVIDENCE = 8  # tokens that a rule needs: what is against chance in 8 happens by chance with a probability of about e^-8
STRETCH = {"tanh": 1.0, "sigmoid": 0.5}  # gates that saturate: slope 1 - tanh(stretch * score)^2 of the largest


@dataclass(frozen=True)
class Collapse:
    """One collapsed router."""

    layer: int
    task: str
    name: str
    figure: float  # the number that the rule compares
    sentence: str

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.task}, {self.name}: {self.sentence}"


def collapsed(log: Log, batch: Batch, gate: str) -> list[Collapse]:
    """Routers of one batch that still select tokens but no longer by their content, by layer and task.

    gate: the routers' (`RouterConfig.gate`). Only eligible tokens (`Routing.eligible`) of segments in which some were
    dropped are evidence, so more rows make more rules apply. A constant router is not also called positional or
    one-sided.
    """
    found, segment = [], batch.segment_numbers()
    for (layer, routing), task in itertools.product(log.items(), dict.fromkeys(batch.tasks)):
        eligible = routing.eligible & (batch.task == task)
        kept = routing.kept & eligible
        dropping = (_count(eligible, segment) > _count(kept, segment))[segment]
        eligible, kept = eligible & dropping, kept & dropping
        hits = list(_constant(routing.score.detach(), segment, eligible))
        if not hits:
            hits = [*_positional(batch, task, eligible, kept), *_one_sided(batch, segment, eligible, kept)]
        hits += _gated(routing, kept, gate)
        found += [Collapse(layer, task.name.lower(), *hit) for hit in hits]
    return found


Hits = Iterator[tuple[str, float, str]]
"""Name, figure and sentence of every rule that holds."""


def _constant(score: Tensor, segment: Tensor, eligible: Tensor) -> Hits:
    segments = [score[eligible & (segment == number)].double() for number in segment[eligible].unique()]
    if int(eligible.sum()) >= EVIDENCE:
        # 1e-300: scores that are all 0 differ by nothing
        middle = statistics.median(float((x.max() - x.min()) / x.abs().max().clamp(min=1e-300)) for x in segments)
        if not middle > TIES * torch.finfo(score.dtype).eps:                    # nor are scores that are nan a choice
            yield "constant", middle, f"scores of a segment differ by {middle:.1e} of their size, so ties decide"


def _positional(batch: Batch, task: Task, eligible: Tensor, kept: Tensor) -> Hits:
    where = pictures(batch, task)                  # image tokens only: all rows begin with the same words of text
    kept, eligible, ids = kept[where].double(), eligible[where].double(), batch.ids[where]
    both, a, n = kept @ kept.T, kept @ eligible.T, eligible @ eligible.T        # [rows, rows]
    other = (ids[:, None] != ids[None]).any(-1).triu(1) & (n > 0)               # pairs of different pictures
    surprise = (torch.minimum(a, a.T) - a * a.T / n.clamp(min=1)) * other
    if float(surprise.diagonal(1).sum()) >= EVIDENCE:
        excess = overlap(both[other], a[other], a.T[other], n[other])["excess"]
        if excess >= POSITIONAL:
            yield "positional", excess, ("different pictures keep the same places: overlap between rows "
                                         f"{excess:.2f} of the way from chance to identity")


def _one_sided(batch: Batch, segment: Tensor, eligible: Tensor, kept: Tensor) -> Hits:
    share = (_count(kept, segment) / _count(eligible, segment))[segment]
    for modality, name in ((Modality.TEXT, "text"), (Modality.IMAGE, "picture")):
        of = batch.modality == modality
        competes = (_count(eligible & of, segment) > 0) & (_count(eligible & ~of, segment) > 0)
        mine = eligible & of & competes[segment]
        different = len(batch.ids[mine].unique())      # a token that many rows have (a prompt's words) is evidence once
        even, rate = float(share[mine].mean()), float(kept[mine].double().mean())       # nan without any
        if (rate >= 1 - ONE_SIDED and different * (1 - even) >= EVIDENCE) or (
                rate <= ONE_SIDED and different * even >= EVIDENCE):
            yield "one-sided", rate, f"{rate:.0%} of its {name} tokens are kept, where an even choice keeps {even:.0%}"
            return                                     # where one modality is kept the other is dropped


def _gated(routing: Routing, kept: Tensor, gate: str) -> Hits:
    score, weight = routing.score.detach()[kept].double(), routing.weight.detach()[kept[routing.index]].abs()
    flat = float((1 - torch.tanh(STRETCH.get(gate, 0.0) * score) ** 2 <= FLAT).double().mean())
    none = float((weight <= DEAD).double().mean())
    if len(score) >= EVIDENCE and flat >= NEARLY_ALL:
        yield "saturated", flat, f"the {gate} of {flat:.0%} of its kept tokens is at its end"
    if len(weight) >= EVIDENCE and none >= NEARLY_ALL:  # a fresh raw gate is rightly dead: its scores begin near 0
        yield "dead gate", none, f"{none:.0%} of its kept tokens get at most {DEAD} of the layer's update"


def _count(which: Tensor, segment: Tensor) -> Tensor:
    """How many of `which`, bool [T], every segment, int64 [T], has: float64."""
    return torch.bincount(segment, weights=which.double())
