"""Whom a token may attend to: the interval `[lo, hi)` of packed tokens, which expresses every mask of Show-o and Emu3."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_hi(prefix: int, total: int) -> Tensor:
    """Upper ends of a sequence whose first `prefix` tokens see one another and whose rest is causal (0: all causal): int64 [n]."""
    hi = torch.arange(1, total + 1)
    return hi.clamp(min=prefix)


def suffix_hi(causal: int, total: int) -> Tensor:
    """Upper ends of a sequence whose first `causal` tokens are causal and whose rest sees everything: int64 [n]."""
    hi = torch.arange(1, total + 1)
    hi[causal:] = total
    return hi


def mask_kind(hi: Tensor) -> str:
    """How the upper ends of a sequence (int64 [n], on the host, lo = 0) are made. A sorted gather keeps the kind.

    causal: every token sees itself and what is before it; prefix: as causal, but the first tokens see one and the same number of tokens;
    suffix: as causal, but the last tokens see all; general: anything else.
    """
    own = torch.arange(1, len(hi) + 1)
    early, late = int((hi > own).sum()), int((hi < len(hi)).sum())
    if torch.equal(hi[early:], own[early:]) and bool((hi[:early] == hi[0]).all()):
        return "prefix" if early else "causal"
    return "suffix" if torch.equal(hi, own.where(own <= late, len(hi))) else "general"
