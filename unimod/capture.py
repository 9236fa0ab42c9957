"""Capture a model's attention without changing its output: q and k, from which any map follows, or a summary per layer.

    record = capture_batch(model, batch)              # or: with capture(model) as record: model(batch)
    record.map(row=0, layer=3, head=1)                # [n, n], rows sum to 1
    record.row_weights(row=0, layer=3, head=1, query=-1)
    record.tile(row=0, layer=3, keys=slice(0, 1024))  # the map pooled to 32 x 32 per head, in bounded memory
    record.save("row"), AttentionRecord.load("row")
    capture_summary(model, batch, lambda layer: layer.mass(label, 3))       # keeps nothing else: for long sequences
    with capture_stock(lm) as record: lm(input_ids=ids)                     # any transformers model, attention "sdpa"

q and k are taken after norm and rotary embedding, inside the registered attention function: no eager attention is
needed and the logits are bit for bit the same.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import seam
from .attention_record import AttentionRecord, CaptureError, LayerAttention
from .batch import IGNORE, Batch, Modality, Segment, Task, lengths_of
from .mask import IntervalMask
from .models.unified import UnifiedModel

__all__ = ["AttentionRecord", "CaptureError", "LayerAttention", "capture", "capture_batch", "capture_stock",
           "capture_summary"]
R = TypeVar("R")
CAPTURING = "unimod_capturing"  # attention inside a `capture_stock` block
PLAIN = "sdpa"  # the only attention whose masks it reads
HIDDEN = -1e3  # added to a logit, this or less hides the key: exp(-1000) is 0 in float32
Keep = Callable[[nn.Module, Tensor, Tensor, Tensor | None, dict], None]
_CAPTURED: dict[nn.Module, Keep] = {}
_FORMER = {"observe": "capture_batch", "reduced": "capture_summary"}


def __getattr__(name: str) -> object:
    """The former names of functions, for one release."""
    if name not in _FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"unimod.capture.{name} is now {_FORMER[name]}; the next release drops this name.", FutureWarning, 2)
    return globals()[_FORMER[name]]


@contextmanager
def _each_layer(model: UnifiedModel, begin: Callable[[Batch], None],
                take: Callable[[int, LayerAttention], None]) -> Iterator[None]:
    """Call `begin` with every batch that the model is given, then `take` with the number and attention of each layer.

    Other models, and this one on other threads (a notebook's widgets run on one), are ignored.
    """
    if not isinstance(model, UnifiedModel):
        raise CaptureError(f"capture() works on unimod's models, and this is a {type(model).__name__}: "
                           "for a transformers model use capture_stock().")
    number = {part: i for i, layer in enumerate(model.layers) for part in layer.modules()}
    own, signature = threading.get_ident(), inspect.signature(type(model).forward)

    def observer(module: nn.Module, q: Tensor, k: Tensor, batch: Batch) -> None:
        if module in number:
            take(number[module], LayerAttention(q.detach(), k.detach(), module.scaling, batch))

    def enter(module: nn.Module, args: tuple, options: dict) -> None:
        if threading.get_ident() != own:                    # the observer below is this thread's own, a hook is not
            return
        _, batch, *cache = signature.bind(module, *args, **options).args
        if cache and cache[0] is not None and not cache[0].fresh:
            raise CaptureError(f"A step of {len(batch)} tokens after cached ones cannot be recorded: run the whole "
                               "sequence at once, without a cache.")
        begin(batch)

    with model.register_forward_pre_hook(enter, with_kwargs=True), seam.observe_attention(observer):
        yield


@contextmanager
def capture(model: UnifiedModel) -> Iterator[AttentionRecord]:
    """Record the attention of the last forward of `model` inside the block, without gradients. Blocks may be nested.

    Raises `CaptureError` for another kind of model and for a step after cached tokens, whose keys are not in the batch.
    """
    record = AttentionRecord(about={"model": model.layout.kind} if isinstance(model, UnifiedModel) else {})

    def begin(batch: Batch) -> None:
        record.captured.clear()
        record.whole = batch

    with _each_layer(model, begin, record.captured.__setitem__):
        yield record


@torch.no_grad()
def capture_batch(model: UnifiedModel, batch: Batch) -> AttentionRecord:
    """Run the model on a batch and return its record. Raises `CaptureError` for another kind of model."""
    with capture(model) as record:
        model(batch.to(model.device))
    return record


@torch.no_grad()
def capture_summary(model: UnifiedModel, batch: Batch, summarise: Callable[[LayerAttention], R]) -> dict[int, R]:
    """Run the model on a batch and keep only what `summarise` returns for each layer's attention: by layer number.

    It is called inside the attention and q and k are released before the next layer runs: memory as of one layer.
    Raises `CaptureError` for another kind of model.
    """
    found: dict[int, R] = {}
    with _each_layer(model, lambda _: None, lambda layer, attention: found.update({layer: summarise(attention)})):
        model(batch.to(model.device))
    return found


def _capturing_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None,
                         **options: object) -> tuple[Tensor, None]:
    _CAPTURED[module](module, q, k, attention_mask, options)
    return seam.stock_attention(PLAIN)(module, q, k, v, attention_mask, **options)


seam.register_attention(CAPTURING, _capturing_attention, masks_of=PLAIN)


@contextmanager
def capture_stock(model: PreTrainedModel) -> Iterator[AttentionRecord]:
    """Record the attention of the last forward of any transformers model inside the block, without gradients.

    Inside the block the model's attention is a function that keeps q and k and calls sdpa: outputs are bit for bit the
    same. Causal, padded, sliding and bidirectional masks become intervals. Rows are the batch's without pads; one with
    image tokens (`config.image_token_id`) has task MMU, any other LM. Blocks of several models may be nested.

    Raises `CaptureError` for a model with another attention or with an encoder beside its decoder, a step with a cache,
    a mask with holes or with numbers added to the logits, and when no layer was captured.
    """
    config = getattr(model, "config", None)
    name, kind = seam.attention_name(config), type(model).__name__
    if name == seam.ATTENTION:
        raise CaptureError("This model attends over packed tokens already: use capture() on its unimod model.")
    if name == CAPTURING:
        raise CaptureError(f"This {kind} is being recorded already: leave that block first.")
    if name != PLAIN:
        raise CaptureError(f"capture_stock() reads attention {PLAIN!r}, and this {kind} has {name!r}. "
                           "Load it with attn_implementation='sdpa', or call model.set_attn_implementation('sdpa').")
    if config.is_encoder_decoder:
        raise CaptureError(f"This {kind} has an encoder beside its decoder, which attend under the same layer numbers: "
                           "it is not recorded.")
    record, ids, own = AttentionRecord(about={"model": config.model_type}), [None], threading.get_ident()
    image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))

    def keep(module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, options: dict) -> None:
        if (number := seam.layer_number(module)) is not None and threading.get_ident() == own:
            causal = options.get("is_causal")
            visible = _intervals(q, k, mask, getattr(module, "is_causal", True) if causal is None else causal)
            record.captured[number] = _stock_layer(q, k, options.get("scaling"), *visible, ids[0], image)

    def begin(_: nn.Module, args: tuple, options: dict) -> None:
        if threading.get_ident() == own:
            record.captured.clear()
            ids[0] = options.get("input_ids", args[0] if args else None)

    before, parts = seam.attention_names(config), list(model.modules())
    _CAPTURED.update(dict.fromkeys(parts, keep))
    model.set_attn_implementation(seam.attention_names(config, {PLAIN: CAPTURING}))
    try:
        with model.register_forward_pre_hook(begin, with_kwargs=True):
            yield record
    finally:
        model.set_attn_implementation(before)
        for module in parts:
            del _CAPTURED[module]
    if not record.captured:
        raise CaptureError(f"No layer of this {kind} attended through transformers' registry: call it inside the "
                           "block. A model with an attention of its own cannot be recorded.")
    record.whole = record.captured[min(record.captured)].batch


def _intervals(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that are no pads, bool [B, n]; the first key that each sees and how many, places in the row: int64 [B, n].

    q: [B, H, n, d]; mask: [B, 1, n, n], bool or added to the logits, or None.
    """
    n = q.shape[2]
    if k.shape[2] != n:
        raise CaptureError(f"{n} queries for {k.shape[2]} keys, a step with a cache: run the whole sequence at once, "
                           "with use_cache=False.")
    j = torch.arange(n, device=q.device)
    if mask is None:
        low, count = torch.zeros_like(j), j + 1 if causal else torch.full_like(j, n)
        return torch.ones(len(q), n, dtype=torch.bool, device=q.device), low.expand(len(q), n), count.expand(len(q), n)
    if mask.dtype != torch.bool:
        added, mask = mask, mask > HIDDEN
        if added.masked_fill(~mask, 0).any():
            raise CaptureError("The mask of this batch adds numbers to the logits, a bias such as ALiBi's: only masks "
                               "that hide keys are recorded.")
    visible = mask[:, 0].expand(len(q), n, n)
    real = visible.diagonal(dim1=1, dim2=2)                 # a pad does not see itself
    visible = visible & real[:, None] & real[:, :, None]
    low, count = visible.byte().argmax(-1), visible.sum(-1)
    if not torch.equal(visible, (j >= low[..., None]) & (j < (low + count)[..., None])):
        raise CaptureError("Some token of this batch sees keys that do not lie side by side: such a mask has no "
                           "interval, and is not recorded.")
    return real, low, count


def _stock_layer(q: Tensor, k: Tensor, scale: float | None, real: Tensor, low: Tensor, count: Tensor,
                 ids: Tensor | None, image: int | None) -> LayerAttention:
    """Pack the rows of one layer without pads.

    q: [B, H, n, d], k: [B, H_kv, n, d]; real, low, count: as `_intervals` returns; ids: int64 [B, n]; image: an id.
    """
    lengths = real.sum(1)
    place = (real.cumsum(1) - real.long()) + (lengths.cumsum(0) - lengths)[:, None]     # of each token as packed
    lo = place.gather(1, low)[real]
    row, position = real.nonzero().T
    ids = torch.full_like(row, -1) if ids is None else ids[real]
    images = torch.zeros_like(ids, dtype=torch.bool) if image is None else ids == image
    tasks = [Task.MMU if bool(images[row == b].any()) else Task.LM for b in range(len(real))]
    segments = tuple(Segment(b, task, n) for b, (task, n) in enumerate(zip(tasks, lengths.tolist())))
    batch = Batch(ids=ids, row=row, position=position, task=torch.tensor(tasks, device=row.device)[row],
                  modality=torch.where(images, int(Modality.IMAGE), int(Modality.TEXT)),
                  target=torch.full_like(row, IGNORE), segments=segments,
                  mask=IntervalMask(lo, lo + count[real], lengths_of(segments)))
    q_packed, k_packed = (x.transpose(1, 2)[real].transpose(0, 1).detach() for x in (q, k))
    return LayerAttention(q_packed, k_packed, q.shape[-1] ** -0.5 if scale is None else scale, batch)
