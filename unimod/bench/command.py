"""What `python -m unimod bench` does with its words.

    found = bench("layer", "cpu", rounds=9)         # the record; unimod.bench.record.table(found) to read
"""

from __future__ import annotations

import math
import os
import time

import torch

from ..config import ParameterError
from .attention import attention
from .clock import LEAST
from .job import KINDS, jobs_of
from .looking import looking
from .record import measure, record
from .sampling import decode
from .sizes import CUDA, LOOKED, SIZES
from .training import layer, step

MEASURES = {"layer": layer, "step": step, "decode": decode, "attention": attention, "looking": looking}
GPU_SECONDS = 450.0
"""Deadline of the whole GPU set where none is given: with loading and the last round it ends within 8 minutes."""


def bench(kind: str, preset: str = "", rounds: int = 9, deadline: float = 0.0) -> dict:
    """Measure and give the record. kind: layer, step, decode, attention, looking, or gpu (all of them on all released sizes); preset: by default cpu, for
    looking released; deadline: seconds, 0 for none.

    Raises `ParameterError` for what is not known or cannot run here.
    """
    if kind not in (*MEASURES, "gpu"):
        raise ParameterError(f"bench {kind!r} is not known. Allowed: {', '.join(MEASURES)}, gpu.")
    looks = kind == "looking"
    preset, known = preset or ("released" if looks else "cpu"), tuple(LOOKED) if looks else (*SIZES, "gpu")
    if preset not in known:
        raise ParameterError(f"--preset {preset} is not known. Allowed: {', '.join(known)}.")
    if rounds < LEAST:
        raise ParameterError(f"--rounds {rounds}: nothing is claimed from less than {LEAST} rounds.")
    if not deadline >= 0:
        raise ParameterError(f"--deadline {deadline:g} must be seconds, or 0 for none.")
    whole = "gpu" in (kind, preset)
    if (whole or (preset in CUDA and not looks)) and not torch.cuda.is_available():
        raise ParameterError(f"{'The GPU set' if whole else f'--preset {preset}'} needs CUDA, and torch sees no CUDA device here. "
                             f"Presets for a CPU: {', '.join(name for name in SIZES if name not in CUDA)}.")
    words = f"bench {kind}" + (f" --preset {preset}" if kind != "gpu" else "") + f" --rounds {rounds}" + (f" --deadline {deadline:g}" if deadline else "")
    sizes = LOOKED[preset] if looks else [size for name in (CUDA if whole else (preset,)) for size in SIZES[name]]
    seconds = deadline or (GPU_SECONDS if whole else math.inf)
    until = time.monotonic() + seconds
    jobs = jobs_of(KINDS if kind == "gpu" else (kind,), sizes, rounds, until)
    if kind == "gpu":
        jobs += jobs_of(("looking",), LOOKED["released"], rounds, until)
    found = record(f"{_threads()}python -m unimod {words}", jobs[0].device, [])
    return found | {"rows": measure(jobs, MEASURES)}


def _threads() -> str:
    return f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} " if "OMP_NUM_THREADS" in os.environ else ""
