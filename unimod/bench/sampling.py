"""Tokens per second of decoding with the cache, against the time it takes to read the weights once per step.

    for row in decode(job): ...       # answers, and pictures of causal models; 1 and 8 rows; dense and routed

A short and a long generation are timed in turn; the difference is free of the prompt's cost. The floor is the bytes of layers and head over
the bandwidth of a large copy, measured here.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from ..batch import pack
from ..generate import answer, calibrate, draw
from ..layers import apply_mod
from ..models.unified import UnifiedModel
from ..ops.backend import use_backend
from .clock import Times, columns, compared, rounds_of, wait
from .job import Job
from .sizes import twin

BATCHES = (1, 8)
NEW = {"cpu": (2, 10), "cuda": (2, 34)}
"""Tokens of the short and the long answer."""
PROMPT = 1024
"""Most picture codes of a prompt."""


def decode(job: Job) -> Iterator[dict]:
    """Rows with `per_second` tokens, of all rows of the batch together, and `of_floor`, the share of what reading the weights alone would allow."""
    model, _ = job.size.build(job.device, job.dtype)
    model.layout = copy.copy(model.layout)
    model.layout.stop = -1                                   # answers of random weights must not end early
    model.eval()
    floor = _bytes(model) / bandwidth(job.device)
    plans = job.size.plans(len(model.layers))
    name = "paper" if "paper" in plans else next(iter(plans))
    arms = {"1": model, name: apply_mod(twin(model), plans[name]).eval()}
    layout = model.layout.resized((max(1, min(model.layout.grid[0], PROMPT // model.layout.grid[1])), model.layout.grid[1]))
    codes = torch.zeros(layout.image_tokens, dtype=torch.long)
    if layout.causal_images:
        calibrate(arms[name].train(), pack([layout.t2i("x" * 20, codes)]))
        arms[name].eval()
    question = layout.mmu(codes, [("x" * 20, "")], open_ended=True)
    width = NEW[job.device][1] // 2

    def answers(arm: UnifiedModel, batch: int, long: bool) -> int:
        return NEW[job.device][long] * len(answer(arm, [question] * batch, max_new=NEW[job.device][long], static=job.device == "cuda"))

    def pictures(arm: UnifiedModel, batch: int, long: bool) -> int:
        draw(arm, ["x" * 20] * batch, guidance=0.0, grid=(1 + long, width), static=job.device == "cuda")
        return (1 + long) * (width + 1) * batch              # ends of line are generated too

    for what, generate in (("answer", answers), *((("picture", pictures),) if layout.causal_images else ())):
        for batch in BATCHES:
            with use_backend(job.kernels[0], job.attention):
                counts, times = _difference(arms, lambda arm, long, g=generate, b=batch: g(arm, b, long), job)
            for arm, t in times.items():
                per_second = counts[arm] / (t["ms"] / 1000)
                yield job.row(len(question.ids), model, what=what, capacity=arm if arm == "paper" else float(arm),
                              backend=f"{job.kernels[0]},{job.attention}", realised=None, per_second=per_second,
                              floor_per_second=batch / floor, of_floor=per_second * floor / batch, **columns(t)) | {"batch": batch}


def _difference(arms: dict[str, UnifiedModel], generate: Callable[[UnifiedModel, bool], int], job: Job) -> tuple[dict[str, int], dict[str, dict]]:
    """Tokens of the long generation beyond those of the short one, and their time, per arm."""
    counts: dict[tuple[str, bool], int] = {}

    def run(name: str, long: bool) -> None:
        counts[name, long] = generate(arms[name], long)

    times = rounds_of({(name, long): (lambda name=name, long=long: run(name, long)) for name in arms for long in (False, True)}, job.rounds,
                      until=job.until)
    only = {name: Times(*([b - a for a, b in zip(getattr(times[name, False], kind), getattr(times[name, True], kind))] for kind in ("wall", "cpu")))
            for name in arms}
    return {name: counts[name, True] - counts[name, False] for name in arms}, compared(only, job.headline)


def bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written bytes both counted; the median of seven."""
    x = torch.zeros(2 ** 31 if device == "cuda" else 2 ** 27, dtype=torch.uint8, device=device)
    y, seconds = torch.empty_like(x), []
    for _ in range(8):
        wait()
        began = time.perf_counter()
        y.copy_(x)
        wait()
        seconds.append(time.perf_counter() - began)
    return 2 * len(x) / statistics.median(seconds[1:])


def _bytes(model: UnifiedModel) -> int:
    """Of the weights that a decoding step reads: layers and head."""
    return sum(p.numel() * p.element_size() for part in (model.layers, model.head) for p in part.parameters())
