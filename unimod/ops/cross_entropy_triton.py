"""Softmax minus one-hot as a Triton kernel: a row of logits is read twice and its gradient is written in its place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .backend import launch
from .kernels_triton import row_block

BLOCK = 8192
"""Logits of a row that a program holds at a time."""


@triton.jit
def softmax_kernel(logits, bias, target, scale, nll, V, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row. nll_i = logsumexp(z) - z[t]; with GRADIENT, z becomes scale_i (softmax(z) - onehot(t))."""
    row = tl.program_id(0).to(tl.int64)
    at, column = logits + row * V, tl.arange(0, BLOCK)
    t = tl.load(target + row)
    # before the first sum over the program's threads, which all wait at: later some have already written there
    own = tl.load(at + t).to(tl.float32)
    if bias is not None:
        own += tl.load(bias + t).to(tl.float32)

    # the largest logit so far, and the sum of exponentials relative to it
    largest = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + column < V
        z = tl.load(at + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        if bias is not None:
            z += tl.load(bias + start + column, mask=inside, other=0).to(tl.float32)
        higher = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher), 0)
        largest = higher
    normaliser = largest + tl.log(total)
    tl.store(nll + row, normaliser - own)

    if GRADIENT:
        w = tl.load(scale + row)
        for start in range(0, V, BLOCK):
            inside = start + column < V
            z = tl.load(at + start + column, mask=inside, other=-float("inf")).to(tl.float32)
            if bias is not None:
                z += tl.load(bias + start + column, mask=inside, other=0).to(tl.float32)
            g = tl.exp(z - normaliser) - (start + column == t).to(tl.float32)
            tl.store(at + start + column, (g * w).to(logits.dtype.element_ty), mask=inside)


def softmax_(logits: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, nll: Tensor, gradient: bool) -> None:
    """Negative log-likelihoods into nll, and with `gradient` the weighted gradient in place of the logits.

    logits: [N, V], contiguous, without the bias; bias: [V] or None; target: int64 [N]; scale, nll: float32 [N].
    """
    rows, size = logits.shape
    launch(softmax_kernel, (rows,), logits, bias, target, scale, nll, size, GRADIENT=gradient,
           **row_block(min(size, BLOCK)))
