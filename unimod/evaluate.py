"""Quality of a model on held-out data, the object detector that judges pictures, and routed models as they decode.

    quality = evaluate(model, image_tokenizer, data, split="test", count=64)
    quality.questions["all"], quality.pictures["all"], quality.losses["t2i"]

    found = detect(picture)               # (Thing("red", "circle", cell=0, box=(1, 1, 23, 23)), ...)
    matches(found, sample)                # the picture shows exactly what its caption asks for

    in_use(model, tokenizer, batches)     # agreement, loss_by_decision, cache_share and guidance at once

The detector has no learned part. The background is the palette's one nearest to most pixels; each pixel is then read as
a mix of it with one palette color, and counts for that color where the mix is more than half. A majority of 3 x 3
pixels removes noise and specks, and each connected patch of one color is compared with the outline of each shape,
stretched to the patch's box.

A per-token decision is the predictor's where the router has one, else a calibrated threshold's (`generate.calibrate`).
Rows are written for training: every token known, top-k where it may look at a whole segment.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .analysis.routing import choosing, routings
from .batch import Batch, Modality, Task, TokenSequence, pack
from .data.batches import Batches
from .data.scenes import BACKGROUNDS, COLORS, SHAPES, shape_mask
from .data.sources import Dataset, Question, Sample, Thing
from .generate import answer, calibrate, draw
from .layers import record_routing, routed_layers
from .losses import losses
from .models.cache import KVCache
from .models.image_tokenizer import ImageTokenizer
from .models.unified import UnifiedModel

SMALLEST, LARGEST = 1 / 8, 0.55  # allowed side of an object's box, as a share of the picture's side
LONGEST = 1.6  # allowed ratio of the box's sides
LEAST_OVERLAP = 0.7  # intersection over union with the best shape, below which a patch is no object
FARTHEST = 90.0  # distance in RGB from every mix of background and color, above which a pixel is neither
_PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], np.float32)


@dataclass(frozen=True)
class Quality:
    """Shares are in [0, 1], losses in nats per target; `counts` holds how many items stand behind every share."""

    questions: dict[str, float]  # exact match per kind of question, and "all"
    pictures: dict[str, float]  # share of generated pictures that are right, per category and "all"; {} without truth
    losses: dict[str, float]  # loss per task on a fixed held-out batch
    counts: dict[str, int] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """One flat dictionary (group/name), for records and tables; without the counts."""
        return {f"{group}/{name}": value for group in ("questions", "pictures", "losses")
                for name, value in getattr(self, group).items()}


@torch.no_grad()
def evaluate(model: UnifiedModel, image_tokenizer: ImageTokenizer, data: Dataset, split: str = "test", count: int = 64,
             seed: int = 0, per_picture: int = 2, start: int = 0) -> Quality:
    """Ask `per_picture` questions about each of `count` pictures, and generate pictures from the captions of the same.

    The same arguments judge the same items. A routed model that generates token by token is calibrated on training rows
    first.
    """
    training = model.training
    model.eval()                                            # some routers decide otherwise in training
    batches = Batches(data, image_tokenizer, model.layout, seed=seed)
    samples = batches.samples(split, start, count, seed=0)  # the same pictures for every seed of a training
    if model.layout.causal_images and routed_layers(model):
        calibrate(model, batches.single_task(Task.T2I, "train", 64))
    right = {"questions": questions_right(model, batches, samples, per_picture), "pictures": {}}
    if all(sample.things for sample in samples):
        right["pictures"] = pictures_right(model, image_tokenizer, samples, seed)
    per_task = losses(model, batches.held_out(split, min(32, count)).to(model.device)).per_task.tolist()
    model.train(training)
    shares = {group: {kind: float(np.mean(hits)) for kind, hits in sorted(found.items())}
              for group, found in right.items()}
    counts = {f"{group}/{kind}": len(hits) for group, found in right.items() for kind, hits in found.items()}
    return Quality(**shares, losses={task.name.lower(): loss for task, loss in zip(Task, per_task)}, counts=counts)


@torch.no_grad()
def questions_right(model: UnifiedModel, batches: Batches, samples: list[Sample],
                    per_picture: int = 2) -> dict[str, list[bool]]:
    """Whether each answer is exact, per kind of question and for "all", over `per_picture` questions of each sample,
    the first of each kind before the rest. The model must be in eval mode."""
    right: dict[str, list[bool]] = defaultdict(list)
    asked = []
    for sample, code in zip(samples, batches.codes(samples)):
        first: dict[str, Question] = {}                     # so that a small evaluation still meets every kind
        for q in sample.questions:
            first.setdefault(q.kind, q)
        rest = [q for q in sample.questions if q not in first.values()]
        asked += [(code, q) for q in [*first.values(), *rest][:per_picture]]
    texts = answer(model, [model.layout.mmu(code, [(q.text, "")], open_ended=True) for code, q in asked])
    for (_, q), text in zip(asked, texts):
        for kind in (q.kind, "all"):
            right[kind].append(text == q.answer)
    return right


@torch.no_grad()
def pictures_right(model: UnifiedModel, image_tokenizer: ImageTokenizer, samples: list[Sample],
                   seed: int = 0) -> dict[str, list[bool]]:
    """Whether the picture generated from each caption shows exactly the sample's objects, per category and for "all".
    The model must be in eval mode."""
    right: dict[str, list[bool]] = defaultdict(list)
    codes = draw(model, [s.caption for s in samples], seed=seed).view(-1, *model.layout.grid)
    for sample, hit in zip(samples, _as_captioned(image_tokenizer, codes, samples)):
        for category in (sample.category, "all"):
            right[category].append(hit)
    return right


def _as_captioned(image_tokenizer: ImageTokenizer, codes: Tensor, samples: Sequence[Sample]) -> list[bool]:
    """Whether the picture of each sample's codes, int64 [B, h, w], shows what the sample does."""
    pictures = image_tokenizer.decode(codes).permute(0, 2, 3, 1).numpy()
    return [matches(detect(picture), sample) for picture, sample in zip(pictures, samples)]


