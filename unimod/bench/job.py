"""One piece of a benchmark: a shape, where it runs, by which backends, until when.

    for job in jobs_of(["layer"], SIZES["cpu"], rounds=9): ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..config import ParameterError
from ..models.unified import UnifiedModel
from ..ops.backend import FAMILIES, backend, use_backend
from .sizes import Size

KINDS = ("layer", "step", "decode", "attention")


@dataclass(frozen=True)
class Job:
    """What is measured in one go; the arms inside are timed in turn."""

    kind: str
    size: Size
    rounds: int
    kernels: tuple[str, ...]
    """Backends of the kernels to try, the preferred first."""
    attention: str
    """The attention backend."""
    until: float = math.inf
    """`time.monotonic()` at which to end."""

    @property
    def device(self) -> str:
        """cuda where there is one, but for the cpu preset."""
        return device_of(self.size)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on CUDA, float32 on a CPU."""
        return dtype_of(self.device)

    @property
    def headline(self) -> str:
        """The clock that counts: this process's CPU time on a CPU, wall time on CUDA."""
        return "wall" if self.device == "cuda" else "cpu"

    def __str__(self) -> str:
        return f"{self.kind} {self.size.preset} {self.size.tokens or ''}x{self.size.batch} {','.join(self.kernels)} {self.attention}"

    def row(self, tokens: int, model: UnifiedModel, **columns: object) -> dict:
        """A row of the record with what every row has; numbers to four digits."""
        columns = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in columns.items()}
        note = f"{len(model.layers)} layers only: more do not fit the memory" if self.size.layers else ""
        return {"bench": self.kind, "preset": self.size.preset, "tokens": tokens, "batch": self.size.batch, "layers": len(model.layers),
                "width": model.width, "dtype": str(self.dtype).removeprefix("torch."), **columns, "note": note}

    def missing(self, why: str) -> dict:
        """The row of a job that was not measured, or not to the end."""
        return {"bench": self.kind, "preset": self.size.preset, "tokens": self.size.tokens * self.size.batch, "batch": self.size.batch, "capacity": None,
                "backend": f"{','.join(self.kernels)},{self.attention}", "realised": None, "note": why}


def device_of(size: Size) -> str:
    """Where a size is measured."""
    return "cuda" if size.preset != "cpu" and torch.cuda.is_available() else "cpu"


def dtype_of(device: str) -> torch.dtype:
    """In which dtype."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def available(family: str, device: str) -> tuple[str, ...]:
    """The backends of a family that run on a device, the preferred first; a forced one alone. On a CPU kernels mean the reference: triton
    is an interpreter there."""
    dtype, found = dtype_of(device), []
    if device == "cpu" and family == "kernels":
        return ("reference",)
    preferred = backend(family, device, dtype)
    for name in FAMILIES[family]:
        try:
            with use_backend(name):
                found.append(backend(family, device, dtype))
        except ParameterError:
            continue
    return (preferred, *(name for name in found if name != preferred))


def jobs_of(kinds: Sequence[str], sizes: Sequence[Size], rounds: int, until: float = math.inf) -> list[Job]:
    """What to measure, in order: first everything by the preferred attention, with every kernels backend; then the stack at the first capacity by the
    other attentions. Of several sizes of one model, the first decodes."""
    jobs, later, decoding = [], [], set()
    for kind in kinds:
        for size in sizes:
            if kind == "decode" and size.family in decoding:
                continue
            decoding |= {size.family} if kind == "decode" else set()
            device = device_of(size)
            kernels, (first, *others) = available("kernels", device), available("attention", device)
            jobs.append(Job(kind, size, rounds, kernels, first, until))
            if kind == "layer":
                later += [Job(kind, replace(size, capacities=size.capacities[:1]), rounds, kernels[:1], name, until) for name in others]
    return jobs + later
