"""The attention of any transformers model that attends through the library's registry, called as its own documentation says.

    with capture_stock(lm) as record:                       # lm: any model of transformers, loaded with attention "sdpa"
        lm(input_ids=ids, attention_mask=mask)
    record.map(row=0, layer=3, head=1)

For the time of the block the model attends through a function that keeps q and k and then calls the very function that it used before, so
what comes out is the same bit for bit. Masks become intervals: causal, padded, sliding and bidirectional ones are; one with holes is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import seam
from ..batch import IGNORE, Batch, Modality, Segment, Task
from .folder import CaptureError
from .record import AttentionRecord, LayerAttention

OBSERVED, PLAIN = "unimod_observed", "sdpa"
"""The attention for the time of a block, and the one whose masks are read here."""
HIDDEN = -1e3
"""What a mask of numbers adds, at most, to the logit of a key that is not to be seen."""
Keep = Callable[[torch.nn.Module, Tensor, Tensor, Tensor | None, dict], None]
_WATCHED: dict[torch.nn.Module, Keep] = {}


def _attend(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: object) -> tuple[Tensor, None]:
    _WATCHED[module](module, q, k, attention_mask, options)
    return seam.stock_attention(PLAIN)(module, q, k, v, attention_mask, **options)


seam.register_attention(OBSERVED, _attend, masks_of=PLAIN)


@contextmanager
def capture_stock(model: PreTrainedModel) -> Iterator[AttentionRecord]:
    """Record the attention of the last forward inside the block; gradients are not kept. Rows are the batch's, pads left out; a vision-language model's
    picture tokens (`config.image_token_id`) make a row one of understanding, any other row is plain text. Blocks of several models may be nested.

    Raises `CaptureError` for a model that attends otherwise or has an encoder beside its decoder, for a step with a cache, for a mask with holes or with
    numbers that are added to logits, and when no layer was seen.
    """
    config = getattr(model, "config", None)
    name = seam.attention_name(config)
    if name == seam.ATTENTION:
        raise CaptureError("This model already attends over packed tokens: use capture() on the unimod model around it.")
    if name == OBSERVED:
        raise CaptureError(f"This {type(model).__name__} is being recorded already: leave that block first.")
    if name != PLAIN:
        raise CaptureError(f"capture_stock() reads attention {PLAIN!r}, and this {type(model).__name__} has {name!r}. "
                           "Load it with attn_implementation='sdpa', or call model.set_attn_implementation('sdpa').")
    if config.is_encoder_decoder:
        raise CaptureError(f"This {type(model).__name__} has an encoder beside its decoder, which attend under the same layer numbers: it is not recorded.")
    record, given, mine = AttentionRecord(about={"model": config.model_type}), {}, threading.get_ident()
    image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))

    def keep(module: torch.nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, options: dict) -> None:
        if (number := seam.layer_number(module)) is not None and threading.get_ident() == mine:
            causal = options.get("is_causal")
            seen = _intervals(q, k, mask, getattr(module, "is_causal", True) if causal is None else causal)
            record.seen[number] = _layer(q, k, options.get("scaling"), *seen, given.get("input_ids"), image)

    def begin(_: torch.nn.Module, args: tuple, options: dict) -> None:
        if threading.get_ident() == mine:
            record.seen.clear()
            given.clear()
            given["input_ids"] = options.get("input_ids", args[0] if args else None)

    before, parts = seam.attention_names(config), list(model.modules())
    _WATCHED.update(dict.fromkeys(parts, keep))
    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    model.set_attn_implementation(seam.attention_names(config, {PLAIN: OBSERVED}))
    try:
        yield record
    finally:
        model.set_attn_implementation(before)
        hook.remove()
        for module in parts:
            del _WATCHED[module]
    if not record.seen:
        raise CaptureError(f"No layer of this {type(model).__name__} attended through transformers' registry: call it inside the block. "
                           "A model with an attention of its own cannot be recorded.")
    record.batch[:] = [record.seen[min(record.seen)].packed]


def _intervals(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are no pads, bool [B, n]; the first key that each sees and how many, counted in the row: int64 [B, n]."""
    n = q.shape[2]
    if k.shape[2] != n:
        raise CaptureError(f"{n} queries look at {k.shape[2]} keys, a step with a cache: run the whole sequence at once, with use_cache=False.")
    j = torch.arange(n, device=q.device)
    if mask is None:
        low, count = torch.zeros_like(j), j + 1 if causal else torch.full_like(j, n)
        return torch.ones(len(q), n, dtype=torch.bool, device=q.device), low.expand(len(q), n), count.expand(len(q), n)
    if mask.dtype != torch.bool:
        added, mask = mask, mask > HIDDEN
        if added.masked_fill(~mask, 0).any():
            raise CaptureError("The mask of this batch adds numbers to the logits, a bias such as ALiBi's: only masks that hide keys are recorded.")
    seen = mask[:, 0].expand(len(q), n, n)
    real = seen.diagonal(dim1=1, dim2=2)                        # a pad does not see itself
    seen = seen & real[:, None] & real[:, :, None]
    low, count = seen.byte().argmax(-1), seen.sum(-1)
    if not torch.equal(seen, (j >= low[..., None]) & (j < (low + count)[..., None])):
        raise CaptureError("Some token of this batch sees keys that do not lie side by side: such a mask has no interval, and is not recorded.")
    return real, low, count


def _layer(q: Tensor, k: Tensor, scale: float | None, real: Tensor, low: Tensor, count: Tensor, ids: Tensor | None, image: int | None) -> LayerAttention:
    """q: [B, H, n, d], k: [B, H_kv, n, d] and who sees whom (`_intervals`) -> the tokens of all rows, pads left out."""
    before = (real.cumsum(1) - real.long()) + (real.sum(1).cumsum(0) - real.sum(1))[:, None]        # place in the packed order
    lo = before.gather(1, low)[real]
    row, position = real.nonzero().T
    kept = lambda x: x.transpose(1, 2)[real].transpose(0, 1).detach()  # noqa: E731
    ids = torch.full_like(row, -1) if ids is None else ids[real]
    pictures = ids == image if image is not None else torch.zeros_like(real[real])
    asks = [bool(pictures[row == b].any()) for b in range(len(real))]
    task = torch.tensor([int(Task.MMU if a else Task.LM) for a in asks], device=row.device)
    segments = tuple(Segment(b, Task.MMU if a else Task.LM, n) for b, (a, n) in enumerate(zip(asks, real.sum(1).tolist())))
    packed = Batch(ids=ids, row=row, position=position, task=task[row], modality=torch.where(pictures, int(Modality.IMAGE), int(Modality.TEXT)), lo=lo,
                    hi=lo + count[real], target=torch.full_like(row, IGNORE), segments=segments)
    return LayerAttention(kept(q), kept(k), q.shape[-1] ** -0.5 if scale is None else scale, packed)