def detect(image: np.ndarray) -> tuple[Thing, ...]:
    """The objects in a picture, uint8 [S, S, 3], ordered by cell and place; raises ValueError for any other array."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape != (len(image), len(image), 3):
        raise ValueError(f"detect needs a square uint8 picture [S, S, 3]; got {image.dtype} {list(image.shape)}")
    colors, size = _color_map(image), len(image)
    things = []
    for number, color in enumerate(COLORS):
        votes = ndimage.uniform_filter((colors == number).astype(np.float32), size=3, mode="constant")
        patches, _ = ndimage.label(votes > 0.5)
        for label, (y, x) in enumerate(ndimage.find_objects(patches), start=1):
            shape = _shape_of(patches[y, x] == label, size)
            if shape:
                cell = 2 * (y.start + y.stop >= size) + (x.start + x.stop >= size)      # by the center of the box
                things.append(Thing(color, shape, cell, (x.start, y.start, x.stop, y.stop)))
    return tuple(sorted(things, key=lambda thing: (thing.cell, thing.box, thing.color)))


def _color_map(image: np.ndarray) -> np.ndarray:
    """The color of each pixel of uint8 [S, S, 3], as its number in COLORS, or -1 for the background: int [S, S]."""
    pixels = image.reshape(-1, 3).astype(np.float32)
    # squared distances, less the pixel's own square, which is the same for every palette color
    nearest = ((_PALETTE**2).sum(-1) - 2 * pixels @ _PALETTE.T).argmin(-1)
    background = _PALETTE[len(COLORS) + np.bincount(nearest, minlength=len(_PALETTE))[len(COLORS) :].argmax()]
    offsets, axes = pixels - background, _PALETTE[: len(COLORS)] - background
    lengths, along = (axes**2).sum(-1), offsets @ axes.T
    shares = (along / lengths).clip(0, 1)                   # [pixels, colors], how much of each color is in the mix
    # squared distance to that mix
    misses = (offsets**2).sum(-1, keepdims=True) + shares * (shares * lengths - 2 * along)
    best = misses.argmin(-1)
    pick = np.arange(len(pixels)), best
    return np.where((shares[pick] > 0.5) & (misses[pick] < FARTHEST**2), best, -1).reshape(image.shape[:2])


def _shape_of(mask: np.ndarray, image_size: int) -> str:
    """The shape that a patch, bool [height, width] cut to its box, looks most like; "" where it is no object."""
    short, long = sorted(mask.shape)
    if short < SMALLEST * image_size or long > LARGEST * image_size or long > LONGEST * short:
        return ""
    overlaps = {}
    for shape in SHAPES:
        outline = shape_mask(shape, *mask.shape)
        overlaps[shape] = (mask & outline).sum() / (mask | outline).sum()
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= LEAST_OVERLAP else ""



def matches(found: tuple[Thing, ...], sample: Sample) -> bool:
    """Whether exactly the objects that the caption names were found, each with its color, shape and quarter.

    Raises ValueError for a sample without ground truth.
    """
    if not sample.things:
        raise ValueError(f"sample {sample.key!r} has no ground-truth objects: only samples of scenes can be compared")
    a, b = (Counter((thing.color, thing.shape, thing.cell) for thing in things) for things in (found, sample.things))
    return a == b


def per_token(batch: Batch) -> Batch:
    """The batch with every top-k segment decided token by token instead, by causal decisions."""
    segments = [replace(s, rule="threshold") if s.rule == "topk" else s for s in batch.segments]
    return replace(batch, segments=tuple(segments))


@torch.no_grad()
def agreement(model: UnifiedModel, batch: Batch) -> list[dict[str, object]]:
    """One row per routed layer and task with eligible tokens, all decided on the hidden states of the top-k forward:
    `agree`, the share of tokens that a per-token decision treats as top-k does; `kept`, the share it keeps; `planned`,
    the share that top-k keeps; `by`, predictor or threshold. Raises RuntimeError without calibrated thresholds."""
    batch, rows = batch.to(model.device), []
    with record_routing() as log:
        model(batch)
    for (layer, routing), task in itertools.product(log.items(), Task):
        mine, router = routing.eligible & (batch.task == task), model.layers[layer].router
        if mine.any():
            passes = router.passes(routing.score, routing.predicted, batch, {task})
            rows.append({"layer": layer, "task": task.name.lower(),
                         "by": "predictor" if router.config.predictor else "threshold",
                         "agree": float((passes == routing.kept)[mine].float().mean()),
                         "kept": float(passes[mine].float().mean()),
                         "planned": float(routing.kept[mine].float().mean()), "tokens": int(mine.sum())})
    return rows


@torch.no_grad()
def loss_by_decision(model: UnifiedModel, batch: Batch) -> list[dict[str, object]]:
    """One row per task of the batch and way it is `decided` (top-k; alone: per token): `loss` in nats per target and
    the share of token-layers `kept` in the routed layers."""
    batch, rows = batch.to(model.device), []
    for way, given in {"top-k": batch, "alone": per_token(batch)}.items():
        with record_routing() as log:
            per_task = losses(model, given).per_task
        for task in dict.fromkeys(batch.tasks):
            mine = batch.task == task
            kept = sum(int(mine[r.index].sum()) for r in log.values()) / max(1, len(log) * int(mine.sum()))
            rows.append({"task": task.name.lower(), "decided": way, "loss": float(per_task[task]), "kept": kept})
    return rows


@torch.no_grad()
def cache_share(model: UnifiedModel, rows: Sequence[TokenSequence]) -> float:
    """Keys and values that decoding these rows leaves in the cache, relative to a dense model's of the same width."""
    batch = pack(rows).to(model.device)
    cache = KVCache(len(rows), max(batch.lengths))
    model(batch, cache=cache)
    return sum(int(used.sum()) for used in cache.used.values()) / (len(batch) * len(model.layers))


