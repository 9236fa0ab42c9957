"""Is the packed way right? Compared with transformers' own forward, and with the way such models are usually trained.

    error = against_stock(model, rows)        # one sequence at a time, eager attention, dense mask
    loss = padded_step(model, rows)           # rows padded to one length, dense mask, logits of every token
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import IGNORE, Task, TokenSequence, pack
from ..losses import COEFFICIENTS, losses
from ..models.unified import UnifiedModel
from ..seam import ATTENTION, query_projection


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of logits and of one gradient, each with the largest absolute value that occurs."""

    logits: float
    largest_logit: float
    gradient: float
    largest_gradient: float


@dataclass(frozen=True)
class Padded:
    """Rows padded to n tokens: ids, position, target int64 [B, n]; mask [B, 1, n, n], 0 or its dtype's least number.

    tasks: of each row; None where it has no target.
    """

    ids: Tensor
    position: Tensor
    target: Tensor
    mask: Tensor
    tasks: tuple[Task | None, ...]

    @classmethod
    def of(cls, rows: list[TokenSequence], like: Tensor) -> Padded:
        """On the device of `like`, the mask in its dtype."""
        n = max(len(row.ids) for row in rows)

        def padded(name: str, value: int = 0) -> Tensor:
            each = [F.pad(getattr(row, name), (0, n - len(row.ids)), value=value) for row in rows]
            return torch.stack(each).to(like.device)

        hidden = torch.arange(n, device=like.device) >= padded("hi", n)[:, None, :, None]
        mask = like.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(like.dtype).min)
        return cls(padded("ids"), padded("position"), padded("target", IGNORE), mask, tuple(map(_learned, rows)))

    def logits(self, lm: nn.Module) -> Tensor:
        """Logits [B, n, V] of a transformers model."""
        return lm(input_ids=self.ids, attention_mask=self.mask, position_ids=self.position).logits

    def loss(self, lm: nn.Module) -> Tensor:
        """The training loss of a transformers model."""
        return _loss(self.logits(lm), self.target, self.tasks)


@contextmanager
def stock_attention(model: UnifiedModel, name: str = "eager") -> Iterator[nn.Module]:
    """The transformers model itself, with its own attention, for as long as the block lasts."""
    model.lm.set_attn_implementation(name)
    try:
        yield model.lm
    finally:
        model.lm.set_attn_implementation(ATTENTION)


def against_stock(model: UnifiedModel, rows: list[TokenSequence]) -> Difference:
    """The packed forward and backward of a dense model against transformers' own, row by row with a dense mask."""
    weight = query_projection(model.layers[0]).weight
    batch = pack(rows).to(model.device)
    with torch.no_grad():
        ours = model.head(model(batch))
    gradient = torch.autograd.grad(losses(model, batch).total, weight)[0]
    with stock_attention(model) as lm:
        theirs = [Padded.of([row], weight).logits(lm)[0] for row in rows]
    loss = _loss(theirs, [row.target.to(weight.device) for row in rows], list(map(_learned, rows)))
    expected = torch.autograd.grad(loss, weight)[0]
    logits = torch.cat(theirs).detach()
    numbers = ours - logits, logits, gradient - expected, expected
    return Difference(*(float(x.abs().max()) for x in numbers))


def padded_step(model: UnifiedModel, rows: list[TokenSequence] | Padded) -> Tensor:
    """The loss the usual way: rows padded to one length, a dense mask, logits of every token."""
    padded = rows if isinstance(rows, Padded) else Padded.of(rows, model.head.weight)
    with stock_attention(model, "sdpa") as lm:
        return padded.loss(lm)


def _learned(row: TokenSequence) -> Task | None:
    return row.task if (row.target != IGNORE).any() else None


def _loss(logits: Sequence[Tensor], target: Sequence[Tensor], tasks: Sequence[Task | None]) -> Tensor:
    """The weighted sum of each task's mean cross entropy over all places of its rows that have a target."""
    total = torch.zeros((), device=logits[0].device)
    for task in Task:
        rows = [i for i, t in enumerate(tasks) if t == task]
        if rows:
            x, y = (torch.cat([part[i] for i in rows]) for part in (logits, target))
            total = total + COEFFICIENTS[task] * F.cross_entropy(x.float(), y, ignore_index=IGNORE)
    return total
