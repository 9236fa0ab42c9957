"""Paired interleaved timing: comparable times on a machine whose speed drifts, and the parts of a step.

    times = time_interleaved({"dense": a, "routed": b}, rounds=9)    # functions without arguments
    paired_ratios(times)["routed"]["ratio"]                          # median over rounds of the time relative to dense
    part_shares(model, forward, update)                              # router, attention, mlp, ...: they sum to 1

Both wall time and the process's own CPU time are taken. On a CPU the second counts: other processes do not add to it.
On CUDA it says nothing, and wall time between two synchronisations counts.
"""

from __future__ import annotations

import math
import os
import platform
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from .. import seam
from ..batch import Batch
from ..layers import MoDLayer, routed_layers
from ..losses import losses
from ..models.unified import UnifiedModel

MIN_ROUNDS = 5
"""Rounds below which no ratio is reported."""


class OutOfTime(Exception):
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


PARTS = ("router", "select", "gather", "attention", "mlp", "scatter", "head", "optimiser", "other")
"""Parts of a step. attention and mlp with their projections; head with the loss; other: embedding, norms, residual
additions, and backward operations of no known forward one."""
RANGE = "unimod part: "
BACKWARD = "autograd::engine::evaluate_function: "
SELECT_WORDS = (
    "sort", "topk", "index", "repeat_interleave", "cumsum", "arange", "scatter", "fill", "zero", "ones", "select",
    "copy", "rank", "masked",
)
"""Operations of a router that choose tokens by their scores; its others compute the scores."""
GATHER_WORDS = ("index", "searchsorted", "gather", "take")
"""Operations of a routed layer, outside its stock layer, that pick kept tokens; its others put them back."""


def part_shares(
    model: UnifiedModel, forward: Callable[[], Tensor], update: Callable[[], object] = lambda: None, rounds: int = 3
) -> dict[str, float]:
    """Share of each of `PARTS` in the time of all operations of a step, medians over `rounds`; they sum to 1.

    `forward` returns what is summed and differentiated; `update` is the optimizer's part.
    """
    def step() -> None:
        model.zero_grad(set_to_none=True)
        with record_function(RANGE + "head"):  # the loss is computed outside the model's forward
            loss = forward()
        loss.sum().backward()
        with record_function(RANGE + "optimiser"):
            update()

    step()  # the first one is slower, and not counted
    spent = {part: [0.0] * rounds for part in PARTS}
    for n in range(rounds):
        for part, _, seconds in operations(recorded(model, step), model.device.type == "cuda"):
            spent[part][n] += seconds
    # the profiler has wall time only: the median drops a round in which another process was given the core
    medians = {part: statistics.median(values) for part, values in spent.items()}
    total = sum(medians.values())
    return {part: value / total for part, value in medians.items()}


NODE = 1
"""`scope` of the event of a backward function (RecordScope::BACKWARD_FUNCTION)."""
CALL = re.compile(r"(cuda|cu|hip)[A-Z]")
"""Names of calls of a device's runtime and driver."""


@dataclass
class _Open:
    """An event of the host that has not ended: its end, the range around it, the part of what is launched in it."""

    end: float
    inside: str
    part: str


