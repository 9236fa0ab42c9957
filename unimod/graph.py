"""A whole training step on memory that stays where it is: on CUDA it is recorded as a graph once and then replayed.

    step = StaticStep(objective, optimizer, clip=1.0)
    outcome, norm = step([batch], rate=0.7)         # batches on the host; one pinned upload each

A routed step of Show-o is bound by the host, which issues some 5,000 kernels; a graph issues one. A graph is for one
set of sizes, its `Signature`, and hardly any two batches have the same: of 2,000 shuffled ones 1,997 differ. So a batch
gets one more sequence, a filler without targets, that makes its sizes multiples of `BUCKET`: it takes the places that
are left over in every routed layer, no other token sees it, and no loss counts it. That leaves four to six signatures,
for about two per cent more tokens. Tokens are never left outside the attention's runs: kernels write nothing there, and
0 * NaN would poison gradients.

On a CPU the same way is taken without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .baselines import BatchRouter, Fading, SequenceRouter
from .batch import Batch, Modality, Segment, Targets, Task, lengths_of
from .layers import routed_layers
from .mask import IntervalMask
from .models.unified import UnifiedModel
from .ops.attention_varlen import longest
from .ops.backend import say
from .ops.select import segment_sizes
from .routing import BatchPlan, LayerPlan
from .upload import size_of, upload

BUCKET = 256
"""Tokens, kept tokens and targets of a batch are filled up to multiples of it."""
ROWS = 8
"""Sequences and segments likewise, with empty ones."""
SLOTS = 64
"""Slots of padded attention likewise."""


@dataclass(frozen=True)
class Signature:
    """The sizes by which a recorded step differs from another."""

    tokens: int
    kept: tuple[int, ...]
    """Kept tokens by routed layers of one capacity."""
    targets: int
    sequences: int
    segments: int
    longest: tuple[int, ...]
    """Bounds of what kernels take for the longest: segment in the selection, as a power of 2; sequence in attention, of
    the batch and of each routed layer."""


def whole_step_refused(model: UnifiedModel) -> str:
    """Why a model's training step cannot have one size; empty where it can."""
    for layer in routed_layers(model):
        if isinstance(layer.router, BatchRouter):
            return "topk_scope='batch' reads from the device how many tokens of each sequence are kept"
        if isinstance(layer.router, SequenceRouter):
            return "topk_scope='sequences' keeps another number of tokens at every step"
        if isinstance(layer.router, Fading):
            return "capacities that are learned change what is kept from step to step"
    return ""


def filled(model: UnifiedModel, batch: Batch, bucket: int = BUCKET) -> tuple[Batch, BatchPlan, Signature]:
    """A batch on the host with its filler, its plan for the model, and the sizes that both have.

    Losses and gradients are those of the batch.
    """
    plan = model.plan(batch, attention=False)
    layers, targets = {id(p): p for p in plan.layers.values()}, plan.targets
    kept = {key: sum(p.kept) for key, p in layers.items()}
    to = {key: _up(n, bucket) for key, n in kept.items()}
    # at least one token, and as many as the layer that takes most of them
    total = _up(len(batch) + max([1, *(to[key] - n for key, n in kept.items())]), bucket)
    n = total - len(batch)
    # a layer that keeps everything keeps the filler, too
    to |= {key: total for key, p in layers.items() if kept[key] == len(batch)}

    rows = _up(len(batch.lengths) + 1, ROWS) - len(batch.lengths)
    segments = _up(len(batch.segments) + rows, ROWS) - len(batch.segments)

    def more(length: int) -> tuple[Segment, ...]:
        """The filler and empty segments, the last sequences' own."""
        first = len(batch.lengths)
        return tuple(Segment(first + min(i, rows - 1), Task.LM, length if i == 0 else 0) for i in range(segments))

    changed = {key: _more(p, more(n), more(to[key] - kept[key])) for key, p in layers.items()}
    new = _with_filler(batch, n, rows, more(n))
    count = _up(len(targets.index) if targets else 0, bucket)
    by_number = {i: changed[id(p)] for i, p in plan.layers.items()}
    made = BatchPlan(by_number, model.attention_plan(new, by_number, SLOTS), _padded(targets, count, len(batch)),
                     None if plan.segment is None else new.segment_numbers())
    attention = [getattr(x, "n", None) or x.longest for x in made.attention.values()]
    return new, made, Signature(total, tuple(to.values()), count, len(new.lengths), len(new.segments), (
        (max(s.length for s in new.segments) - 1).bit_length(), *attention,
        *(longest(lengths_of(p.segments)) for p in changed.values())))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _with_filler(batch: Batch, n: int, rows: int, segments: tuple[Segment, ...]) -> Batch:
    """The batch with a causal sequence of n tokens of id 0, and rows - 1 empty ones."""
    i, zeros = torch.arange(n), torch.zeros(n, dtype=torch.long)
    first, at = len(batch.lengths), len(batch)
    more = {"ids": zeros, "row": zeros + first, "position": i, "task": zeros + Task.LM,
            "modality": zeros + Modality.TEXT, "target": zeros - 100}
    mask = IntervalMask(torch.cat([batch.mask.lo, zeros + at]), torch.cat([batch.mask.hi, at + i + 1]),
                        (*batch.lengths, n, *(0,) * (rows - 1)), (*batch.mask.kinds, *("causal",) * rows))
    source = None if batch.score_source is None else torch.cat([batch.score_source, at + i])
    return replace(batch, **{name: torch.cat([getattr(batch, name), x]) for name, x in more.items()}, mask=mask,
                   segments=batch.segments + segments, score_source=source)


