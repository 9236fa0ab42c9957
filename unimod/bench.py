"""Is the packed, routed way right, and what does it save? Errors, times and memory against slower ways of doing the same.

    error = against_stock(model, rows)                       # one sequence at a time, eager attention, dense mask
    times = time_steps({"dense": a, "unimod": b}, packed)    # interleaved, medians, ratios to the first
    bytes_ = saved_for_backward(model, packed)
    parts = where_time_goes(model, packed)                   # inside the routed layers
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import MoDLayer
from .models.backbone import ATTENTION, COEFFICIENTS, UnifiedModel, losses
from .tokens import IGNORE, Packed, Task, TokenSequence, pack


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of logits and of one gradient, each with the largest value it is to be seen against."""

    logits: float
    largest_logit: float
    gradient: float
    largest_gradient: float


@contextmanager
def stock_attention(model: UnifiedModel, name: str = "eager") -> Iterator[nn.Module]:
    """The transformers model itself, with its own attention, for as long as the block lasts."""
    model.lm.set_attn_implementation(name)
    try:
        yield model.lm
    finally:
        model.lm.set_attn_implementation(ATTENTION)


def against_stock(model: UnifiedModel, rows: list[TokenSequence]) -> Difference:
    """The packed forward and backward of a dense model against transformers' own, row by row with a dense mask."""
    weight = model.layers[0].self_attn.q_proj.weight
    packed = pack(rows)
    with torch.no_grad():
        ours = model.head(model(packed))
    gradient = torch.autograd.grad(losses(model, packed).total, weight)[0]
    with stock_attention(model) as lm:
        theirs = [_padded(lm, [row])[0] for row in rows]
    expected = torch.autograd.grad(_loss(theirs, rows), weight)[0]
    logits = torch.cat(theirs).detach()
    return Difference(float((ours - logits).abs().max()), float(logits.abs().max()), float((gradient - expected).abs().max()), float(expected.abs().max()))


def padded_step(model: UnifiedModel, rows: list[TokenSequence]) -> Tensor:
    """The loss the usual way: rows padded to one length, a dense mask, logits of every token."""
    with stock_attention(model, "sdpa") as lm:
        return _loss(_padded(lm, rows), rows)


def _padded(lm: nn.Module, rows: list[TokenSequence]) -> list[Tensor]:
    """Logits [n, V] of every row from one padded forward."""
    n = max(len(row.ids) for row in rows)
    ids = torch.stack([F.pad(row.ids, (0, n - len(row.ids))) for row in rows])
    position = torch.stack([F.pad(row.position, (0, n - len(row.ids))) for row in rows])
    hi = torch.stack([F.pad(row.hi, (0, n - len(row.ids)), value=n) for row in rows])
    mask = torch.zeros(len(rows), 1, n, n).masked_fill(torch.arange(n) >= hi[:, None, :, None], torch.finfo(torch.float32).min)
    logits = lm(input_ids=ids, attention_mask=mask, position_ids=position).logits
    return [x[: len(row.ids)] for x, row in zip(logits, rows)]


def _loss(logits: list[Tensor], rows: list[TokenSequence]) -> Tensor:
    total = torch.zeros(())
    for task in Task:
        mine = [(x, row.target) for x, row in zip(logits, rows) if row.task == task]
        if any((target != IGNORE).any() for _, target in mine):
            x, target = (torch.cat(parts) for parts in zip(*mine))
            total = total + COEFFICIENTS[task] * F.cross_entropy(x, target, ignore_index=IGNORE)
    return total


def interleave(steps: dict[str, Callable[[], Tensor]], rounds: int = 7) -> dict[str, dict[str, float]]:
    """Run every step (a function that returns a loss) with its backward, in turn, round after round.

    Returns, per name, the median milliseconds, and the median over rounds of the time relative to the first one's, with the
    smallest and largest ratio seen. One round of warm-up is not counted. Gradients pile up in the models: clear them after.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            _wait()
            began = time.perf_counter()
            step().backward()
            _wait()
            seconds[name].append(time.perf_counter() - began)
    base = seconds[next(iter(steps))][1:]
    out = {}
    for name, values in seconds.items():
        ratios = [v / b for v, b in zip(values[1:], base)]
        out[name] = {"ms": 1000 * statistics.median(values[1:]), "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return out


def time_steps(models: dict[str, UnifiedModel], packed: Packed, rounds: int = 7) -> dict[str, dict[str, float]]:
    """`interleave` for the training losses of several models on one batch."""
    out = interleave({name: (lambda m=model: losses(m, packed).total) for name, model in models.items()}, rounds)
    for model in models.values():
        model.zero_grad(set_to_none=True)
    return out


def saved_for_backward(model: UnifiedModel, packed: Packed) -> int:
    """Bytes of activations that autograd keeps between forward and backward, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = losses(model, packed).total
    del loss
    return sum(seen.values())


@torch.no_grad()
def where_time_goes(model: UnifiedModel, packed: Packed, rounds: int = 5) -> dict[str, float]:
    """Median milliseconds per forward inside the routed layers: router and selection, decoder layer, and the rest (gather,
    new intervals, scatter). Empty for a dense model."""
    routed = [layer for layer in model.layers if isinstance(layer, MoDLayer)]
    samples: dict[str, list[float]] = {"router and selection": [], "decoder layer": [], "gather and scatter": []}
    spent: dict[str, float] = {}

    def clock(key: str, module: nn.Module) -> list:
        began: list[float] = []

        def before(*_: object) -> None:
            _wait()
            began.append(time.perf_counter())

        def after(*_: object) -> None:
            _wait()
            spent[key] = spent.get(key, 0.0) + time.perf_counter() - began.pop()
        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    hooks = []
    for layer in routed:
        hooks += clock("all", layer) + clock("router and selection", layer.router) + clock("decoder layer", layer.layer)
    try:
        for _ in range(rounds + 1):
            spent.clear()
            model(packed)
            if routed:
                spent["gather and scatter"] = spent["all"] - spent["router and selection"] - spent["decoder layer"]
                for key, values in samples.items():
                    values.append(1000 * spent[key])
    finally:
        for hook in hooks:
            hook.remove()
    return {key: statistics.median(values[1:]) for key, values in samples.items() if values}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
