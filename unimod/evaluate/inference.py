"""How a routed model behaves where it is used: decisions that a token makes alone against top-k, cache memory, guidance branches.

    agreement(model, packed)              # per layer and task: does a token judged alone do what top-k would?
    decided(model, packed)                # and what does it cost: loss per task, decided by top-k and alone
    cache_share(model, rows)              # share of the dense cache that the layers fill
    guidance(model, tokenizer, samples)   # both branches of guidance with a decision of their own, or one for both
    in_use(model, tokenizer, batches)     # all of these at once

A token alone is judged by the predictor where the router has one, else by a calibrated threshold (`generate.calibrate`). Rows are written for
training: every token known, top-k where it may look at a whole segment. L routed layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..analysis.routing import choosing, routings
from ..batch import Batch, Modality, Task, TokenSequence, pack
from ..data.batches import Batches
from ..data.sources import Sample
from ..generate import calibrate, draw
from ..layers import record_routing, routed_layers
from ..losses import losses
from ..models.cache import KVCache
from ..models.image_tokenizer import ImageTokenizer
from ..models.unified import UnifiedModel
from .detector import detect, matches
from .quality import to_pictures


def alone(packed: Batch) -> Batch:
    """The batch with every segment of top-k decided token by token instead."""
    return replace(packed, segments=tuple(replace(s, rule="threshold") if s.rule == "topk" else s for s in packed.segments))


@torch.no_grad()
def agreement(model: UnifiedModel, packed: Batch) -> list[dict[str, object]]:
    """One row per routed layer and task with tokens up for choice, all judged on the hidden states of the top-k forward: `agree`, the share of
    tokens that a decision alone treats as top-k does; `kept`, the share it keeps; `planned`, the share that top-k keeps; `by`, what decides.

    Raises RuntimeError where thresholds are not calibrated.
    """
    packed, rows = packed.to(model.device), []
    with record_routing() as log:
        model(packed)
    for number, routing in log.items():
        router = model.layers[number].router
        for task in Task:
            mine = routing.open & (packed.task == task)
            if mine.any():
                passes = router.passes(routing.score, routing.predicted, packed, {task})
                rows.append({"layer": number, "task": task.name.lower(), "by": "predictor" if router.config.predictor else "threshold",
                             "agree": float((passes == routing.stays)[mine].float().mean()), "kept": float(passes[mine].float().mean()),
                             "planned": float(routing.stays[mine].float().mean()), "tokens": int(mine.sum())})
    return rows


@torch.no_grad()
def decided(model: UnifiedModel, packed: Batch) -> list[dict[str, object]]:
    """One row per task of the batch: `loss` in nats per target and the share of token-layers `kept` in the routed layers, by top-k and alone."""
    packed, rows = packed.to(model.device), []
    for way, batch in (("top-k", packed), ("alone", alone(packed))):
        with record_routing() as log:
            per_task = losses(model, batch).per_task
        for task in dict.fromkeys(packed.tasks):
            mine = packed.task == task
            kept = sum(int(mine[r.index].sum()) for r in log.values()) / max(1, len(log) * int(mine.sum()))
            rows.append({"task": task.name.lower(), "decided": way, "loss": float(per_task[task]), "kept": kept})
    return rows


@torch.no_grad()
def cache_share(model: UnifiedModel, rows: Sequence[TokenSequence]) -> float:
    """Keys and values that decoding these rows leaves in the cache, relative to a dense model's; the layers' caches are all of one width."""
    packed = pack(rows).to(model.device)
    cache = KVCache(len(rows), max(packed.lengths))
    model(packed, cache=cache)
    return sum(int(used.sum()) for used in cache.used.values()) / (len(packed) * len(model.layers))


@torch.no_grad()
def guidance(model: UnifiedModel, image_tokenizer: ImageTokenizer, samples: Sequence[Sample], weight: float = 1.5, seed: int = 0) -> list[dict[str, object]]:
    """Drawing with guidance, the branches deciding for themselves or together: per way, `right`, the share of pictures as captioned, and `same`, the
    share of picture tokens that both branches treat alike in the routed layers, on the pictures that were drawn. A causal model needs thresholds or
    predictors."""
    layout, captions, rows = model.layout, [s.caption for s in samples], []
    for share in (False, True):
        codes = draw(model, captions, seed=seed, guidance=weight, share=share)
        pictures = to_pictures(image_tokenizer, codes.view(-1, *layout.grid))
        right = [matches(detect(picture), sample) for picture, sample in zip(pictures, samples)]
        known = {"prompt": True} if layout.causal_images else {"masked": torch.zeros(layout.image_tokens, dtype=torch.bool)}
        packed = pack([layout.t2i(text, c, **known) for text, c in zip(captions + [""] * len(captions), [*codes, *codes])])
        packed = (packed.paired() if share else packed).to(model.device)
        with record_routing() as log:
            model(packed)
        picture = (packed.modality == Modality.IMAGE).nonzero()[:, 0].view(2, -1)
        kept = torch.stack([r.stays[picture] for r in log.values()])
        rows.append({"branches": "share" if share else "split", "right": sum(right) / len(right), "same": float((kept[:, 0] == kept[:, 1]).float().mean()),
                     "pictures": len(right)})
    return rows



def in_use(model: UnifiedModel, image_tokenizer: ImageTokenizer, batches: Batches, count: int = 16) -> dict[str, list[dict[str, object]]]:
    """Everything above as tables, on held-out rows: `agreement` and `decided` (where a token can be judged alone), `cache` per task, and `guidance` (where
    the data has ground truth). Thresholds are calibrated on training rows first. Empty for a model that drops nothing outside training."""
    samples, held_out = batches.samples("test", 0, count, seed=0), batches.held_out("test", count)
    if not choosing(routings(model, held_out)):
        return {}
    configs = [layer.router.config for layer in routed_layers(model)]
    found: dict[str, list[dict[str, object]]] = {}
    foresees = all(c.score == "learned" or c.predictor for c in configs)
    if foresees:
        calibrate(model, batches.held_out("train", 32))
        found |= {"agreement": agreement(model, held_out), "decided": decided(model, held_out)}
    codes = batches.codes(samples)
    rows = {"mmu": [batches.mmu(s, c) for s, c in zip(samples, codes)], "t2i": batches.t2i([s.caption for s in samples], codes, torch.Generator(), drop=False)}
    found["cache"] = [{"task": task, "share": cache_share(model, some)} for task, some in rows.items()]
    if all(sample.things for sample in samples) and (foresees or not model.layout.causal_images):
        found["guidance"] = guidance(model, image_tokenizer, samples)
    return found
