"""Interval attention by kernels for rows of different lengths: torch's `varlen_attn`, or flash-attn.

Such a kernel knows two masks, full and causal (aligned at the last key), and takes rows as neighbouring runs of queries and of keys whose
bounds, `cu`, lie on the device. Every mask of this package falls into two parts per row (`tokens.mask_kind`):

    causal    all queries causal                        = a suffix mask; alone in a batch: one call
    prefix    [s, m) see keys [s, x), x >= m: full      then [m, e) causal over the row's keys [s, e)
    suffix    [s, m) causal over keys [s, m)            then [m, e) see all of [s, e): full

The kind of a row is known on the host and outlives a sorted gather; where a routed row falls into two depends on which tokens were kept, so m and
x are counted on the device, and only an upper bound of a run's length is a host number. Both calls run over all T queries. In each, a row is four
runs (queries | keys), most of them empty:

    before | none        active | its keys        after | none        none | the other keys

so nothing is computed twice or thrown away: a block of queries without keys ends at once. The price is memory traffic: two outputs of [T, H, d]
and a `where`, and in the backward pass the sum of two gradients of q, k and v.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

TAKES = frozenset(inspect.signature(varlen_attn).parameters)
"""Its arguments in this torch; they move between releases."""


@dataclass(frozen=True)
class Call:
    """One run of a kernel. cu_q, cu_k: int32 [runs + 1], where the runs of queries and of keys begin, on the device."""

    causal: bool
    cu_q: Tensor
    cu_k: Tensor


@dataclass(frozen=True)
class Plan:
    """The calls that make up a batch (one, or causal and full), at least the longest run, and which output a query takes: bool [T, 1, 1], True causal."""

    calls: tuple[Call, ...]
    most: int
    causal: Tensor | None = None


def refuses(masks: tuple[str, ...], width: int) -> str:
    """Why these kernels cannot run on rows of these kinds with heads of this width; empty when they can."""
    if not masks:
        return "the host does not know the rows' masks"
    if "general" in masks:
        return "a row's mask is neither causal nor a prefix or suffix that sees more"
    return "" if width % 8 == 0 and width <= 256 else f"heads are {width} wide (a multiple of 8 up to 256 is needed)"


def prepare(lo: Tensor, hi: Tensor, lengths: tuple[int, ...], masks: tuple[str, ...]) -> Plan:
    """What to call, from the intervals; nothing is read back from the device."""
    size, leading = torch.tensor([lengths, [kind == "prefix" for kind in masks]]).to(hi.device, non_blocking=True)      # int64 [B] each
    most = max(2, *lengths)                                     # at 1 a kernel may take rows for queries of decoding, of which none is empty
    e = size.cumsum(0)
    s = e - size
    if set(masks) == {"causal"}:
        cu = F.pad(e, (1, 0)).int()
        return Plan((Call(True, cu, cu),), most)
    row = torch.repeat_interleave(torch.arange(len(size), device=hi.device), size, output_size=len(hi))
    leading, i = leading.bool(), torch.arange(1, len(hi) + 1, device=hi.device)
    first = torch.where(leading[row], hi > i, hi < e[row])      # the queries of [s, m)
    seen = F.pad(first.cumsum(0), (1, 0))
    m = s + seen[e] - seen[s]
    x = torch.where(leading, torch.minimum(hi[s.clamp(max=len(hi) - 1)], e), m)     # a row without tokens has no hi of its own
    calls = []
    for causal in (True, False):
        front = leading != causal                               # rows whose first part this call computes
        begin, end, key = torch.where(front, s, m), torch.where(front, m, e), torch.where(front, x, e)
        bounds = torch.stack([torch.stack([begin, end, e, e], 1), torch.stack([s, key, key, e], 1)]).flatten(1)
        calls.append(Call(causal, *F.pad(bounds, (1, 0)).int()))
    return Plan(tuple(calls), most, (first != leading[row])[:, None, None])


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, name: str) -> Tensor:
    """`interval_attention` by one or two calls of the kernel `name`."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))            # [T, H, d]
    outs = [KERNELS[name](q, k, v, call.cu_q, call.cu_k, plan.most, call.causal, scale) for call in plan.calls]
    return outs[0] if plan.causal is None else torch.where(plan.causal, *outs)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most: int, causal: bool, scale: float) -> Tensor:
    """q: [T, H, d]; k, v: [T, H_kv, d]; runs as in `Call`, none longer than `most`. Returns [T, H, d]."""
    options: dict[str, object] = {"window_size": (-1, 0 if causal else -1)} if "window_size" in TAKES else {"is_causal": causal}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in TAKES:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if "scale" in TAKES:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[2] ** 0.5)
    return varlen_attn(q, k, v, cu_q, cu_k, most, most, **options)


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most: int, causal: bool, scale: float) -> Tensor:
    """As `_varlen`, by flash-attn 3 or 4 where it is installed, else 2."""
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except ImportError:
        from flash_attn import flash_attn_varlen_func
    out = flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=most, max_seqlen_k=most, softmax_scale=scale, causal=causal)
    return out[0] if isinstance(out, tuple) else out


KERNELS = {"varlen": _varlen, "flash": _flash}
"""Kernels of one contract; a query whose run has no keys may get anything, but no gradient."""
