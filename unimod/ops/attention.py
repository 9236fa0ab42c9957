"""Attention of packed tokens over intervals, and statistics of it that need no T x T map.

    interval_attention    softmax_j(q_i . k_j * scale) v_j            over   lo_i <= j < hi_i
    attention_received    what the softmax gives to each token j, relative to an even share
    attention_mass        what each query gives to each kind of key, with its entropy and its mean distance

This file holds the reference: sequences are padded to one length, the mask is boolean, the operators are torch's own.
Kernels for sequences of different lengths are in `attention_varlen`, the statistics' Triton kernels in
`attention_triton`; both are imported when they are first used. What depends on the mask alone is worked out once per
batch, for dense and routed layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mask import IntervalMask, KeptMask
from ..upload import upload
from .backend import backend, possible, say

if TYPE_CHECKING:
    from .attention_varlen import Plan

ENTRIES = 2**23
"""Entries of attention maps that the statistics hold at a time."""
_say = cache(say)


def interval_attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask | KeptMask, scale: float,
                       memo: dict | None = None) -> Tensor:
    """Attention of packed tokens: [T, H, d] in q's dtype.

    q: [H, T, d]; k, v: [H_kv, T, d] (H a multiple of H_kv). memo: what was worked out from the mask of a batch, for all
    its layers, dense and routed; see `prepared`.
    """
    return ready(mask, memo, q.device.type, q.dtype, (q.shape[0], k.shape[0], q.shape[2]))(q, k, v, scale)


class Ready(NamedTuple):
    """Attention by one mask: all that is left is tensors, as a compiler wants it. A tuple: torch 2.11's compiler cannot
    make a frozen dataclass."""

    name: str
    """The backend."""
    plan: Padded | Plan
    allow: Tensor | None = None
    """Of sdpa: `Padded.allowed`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`interval_attention`."""
        if self.name == "sdpa":
            return attend(q, k, v, self.plan, self.allow, scale)
        from . import attention_varlen

        return attention_varlen.attend(q, k, v, self.plan, scale, self.name)

    def of_kept(self, mask: KeptMask, memo: dict | None) -> Ready:
        """The same for the tokens that a routed layer keeps."""
        return _ready(self.name, mask, memo)


def ready(mask: IntervalMask | KeptMask, memo: dict | None, device: str, dtype: torch.dtype,
          shape: tuple[int, int, int]) -> Ready:
    """Attention of this shape (heads, heads of keys, their width) in this dtype on `device`; memo as for
    `interval_attention`."""
    # for kept tokens, too, by the mask of the batch, of which its layers share all they can
    whole = mask.whole if isinstance(mask, KeptMask) else mask
    return _ready(implementation(device, dtype, whole, shape), mask, memo)


def _ready(name: str, mask: IntervalMask | KeptMask, memo: dict | None) -> Ready:
    kept = isinstance(mask, KeptMask)
    if name == "sdpa":
        padded = _padded(mask, memo)
        # the mask [B, n, n] of kept tokens serves one layer: a memo would hold those of all layers
        allow = padded.allowed(mask) if kept else _kept(memo, "allowed", lambda: padded.allowed(mask))
        return Ready(name, padded, allow)
    from . import attention_varlen

    plan = _kept(memo, "runs", lambda: attention_varlen.prepare(mask.whole if kept else mask))
    return Ready(name, plan.take(mask) if kept else plan)


def _padded(mask: IntervalMask | KeptMask, memo: dict | None) -> Padded:
    return _kept(memo, mask.lengths, lambda: upload(Padded.of(mask.lengths), (
        mask.index if isinstance(mask, KeptMask) else mask.lo).device))


def prepared(mask: IntervalMask, kept: Mapping[tuple[int, ...], int], device: str, dtype: torch.dtype,
             shape: tuple[int, int, int], longest: int = 0) -> dict:
    """A memo of `interval_attention` with what it would work out on its first call, so that no layer copies anything to
    its device: tensors of the mask's device, for attention of this shape (heads, heads of keys, their width) in this
    dtype on `device`.

    kept: the lengths of the sequences in each routed layer, where the host knows them, and what kernels are given for
    the longest of them (0: as it is); longest: likewise for the batch.
    """
    if implementation(device, dtype, mask, shape) != "sdpa":
        from . import attention_varlen

        return {_key("runs"): attention_varlen.prepare(mask, longest)}
    return {_key(lengths): Padded.of(lengths, n) for lengths, n in ({mask.lengths: longest} | kept).items()}


@torch.no_grad()
def attention_received(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, segment: Tensor, lengths: tuple[int, ...],
                       scale: float) -> Tensor:
    """Attention that each token receives from the queries of its own segment, 1 for an even share: float32 [T].

        r_j = mean over queries i of j's segment with lo_i <= j < hi_i of (hi_i - lo_i) * mean over heads of A_ij

    A-MoD's score (arXiv 2412.20875) where a segment is the whole sequence and sees all of itself; queries of later
    segments, which may not exist yet, do not count. Arguments as for `interval_attention`; segment: int64 [T],
    ascending, each token's segment.
    """
    if _by_triton(q):
        from . import attention_triton

        return attention_triton.attention_received(q, k, lo, hi, segment, scale)
    padded = upload(Padded.of(lengths), q.device)
    low, high = padded.intervals(lo, hi)
    of = padded.pad((segment + 1)[None, :, None])[:, 0, :, 0]   # 0 for a pad
    total, asked = (torch.zeros(len(lengths), padded.n, device=q.device) for _ in range(2))
    for some, allow, a in _maps(q, k, padded, low, high, scale):
        counts = allow & (of[:, some, None] == of[:, None])
        total += (a.mean(1) * (high - low)[:, some, None] * counts).sum(1)
        asked += counts.sum(1)
    return padded.unpad(total / asked.clamp(min=1))


@torch.no_grad()
def attention_mass(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, label: Tensor, labels: int, lengths: tuple[int, ...],
                   scale: float, position: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What every query of every head gives to each kind of key, its entropy and its mean distance.

        mass_il = sum of A_ij over keys j with label l    entropy_i = -sum_j A_ij ln A_ij (nats)
        distance_i = sum_j A_ij |p_i - p_j| (tokens)

    Arguments as for `interval_attention`; label: int64 [T] in [0, labels); position p: int64 [T], default the place in
    the packed order. Returns float32 [H, T, labels], [H, T] and [H, T].
    """
    position = torch.arange(len(lo), device=lo.device) if position is None else position
    if _by_triton(q):
        from . import attention_triton

        return attention_triton.attention_mass(q, k, lo, hi, label, position, labels, scale)
    padded = upload(Padded.of(lengths), q.device)
    low, high = padded.intervals(lo, hi)
    kinds = padded.pad(F.one_hot(label, labels).float()[None])              # [B, 1, n, labels]
    at = padded.pad(position[None, :, None])[:, :, :, 0].float()            # [B, 1, n]
    size = len(lengths), q.shape[0], padded.n
    found = [torch.empty(*size, *last, device=q.device) for last in ((labels,), (), ())]
    for some, _, a in _maps(q, k, padded, low, high, scale):
        # Written into `found` block by block: keeping every block's results would leave the heap full of holes.
        mass, entropy, distance = (x[:, :, some[0]: some[-1] + 1] for x in found)
        mass[:] = a @ kinds
        entropy[:] = -torch.xlogy(a, a).sum(-1)
        distance[:] = (at[:, :, some, None] - at[:, :, None]).abs_().mul(a).sum(-1)
    mass, entropy, distance = (padded.unpad(x.transpose(1, 2)).transpose(0, 1) for x in found)
    return mass, entropy, distance


