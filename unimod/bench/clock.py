"""Time that can be compared on a machine that is never equally fast for long: everything in turn, ratios round by round.

    times = rounds_of({"dense": a, "routed": b}, rounds=9)   # functions without arguments
    compared(times)["routed"]["ratio"]                       # median over rounds of the time relative to the first one's
    times = time_steps({"dense": a, "unimod": b}, packed)    # the same for the training losses of several models

Wall time and the process's own CPU time are both taken. On a CPU the second is the headline: other processes do not count into it. On CUDA
it says nothing, and wall time between two synchronisations counts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..batch import Batch
from ..losses import losses
from ..models.unified import UnifiedModel

LEAST = 5
"""Rounds below which nothing is claimed."""


class OutOfTime(Exception):
    """The deadline came before `LEAST` rounds were done."""


@dataclass
class Times:
    """Seconds of every counted round: by the clock on the wall, and of CPU time of this process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rounds_of(steps: dict[str, Callable[[], object]], rounds: int, warmup: int = 1, *, after: Callable[[], object] = lambda: None,
              until: float = math.inf) -> dict[str, Times]:
    """Call every step in turn, `rounds` times over after `warmup` rounds that do not count; every other round goes backwards.

    `after` is called behind each step and not timed. `until`: the `time.monotonic()` at which to end; raises `OutOfTime` when fewer than
    `LEAST` rounds were done by then.
    """
    found = {name: Times() for name in steps}
    for n in range(rounds + warmup):
        if time.monotonic() > until:
            if n < warmup + LEAST:
                raise OutOfTime(f"{max(0, n - warmup)} rounds done, {LEAST} needed")
            break
        for name in list(steps)[::1 if n % 2 else -1]:
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            wait()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            after()
            if n >= warmup:
                found[name].wall.append(spent[0])
                found[name].cpu.append(spent[1])
    return found


def compared(times: dict[str, Times], headline: str = "wall") -> dict[str, dict[str, float]]:
    """Per name the median milliseconds, and the median of its time relative to the first name's in the same round, with the smallest and largest
    ratio; all by `headline`, wall or cpu. `wall` and `cpu` are the median ratios by each, `rounds` how many were counted."""
    base = next(iter(times.values()))

    def ratios(mine: Times, kind: str) -> list[float]:
        return [a / b for a, b in zip(getattr(mine, kind), getattr(base, kind)) if b]

    out = {}
    for name, mine in times.items():
        found = ratios(mine, headline)
        out[name] = {"ms": 1000 * statistics.median(getattr(mine, headline)), "ratio": statistics.median(found), "ratio_low": min(found),
                     "ratio_high": max(found), "wall": statistics.median(ratios(mine, "wall")), "cpu": statistics.median(ratios(mine, "cpu") or [math.nan]),
                     "rounds": len(mine.wall)}
    return out


def columns(t: dict[str, float]) -> dict[str, float]:
    """A row's columns of time, from what `compared` says of an arm."""
    return {"ms": t["ms"], "time": t["ratio"], "time_low": t["ratio_low"], "time_high": t["ratio_high"], "time_wall": t["wall"], "rounds": t["rounds"]}


def realised(time_ratio: float, flops_ratio: float) -> float | None:
    """The share of a counted saving that arrives as time: (1 - t / t_dense) / (1 - FLOPs / FLOPs_dense); None where nothing is saved."""
    return (1 - time_ratio) / (1 - flops_ratio) if flops_ratio < 1 else None


def interleave(steps: dict[str, Callable[[], Tensor]], rounds: int = 7) -> dict[str, dict[str, float]]:
    """`compared` by wall time for steps (functions that return a loss) with their backward. Gradients pile up in the models: clear them after."""
    return compared(rounds_of({name: (lambda step=step: step().backward()) for name, step in steps.items()}, rounds))


def time_steps(models: dict[str, UnifiedModel], packed: Batch, rounds: int = 7) -> dict[str, dict[str, float]]:
    """`interleave` for the training losses of several models on one batch."""
    out = interleave({name: (lambda m=model: losses(m, packed).total) for name, model in models.items()}, rounds)
    for model in models.values():
        model.zero_grad(set_to_none=True)
    return out


def saved_for_backward(model: UnifiedModel, forward: Batch | Callable[[], Tensor]) -> int:
    """Bytes of activations that autograd keeps between forward and backward, parameters not counted; of the losses of a batch, or of what
    `forward()` returns."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = losses(model, forward).total if isinstance(forward, Batch) else forward()
    del loss
    return sum(seen.values())
