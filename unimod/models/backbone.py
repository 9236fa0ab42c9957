"""A stock transformers causal model run layer by layer on packed tokens.

    model = UnifiedModel(PhiForCausalLM(config), layout)
    hidden = model(packed)                       # [T, D]
    logits = model.head(hidden[packed.labelled])

Attention is one function registered with transformers' `AttentionInterface`; it reads the intervals of the `Packed` that
every decoder layer hands through its keyword arguments. No modelling file is rewritten, no T x T mask is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..ops.attention import interval_attention
from ..tokens import Packed, Task

ATTENTION = "unimod_intervals"
Observer = Callable[[nn.Module, Tensor, Tensor, Packed], None]
_OBSERVER: ContextVar[Observer | None] = ContextVar("attention_observer", default=None)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float,
               dropout: float = 0.0, packed: Packed | None = None, **_: object) -> tuple[Tensor, None]:
    """transformers' attention contract for one packed row: q [1, H, T, d], k and v [1, H_kv, T, d] -> [1, T, H, d]."""
    if packed is None or attention_mask is not None:
        raise RuntimeError(f"The attention '{ATTENTION}' works on packed tokens only: call the model through unimod's UnifiedModel, "
                           "which packs without padding, or choose another attn_implementation.")
    if dropout:
        raise RuntimeError(f"Attention dropout {dropout} is not available on packed tokens; build the model with attention_dropout=0.")
    observer = _OBSERVER.get()
    if observer is not None:
        observer(module, query[0], key[0], packed)
    return interval_attention(query[0], key[0], value[0], packed.lo, packed.hi, packed.lengths, scaling)[None], None


AttentionInterface.register(ATTENTION, _attention)


@contextmanager
def observe_attention(observer: Observer) -> Iterator[None]:
    """Call `observer(module, q, k, packed)` in every attention, with q [H, T, d] and k [H_kv, T, d] after norm and RoPE."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


class UnifiedModel(nn.Module):
    """One transformer for understanding and generation: a stock `lm` and the `layout` that writes its sequences.

    `lm` is a transformers causal model whose inner model has `embed_tokens`, `layers`, a final norm and `rotary_emb`.
    """

    def __init__(self, lm: PreTrainedModel, layout: object) -> None:
        super().__init__()
        lm.set_attn_implementation(ATTENTION)
        self.lm = lm
        self.layout = layout

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, dense or routed."""
        return self.lm.model.layers

    @property
    def width(self) -> int:
        """Width of the residual stream (D)."""
        return self.lm.config.hidden_size

    @property
    def head(self) -> nn.Linear:
        """From hidden states to logits over the whole vocabulary."""
        return self.lm.lm_head

    def forward(self, packed: Packed, skip: int | None = None) -> Tensor:
        """Hidden states after the final norm: [T, D]. `skip` leaves out one layer (layer importance)."""
        inner = self.lm.model
        h = inner.embed_tokens(packed.ids)[None]
        position = packed.position[None]
        rotary = inner.rotary_emb(h, position_ids=position)
        for i, layer in enumerate(inner.layers):
            if i != skip:
                h = layer(h, attention_mask=None, position_ids=position, position_embeddings=rotary, packed=packed)
        norm = inner.final_layernorm if hasattr(inner, "final_layernorm") else inner.norm
        return norm(h)[0]


@dataclass(frozen=True)
class Losses:
    """Mean cross entropy per task (nan where the batch has no target of it), their weighted sum, and targets per task."""

    total: Tensor
    per_task: Tensor
    targets: tuple[int, ...]


COEFFICIENTS = {Task.T2I: 1.0, Task.MMU: 1.0, Task.LM: 0.1}
"""Loss weights of Show-o: t2i 1, lm 0.1, mmu 1."""


def losses(model: UnifiedModel, packed: Packed, skip: int | None = None) -> Losses:
    """Loss of a batch; the head sees labelled tokens only. A task without targets contributes nothing.

    Raises ValueError when no token of the batch has a target.
    """
    counts = packed.target_counts
    if not sum(counts):
        raise ValueError("No token of this batch has a target, so there is nothing to learn from it.")
    where = packed.labelled
    logits = model.head(model(packed, skip)[where]).float()
    entropy = F.cross_entropy(logits, packed.target[where], reduction="none")
    scale = torch.tensor([1 / n if n else 0.0 for n in counts], device=entropy.device)
    per_task = torch.zeros(len(Task), device=entropy.device).index_add(0, packed.task[where], entropy) * scale
    total = (per_task * torch.tensor([COEFFICIENTS[t] for t in Task], device=entropy.device)).sum()
    return Losses(total, torch.where(scale > 0, per_task.detach(), torch.nan), counts)
