"""Cross entropy of a linear head over a large vocabulary, in chunks of tokens: neither all logits nor their gradients
are held.

    total = sum_i weight_i * (logsumexp(z_i) - z_i[target_i]),   z = hidden W^T + b

The weights are known beforehand, so every chunk's part of the gradients is worked out while its logits are there, and
the backward pass only scales: the same three products per token as without chunks, none of them twice. On a GPU one
kernel (`cross_entropy_triton`) puts a chunk's gradient in the place of its logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .select import by_triton

LOGITS = 2**27
"""Logits held at a time, in float32, two or three times over."""
KERNEL_LOGITS = 2**30
"""The same for the kernel, which holds them once and in the model's dtype: 2 GiB in bfloat16. Every chunk reads and
writes the whole gradient of the weight, 3 GiB in Emu3: there 8,192 tokens are two chunks, not 13."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
                         scale: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum (float32 [], with gradients to hidden, weight and bias) and each token's negative log-likelihood
    in nats (float32 [N], without gradient).

    hidden: [N, D]; weight: [V, D]; bias: [V] or None; target: int64 [N]; scale: float32 [N], the tokens' weights in the
    sum.
    """
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return _LinearCrossEntropy.apply(hidden, weight, bias, target, scale, wanted)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None,
                target: Tensor, scale: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
        w, nll, kernel = weight.to(hidden.dtype), torch.empty_like(scale), by_triton(hidden)
        grads: list[Tensor | None] = [None, None, None]
        for i, x in enumerate((hidden, weight, bias)):
            if wanted[i]:                                       # sums over chunks in no less than float32
                dtype = x.dtype if x is hidden else torch.promote_types(x.dtype, torch.float32)
                grads[i] = torch.zeros_like(x, dtype=dtype)
        chunk = max(1, (KERNEL_LOGITS if kernel else LOGITS) // len(weight))
        chunk = chunk // 128 * 128 or chunk                     # full tiles
        for start in range(0, len(hidden), chunk):
            at = slice(start, start + chunk)
            z, given = hidden[at] @ w.T, (bias, target[at], scale[at], nll[at], any(wanted))
            if kernel:
                from .cross_entropy_triton import softmax_

                softmax_(z, *given)
                g = z
            else:
                g = reference_softmax(z, *given)
            if grads[2] is not None:
                grads[2] += g.sum(0, dtype=torch.float32)
            g = g.to(hidden.dtype)
            if grads[0] is not None:
                grads[0][at] = g @ w
            if grads[1] is not None:
                _add_product(grads[1], g.T, hidden[at])
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(nll)
        return (nll * scale).sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else (grad.to(total.dtype) * total).to(dtype)
                  for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return (*scaled, None, None, None)


def reference_softmax(z: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, nll: Tensor,
                      gradient: bool) -> Tensor:
    """Negative log-likelihoods into nll; returns the weighted gradient of the logits, float32 [N, V], where it is asked
    for. Arguments as for `cross_entropy_triton.softmax_`."""
    z = z.float()
    z = z if bias is None else z + bias
    normaliser = z.logsumexp(1)
    nll.copy_(normaliser - z.gather(1, target[:, None])[:, 0])
    if not gradient:
        return z
    g = (z - normaliser[:, None]).exp_()
    g.scatter_add_(1, target[:, None], g.new_full((len(g), 1), -1.0))
    return g.mul_(scale[:, None])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on a GPU without another tensor of total's size, which is the gradient of a whole head."""
    if a.device.type == "cpu":
        total += a @ b
    elif total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.is_meta:                                     # only counted there, where torch 2.11 lacks out_dtype
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
