"""The one shape of a batch: packed tokens.

A batch is one row of `T` real tokens, no padding, each with its task, its modality, its position and its target;
`IntervalMask` says whom a token may attend to.

    >>> batch = pack([sequence_a, sequence_b])
    >>> smaller = batch.take(index, segments)     # index sorted; positions kept, intervals renumbered

Letters used in the whole package: T tokens, K kept, B sequences, S segments, H heads, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

from .config import RULES
from .mask import IntervalMask, mask_kind
from .upload import upload

IGNORE = -100
"""Target of a token that predicts nothing (torch's own convention)."""

FEATURE = -1
"""Id of a token that enters as a feature vector of a vision tower, not through the vocabulary."""


class Task(IntEnum):
    """What a sequence asks of the model: text-to-image, understanding, or plain language modelling."""

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
    """A run of consecutive tokens of one sequence that compete for the same places in a routed layer, by one of
    `config.RULES`."""

    row: int
    task: Task
    length: int
    rule: str = "topk"


@dataclass(frozen=True)
class TokenSequence:
    """One sequence before packing; all tensors are int64 [n].

    `position` counts the pads of the reference layout; `hi` is relative to the sequence's first token and `lo` is
    always that token; `target[i]` is what token i must predict (already shifted for next-token tasks), or `IGNORE`.
    `parts` cuts the sequence into (length, rule) from left to right. `features`: float [F, D_v], one per id that is
    `FEATURE`. Raises ValueError on fields that do not fit one another.
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
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {n} tokens; "
                                 "all fields of a sequence have one length.")
        if n == 0:
            raise ValueError("A sequence needs at least one token.")
        covered = sum(length for length, _ in self.parts)
        if covered != n:
            raise ValueError(f"parts {self.parts} add up to {covered} tokens, the sequence has {n}.")
        for _, rule in self.parts:
            if rule not in RULES:
                raise ValueError(f"Unknown rule {rule!r} in parts; allowed: {', '.join(RULES)}.")
        slots, given = int((self.ids == FEATURE).sum()), 0 if self.features is None else len(self.features)
        if slots != given:
            raise ValueError(f"{given} feature vectors for {slots} feature tokens (id {FEATURE}); give one for each.")


@dataclass(frozen=True)
class Batch:
    """B packed sequences: int64 tensors [T] and, on the host, the segments they are made of; `pack` makes one."""

    ids: Tensor
    row: Tensor
    """The sequence of each token."""
    position: Tensor
    """Original positions, pads of the reference layout counted, for the rotary embedding."""
    task: Tensor
    modality: Tensor
    target: Tensor
    """What each token must predict, or `IGNORE`."""
    mask: IntervalMask
    segments: tuple[Segment, ...]
    """In packed order; their lengths add up to T (an empty segment is allowed after routing)."""
    features: Tensor | None = None
    """float [F, D_v], one per id that is `FEATURE`, in packed order."""
    score_source: Tensor | None = None
    """int64 [T]: the token by whose score a router judges each token, where it is not its own (guidance pairs)."""
    host: Batch | None = field(default=None, init=False, repr=False, compare=False)
    """This batch before `to` moved it, from which host numbers are read without waiting for the device. `replace`
    leaves it behind: a changed batch speaks for itself."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, on the host: [B]."""
        return self.mask.lengths

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Task of each sequence, on the host: [B]."""
        return tuple({segment.row: segment.task for segment in self.segments}.values())

    @property
    def labelled(self) -> Tensor:
        """The tokens that have a target: int64 [N], ascending, found on the host."""
        # nonzero on a device waits for it, since its size is a host number
        where = ((self.host or self).target != IGNORE).nonzero()[:, 0]
        return where.to(self.ids.device, non_blocking=not where.is_cuda)     # to the host it would be read too early

    @property
    def target_counts(self) -> tuple[int, ...]:
        """Targets per task, on the host."""
        host = self.host or self
        return tuple(torch.bincount(host.task[host.target != IGNORE], minlength=len(Task)).tolist())

    def segment_numbers(self) -> Tensor:
        """Number of each token's segment: int64 [T], ascending."""
        return spread(torch.arange(len(self.segments)), [s.length for s in self.segments], self.ids.device)

    def of_kind(self, kinds: tuple[str, ...]) -> Tensor:
        """The tokens of any of `config.KINDS`: bool [T]."""
        found = torch.zeros_like(self.ids, dtype=torch.bool)
        for kind in kinds:
            found |= _KIND[kind](self)
        return found

    def count_of_kind(self, kinds: tuple[str, ...]) -> tuple[int, ...]:
        """How many tokens of any of `config.KINDS` each segment has: [S], read on the host."""
        if not kinds:
            return (0,) * len(self.segments)
        found = (self.host or self).of_kind(kinds)
        return tuple(int(part.sum()) for part in found.split([s.length for s in self.segments]))

    def take(self, index: Tensor, segments: Sequence[Segment], rank: Tensor | None = None) -> Batch:
        """The batch of the tokens `index` (int64 [K], sorted, unique), whose segments are `segments`; `rank` as for
        `IntervalMask.take`.

        Positions stay the original ones. Features stay behind: they have been embedded before any layer runs. So do
        score sources, which are for routers, and those see the whole batch.
        """
        tensors = {name: getattr(self, name)[index]
                   for name in ("ids", "row", "position", "task", "modality", "target")}
        return Batch(**tensors, mask=self.mask.take(index, lengths_of(segments), rank), segments=tuple(segments))

    def share_scores(self) -> Batch:
        """The batch whose second half of sequences has its image tokens judged by the scores of the first half, one by
        one: guidance branches, which have the same picture."""
        pictures = (self.modality == Modality.IMAGE).nonzero()[:, 0].view(2, -1)
        own = torch.arange(len(self), device=self.ids.device)
        return replace(self, score_source=own.index_copy(0, pictures[1], pictures[0]))

    def rows(self) -> list[slice]:
        """Where each sequence lies in the packed order."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [slice(end - n, end) for end, n in zip(ends, self.lengths)]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`. What goes to a device goes in one pinned copy that nothing waits for; the host
        keeps what it must know."""
        if self.ids.device.type != "cpu":                   # from one device to another, or back
            moved = {f.name: x.to(device) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
            moved = replace(self, **moved, mask=replace(self.mask, lo=self.mask.lo.to(device),
                                                        hi=self.mask.hi.to(device)))
        elif (moved := upload(self, device)) is self:
            return self
        return moved.with_host(self.host or self)

    def with_host(self, host: Batch) -> Batch:
        """This batch, which `host` is on the host."""
        # not a field of __init__, so that replace cannot carry it on to a batch with other tokens
        object.__setattr__(self, "host", host)
        return self

    def __str__(self) -> str:
        lines = ["row  task  tokens  text  image  special  targets"]
        for b, (where, task) in enumerate(zip(self.rows(), self.tasks)):
            count = [int((self.modality[where] == m).sum()) for m in Modality]
            targets = int((self.target[where] != IGNORE).sum())
            lines.append(f"{b:3d}  {task.name.lower():4s}  {self.lengths[b]:6d}  "
                         f"{count[0]:4d}  {count[1]:5d}  {count[2]:7d}  {targets:7d}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Targets:
    """The N labelled tokens of a batch and what each counts in its loss."""

    index: Tensor
    """int64 [N], ascending: where they lie in the batch."""
    target: Tensor
    """int64 [N]: what each must predict."""
    task: Tensor
    """int64 [N]: the task of each; one more than there are for a token that counts in no loss."""
    coefficient: Tensor
    """float32 [tasks]: each task's weight in the sum."""
    scale: Tensor
    """float32 [tasks]: 1 / the task's targets, 0 where it has none."""
    weight: Tensor
    """float32 [N]: their product, per token."""
    counts: tuple[int, ...]
    """Targets of each task, on the host."""


_KIND = {
    "image": lambda batch: batch.modality == Modality.IMAGE,
    "text": lambda batch: batch.modality == Modality.TEXT,
    "special": lambda batch: batch.modality == Modality.SPECIAL,
    "question": lambda batch: (batch.modality == Modality.TEXT) & (batch.task == Task.MMU),
    "labelled": lambda batch: batch.target != IGNORE,
}


def pack(sequences: Sequence[TokenSequence]) -> Batch:
    """Lay the sequences behind one another. Raises ValueError when there is none."""
    if not sequences:
        raise ValueError("pack() needs at least one sequence.")
    lengths = tuple(len(s.ids) for s in sequences)
    # no padding: rows of 90 to 1,155 tokens lie behind one another, and linear layers see one [1, T, D]
    size = torch.tensor(lengths)
    start = spread(size.cumsum(0) - size, lengths)
    features = [s.features for s in sequences if s.features is not None]
    return Batch(
        ids=torch.cat([s.ids for s in sequences]),
        row=spread(torch.arange(len(sequences)), lengths),
        position=torch.cat([s.position for s in sequences]),
        task=spread(torch.tensor([int(s.task) for s in sequences]), lengths),
        modality=torch.cat([s.modality for s in sequences]),
        target=torch.cat([s.target for s in sequences]),
        mask=IntervalMask(start, start + torch.cat([s.hi for s in sequences]), lengths,
                          tuple(mask_kind(s.hi) for s in sequences)),
        segments=tuple(Segment(row, s.task, n, rule) for row, s in enumerate(sequences) for n, rule in s.parts),
        features=torch.cat(features) if features else None,
    )


def spread(values: Tensor, lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """One value per run (host tensor [S]), repeated for each of its tokens: [T] on `device`, without waiting for it."""
    # on the host, then up: repeat_interleave on a device would ask it for the size
    found = torch.repeat_interleave(values, torch.tensor(lengths), output_size=sum(lengths))
    return found.to(device, non_blocking=True)


def lengths_of(segments: Sequence[Segment]) -> tuple[int, ...]:
    """Tokens of each sequence that these segments make up: [B]."""
    found = [0] * (segments[-1].row + 1)
    for segment in segments:
        found[segment.row] += segment.length
    return tuple(found)
