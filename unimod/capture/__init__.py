"""Look at attention without changing it: keep q and k of every layer, from which any map follows exactly, or only what is asked of them.

    record = observe(model, packed)                   # or: with capture(model) as record: model(packed)
    record.map(row=0, layer=3, head=1)                # [n, n], rows sum to 1
    record.row_weights(row=0, layer=3, head=1, query=-1)
    record.tile(row=0, layer=3, keys=slice(0, 1024))  # the same, pooled to 32 x 32 per head, in bounded memory
    record.save("row.attention"), AttentionRecord.load("row.attention")
    reduced(model, packed, lambda layer: layer.mass(label, 3))      # nothing else is kept: for long sequences and deep models
    with capture_stock(lm) as record: lm(input_ids=ids)             # any transformers model, `capture.stock`

q and k are taken after norm and rotary embedding, inside the registered attention function, so no eager attention is needed and
the logits are the same bit for bit. For 1,155 tokens of Show-o they are 9 times smaller than the maps,
for 8,200 of Emu3 51 times; maps are made only when asked for.
In a routed layer a record knows the kept tokens only: `record.packed(layer)` is that layer's own, smaller batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..models.cache import KVCache
from ..models.unified import UnifiedModel
from ..seam import observe_attention
from .folder import CaptureError
from .record import AttentionRecord, LayerAttention
from .stock import capture_stock

__all__ = ["AttentionRecord", "CaptureError", "LayerAttention", "capture", "capture_stock", "observe", "reduced"]
R = TypeVar("R")


@contextmanager
def _watch(model: UnifiedModel, begin: Callable[[Batch], None], look: Callable[[int, LayerAttention], None]) -> Iterator[None]:
    """Call `begin` with every batch the model is given, then `look` with the number and attention of each layer. Other models may run meanwhile, and this
    one on other threads (a notebook's widgets have one): what they do is not looked at."""
    if not isinstance(model, UnifiedModel):
        raise CaptureError(f"capture() looks into unimod's models, and this is a {type(model).__name__}: for a transformers model use capture_stock().")
    number, mine = {part: i for i, layer in enumerate(model.layers) for part in layer.modules()}, threading.get_ident()

    def see(module: nn.Module, q: Tensor, k: Tensor, packed: Batch) -> None:
        if module in number:
            look(number[module], LayerAttention(q.detach(), k.detach(), module.scaling, packed))

    def enter(packed: Batch, cache: KVCache | None = None) -> None:
        if threading.get_ident() != mine:                      # the observer below belongs to this thread by itself, a hook does not
            return
        if cache is not None and not cache.fresh:
            raise CaptureError(f"A step of {len(packed)} tokens after cached ones cannot be recorded: run the whole sequence at once, without a cache.")
        begin(packed)

    hook = model.register_forward_pre_hook(lambda _, args, options: enter(*args, **options), with_kwargs=True)
    try:
        with observe_attention(see):
            yield
    finally:
        hook.remove()


@contextmanager
def capture(model: UnifiedModel) -> Iterator[AttentionRecord]:
    """Record the attention of the last forward of `model` inside the block; gradients are not kept. Blocks may be nested, of one model or of several.

    Raises `CaptureError` for a model that attends otherwise and for a step after cached tokens, whose keys are not all there.
    """
    record = AttentionRecord(about={"model": model.layout.kind} if isinstance(model, UnifiedModel) else {})

    def begin(packed: Batch) -> None:
        record.seen.clear()
        record.batch[:] = [packed]

    with _watch(model, begin, record.seen.__setitem__):
        yield record


@torch.no_grad()
def observe(model: UnifiedModel, packed: Batch) -> AttentionRecord:
    """Run the model on a batch and hand back its record. Raises `CaptureError` for a model that attends otherwise."""
    with capture(model) as record:
        model(packed.to(model.device))
    return record


@torch.no_grad()
def reduced(model: UnifiedModel, packed: Batch, reduce: Callable[[LayerAttention], R]) -> dict[int, R]:
    """Run the model on a batch and keep, per layer, only what `reduce` makes of its attention. It is called inside the attention: queries and keys of a
    layer are gone when the next one runs, so the memory is that of one layer. Raises `CaptureError` for a model that attends otherwise."""
    found: dict[int, R] = {}
    with _watch(model, lambda _: None, lambda layer, attention: found.update({layer: reduce(attention)})):
        model(packed.to(model.device))
    return found
