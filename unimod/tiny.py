"""The shipped tiny checkpoints: how they were made, and how to make them again.

    python -m unimod train-tiny showo-tiny --out runs/showo-tiny        # 40 minutes on one core; emu3-tiny 90
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from .data import open_data
from .data.batches import Batches
from .data.sources import Dataset
from .evaluate.quality import evaluate
from .models.checkpoint import build_model, from_pretrained, save_pretrained
from .models.image_tokenizer import CONFIG_FILE, ImageTokenizer, build_image_tokenizer, load_image_tokenizer
from .train import TrainConfig, train


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own warm-up and cosine. rows: sequences of t2i, mmu and lm in a step."""

    steps: int
    rows: tuple[int, int, int]
    lr: float


FIRST = Stage(3000, (12, 16, 2), 1.5e-3)
STAGES = {
    "showo-tiny": (FIRST, Stage(800, (4, 24, 2), 1.0e-3)),
    "emu3-tiny": (FIRST, Stage(1500, (4, 24, 2), 1.5e-3), Stage(700, (4, 24, 2), 1.0e-3), Stage(1500, (4, 24, 2), 1.5e-3), Stage(1200, (4, 24, 2), 1.5e-3)),
}
"""Pictures are learned early; the later stages are mostly questions, which take longest, "where is ..." above all, Emu3 longer than Show-o."""

FIT_STEPS = 1000
"""Optimiser steps of a learned picture tokenizer in the workbook; the dictionary needs none."""


def vocabulary() -> tuple[str, ...]:
    """Words of the embedded data sets, so that one checkpoint can go on with either."""
    return tuple(sorted({*open_data("scenes").words(), *open_data("digits").words()}))


def training_pictures(data: Dataset, count: int = 4000, seed: int = 0) -> torch.Tensor:
    """The first `count` training pictures of a data set (all, when it has fewer): uint8 [N, 3, H, W]."""
    count = min(count, data.size("train") or count)
    return torch.from_numpy(np.stack([data.sample("train", i, seed).image for i in range(count)])).permute(0, 3, 1, 2)


def fit_image_tokenizer(data: Dataset, name: str = "dictionary", count: int = 4000, seed: int = 0, cache: str | Path | None = None) -> ImageTokenizer:
    """A picture tokenizer of 256 codes fitted on the training pictures of a data set.

    The dictionary takes seconds, the learned ones minutes; with `cache`, a folder, one that was fitted on the same pictures before is
    read from there.
    """
    pictures = training_pictures(data, count, seed)
    folder = Path(cache) / f"{name}-{hashlib.blake2b(pictures.numpy().tobytes(), digest_size=6).hexdigest()}-{seed}" if cache else None
    if folder and (folder / CONFIG_FILE).exists():
        return load_image_tokenizer(folder)
    tokenizer = build_image_tokenizer(name)
    tokenizer.fit(pictures, steps=FIT_STEPS, seed=seed, log=lambda text: print(f"fitting {name}: {text}", flush=True))
    if folder:
        tokenizer.save(folder)
    return tokenizer


def train_tiny(name: str, out: str | Path, seed: int = 0) -> dict:
    """Train a tiny dense model on the default scenes and save it in `out` with card.json: how it was made and how good it is.

    An interrupted training goes on at its last checkpoint when it is called again with the same folder.
    """
    data, out = open_data("scenes"), Path(out)
    image_tokenizer = fit_image_tokenizer(data)
    model = build_model(name, vocabulary(), image_tokenizer.codebook_size, seed=seed)
    began = time.perf_counter()
    for number, stage in enumerate(STAGES[name]):
        folder = out / f"stage-{number}"
        if (folder / "config.json").exists():
            model, _ = from_pretrained(folder)
            continue

        def log(record: dict, stage: Stage = stage, number: int = number) -> None:
            if record["step"] % 20 == 0:
                shown = {k: round(v, 4) for k, v in record.items() if k.startswith("loss_") or k.endswith("/all") or k == "seconds"}
                print(f"{name} stage {number} step {record['step']}/{stage.steps} {shown} {time.perf_counter() - began:.0f} s", flush=True)

        batches = Batches(data, image_tokenizer, model.layout, stage.rows, seed + number)
        train(model, batches, TrainConfig(steps=stage.steps, lr=stage.lr, evaluate_every=400), folder=folder, log=log,
              evaluate=lambda m: evaluate(m, image_tokenizer, data, "validation", 48).flat())
        save_pretrained(folder, model, image_tokenizer)
    save_pretrained(out, model, image_tokenizer)
    card = {"name": name, "stages": [asdict(s) for s in STAGES[name]], "seed": seed, "torch": torch.__version__,
            "quality": asdict(evaluate(model, image_tokenizer, data, "test", 400))}
    (out / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")
    return card
