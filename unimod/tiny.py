"""The shipped tiny checkpoints: how they were made, and how to make them again.

    python -m unimod train-tiny showo-tiny --out runs/showo-tiny        # about an hour on one core
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from .data import open_data
from .data.batches import Batches
from .data.sample import Dataset
from .evaluate.quality import evaluate
from .models.checkpoint import build_model, save_model
from .models.image_tokenizer import CONFIG_FILE, ImageTokenizer, build_image_tokenizer, load_image_tokenizer
from .train import TrainConfig, train

STEPS = 3000
ROWS = (12, 16, 2)
"""Sequences of t2i, mmu and lm in a step: questions take longest to learn."""

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


def train_tiny(name: str, out: str | Path, steps: int = STEPS, seed: int = 0, lr: float = 1.5e-3) -> dict:
    """Train a tiny dense model on the default scenes and save it in `out` with card.json: how it was made and how good it is."""
    data = open_data("scenes")
    image_tokenizer = fit_image_tokenizer(data)
    model = build_model(name, vocabulary(), image_tokenizer.codebook_size, seed=seed)
    batches = Batches(data, image_tokenizer, model.layout, ROWS, seed)
    began = time.perf_counter()

    def log(record: dict) -> None:
        if record["step"] % 20 == 0 or "questions/all" in record:
            shown = {k: round(v, 4) for k, v in record.items() if k in ("loss_t2i", "loss_mmu", "loss_lm", "seconds", "questions/all", "pictures/all")}
            print(f"{name} step {record['step']}/{steps} {shown} {time.perf_counter() - began:.0f} s", flush=True)

    train(model, batches, TrainConfig(steps=steps, lr=lr, evaluate_every=400), folder=out, log=log,
          evaluate=lambda m: evaluate(m, image_tokenizer, data, "validation", 48).flat())
    minutes = (time.perf_counter() - began) / 60
    save_model(out, model, image_tokenizer)
    quality = evaluate(model, image_tokenizer, data, "test", 400)
    card = {"name": name, "steps": steps, "rows": ROWS, "lr": lr, "seed": seed, "minutes": round(minutes, 1), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "quality": asdict(quality)}
    (Path(out) / "card.json").write_text(json.dumps(card, indent=1))
    return card