def attention_weights(q: Tensor, k: Tensor, allow: Tensor, scale: float) -> Tensor:
    """The attention map softmax_j(q_i . k_j * scale) over the allowed keys: [..., m, n] in q's dtype, 0 where not
    allowed.

    q: [..., m, d]; k: [..., n, d]; allow: bool, broadcast to [..., m, n], at least one key for every query.
    """
    return (q @ k.mT).mul_(scale).masked_fill_(~allow, -torch.inf).softmax(-1)


def within(lo: Tensor, hi: Tensor, j: Tensor) -> Tensor:
    """Which keys j (int64 [n]) lie in the intervals lo, hi (int64 [..., m]): bool [..., m, n]."""
    return (j >= lo[..., None]) & (j < hi[..., None])


@dataclass(frozen=True)
class Padded:
    """B packed sequences as a padded batch of n slots each."""

    rows: int
    """B: a number by itself, which a compiler makes a symbol of; it would take the length of a tuple for a constant."""
    n: int
    begin: Tensor
    """int64 [T]: the first token of each token's sequence."""
    place: Tensor | None
    """int64 [T]: the slot of each packed token in [B * n]; None where every sequence has n tokens."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], n: int = 0) -> Padded:
        """The padding of sequences of these lengths to n slots (default the longest), on the host."""
        n, size = n or max(lengths), torch.tensor(lengths)
        begin = torch.repeat_interleave(size.cumsum(0) - size, size, output_size=sum(lengths))
        row = torch.repeat_interleave(torch.arange(len(lengths)), size, output_size=sum(lengths))
        even = min(lengths) == n                                # then padding is the identity
        return cls(len(lengths), n, begin, None if even else row * n + torch.arange(sum(lengths)) - begin)

    def pad(self, x: Tensor) -> Tensor:
        """[H, T, d] -> [B, H, n, d], zeros where there is no token."""
        if self.place is not None:
            x = x.new_zeros(x.shape[0], self.rows * self.n, x.shape[2]).index_copy(1, self.place, x)
        return x.unflatten(1, (-1, self.n)).transpose(0, 1)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, n, ...] -> [T, ...]."""
        x = x.flatten(0, 1)
        return x if self.place is None else x.index_select(0, self.place)     # not [], whose backward sorts

    def intervals(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals counted within their sequences, each int64 [B, n]; pads see all, so that no softmax is empty."""
        low, high = lo - self.begin, hi - self.begin
        if self.place is not None:
            low = lo.new_zeros(self.rows * self.n).index_copy(0, self.place, low)
            high = hi.new_full((self.rows * self.n,), self.n).index_copy(0, self.place, high)
        return low.view(-1, self.n), high.view(-1, self.n)

    def allowed(self, mask: IntervalMask | KeptMask) -> Tensor | None:
        """Whom each slot may see: bool [B, 1, n, n]; None where every sequence is causal."""
        if set(mask.kinds) == {"causal"}:
            return None
        return within(*self.intervals(mask.lo, mask.hi), torch.arange(self.n, device=mask.lo.device))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, padded: Padded, allow: Tensor | None, scale: float) -> Tensor:
    """`interval_attention` by torch's scaled_dot_product_attention."""
    out = F.scaled_dot_product_attention(*map(padded.pad, (q, k, v)), attn_mask=allow, is_causal=allow is None,
                                         scale=scale, enable_gqa=q.shape[0] != k.shape[0])
    return padded.unpad(out.transpose(1, 2))                    # [B, H, n, d] -> [T, H, d]


def _maps(q: Tensor, k: Tensor, padded: Padded, low: Tensor, high: Tensor,
          scale: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of queries, int64 [m]: the keys they may see, bool [B, m, n], and their attention map, float32 [B, H, m,
    n]."""
    # float32 before the product, as kernels accumulate: no logit is rounded to a half type
    query, key = padded.pad(q).float(), padded.pad(k).float().repeat_interleave(q.shape[0] // k.shape[0], 1)
    j = torch.arange(padded.n, device=q.device)
    for some in j.split(max(1, ENTRIES // (query.shape[0] * query.shape[1] * padded.n))):
        allow = within(low[:, some], high[:, some], j)
        yield some, allow, attention_weights(query[:, :, some], key, allow[:, None], scale)


def attention_runs(memo: dict) -> object | None:
    """The `attention_varlen.Plan` of a batch in a memo; None where attention goes another way."""
    return memo.get(_key("runs"))


def _kept(memo: dict | None, what: object, make: Callable[[], object]) -> object:
    """What `make` returns, from `memo` where it is there."""
    if memo is None:
        return make()
    if _key(what) not in memo:
        memo[_key(what)] = make()
    return memo[_key(what)]


def _key(what: object) -> tuple:
    return what, torch.is_inference_mode_enabled()          # what was made in inference mode is no use to a backward


def implementation(device: str, dtype: torch.dtype, mask: IntervalMask, shape: tuple[int, int, int]) -> str:
    """The backend that runs: of several that can, the fastest for such a mask and shape."""
    name = _expressible(device, dtype, mask.kinds, shape[2])
    if name == "sdpa" or device == "meta" or torch.compiler.is_compiling():
        return name
    names = possible("attention", device, dtype)
    if len(names) == 1:
        return name
    from .attention_choice import fastest

    return fastest(names, mask, device, dtype, shape, interval_attention)


@torch.compiler.assume_constant_result
def _expressible(device: str, dtype: torch.dtype, masks: tuple[str, ...], width: int) -> str:
    """The preferred or forced backend, or sdpa for what it cannot express. A compiled layer keeps the one it was
    compiled with."""
    names = possible("attention", device, dtype)
    # what is only counted, on the meta device, goes the way that any CUDA device can
    name = "varlen" if device == "meta" and "varlen" in names else names[0]
    if len(names) == 1:
        name = backend("attention", device, dtype)          # which says why
    if name != "sdpa":
        from .attention_varlen import refuses

        if why := refuses(masks, width):
            _say(f"unimod: attention by sdpa instead of {name} where {why}")
            return "sdpa"
    return name


def _by_triton(q: Tensor) -> bool:
    """Whether the statistics run by Triton: float64 never does, even where triton is forced."""
    half_or_float = q.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return half_or_float and backend("kernels", q.device.type, q.dtype) == "triton"
