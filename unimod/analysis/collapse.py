"""Routers that have collapsed: they still pick tokens, but no longer look at them.

    for finding in collapsed(routings(model, packed), packed, gate="tanh"):      # [] in good health
        print(finding)

Five ways, each with a rule and a number. All look only at tokens that were up for choice (`Routing.open`) in segments where something
was dropped, and none speaks on little evidence: what is against chance in `EVIDENCE` tokens happens by chance with a probability of about e^-8.

constant     scores of a segment differ by no more than TIES roundings of their size: ties decide, and the first tokens win
positional   the same places of the picture, whatever the picture: excess overlap (`analysis.routing`) between rows of at least POSITIONAL
one-sided    a modality, text or picture, that competes with others is kept or dropped whole, to within ONE_SIDED; a token that many rows have
             (the words of a prompt) is evidence once
saturated    tanh or sigmoid has at most FLAT of its largest slope for NEARLY_ALL kept tokens: the router gets no gradient through it
dead gate    the factor on the update is at most DEAD for NEARLY_ALL kept tokens: they are computed and nothing comes of it

A constant router is not also called positional or one-sided, which it is by its ties. Text is not looked at for places, because all rows begin
with the same words. A fresh router with a raw gate is rightly called dead: its scores begin near 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch, Modality, Task
from ..router import Routing
from .routing import Log, overlap, pictures, pools

TIES, POSITIONAL, ONE_SIDED, FLAT, DEAD, NEARLY_ALL = 8, 0.95, 0.01, 0.01, 0.01, 0.95
EVIDENCE = 8
STRETCH = {"tanh": 1.0, "sigmoid": 0.5}
"""Gates with ends: their slope at a score s is 1 - tanh(stretch * s)^2 of the largest."""


@dataclass(frozen=True)
class Finding:
    """One collapsed router."""

    layer: int
    task: str
    name: str
    figure: float
    """The number that the rule looks at."""
    sentence: str

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.task}, {self.name}: {self.sentence}"


def collapsed(log: Log, packed: Batch, gate: str) -> list[Finding]:
    """The collapsed routers of one batch, by layer and task. gate: the routers' (`RouterConfig.gate`). The more rows, the more can be said."""
    found = []
    for layer, routing in log.items():
        for task in dict.fromkeys(packed.tasks):
            choice = _Choice.of(routing, packed, task)
            constant = list(choice.constant())
            choosing = constant or [*choice.positional(), *choice.one_sided()]
            found += [Finding(layer, task.name.lower(), *rest) for rest in (*choosing, *choice.saturated(gate), *choice.dead())]
    return found


@dataclass(frozen=True)
class _Choice:
    """What one router chose of one task. pool: int64 [T], the segments; up, kept: bool [T], tokens of segments that dropped some."""

    routing: Routing
    packed: Batch
    task: Task
    pool: Tensor
    up: Tensor
    kept: Tensor

    @classmethod
    def of(cls, routing: Routing, packed: Batch, task: Task) -> _Choice:
        pool = pools(packed)
        up = routing.open & (packed.task == task)
        kept = routing.stays & up
        some = (_sums(up, pool) > _sums(kept, pool))[pool]
        return cls(routing, packed, task, pool, up & some, kept & some)

    def constant(self) -> Iterator[tuple[str, float, str]]:
        score, spread = self.routing.score.detach(), []
        for segment in self.pool[self.up].unique():
            mine = score[self.up & (self.pool == segment)].double()
            spread.append(float((mine.max() - mine.min()) / mine.abs().max().clamp(min=1e-300)))
        if spread and int(self.up.sum()) >= EVIDENCE:
            middle = statistics.median(spread)
            if middle <= TIES * torch.finfo(score.dtype).eps:
                yield "constant", middle, f"scores of a segment differ by {middle:.1e} of their size, so ties decide"

    def positional(self) -> Iterator[tuple[str, float, str]]:
        where = pictures(self.packed, self.task)
        if len(where) < 2:
            return
        kept, up, ids = self.kept[where].double(), self.up[where].double(), self.packed.ids[where]
        both, a, n = kept @ kept.T, kept @ up.T, up @ up.T                     # [rows, rows]
        other = (ids[:, None] != ids[None]).any(-1).triu(1) & (n > 0)          # pairs of different pictures
        surprise = (torch.minimum(a, a.T) - a * a.T / n.clamp(min=1)) * other
        if float(surprise.diagonal(1).sum()) < EVIDENCE:
            return
        excess = overlap(both[other], a[other], a.T[other], n[other])["excess"]
        if excess >= POSITIONAL:
            yield "positional", excess, f"different pictures keep the same places: overlap between rows {excess:.2f} of the way from chance to identity"

    def one_sided(self) -> Iterator[tuple[str, float, str]]:
        share = (_sums(self.kept, self.pool) / _sums(self.up, self.pool))[self.pool]
        for modality, name in ((Modality.TEXT, "text"), (Modality.IMAGE, "picture")):
            of = self.packed.modality == modality
            against = (_sums(self.up & of, self.pool) > 0) & (_sums(self.up & ~of, self.pool) > 0)
            mine = self.up & of & against[self.pool]
            if not mine.any():
                continue
            different, even, rate = len(self.packed.ids[mine].unique()), float(share[mine].mean()), float(self.kept[mine].double().mean())
            if (rate >= 1 - ONE_SIDED and different * (1 - even) >= EVIDENCE) or (rate <= ONE_SIDED and different * even >= EVIDENCE):
                yield "one-sided", rate, f"{rate:.0%} of its {name} tokens are kept, where an even choice keeps {even:.0%}"
                return

    def saturated(self, gate: str) -> Iterator[tuple[str, float, str]]:
        score = self.routing.score.detach()[self.kept].double()
        if gate in STRETCH and len(score) >= EVIDENCE:
            flat = float((1 - torch.tanh(STRETCH[gate] * score) ** 2 <= FLAT).double().mean())
            if flat >= NEARLY_ALL:
                yield "saturated", flat, f"the {gate} of {flat:.0%} of its kept tokens is at its end"

    def dead(self) -> Iterator[tuple[str, float, str]]:
        weight = self.routing.weight.detach()[self.kept[self.routing.index]].abs()
        if len(weight) >= EVIDENCE:
            none = float((weight <= DEAD).double().mean())
            if none >= NEARLY_ALL:
                yield "dead gate", none, f"{none:.0%} of its kept tokens get at most {DEAD} of the layer's update"


def _sums(which: Tensor, pool: Tensor) -> Tensor:
    """How many of `which`, bool [T], every pool has."""
    return torch.bincount(pool, weights=which.double())
