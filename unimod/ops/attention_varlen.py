"""Interval attention by kernels for sequences of different lengths: torch's `varlen_attn`, or flash-attn.

Such a kernel knows two masks, full and causal (aligned at the last key), and takes sequences as neighbouring runs of
queries and of keys whose bounds, `cu`, lie on the device. Every mask of this package but "general" falls into two parts
per sequence of tokens [s, e) (`mask.mask_kind`):

    causal    all queries causal                        = a suffix mask; alone in a batch: one call
    prefix    [s, m) see keys [s, x), x >= m: full      then [m, e) causal over the keys [s, e)
    suffix    [s, m) causal over keys [s, m)            then [m, e) see all of [s, e): full

The kind of a sequence is known on the host and outlives a sorted gather; where a routed sequence falls into two depends
on which tokens were kept, so m and x are counted on the device, and only an upper bound of a run's length is a host
number. Both calls run over all T queries. In each, a sequence is four runs (queries | keys), most of them empty:

    before | none        active | its keys        after | none        none | the other keys

so nothing is computed twice: a block of queries without keys ends at once. The price is memory traffic: two outputs of
[T, H, d] and a `where`, and in the backward pass the sum of two gradients of q, k and v.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ..mask import IntervalMask, KeptMask

TAKES = frozenset(inspect.signature(varlen_attn).parameters)
"""Arguments of `varlen_attn` in this torch; they differ between releases."""


@dataclass(frozen=True)
class Plan:
    """The calls of a kernel for a batch: a causal one, or a causal and a full one."""

    bounds: Tensor
    """int32 [calls, 2, runs + 1], on the device: where the runs of queries and of keys begin; [1, 1, B + 1] where the
    causal call is alone, whose runs are the sequences."""
    longest: int
    """No run is longer."""
    causal: Tensor | None = None
    """bool [T]: whose output is the causal call's; None where it is alone."""

    def take(self, mask: KeptMask) -> Plan:
        """The plan of the tokens that a routed layer keeps: a bound b is behind rank[b] of them. One gather or two, in
        place of `prepare`'s 40 ops; none where the layer's gather found them already."""
        bounds, causal = mask.bounds, mask.flags
        if bounds is None:
            bounds = mask.rank.index_select(0, self.bounds.flatten()).int()
            causal = None if self.causal is None else self.causal.index_select(0, mask.index)
        return Plan(bounds.view_as(self.bounds), mask.longest or longest(mask.lengths), causal)


def longest(lengths: tuple[int, ...]) -> int:
    """The longest run, and at least 2: 1 may be taken for a decoding step."""
    return max(2, *lengths)


def refuses(masks: tuple[str, ...], width: int) -> str:
    """Why these kernels cannot run on masks of these kinds with heads of this width; empty when they can."""
    if not masks:
        return "the host does not know the rows' masks"
    if "general" in masks:
        return "a row's mask is neither causal nor a prefix or suffix that sees more"
    if width % 8 or width > 256:
        return f"heads are {width} wide (a multiple of 8 up to 256 is needed)"
    return ""


def prepare(mask: IntervalMask, most: int = 0) -> Plan:
    """The plan of `attend` on the mask's device; nothing is read back from it. most: a bound of the longest sequence in
    its place."""
    hi, most = mask.hi, most or longest(mask.lengths)
    host = torch.tensor([mask.lengths, [kind == "prefix" for kind in mask.kinds]])
    size, leading = host.to(hi.device, non_blocking=True)       # int64 [B] each
    e = size.cumsum(0)
    s = e - size
    if set(mask.kinds) == {"causal"}:
        return Plan(F.pad(e, (1, 0)).int()[None, None], most)
    row = torch.repeat_interleave(torch.arange(len(size), device=hi.device), size, output_size=len(hi))
    leading, i = leading.bool(), torch.arange(1, len(hi) + 1, device=hi.device)
    first = torch.where(leading[row], hi > i, hi < e[row])      # the queries of [s, m)
    seen = F.pad(first.cumsum(0), (1, 0))
    m = s + seen[e] - seen[s]
    x = torch.where(leading, torch.minimum(hi[s.clamp(max=len(hi) - 1)], e), m)     # clamp: an empty sequence has no hi
    calls = []
    for causal in (True, False):
        front = leading != causal                               # sequences whose first part this call computes
        begin, end, key = torch.where(front, s, m), torch.where(front, m, e), torch.where(front, x, e)
        bounds = torch.stack([torch.stack([begin, end, e, e], 1), torch.stack([s, key, key, e], 1)]).flatten(1)
        calls.append(F.pad(bounds, (1, 0)).int())
    return Plan(torch.stack(calls), most, first != leading[row])


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, name: str) -> Tensor:
    """`interval_attention` by one or two calls of the kernel `name` of `KERNELS`."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))            # [T, H, d]
    outs = [KERNELS[name](q, k, v, bounds[0], bounds[-1], plan.longest, causal, scale)
            for causal, bounds in zip((True, False), plan.bounds)]
    return outs[0] if plan.causal is None else torch.where(plan.causal[:, None, None], *outs)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int, causal: bool,
            scale: float) -> Tensor:
    """q: [T, H, d]; k, v: [T, H_kv, d]; cu_q, cu_k: int32 [runs + 1], where runs no longer than `longest` begin.
    Returns [T, H, d]."""
    options: dict[str, object] = {"is_causal": causal}
    if "window_size" in TAKES:
        options = {"window_size": (-1, 0 if causal else -1)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in TAKES:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if "scale" in TAKES:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[2] ** 0.5)
    return varlen_attn(q, k, v, cu_q, cu_k, longest, longest, **options)


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int, causal: bool,
           scale: float) -> Tensor:
    """As `_varlen`, by flash-attn."""
    out = flash_function()(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest, max_seqlen_k=longest,
                           softmax_scale=scale, causal=causal)
    return out[0] if isinstance(out, tuple) else out


@cache
def flash_function() -> Callable | None:
    """`flash_attn_varlen_func` of flash-attn 3 where it is installed, else of 2; None where no installed package has
    it."""
    for name in ("flash_attn_interface", "flash_attn"):
        try:
            return import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError):               # flash-attn 4 alone: a `flash_attn` without the function
            continue
    return None


KERNELS = {"varlen": _varlen, "flash": _flash}
"""Kernels of one contract; a query whose run has no keys may get any output, but no gradient."""
