"""Paired interleaved timing: comparable times on a machine whose speed drifts; memory, and when to end.

    times = time_interleaved({"dense": a, "routed": b}, rounds=9)    # functions without arguments
    paired_ratios(times)["routed"]["ratio"]                          # median over rounds of the time relative to dense

Both wall time and the process's own CPU time are taken. On a CPU the second counts: other processes do not add to it.
On CUDA it says nothing, and wall time between two synchronisations counts.
"""

from __future__ import annotations

import math
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..batch import Batch
from ..losses import losses
from ..models.unified import UnifiedModel

MIN_ROUNDS = 5
"""Rounds below which no ratio is reported."""


class OutOfTime(BaseException):  # passes by what catches an `Exception` and tries something else
    """The deadline came before `MIN_ROUNDS` rounds were done."""


@contextmanager
def ends_at(until: float) -> Iterator[None]:
    """Raise `OutOfTime` inside the block at this `time.monotonic()`, amid whatever runs: a compilation, too, is cut.

    Only the main thread can be interrupted; in another one the block runs to its end.
    """
    if until == math.inf or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise OutOfTime("no time was left")

    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, late)
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(1e-6, until - began))  # 0 would switch it off
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # an alarm of the caller's goes on
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - began)))


@dataclass
class Times:
    """Seconds of every counted round: wall time, and CPU time of this process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def dtype_of(device: str) -> torch.dtype:
    """In which a device is measured: bfloat16 on CUDA, float32 on a CPU."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def describe(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.machine()}), {torch.get_num_threads()} of {os.cpu_count()} cores"


def synchronize() -> None:
    """Return once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_interleaved(
    steps: dict[str, Callable[[], object]], rounds: int, warmup: int = 1, *,
    after: Callable[[], object] = lambda: None, until: float = math.inf,
) -> dict[str, Times]:
    """Call every step in turn, `rounds` times over after `warmup` uncounted rounds; every other round is reversed.

    `after` is called behind each step and not timed. `until`: the `time.monotonic()` at which to end; raises
    `OutOfTime` when fewer than `MIN_ROUNDS` rounds were done by then.
    """
    found = {name: Times() for name in steps}
    try:
        for n in range(rounds + warmup):
            # reversed in turn: otherwise each step would always run in the same one's cache and heat
            for name in list(steps)[:: 1 if n % 2 else -1]:
                if time.monotonic() > until:
                    raise OutOfTime
                synchronize()
                wall, cpu = time.perf_counter(), time.process_time()
                steps[name]()
                synchronize()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                after()
                if n >= warmup:
                    found[name].wall.append(wall)
                    found[name].cpu.append(cpu)
    except OutOfTime:
        done = min(len(times.cpu) for times in found.values())  # a round that was cut short does not count
        if done < MIN_ROUNDS:
            raise OutOfTime(f"{done} rounds done, {MIN_ROUNDS} needed") from None
        found = {name: Times(times.wall[:done], times.cpu[:done]) for name, times in found.items()}
    return found


def paired_ratios(times: dict[str, Times], clock: str = "wall") -> dict[str, dict[str, float]]:
    """Each step's time relative to the first one's in the same round, by `clock`, which is "wall" or "cpu".

    Per step: `ms`, the median milliseconds; `ratio`, the median ratio, with `ratio_low` and `ratio_high`, the smallest
    and largest; `wall` and `cpu`, the median ratios by each clock; `rounds`, how many were counted.
    """
    base = next(iter(times.values()))

    def ratios(mine: Times, kind: str) -> list[float]:
        return [a / b for a, b in zip(getattr(mine, kind), getattr(base, kind)) if b]

    out = {}
    for name, mine in times.items():
        found = ratios(mine, clock)
        out[name] = {
            "ms": 1000 * statistics.median(getattr(mine, clock)),
            "ratio": statistics.median(found), "ratio_low": min(found), "ratio_high": max(found),
            "wall": statistics.median(ratios(mine, "wall")),
            "cpu": statistics.median(ratios(mine, "cpu") or [math.nan]),  # all 0 on a coarse clock
            "rounds": len(mine.wall),
        }
    return out


def realised(time_ratio: float, flops_ratio: float) -> float | None:
    """The share of a counted saving that arrives as time: (1 - t / t_dense) / (1 - FLOPs / FLOPs_dense).

    None where nothing is saved.
    """
    return (1 - time_ratio) / (1 - flops_ratio) if flops_ratio < 1 else None


def interleave(steps: dict[str, Callable[[], Tensor]], rounds: int = 7) -> dict[str, dict[str, float]]:
    """`paired_ratios` by wall time of steps that return a loss, with their backward.

    Gradients add up in the models: clear them afterwards.
    """
    return paired_ratios(
        time_interleaved({name: (lambda step=step: step().backward()) for name, step in steps.items()}, rounds)
    )


def time_steps(models: dict[str, UnifiedModel], batch: Batch, rounds: int = 7) -> dict[str, dict[str, float]]:
    """`interleave` for the training losses of several models on one batch; gradients are cleared afterwards."""
    out = interleave({name: (lambda m=model: losses(m, batch).total) for name, model in models.items()}, rounds)
    for model in models.values():
        model.zero_grad(set_to_none=True)
    return out


def saved_for_backward(model: UnifiedModel, forward: Batch | Callable[[], Tensor]) -> int:
    """Bytes of activations that autograd keeps between forward and backward, parameters not counted.

    `forward`: a batch, whose losses are computed, or a function that returns a tensor.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()  # by storage: views of one tensor count once
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = losses(model, forward).total if isinstance(forward, Batch) else forward()
    del loss
    return sum(seen.values())


def peak_memory(model: UnifiedModel, forward: Callable[[], Tensor], finish: Callable[[Tensor], object]) -> int:
    """Bytes: on CUDA the most allocated during `finish(forward())`, on a CPU what forward keeps for the backward."""
    if model.device.type != "cuda":
        return saved_for_backward(model, forward)
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    finish(forward())
    synchronize()
    return torch.cuda.max_memory_allocated()


def bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written bytes both counted; the median of seven."""
    # 2 GiB or 128 MiB: far larger than the caches, which would answer faster than memory
    x = torch.zeros(2**31 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    y, seconds = torch.empty_like(x), []
    for _ in range(8):
        synchronize()
        began = time.perf_counter()
        y.copy_(x)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * len(x) / statistics.median(seconds[1:])  # the first one also maps the pages
