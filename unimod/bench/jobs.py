"""What is measured in one go, and in which order.

    for job in jobs_of(["layer", "step"], SIZES["cpu"], rounds=9): ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..mask import IntervalMask
from ..models.unified import UnifiedModel
from ..ops.attention import implementation
from ..ops.backend import possible, use_backend
from ..presets import Size
from .timing import dtype_of

MEASURED = "measured"
"""Attention of a job by the backend that is the fastest for its rows."""


@dataclass(frozen=True)
class Job:
    """What is measured in one go.

    kernels: backends of the kernels to try, the preferred first; attention: its backend, or `MEASURED`; until: the
    `time.monotonic()` at which to end; weight: how much of the time it may take beside other jobs.
    """

    kind: str
    size: Size
    rounds: int
    kernels: tuple[str, ...]
    attention: str
    until: float = math.inf
    weight: float = 1.0

    @property
    def device(self) -> str:
        """cuda where there is one, but for the cpu preset."""
        return device_of(self.size)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on CUDA, float32 on a CPU."""
        return dtype_of(self.device)

    @property
    def clock(self) -> str:
        """The clock that counts: this process's CPU time on a CPU, wall time on CUDA."""
        return "wall" if self.device == "cuda" else "cpu"

    @property
    def backend(self) -> str:
        """The preferred backends, as a row names them."""
        return f"{self.kernels[0]},{self.attention}"

    def on(self, model: UnifiedModel, mask: IntervalMask) -> Job:
        """The job with the backend that attends on such rows in place of `MEASURED`."""
        if self.attention != MEASURED:
            return self
        with use_backend():
            return replace(self, attention=implementation(self.device, self.dtype, mask, model.attention_shape))

    def __str__(self) -> str:
        shape = f"{self.size.preset} {self.size.tokens or ''}x{self.size.batch}"
        return f"{self.kind} {shape} {','.join(self.kernels)} {self.attention}"

    def row(self, tokens: int, model: UnifiedModel, **columns: object) -> dict:
        """A row of the record with what every row has; numbers to four digits."""
        columns = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in columns.items()}
        note = f"{len(model.layers)} layers only: more do not fit the memory" if self.size.layers else ""
        return {
            "bench": self.kind, "preset": self.size.preset, "tokens": tokens, "batch": self.size.batch,
            "layers": len(model.layers), "width": model.width, "dtype": str(self.dtype).removeprefix("torch."),
            "note": note, **columns,
        }

    def missing(self, why: str) -> dict:
        """The row of a job that was not measured, or not to the end."""
        size = self.size
        return {
            "bench": self.kind, "preset": size.preset, "tokens": size.tokens * size.batch, "batch": size.batch,
            "capacity": None, "backend": f"{','.join(self.kernels)},{self.attention}", "realised": None, "note": why,
        }


def device_of(size: Size) -> str:
    """Where a size is measured."""
    return "cuda" if size.preset != "cpu" and torch.cuda.is_available() else "cpu"


def available(family: str, device: str) -> tuple[str, ...]:
    """The backends of a family, "kernels" or "attention", that run on a device, the preferred first; a forced one
    alone."""
    if device == "cpu" and family == "kernels":
        return ("reference",)  # triton is an interpreter on a CPU
    return possible(family, device, dtype_of(device))


WEIGHTS = {"layer": 4.0, "step": 3.0, "decode": 4.0, "attention": 1.0, "capture": 1.0}
"""Shares of the time by kind of job: nearly what each took on an H200 in five rounds."""


def jobs_of(kinds: Sequence[str], sizes: Sequence[Size], rounds: int, until: float = math.inf) -> list[Job]:
    """What to measure, the most important first: everything by the fastest attention, with every kernels backend, in
    the order of `kinds` and within a kind of `sizes`; then the stack at the first capacity by each attention, where
    there are several. Of several sizes of one model, the first decodes."""
    jobs, later, decoding = [], [], set()
    for kind in kinds:
        for size in sizes:
            if kind == "decode" and size.family in decoding:
                continue
            if kind == "decode":
                decoding.add(size.family)
            device = device_of(size)
            kernels, attentions = available("kernels", device), available("attention", device)
            one = MEASURED if len(attentions) > 1 and kind in ("layer", "step", "decode") else attentions[0]
            jobs.append(Job(kind, size, rounds, kernels, one, until, WEIGHTS[kind]))
            if kind == "layer" and len(attentions) > 1:
                # attention backends matter less than kernels: one capacity each, and only where time is left
                once = replace(size, capacities=size.capacities[:1])
                later += [Job(kind, once, rounds, kernels[:1], name, until) for name in attentions]
    return jobs + later