def _more(plan: LayerPlan, segments: tuple[Segment, ...], kept: tuple[Segment, ...]) -> LayerPlan:
    """The layer's plan with further segments, of which `kept` is what stays of each; no gate is on them."""
    lengths = plan.lengths + tuple(s.length for s in segments)
    places = plan.kept + tuple(s.length for s in kept)
    none = torch.zeros(sum(s.length for s in segments), dtype=torch.bool)
    return replace(plan, lengths=lengths, kept=places, segments=plan.segments + kept,
                   eligible=torch.cat([plan.eligible, none]),
                   always=None if plan.always is None else torch.cat([plan.always, none]),
                   sizes=segment_sizes(lengths, places))


def _padded(targets: Targets | None, count: int, at: int) -> Targets | None:
    """`count` targets, those that are added of the token `at`, which counts in no loss."""
    if targets is None:
        return None
    n = count - len(targets.index)

    def more(x: Tensor, value: float) -> Tensor:
        return torch.cat([x, x.new_full((n,), value)])

    return replace(targets, index=more(targets.index, at), target=more(targets.target, 0),
                   task=more(targets.task, len(Task)), weight=more(targets.weight, 0.0))


class StaticStep:
    """Losses, backward, clipping and update: on CUDA replayed as one graph per signature; with several batches a step,
    one for each batch's losses and one for the update.

    A signature's first step runs as it is, which compiles and chooses kernels; its second is recorded. Where a step
    cannot be recorded, this and all later ones run as they are, which is said once. The optimizer's learning rates
    become tensors on the device: `rate` times the group's "peak".
    """

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
        self.objective, self.optimizer, self.clip = objective, optimizer, clip
        self.model: UnifiedModel = objective.model
        self.device = self.model.device
        self.records = self.device.type == "cuda"
        self._memory: dict[Signature, Tensor] = {}
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, object]] = {}
        self._seen: set[object] = set()
        self._pool = None
        self._rate = torch.ones((), device=self.device)
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(float(group["peak"]), device=self.device)

    def __call__(self, batches: list[Batch], rate: float) -> tuple[Tensor, Tensor]:
        """One step on batches of the host. rate: the learning rate relative to each group's peak.

        Returns the means over batches of the tasks' weighted sum and of each task's loss, float32 [1 + tasks], and the
        norm of the gradients.
        """
        if len(batches) == 1:
            signature, *held = self._upload(batches[0], rate)
            return self._run(signature, lambda: self._whole(*held))
        found = []
        for i, batch in enumerate(batches):
            signature, *held = self._upload(batch, rate)
            learn = partial(self._learn, *held, 1 / len(batches), i == 0)
            found.append(self._run((signature, i == 0), learn).clone())
        return torch.stack(found).nanmean(0), self._run("update", self._update)

    def _upload(self, batch: Batch, rate: float) -> tuple[Signature, Batch, BatchPlan, Tensor]:
        """The batch, filled up, its plan and the rate in the memory of their signature."""
        batch, plan, signature = filled(self.model, batch)
        held = batch, plan, torch.tensor(rate)
        if signature not in self._memory:
            self._memory[signature] = torch.empty(size_of(held), dtype=torch.uint8, device=self.device)
        there, plan, rates = upload(held, self.device, self._memory[signature])
        return signature, there.with_host(batch), plan, rates

    def _whole(self, batch: Batch, plan: BatchPlan, rate: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        return self._learn(batch, plan, rate, 1.0, False), self._update()

    def _learn(self, batch: Batch, plan: BatchPlan, rate: Tensor, share: float, fresh: bool) -> Tensor:
        """Gradients of one batch, added to those there are. fresh: those there are belong to the step before."""
        self._rate.copy_(rate)
        if fresh:
            for p in self.model.parameters():
                if p.requires_grad:                         # the same memory in all graphs: zeroed, not freed
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        outcome = self.objective(batch, plan)
        (outcome.objective if share == 1 else outcome.objective * share).backward()
        return torch.cat([outcome.total.detach()[None], outcome.per_task])

    def _update(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"].copy_(self._rate * group["peak"])
        self.optimizer.step()
        return norm

    def _run(self, key: object, step: Callable[[], object]) -> object:
        """`step()`, or what a recording of it computes anew."""
        if not self.records or key not in self._seen:
            self._seen.add(key)
            return step()
        if key not in self._graphs:
            try:
                self._record(key, step)
            except RuntimeError as error:
                self.records = False
                say(f"unimod: training steps run one kernel at a time, since this one cannot be recorded: {error}")
                return step()
        graph, out = self._graphs[key]
        graph.replay()
        return out

    def _record(self, key: object, step: Callable[[], object]) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = step()
        self._pool = self._pool or graph.pool()
        self._graphs[key] = graph, out
