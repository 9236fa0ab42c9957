"""Gather and normalise: the tokens that a routed layer keeps, and what its input norm makes of them.

    x = h[index],  n = norm(x)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..backend import backend
from . import reference


@dataclass(frozen=True)
class Norm:
    """A norm over the width D: LayerNorm (centred), or RMSNorm as transformers' Llama writes it, rounded before it is multiplied."""

    weight: Tensor
    """[D], of the dtype of what is normalised."""
    bias: Tensor | None
    """[D]; LayerNorm only."""
    eps: float
    centred: bool


def known_norm(module: nn.Module | None) -> Norm | None:
    """What `gather_norm` needs of a norm, or None for a module that computes something else."""
    if type(module) is nn.LayerNorm and module.weight is not None and len(module.normalized_shape) == 1:
        return Norm(module.weight, module.bias, module.eps, True)
    if type(module).__name__ in ("LlamaRMSNorm", "Emu3RMSNorm", "ChameleonRMSNorm"):
        return Norm(module.weight, None, module.variance_epsilon, False)
    return None


def gather_norm(h: Tensor, index: Tensor, norm: Norm, rank: Tensor) -> tuple[Tensor, Tensor]:
    """x = h[index] and its norm, both [K, D] in h's dtype.

    h: [T, D]; index: int64 [K], ascending, unique; rank: int64 [T + 1], its prefix count (`ops.select.select`), for the backward pass.
    """
    if backend("kernels", h.device.type, h.dtype) == "triton":
        from . import triton

        return triton.gather_norm(h, index, norm.weight, norm.bias, rank, norm.eps, norm.centred)
    return reference.gather_norm(h, index, norm.weight, norm.bias, norm.eps, norm.centred)


__all__ = ["Norm", "gather_norm", "known_norm"]
