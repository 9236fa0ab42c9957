"""Quality of a model on held-out data: exact match per question kind, and pictures judged by the object detector.

    quality = evaluate(model, image_tokenizer, data, split="test", count=64)
    quality.questions["all"], quality.pictures["all"], quality.losses["t2i"]
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from ..batch import Task
from ..data.batches import Batches
from ..data.sources import Dataset, Sample
from ..generate import answer, calibrate, draw
from ..layers import routed_layers
from ..losses import losses
from ..models.image_tokenizer import ImageTokenizer
from ..models.unified import UnifiedModel
from .detector import detect, matches

TASK_NAMES = tuple(t.name.lower() for t in Task)


@dataclass(frozen=True)
class Quality:
    """Shares are in [0, 1], losses in nats per target; `counts` holds how many items stand behind every share."""

    questions: dict[str, float]
    """Exact match per kind of question, and "all"."""
    pictures: dict[str, float]
    """Share of generated pictures whose objects are exactly the caption's, per category and "all"; empty without ground truth."""
    losses: dict[str, float]
    """Loss per task on a fixed held-out batch."""
    counts: dict[str, int] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """One flat dictionary, for records and tables."""
        return {f"{group}/{name}": value for group, values in asdict(self).items() if group != "counts" for name, value in values.items()}


@torch.no_grad()
def evaluate(model: UnifiedModel, image_tokenizer: ImageTokenizer, data: Dataset, split: str = "test", count: int = 64, seed: int = 0,
             per_picture: int = 2, start: int = 0) -> Quality:
    """Ask `per_picture` questions about each of `count` pictures, and draw the captions of the same pictures.

    The same arguments judge the same items. A routed model that draws token by token is calibrated on training rows first.
    """
    training = model.training
    model.eval()                                            # some routers decide otherwise in training
    batches = Batches(data, image_tokenizer, model.layout, seed=seed)
    samples = batches.samples(split, start, count, seed=0)
    if model.layout.causal_images and routed_layers(model):
        calibrate(model, batches.single_task(Task.T2I, "train", 64))
    right = {f"questions/{kind}": found for kind, found in questions_right(model, batches, samples, per_picture).items()}
    if all(sample.things for sample in samples):
        right |= {f"pictures/{kind}": found for kind, found in pictures_right(model, image_tokenizer, samples, seed).items()}
    held_out = batches.held_out(split, min(32, count)).to(model.device)
    per_task = losses(model, held_out).per_task.tolist()
    model.train(training)
    shares = {name: float(np.mean(values)) for name, values in sorted(right.items())}
    return Quality(questions={k.split("/")[1]: v for k, v in shares.items() if k.startswith("q")},
                   pictures={k.split("/")[1]: v for k, v in shares.items() if k.startswith("p")},
                   losses=dict(zip(TASK_NAMES, per_task)), counts={k: len(v) for k, v in right.items()})


@torch.no_grad()
def questions_right(model: UnifiedModel, batches: Batches, samples: list[Sample], per_picture: int = 2) -> dict[str, list[bool]]:
    """Whether each answer is exact, per kind of question and for "all", over `per_picture` questions of each sample. The model must be in eval mode."""
    right: dict[str, list[bool]] = defaultdict(list)
    asked = [(code, q) for sample, code in zip(samples, batches.codes(samples)) for q in _spread(sample.questions, per_picture)]
    texts = answer(model, [model.layout.mmu(code, [(q.text, "")], open_ended=True) for code, q in asked])
    for (_, q), text in zip(asked, texts):
        for kind in (q.kind, "all"):
            right[kind].append(text == q.answer)
    return right


@torch.no_grad()
def pictures_right(model: UnifiedModel, image_tokenizer: ImageTokenizer, samples: list[Sample], seed: int = 0) -> dict[str, list[bool]]:
    """Whether the picture drawn for each caption shows exactly the sample's objects, per category and for "all". The model must be in eval mode."""
    right: dict[str, list[bool]] = defaultdict(list)
    codes = draw(model, [s.caption for s in samples], seed=seed).view(-1, *model.layout.grid)
    for sample, picture in zip(samples, to_pictures(image_tokenizer, codes)):
        for category in (sample.category, "all"):
            right[category].append(matches(detect(picture), sample))
    return right


def to_pictures(image_tokenizer: ImageTokenizer, codes: torch.Tensor) -> np.ndarray:
    """Codes int64 [B, h, w] as uint8 pictures [B, H, W, 3]."""
    return image_tokenizer.decode(codes).permute(0, 2, 3, 1).numpy()


def _spread(questions: tuple, n: int) -> list:
    """The first question of each kind, then the rest, n in all, so that a small evaluation still meets every kind."""
    seen: set[str] = set()
    first = [q for q in questions if not (q.kind in seen or seen.add(q.kind))]
    return (first + [q for q in questions if q not in first])[:n]
