"""Where the time of a step goes: the profiler's operations, by the part of the model that they belong to.

    part_shares(model, forward, update)         # router, attention, mlp, ...: they sum to 1
    where_time_goes(model, batch)               # milliseconds inside the routed layers
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from .. import seam
from ..batch import Batch
from ..layers import MoDLayer, routed_layers
from ..models.unified import UnifiedModel
from .timing import synchronize

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
