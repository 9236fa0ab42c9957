"""The one shape of the whole package: packed tokens with intervals.

A batch is one row of `T` real tokens, no padding. Token `i` may attend to the packed tokens `lo[i] <= j < hi[i]`, which
expresses exactly every mask of Show-o (t2i, mmu, lm) and Emu3 (causal). Intervals are closed under a sorted gather, so a
routed layer is the same computation on fewer tokens:

    >>> packed = pack([sequence_a, sequence_b])
    >>> smaller = packed.take(idx, segments)      # idx sorted; positions kept, intervals renumbered

Letters used in the whole package: T tokens, K kept, B sequences, H heads, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .config import RULES
from .mask import mask_kind

IGNORE = -100
"""Target of a token that predicts nothing (torch's own convention)."""

FEATURE = -1
"""Id of a token that enters as a feature vector of a vision tower, not through the vocabulary."""


class Task(IntEnum):
    """What a sequence asks of the model."""

    T2I = 0
    MMU = 1
    LM = 2


class Modality(IntEnum):
    """What a token stands for."""

    TEXT = 0
    IMAGE = 1
    SPECIAL = 2



@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens of one row that compete for the same places in a routed layer."""

    row: int
    task: Task
    length: int
    rule: str = "topk"


@dataclass(frozen=True)
class TokenSequence:
    """One sequence before packing; all tensors are int64 [n].

    `position` counts the pads of the reference layout; `hi` is relative to the sequence's first token and `lo` is always
    that token; `target[i]` is what token i must predict (already shifted for next-token tasks), or `IGNORE`.
    `parts` cuts the sequence into (length, rule) from left to right. `features`: float [F, D_v], one per id that is `FEATURE`.
    """

    task: Task
    ids: Tensor
    position: Tensor
    modality: Tensor
    hi: Tensor
    target: Tensor
    parts: tuple[tuple[int, str], ...]
    features: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        for name in ("position", "modality", "hi", "target"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {n} tokens; all fields of a sequence have one length.")
        if n == 0:
            raise ValueError("A sequence needs at least one token.")
        if sum(length for length, _ in self.parts) != n:
            raise ValueError(f"parts {self.parts} add up to {sum(length for length, _ in self.parts)} tokens, the sequence has {n}.")
        for _, rule in self.parts:
            if rule not in RULES:
                raise ValueError(f"Unknown rule {rule!r} in parts; allowed: {', '.join(RULES)}.")
        slots, given = int((self.ids == FEATURE).sum()), 0 if self.features is None else len(self.features)
        if slots != given:
            raise ValueError(f"{given} feature vectors for {slots} feature tokens (id {FEATURE}); give one for each.")


@dataclass(frozen=True)
class Batch:
    """A batch: int64 tensors [T] and, on the host, the segments they are made of.

    `lo`, `hi`: token i may attend to packed tokens lo[i] .. hi[i] - 1. `segments` are in packed order; their lengths add up
    to T (an empty segment is allowed after routing). `features`: float [F, D_v], one per id that is `FEATURE`, in packed order.
    """

    ids: Tensor
    row: Tensor
    position: Tensor
    task: Tensor
    modality: Tensor
    lo: Tensor
    hi: Tensor
    target: Tensor
    segments: tuple[Segment, ...]
    features: Tensor | None = None
    twin: Tensor | None = None
    """int64 [T]: the token by whose score a router judges each token, where it is not its own."""
    static: bool = False
    """One further token of every row, all of one rule: layers work on all rows and drop by a mask, so that a step has one size and waits for nothing."""
    masks: tuple[str, ...] = ()
    """How each row's intervals are made (`mask_kind`), on the host: [B], or nothing where it is not known. A sorted gather leaves it as it is."""
    memo: ClassVar[dict | None] = None
    """What attention works out from the intervals, for the layers that share this batch: the model puts a dict in its place; a routed layer's has none."""
    _always: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, on the host: [B]."""
        n = [0] * (self.segments[-1].row + 1)
        for segment in self.segments:
            n[segment.row] += segment.length
        return tuple(n)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """Task of each row, on the host: [B]."""
        return tuple({segment.row: segment.task for segment in self.segments}.values())

    @cached_property
    def segment(self) -> Tensor:
        """Number of each token's segment: int64 [T]."""
        size = [s.length for s in self.segments]
        return torch.repeat_interleave(torch.arange(len(size)), torch.tensor(size), output_size=sum(size)).to(self.ids.device, non_blocking=True)

    @cached_property
    def labelled(self) -> Tensor:
        """The tokens that have a target: int64 [N], ascending."""
        return (self.target != IGNORE).nonzero()[:, 0]

    @cached_property
    def target_counts(self) -> tuple[int, ...]:
        """Targets per task, on the host."""
        return tuple(torch.bincount(self.task[self.labelled], minlength=len(Task)).tolist())

    def always(self, kinds: tuple[str, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """The tokens of any of these `KINDS`: bool [T], and how many there are in each segment, on the host. Worked out once per batch."""
        found = self._always
        if not kinds and kinds not in found:                # the common case: nothing to work out, nothing to move
            found[kinds] = torch.zeros_like(self.ids, dtype=torch.bool), (0,) * len(self.segments)
        elif kinds not in found:
            host = self.__dict__.get("_host", self)
            mask = host.of_kind(kinds)
            counts = tuple(sum(part.tolist()) for part in mask.split([s.length for s in host.segments]))
            found[kinds] = mask.to(self.ids.device, non_blocking=True), counts
        return found[kinds]

    def of_kind(self, kinds: tuple[str, ...]) -> Tensor:
        """The tokens of any of these `KINDS`, worked out where the batch lies, each time: bool [T]."""
        mask = torch.zeros_like(self.ids, dtype=torch.bool)
        for kind in kinds:
            mask |= _KIND[kind](self)
        return mask

    def take(self, idx: Tensor, segments: Seq[Segment], rank: Tensor | None = None) -> Batch:
        """The batch of the tokens `idx` (int64 [K], sorted, unique), whose segments are `segments`.

        Positions stay the original ones; the interval of token i becomes [searchsorted(idx, lo_i), searchsorted(idx, hi_i)), looked up in `rank`
        (int64 [T + 1]: how many of idx lie before each token) where the caller has it.
        Features stay behind: they have been embedded before any layer runs. So do twins: they are for routers, which see the whole batch.
        """
        lo, hi = (torch.searchsorted(idx, x[idx]) if rank is None else rank[x[idx]] for x in (self.lo, self.hi))
        return Batch(
            **{name: getattr(self, name)[idx] for name in ("ids", "row", "position", "task", "modality", "target")},
            lo=lo, hi=hi, segments=tuple(segments), masks=self.masks,
        )

    def paired(self) -> Batch:
        """The batch whose second half of rows has its picture tokens judged like those of the first half, one by one: guidance branches, which have
        the same picture."""
        pictures = (self.modality == Modality.IMAGE).nonzero()[:, 0].view(2, -1)
        return replace(self, twin=torch.arange(len(self), device=self.ids.device).index_copy(0, pictures[1], pictures[0]))

    def rows(self) -> list[slice]:
        """Where each row lies in the packed order."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [slice(end - n, end) for end, n in zip(ends, self.lengths)]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; what the host must know of its targets is worked out before the move, so no step waits for it."""
        up = torch.device(device).type == "cuda"            # the other way the host would read before the copy is there
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        moved = replace(self, **{name: (x.pin_memory() if up and not x.is_cuda else x).to(device, non_blocking=up) for name, x in tensors.items()})
        moved.__dict__.update(labelled=self.labelled.to(device, non_blocking=up), target_counts=self.target_counts, _host=self.__dict__.get("_host", self))
        return moved

    def __str__(self) -> str:
        lines = ["row  task  tokens  text  image  special  targets"]
        for b, (where, task) in enumerate(zip(self.rows(), self.tasks)):
            count = [int((self.modality[where] == m).sum()) for m in Modality]
            targets = int((self.target[where] != IGNORE).sum())
            lines.append(f"{b:3d}  {task.name.lower():4s}  {self.lengths[b]:6d}  {count[0]:4d}  {count[1]:5d}  {count[2]:7d}  {targets:7d}")
        return "\n".join(lines)


_KIND = {
    "image": lambda p: p.modality == Modality.IMAGE,
    "text": lambda p: p.modality == Modality.TEXT,
    "special": lambda p: p.modality == Modality.SPECIAL,
    "question": lambda p: (p.modality == Modality.TEXT) & (p.task == Task.MMU),
    "labelled": lambda p: p.target != IGNORE,
}


def pack(sequences: Seq[TokenSequence]) -> Batch:
    """Lay the sequences behind one another. Raises ValueError when there is none."""
    if not sequences:
        raise ValueError("pack() needs at least one sequence.")
    lengths = torch.tensor([len(s.ids) for s in sequences])
    start = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    features = [s.features for s in sequences if s.features is not None]
    return Batch(
        ids=torch.cat([s.ids for s in sequences]),
        row=torch.repeat_interleave(torch.arange(len(sequences)), lengths),
        position=torch.cat([s.position for s in sequences]),
        task=torch.repeat_interleave(torch.tensor([int(s.task) for s in sequences]), lengths),
        modality=torch.cat([s.modality for s in sequences]),
        lo=start,
        hi=start + torch.cat([s.hi for s in sequences]),
        target=torch.cat([s.target for s in sequences]),
        segments=tuple(Segment(row, s.task, n, rule) for row, s in enumerate(sequences) for n, rule in s.parts),
        features=torch.cat(features) if features else None,
        masks=tuple(mask_kind(s.hi) for s in sequences),
    )
