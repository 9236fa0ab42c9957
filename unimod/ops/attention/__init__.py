"""Attention of packed tokens over intervals, and what it gave to whom without a map.

    interval_attention    softmax_j(q_i . k_j * scale) v_j            over   lo_i <= j < hi_i
    attention_received    what the softmax gave each token j, relative to an even share
    attention_mass        what each query gave to each kind of token, with its entropy and its mean distance

A backend has two halves: `prepare`, which works out what depends on the intervals alone, once for all layers that share them, and `attend`.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..backend import backend, say
from . import flex, reference, varlen

_say = cache(say)
__all__ = ["attention_mass", "attention_received", "interval_attention"]
_MODULE = {"sdpa": reference, "varlen": varlen, "flash": varlen, "flex": flex}


def interval_attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, lengths: tuple[int, ...], scale: float,
                       masks: tuple[str, ...] = (), memo: dict | None = None) -> Tensor:
    """Attention of packed tokens.

    q: [H, T, d]; k, v: [H_kv, T, d] (H a multiple of H_kv); lo, hi: int64 [T]; lengths: tokens of each row, adding up to T.
    An interval never leaves its row. masks: the kind of each row (`tokens.mask_kind`), where the host knows it; lo is then the row's first token.
    memo: what is worked out from the intervals, kept there for the next call with the same ones. Returns [T, H, d] in q's dtype.
    """
    name = _implementation(q.device.type, q.dtype, masks, q.shape[2])
    module = _MODULE[name]
    plan = module.prepare(lo, hi, lengths, masks) if memo is None else _kept(memo, module, lo, hi, lengths, masks)
    return module.attend(q, k, v, plan, scale, name)


def attention_received(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, segment: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """Attention that each token receives from the queries of its own segment, 1 for an even share: float32 [T].

        r_j = mean over queries i of j's segment with lo_i <= j < hi_i of (hi_i - lo_i) * mean over heads of A_ij

    A-MoD's score (arXiv 2412.20875) where a segment is the whole row and sees all of itself; queries of later segments, which may not exist yet,
    have no say. Arguments as for `interval_attention`; segment: int64 [T], ascending, the number of each token's segment.
    """
    if _statistics(q) == "reference":
        return reference.attention_received(q, k, lo, hi, segment, lengths, scale)
    from . import triton
    return triton.attention_received(q.detach(), k.detach(), lo, hi, segment, scale)


def attention_mass(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, label: Tensor, labels: int, lengths: tuple[int, ...], scale: float,
                   position: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What every query of every head gives to each kind of key, how spread out it is and how far it goes, without a map.

        mass_il = sum of A_ij over keys j of kind l        entropy_i = -sum_j A_ij ln A_ij (nats)        distance_i = sum_j A_ij |p_i - p_j| (tokens)

    Arguments as for `interval_attention`; label: int64 [T] in [0, labels); position p: int64 [T], default the place in the packed order.
    Returns float32 [H, T, labels], [H, T] and [H, T].
    """
    position = torch.arange(len(lo), device=lo.device) if position is None else position
    if _statistics(q) == "reference":
        return reference.attention_mass(q, k, lo, hi, label, labels, lengths, scale, position)
    from . import triton
    return triton.attention_mass(q.detach(), k.detach(), lo, hi, label, position, labels, scale)


def _kept(memo: dict, module: ModuleType, *intervals: object) -> object:
    """The backend's plan from `memo`, made there when it is not yet; one made in inference mode is of no use to a backward pass."""
    key = module, torch.is_inference_mode_enabled()
    if key not in memo:
        memo[key] = module.prepare(*intervals)
    return memo[key]


@torch.compiler.assume_constant_result
def _implementation(device: str, dtype: torch.dtype, masks: tuple[str, ...], width: int) -> str:
    """The backend that runs: the chosen one, or sdpa for a shape that it cannot express. A compiled layer keeps the one it was compiled with."""
    name = backend("attention", device, dtype)
    if name in ("varlen", "flash") and (why := varlen.refuses(masks, width)):
        _say(f"unimod: attention by sdpa instead of {name} where {why}")
        return "sdpa"
    return name


def _statistics(q: Tensor) -> str:
    return backend("kernels", q.device.type, q.dtype) if q.dtype in (torch.float32, torch.float16, torch.bfloat16) else "reference"
