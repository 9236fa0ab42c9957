"""Whom a token may attend to: intervals of packed tokens.

Token i sees the packed tokens lo[i] <= j < hi[i]. That expresses exactly every mask of Show-o (t2i, mmu, lm) and Emu3
(causal), and it is closed under a sorted gather: the kept tokens' mask is an interval mask again, so a routed layer is
the same computation on fewer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class IntervalMask:
    """The mask of T packed tokens; an interval never leaves its sequence."""

    lo: Tensor
    """int64 [T]: the first token that each token sees."""
    hi: Tensor
    """int64 [T]: one behind the last token that each token sees."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, on the host: [B], adding up to T."""
    kinds: tuple[str, ...] = ()
    """`mask_kind` of each sequence, on the host: [B]; empty where it is not known. A sorted gather leaves it as it
    is."""

    def __len__(self) -> int:
        return len(self.lo)

    def take(self, index: Tensor, lengths: tuple[int, ...], rank: Tensor | None = None) -> IntervalMask:
        """The mask of the tokens `index` (int64 [K], ascending, unique), of which `lengths` lie in each sequence.

        The interval of token i becomes [rank[lo_i], rank[hi_i]), where `rank` (int64 [T + 1]) counts the kept tokens
        before each token; without it the same numbers are searched in `index`.
        """
        ends = (self.lo.index_select(0, index), self.hi.index_select(0, index))
        # rank is at hand where tokens were selected: two gathers in place of two binary searches
        lo, hi = (torch.searchsorted(index, x) if rank is None else rank.index_select(0, x) for x in ends)
        return IntervalMask(lo, hi, lengths, self.kinds)

    def dense(self) -> Tensor:
        """bool [T, T], True where row i may attend to column j: for tests and pictures of small batches."""
        j = torch.arange(len(self), device=self.lo.device)
        return (self.lo[:, None] <= j) & (j < self.hi[:, None])


@dataclass(frozen=True)
class KeptMask:
    """The mask of the K tokens that a routed layer keeps of a batch. Its intervals are worked out when somebody asks:
    kernels for sequences of different lengths need none."""

    whole: IntervalMask
    """The mask of the batch."""
    index: Tensor
    """int64 [K], ascending: the kept tokens."""
    rank: Tensor
    """int64 [T + 1]: how many kept tokens lie before each token."""
    lengths: tuple[int, ...]
    """Kept tokens of each sequence, on the host: [B], adding up to K."""
    longest: int = 0
    """A bound of these, where kernels are to be given the same for every batch; 0: the most."""
    bounds: Tensor | None = None
    """int32 [C]: where the runs of the batch's attention begin among the kept tokens, if the gather found it
    (`ops.attention_varlen.Plan.bounds`)."""
    flags: Tensor | None = None
    """bool [K]: `ops.attention_varlen.Plan.causal` of the kept tokens, likewise."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def kinds(self) -> tuple[str, ...]:
        """`mask_kind` of each sequence: as in the batch."""
        return self.whole.kinds

    @property
    def lo(self) -> Tensor:
        """int64 [K]: as `IntervalMask.lo`."""
        return self.rank.index_select(0, self.whole.lo.index_select(0, self.index))

    @property
    def hi(self) -> Tensor:
        """int64 [K]: as `IntervalMask.hi`."""
        return self.rank.index_select(0, self.whole.hi.index_select(0, self.index))


def prefix_hi(prefix: int, total: int) -> Tensor:
    """Upper ends of a sequence whose first `prefix` tokens see one another and whose rest is causal (0: all causal):
    int64 [n]."""
    hi = torch.arange(1, total + 1)
    return hi.clamp(min=prefix)


def suffix_hi(causal: int, total: int) -> Tensor:
    """Upper ends of a sequence whose first `causal` tokens are causal and whose rest sees everything: int64 [n]."""
    hi = torch.arange(1, total + 1)
    hi[causal:] = total
    return hi


def mask_kind(hi: Tensor) -> str:
    """How the upper ends of a sequence (int64 [n], on the host, lo = 0) are made.

    causal: every token sees itself and what is before it; prefix: as causal, but the first tokens see one and the same
    number of tokens; suffix: as causal, but the last tokens see all; general: anything else. A sorted gather keeps the
    kind.
    """
    own = torch.arange(1, len(hi) + 1)
    early, late = int((hi > own).sum()), int((hi < len(hi)).sum())
    if torch.equal(hi[early:], own[early:]) and bool((hi[:early] == hi[0]).all()):
        return "prefix" if early else "causal"
    return "suffix" if torch.equal(hi, own.where(own <= late, len(hi))) else "general"
