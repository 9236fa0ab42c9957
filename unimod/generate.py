"""Generation: answers token by token, pictures by masked decoding (Show-o) or token by token (Emu3).

    texts = answer(model, rows)                                      # rows: open-ended mmu sequences
    codes = draw(model, ["a red circle at the top left"], seed=0)    # int64 [B, N]
    calibrate(model, packed)                                         # before draw() on a routed Emu3

Nothing is cached: every step runs the whole sequence, so a routed layer may choose among all tokens that are known. Text that
is generated is kept; pictures generated token by token are routed by a calibrated threshold (see `tokens.RULES`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .layers import MoDLayer, record_routing
from .models.backbone import UnifiedModel
from .tokens import IGNORE, Modality, Packed, Task, TokenSequence, pack

ROWS = 64
"""Rows per forward."""


@torch.no_grad()
def answer(model: UnifiedModel, rows: list[TokenSequence], max_new: int = 6) -> list[str]:
    """Greedy answers to open-ended understanding rows, at most `max_new` tokens each."""
    stop = model.layout.text.eot if model.layout.kind == "showo" else model.layout.eos
    texts: list[str] = []
    for start in range(0, len(rows), ROWS):
        live = dict(enumerate(rows[start:start + ROWS]))
        said: list[list[int]] = [[] for _ in live]
        for _ in range(max_new):
            packed = pack(list(live.values())).to(_device(model))
            last = torch.tensor(packed.lengths).cumsum(0) - 1
            chosen = model.head(model(packed)[last.to(_device(model))]).argmax(-1).tolist()
            for i, token in zip(list(live), chosen):
                if token == stop:
                    del live[i]
                else:
                    said[i].append(token)
                    live[i] = _append(live[i], token)
            if not live:
                break
        texts += [model.layout.text.decode(ids) for ids in said]
    return texts


def _append(row: TokenSequence, token: int) -> TokenSequence:
    """The row with one more generated text token."""
    def more(x: Tensor, value: int) -> Tensor:
        return torch.cat([x, x.new_tensor([value])])
    n, (length, rule) = len(row.ids), row.parts[-1]
    return replace(row, ids=more(row.ids, token), position=more(row.position, int(row.position[-1]) + 1), modality=more(row.modality, Modality.TEXT),
                   hi=more(row.hi, n + 1), target=more(row.target, IGNORE), parts=(*row.parts[:-1], (length + 1, rule)))


@torch.no_grad()
def draw(model: UnifiedModel, captions: list[str], seed: int = 0, guidance: float | None = None, steps: int = 8) -> Tensor:
    """Pictures for captions: codes int64 [B, N].

    guidance: weight w of the captioned branch, 0 for none; default 1.5 for masked decoding, 0 for token-by-token. `steps` is
    the number of masked-decoding steps. The same seed gives the same pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    one = _draw_causal if model.layout.causal_images else _draw_masked
    w = (0.0 if model.layout.causal_images else 1.5) if guidance is None else guidance
    half = ROWS // 2
    return torch.cat([one(model, captions[i:i + half], generator, w, steps) for i in range(0, len(captions), half)])


def _draw_masked(model: UnifiedModel, captions: list[str], generator: torch.Generator, w: float, steps: int) -> Tensor:
    """MaskGIT decoding as Show-o does it (A8): sample every slot, keep the confident ones, mask the rest again.

    logits = (1 + w) cond - w uncond;  score = log p + temperature * gumbel;  m = floor(N cos(pi/2 (s + 1) / steps)) stay masked.
    """
    layout, n, count = model.layout, model.layout.image_tokens, len(captions)
    codes = torch.zeros(count, n, dtype=torch.long)
    unknown = torch.ones(count, n, dtype=torch.bool)
    temperature = 1.0
    for step in range(steps):
        ratio = (step + 1) / steps
        texts = captions + [""] * count * (w > 0)
        packed = pack([layout.t2i(text, codes[i % count], unknown[i % count]) for i, text in enumerate(texts)]).to(_device(model))
        slots = (packed.modality == Modality.IMAGE).nonzero()[:, 0]
        logits = model.head(model(packed)[slots])[:, layout.image_offset:layout.mask].float().cpu().view(len(texts), n, -1)
        if w > 0:
            logits = (1 + w) * logits[:count] - w * logits[count:]
        probability = logits.softmax(-1)
        sampled = torch.multinomial(probability.flatten(0, 1), 1, generator=generator).view(count, n)
        sampled = torch.where(unknown, sampled, codes)
        confidence = probability.gather(-1, sampled[..., None])[..., 0].masked_fill(~unknown, torch.finfo(probability.dtype).max)
        gumbel = -(-torch.rand(count, n, generator=generator).clamp(min=1e-20).log()).clamp(min=1e-20).log()
        temperature *= 1 - ratio
        score = confidence.clamp(min=1e-20).log() + temperature * gumbel
        m = (unknown.sum(-1, keepdim=True) - 1).clamp(max=math.floor(n * math.cos(math.pi / 2 * ratio))).clamp(min=1)
        unknown = score < score.sort(-1).values.gather(-1, m)
        codes = sampled
    return codes


def _draw_causal(model: UnifiedModel, captions: list[str], generator: torch.Generator, w: float, steps: int) -> Tensor:
    """Token by token in raster order, the row ends written by the layout: score = u + (1 + w)(c - u) over log-probabilities."""
    layout, count = model.layout, len(captions)
    codes = torch.zeros(count, 0, dtype=torch.long)
    for _ in range(layout.image_tokens):
        texts = captions + [""] * count * (w > 0)
        packed = pack([layout.t2i(text, codes[i % count], prompt=True) for i, text in enumerate(texts)]).to(_device(model))
        last = torch.tensor(packed.lengths).cumsum(0) - 1
        logits = model.head(model(packed)[last.to(_device(model))])[:, layout.image_offset:].float().log_softmax(-1).cpu()
        if w > 0:
            logits = logits[count:] + (1 + w) * (logits[:count] - logits[count:])
        codes = torch.cat([codes, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return codes


@torch.no_grad()
def calibrate(model: UnifiedModel, packed: Packed) -> None:
    """Set every router's threshold to the mean score of the last token that top-k keeps, per task, on a typical batch.

    A token-by-token decision can then be made from the token's own score; it keeps the planned share on average.
    """
    with record_routing() as log:
        model(packed.to(_device(model)))
    for number, routing in log.items():
        layer = model.layers[number]
        assert isinstance(layer, MoDLayer)
        for task in Task:
            lasts = [at for at, s in zip(routing.last.tolist(), packed.segments) if s.task == task and s.rule == "topk" and s.length]
            if lasts:
                layer.router.threshold[task] = routing.score[lasts].mean()


def _device(model: UnifiedModel) -> torch.device:
    return model.head.weight.device
