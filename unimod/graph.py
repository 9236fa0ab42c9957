"""A whole training step on memory that stays where it is: on CUDA it is recorded as a graph once and then replayed.

    step = StaticStep(objective, optimizer, clip=1.0)
    losses, norm = step([batch], rate=0.7)          # batches on the host; one pinned upload each

A routed step of Show-o is bound by the host, which issues some 5,000 kernels; a graph issues one. A graph is for one
set of sizes, its `Signature`, and hardly any two batches have the same. So a batch gets further sequences, fillers
without targets, that bring it to the sizes of a signature: they take the places that are left over in every routed
layer, no other token sees them, and no loss counts them. `python -m unimod bench counts` counts the signatures of 2,000
shuffled batches and their fillers. Tokens are never left outside the attention's runs: kernels write nothing there, and
0 * NaN would poison gradients.

On a CPU the same way is taken without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from .baselines import BatchRouter, Fading, SequenceRouter
from .batch import IGNORE, Batch, Modality, Segment, Targets, Task, lengths_of, spread
from .layers import routed_layers
from .mask import IntervalMask
from .models.unified import UnifiedModel
from .ops.backend import say
from .ops.select import segment_sizes
from .recording import record
from .routing import BatchPlan, LayerPlan
from .upload import layout_of, size_of, upload

FINE, COARSE = 16, 256
"""A new signature has room for as many more tokens of each kind as make a multiple of about a thirty-second of the
batch, within these two."""
BLOCK = 128
"""Bounds of the longest sequence are multiples of it: of what a program of attention holds."""
SPARE = 0.2
"""Largest share of tokens, and of targets, that a batch is filled up with to share a signature."""
ROWS = 8
"""Sequences and segments are filled up to multiples of it, with empty ones; at least half of it are fillers."""


@dataclass(frozen=True)
class Signature:
    """The sizes of a recorded step."""

    tokens: int
    kept: tuple[int, ...]
    """Kept tokens in the routed layers of each capacity."""
    targets: int
    sequences: int
    segments: int
    block: int
    """The longest segment is no longer than 2 to the power of it: what a program of the selection holds."""
    features: int
    """Feature vectors of a vision tower."""
    longest: tuple[int, ...]
    """Bounds of the longest sequence, which attention's kernels are given: of the batch, and of what the layers of each
    capacity keep."""

    def fits(self, real: Signature) -> bool:
        """Whether a batch of the sizes `real` can be filled up to these without waste."""
        filler = self.tokens - real.tokens
        equal = all(getattr(self, x) == getattr(real, x) for x in ("sequences", "segments", "features"))
        places = all(0 <= mine - theirs <= filler for mine, theirs in zip(self.kept, real.kept))
        bounded = self.block >= real.block and all(m >= n for m, n in zip(self.longest, real.longest))
        few = filler <= min(SPARE * real.tokens + FINE, ROWS // 2 * min(self.longest))
        spare = 0 <= self.targets - real.targets <= SPARE * real.targets + FINE
        return filler > 0 and places and equal and bounded and few and spare


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


def filled(model: UnifiedModel, batch: Batch, known: Iterable[Signature] = ()) -> tuple[Batch, BatchPlan, Signature]:
    """A batch on the host with its fillers, its plan for the model, and the sizes that both have: the smallest of the
    `known` ones that fit, or new ones.

    Losses and gradients are those of the batch.
    """
    plan = model.plan(batch, attention=False)
    layers = {id(p): p for p in plan.layers.values()}           # layers of one capacity share one plan
    signature = signature_of(batch, [p.kept for p in layers.values()], known)
    rows, segments = signature.sequences - len(batch.lengths), signature.segments - len(batch.segments)

    # short ones, evenly: no filler is the longest sequence
    n = signature.tokens - len(batch)
    fillers = [n // rows + (i < n % rows) for i in range(rows)] + [0] * (segments - rows)
    new = _with_fillers(batch, fillers, rows)
    changed = {key: _with_places(p, new, kept - sum(p.kept), longest, 2**signature.block)
               for (key, p), kept, longest in zip(layers.items(), signature.kept, signature.longest[1:])}
    by_number = {i: changed[id(p)] for i, p in plan.layers.items()}
    return new, BatchPlan(by_number, model.attention_plan(new, by_number, signature.longest[0]),
                          _padded(plan.targets, signature.targets, len(batch)),
                          None if plan.segment is None else new.segment_numbers()), signature


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def signature_of(batch: Batch, kept: list[tuple[int, ...]], known: Iterable[Signature] = ()) -> Signature:
    """The sizes to which a batch is filled up, the smallest of the `known` ones that fit, or new ones. kept: tokens of
    each segment that are kept, for each capacity."""
    rows = _up(len(batch.lengths) + ROWS // 2, ROWS)

    def longest(counts: Iterable[int]) -> int:
        found = [0] * len(batch.lengths)
        for s, n in zip(batch.segments, counts):
            found[s.row] += n
        return _up(max(found), BLOCK)

    real = Signature(
        tokens=len(batch), kept=tuple(map(sum, kept)), targets=sum(batch.target_counts), sequences=rows,
        segments=_up(len(batch.segments) + rows - len(batch.lengths), ROWS),
        block=(max(s.length for s in batch.segments) - 1).bit_length(),
        features=0 if batch.features is None else len(batch.features),
        longest=(_up(max(batch.lengths), BLOCK), *map(longest, kept)))
    return min((s for s in known if s.fits(real)), key=lambda s: s.tokens, default=None) or _roomier(real, batch, kept)


def _roomier(real: Signature, batch: Batch, kept: list[tuple[int, ...]]) -> Signature:
    """Sizes with room for longer texts: tokens of every task and rule up to a multiple, and of these what each layer
    would keep. Any batch with fewer of each kind, but for roundings, fits then."""
    bucket = min(COARSE, _up(max(1, real.tokens // 32), FINE))
    kinds = [(s.task, s.rule) for s in batch.segments]

    def per_kind(counts: Iterable[int]) -> dict[tuple, int]:
        found = dict.fromkeys(kinds, 0)
        for kind, n in zip(kinds, counts):
            found[kind] += n
        return found

    tokens = per_kind(s.length for s in batch.segments)
    room = {kind: _up(n, bucket) - n for kind, n in tokens.items()}
    more = max(1, sum(room.values()))
    places = (sum(room[kind] * n / max(1, tokens[kind]) for kind, n in per_kind(x).items()) for x in kept)
    longest = tuple(max(n, _up(-(-more // (ROWS // 2)), BLOCK)) for n in real.longest)   # a filler is not longer
    return replace(real, tokens=real.tokens + more,
                   kept=tuple(k + min(more, round(x)) for k, x in zip(real.kept, places)),
                   targets=_up(real.targets, bucket), longest=longest,
                   block=max(real.block, (longest[0] - 1).bit_length()))


def _with_fillers(batch: Batch, lengths: list[int], rows: int) -> Batch:
    """The batch with further segments of these lengths in `rows` further causal sequences, the last of which has all
    that are left; tokens of id 0."""
    first, at, n = len(batch.lengths), len(batch), sum(lengths)
    segments = tuple(Segment(first + min(i, rows - 1), Task.LM, length) for i, length in enumerate(lengths))
    start = spread(torch.tensor([0, *accumulate(lengths)][:-1]), lengths)
    i, zeros = torch.arange(n), torch.zeros(n, dtype=torch.long)
    more = {"ids": zeros, "row": spread(torch.tensor([s.row for s in segments]), lengths), "position": i - start,
            "task": zeros + Task.LM, "modality": zeros + Modality.TEXT, "target": zeros + IGNORE}
    # unknown kinds stay unknown: with the fillers' alone, all would be taken for causal
    kinds = batch.mask.kinds and (*batch.mask.kinds, *("causal",) * rows)
    mask = IntervalMask(torch.cat([batch.mask.lo, at + start]), torch.cat([batch.mask.hi, at + i + 1]),
                        (*batch.lengths, *lengths_of(segments)[first:]), kinds)
    source = None if batch.score_source is None else torch.cat([batch.score_source, at + i])
    return replace(batch, **{name: torch.cat([getattr(batch, name), x]) for name, x in more.items()}, mask=mask,
                   segments=batch.segments + segments, score_source=source)


def _with_places(plan: LayerPlan, batch: Batch, places: int, longest: int, widest: int) -> LayerPlan:
    """The layer's plan for the batch with fillers, which take `places` in it; no gate is on them."""
    kept, fillers = list(plan.kept), batch.segments[len(plan.lengths):]
    for s in fillers:
        kept.append(min(s.length, places))
        places -= kept[-1]
    lengths = tuple(s.length for s in batch.segments)
    none = torch.zeros(sum(s.length for s in fillers), dtype=torch.bool)
    return replace(plan, lengths=lengths, kept=tuple(kept), longest=longest, widest=widest,
                   segments=plan.segments + tuple(replace(s, length=k) for s, k in zip(fillers, kept[len(plan.kept):])),
                   eligible=torch.cat([plan.eligible, none]),
                   always=None if plan.always is None else torch.cat([plan.always, none]),
                   sizes=segment_sizes(lengths, tuple(kept)))