@torch.no_grad()
def guidance(model: UnifiedModel, image_tokenizer: ImageTokenizer, samples: Sequence[Sample], weight: float = 1.5,
             seed: int = 0) -> list[dict[str, object]]:
    """T2I with classifier-free guidance, the branches deciding each for itself (split) or together (share): per way,
    `right`, the share of pictures as captioned, and `same`, the share of image tokens of the generated pictures that
    both branches treat alike in the routed layers. A causal model needs thresholds or predictors."""
    layout, captions, rows = model.layout, [s.caption for s in samples], []
    for share in (False, True):
        codes = draw(model, captions, seed=seed, guidance=weight, share=share)
        right = _as_captioned(image_tokenizer, codes.view(-1, *layout.grid), samples)
        unmasked = {"masked": torch.zeros(layout.image_tokens, dtype=torch.bool)}
        known = {"prompt": True} if layout.causal_images else unmasked
        texts = captions + [""] * len(captions)
        batch = pack([layout.t2i(text, c, **known) for text, c in zip(texts, [*codes, *codes])])
        batch = (batch.share_scores() if share else batch).to(model.device)
        with record_routing() as log:
            model(batch)
        image = (batch.modality == Modality.IMAGE).nonzero()[:, 0].view(2, -1)              # both branches
        kept = torch.stack([r.kept[image] for r in log.values()])
        rows.append({"branches": "share" if share else "split", "right": sum(right) / len(right),
                     "same": float((kept[:, 0] == kept[:, 1]).float().mean()), "pictures": len(right)})
    return rows


def in_use(model: UnifiedModel, image_tokenizer: ImageTokenizer, batches: Batches,
           count: int = 16) -> dict[str, list[dict]]:
    """Tables on held-out rows: `agreement` and `decided` (where a decision can be made per token), `cache` per task,
    and `guidance` (where the data has ground truth). Thresholds are calibrated on training rows first. {} for a model
    that drops nothing outside training."""
    samples, held_out = batches.samples("test", 0, count, seed=0), batches.held_out("test", count)
    if not choosing(routings(model, held_out)):
        return {}
    found: dict[str, list[dict]] = {}
    configs = [layer.router.config for layer in routed_layers(model)]
    decides = all(c.score == "learned" or c.predictor for c in configs)
    if decides:
        calibrate(model, batches.held_out("train", 32))
        found |= {"agreement": agreement(model, held_out), "decided": loss_by_decision(model, held_out)}
    codes = batches.codes(samples)
    rows = {"mmu": list(map(batches.mmu, samples, codes)),
            "t2i": batches.t2i([s.caption for s in samples], codes, torch.Generator(), drop=False)}
    found["cache"] = [{"task": task, "share": cache_share(model, some)} for task, some in rows.items()]
    if all(sample.things for sample in samples) and (decides or not model.layout.causal_images):
        found["guidance"] = guidance(model, image_tokenizer, samples)
    return found