def operations(events: list, cuda: bool) -> list[tuple[str, str, float]]:
    """Part, name and own time in microseconds of every operation of a recorded step; on CUDA of every kernel.

    An operation of the forward belongs to the innermost range around it. One of the backward belongs to the part of the
    forward operation whose gradient it is: the profiler gives both the same number, counted by the forward's thread. A
    kernel belongs to the operation that called the runtime to launch it: both have the same id.
    """
    found, part_of_node, part_of_call, opened = [], {}, {}, []
    for event in events:  # in the order of their begin, all of one thread: `recorded`
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        while opened and opened[-1].end <= event.time_range.start:
            opened.pop()
        around = opened[-1] if opened else _Open(math.inf, "", "other")
        if CALL.match(event.name):
            # Ids of calls and of operations are counted apart and collide: what torch sums up by the id of an operation
            # (`self_device_time_total`) may hold kernels of another one.
            part_of_call[event.id] = around.part
            continue
        if event.name.startswith(RANGE):
            inside = event.name.removeprefix(RANGE)
            here = _Open(event.time_range.end, inside, _part(inside, ""))
        elif event.name.startswith(BACKWARD):
            # has no number of its own: torch copies that of the next event
            here = _Open(event.time_range.end, "", "other")
        elif event.scope == NODE:
            part = part_of_node.get((event.fwd_thread, event.sequence_nr), "other")
            here = _Open(event.time_range.end, "", part)
            around.part = part  # what the engine then does with the gradients, such as to add them up
        else:
            part = _part(around.inside, event.name) if around.inside else around.part
            here = _Open(event.time_range.end, around.inside, part)
            if event.sequence_nr >= 0:
                # several operations carry the number of the next node; the last of them is the one that made it
                part_of_node[event.thread, event.sequence_nr] = part
        opened.append(here)
        if "::" in event.name and not event.name.startswith(BACKWARD):  # the rest is Python between operations
            found.append((here.part, event.name, event.self_cpu_time_total))
    if not cuda:
        return found
    kernels = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU and not e.is_user_annotation]
    return [(part_of_call.get(e.id, "other"), e.name, e.time_range.elapsed_us()) for e in kernels]


def _part(inside: str, name: str) -> str:
    if inside == "router":
        return "select" if any(word in name for word in SELECT_WORDS) else "router"
    if inside == "routed":
        return "gather" if any(word in name for word in GATHER_WORDS) else "scatter"
    return inside if inside in PARTS else "other"


def recorded(model: UnifiedModel, run: Callable[[], object]) -> list:
    """torch.profiler's events of `run()`, with a range around each part of the model, in the order of their begin.

    The backward runs in the calling thread, as it always does on a CPU; on CUDA it would have one of its own.
    """
    watched = [(model, "model"), (model.head, "head")]
    for layer in model.layers:
        if isinstance(layer, MoDLayer):
            watched += [(layer, "routed"), (layer.router, "router"), (layer.layer, "layer")]
        watched += [(seam.attention(layer), "attention"), (seam.mlp(layer), "mlp")]
    hooks = [hook for module, name in watched for hook in _range(module, RANGE + name)]
    cuda = [ProfilerActivity.CUDA] if model.device.type == "cuda" else []
    recorder = profile(activities=[ProfilerActivity.CPU, *cuda])
    try:
        with _without_log():
            recorder.start()
        with torch.autograd.set_multithreading_enabled(False):
            run()
        synchronize()
    finally:
        with _without_log():
            recorder.stop()
        for hook in hooks:
            hook.remove()
    return sorted(recorder.events(), key=lambda event: (event.time_range.start, -event.time_range.end))


def _range(module: nn.Module, name: str) -> list:
    """Hooks that put the module's forward inside a range of the profiler."""
    entered = []

    def enter(*_: object) -> None:
        entered.append(record_function(name))
        entered[-1].__enter__()

    def leave(*_: object) -> None:
        entered.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


@contextmanager
def _without_log() -> Iterator[None]:
    """Drop what torch's profiler prints: from 2.13 on a line at each start and stop, straight to file descriptor 2."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@torch.no_grad()
def where_time_goes(model: UnifiedModel, batch: Batch, rounds: int = 5) -> dict[str, float]:
    """Median milliseconds per forward inside the routed layers: router and selection, decoder layer, and the rest
    (gather, new intervals, scatter). Empty for a dense model."""
    count = len(routed_layers(model))
    if not count:
        return {}
    model(batch)
    events = recorded(model, lambda: [model(batch) for _ in range(rounds)])
    spent = {}
    for name in ("routed", "router", "layer"):
        ranges = [e for e in events if e.name == RANGE + name and e.device_type == torch.autograd.DeviceType.CPU]
        # microseconds: on CUDA of the kernels launched inside, on a CPU from enter to leave
        each = [e.device_time_total if model.device.type == "cuda" else e.cpu_time_total for e in ranges]
        spent[name] = [sum(each[i : i + count]) / 1000 for i in range(0, len(each), count)]
    rest = [whole - router - layer for whole, router, layer in zip(*spent.values())]
    kinds = {"router and selection": spent["router"], "decoder layer": spent["layer"], "gather and scatter": rest}
    return {name: statistics.median(values) for name, values in kinds.items()}