def _padded(targets: Targets | None, count: int, at: int) -> Targets | None:
    """`count` targets; those that are added are of the token `at`, and count in no loss."""
    if targets is None:
        return None
    n = count - len(targets.index)

    def more(x: Tensor, value: float) -> Tensor:
        return torch.cat([x, x.new_full((n,), value)])

    return replace(targets, index=more(targets.index, at), target=more(targets.target, 0),
                   task=more(targets.task, len(Task)), weight=more(targets.weight, 0.0))


def mean_of(found: list[Tensor]) -> Tensor:
    """The mean over batches of their losses, each [1 + tasks]: of a task over those that have targets of it."""
    losses = torch.stack(found)
    # what is descended is in every batch: nan is not passed over there
    return torch.cat([losses[:, :1].mean(0), losses[:, 1:].nanmean(0)])


class StaticStep:
    """Losses, backward, clipping and update: on CUDA replayed as one graph per signature and way of attention; with
    several batches a step, one for each batch's losses and one for the update.

    A signature's first step runs as it is, which compiles and chooses kernels; its second is recorded. Where a step
    cannot be recorded, this and all later ones run as they are, which is said once. The optimizer's learning rates
    become tensors on the device: `rate` times the group's "peak".

    known: signatures of earlier steps, by which a batch is filled up in the same way.
    """

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, clip: float,
                 known: Iterable[Signature] = ()) -> None:
        self.known = list(known)
        self.objective, self.optimizer, self.clip = objective, optimizer, clip
        self.model: UnifiedModel = objective.model
        self.device = self.model.device
        self.records = self.device.type == "cuda"
        self._memory: dict[tuple[Signature, object], Tensor] = {}
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
            key, *held = self._upload(batches[0], rate)
            return self._run(key, lambda: self._whole(*held))
        found = []
        for i, batch in enumerate(batches):
            key, *held = self._upload(batch, rate)
            learn = partial(self._learn, *held, 1 / len(batches), i == 0)
            found.append(self._run((key, i == 0, len(batches)), learn).clone())
        # what no batch has used so far has no gradient, and no part in the update
        used = tuple(p.grad is not None for p in self.model.parameters())
        return mean_of(found), self._run(("update", used), self._update)

    def _upload(self, batch: Batch, rate: float) -> tuple[object, Batch, BatchPlan, Tensor]:
        """What a graph is for; the batch, filled up, its plan and the rate in the memory that is kept for it."""
        batch, plan, signature = filled(self.model, batch, self.known)
        if signature not in self.known:
            self.known.append(signature)
        held = batch, plan, torch.tensor(rate)
        # beside the sizes: attention is planned otherwise for other lengths or masks, and a batch may have no targets
        key = signature, (layout_of(held), set(batch.mask.kinds) == {"causal"})
        if key not in self._memory:
            self._memory[key] = torch.empty(size_of(held), dtype=torch.uint8, device=self.device)
        there, plan, rates = upload(held, self.device, self._memory[key])
        return key, there.with_host(batch), plan, rates

    def _whole(self, batch: Batch, plan: BatchPlan, rate: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        return self._learn(batch, plan, rate, 1.0, False), self._update()

    def _learn(self, batch: Batch, plan: BatchPlan, rate: Tensor, share: float, fresh: bool) -> Tensor:
        """Gradients of one batch, added to those there are. fresh: those there are belong to the step before."""
        self._rate.copy_(rate)
        if fresh:
            self.optimizer.zero_grad(set_to_none=False)     # the same memory in all graphs: zeroed, not freed
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
            torch.cuda.synchronize()
            try:
                self._graphs[key] = record(step, pool=self._pool)
            except RuntimeError as error:
                self.records = False
                say(f"unimod: training steps run one kernel at a time, since this one cannot be recorded: {error}")
                return step()
        graph, out = self._graphs[key]
        self._pool = self._pool or graph.pool()
        graph.replay()
        return out
