"""Where the time goes: inside the routed layers, and over the parts of a whole training step.

    where_time_goes(model, packed)                    # ms per forward: router and selection, decoder layer, gather and scatter
    part_shares(model, forward, update)               # shares of router, select, gather, attention, mlp, scatter, head, optimiser; they sum to 1
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import seam
from ..batch import Batch
from ..layers import MoDLayer, routed_layers
from ..models.unified import UnifiedModel
from .clock import wait

PARTS = ("router", "select", "gather", "attention", "mlp", "scatter", "head", "optimiser", "other")
"""Parts of a step. attention and mlp with their projections; head with the loss; other: embedding, norms, residual additions, what cannot be told."""
_SELECT = ("sort", "topk", "index", "repeat_interleave", "cumsum", "arange", "scatter", "fill", "zeros", "ones", "select", "copy", "rank", "masked")
_GATHER = ("index", "index_select", "searchsorted", "gather", "take")


def part_shares(model: UnifiedModel, forward: Callable[[], Tensor], update: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Share of each of `PARTS` in the time of all operations of one step, after one that is not counted; they sum to 1.

    Each operation is timed as torch dispatches it (process CPU time, or CUDA events) and belongs to the module that runs. One of the backward
    belongs to the part of the forward operation whose gradient it is, which autograd's sequence numbers tell. `update`: the optimizer's share.
    """
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with Attribution(model) as clock:
            loss = forward()
            loss.sum().backward()
            clock.optimising = True
            update()
        spent = clock.spent()
    total = sum(spent.values())
    return {part: spent.get(part, 0.0) / total for part in PARTS}


class Attribution(TorchDispatchMode):
    """Times every operation and says which part it belongs to, while it is entered."""

    def __init__(self, model: UnifiedModel) -> None:
        super().__init__()
        self.model, self.cuda, self.optimising = model, model.device.type == "cuda", False
        self.inside: list[str] = []
        self.of_node: dict[int, str] = {}
        self.samples: list[tuple[str, str, object, object]] = []
        """Part, operation, and when it began and ended."""
        self.hooks: list = []

    def __enter__(self) -> Attribution:
        self._watch(self.model, "model")
        self._watch(self.model.head, "head")
        for layer in self.model.layers:
            if isinstance(layer, MoDLayer):
                self._watch(layer, "routed")
                self._watch(layer.router, "router")
                self._watch(layer.layer, "layer")
            self._watch(seam.attention(layer), "attention")
            self._watch(seam.mlp(layer), "mlp")
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _watch(self, module: nn.Module, name: str) -> None:
        def leave(*_: object) -> None:
            self.inside.pop()
        self.hooks += [module.register_forward_pre_hook(lambda *_: self.inside.append(name)), module.register_forward_hook(leave)]

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        part = self._part(func.__name__)
        began = self._now()
        out = func(*args, **(kwargs or {}))
        self.samples.append((part, func.__name__, began, self._now()))
        return out

    def _part(self, name: str) -> str:
        node = torch._C._current_autograd_node()
        if node is not None:                                # a backward: the part of the operation that made the node
            return self.of_node.get(node._sequence_nr(), "other")
        if self.optimising:
            return "optimiser"
        at = self.inside[-1] if self.inside else "head"     # the loss is computed outside the model's forward
        if at == "router":
            part = "select" if any(word in name for word in _SELECT) else "router"
        elif at == "routed":
            part = "gather" if name.split(".")[0] in _GATHER or "gather" in name else "scatter"
        else:
            part = at if at in PARTS else "other"
        self.of_node[torch.autograd._get_sequence_nr() - 1] = part
        return part

    def _now(self) -> object:
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spent(self) -> dict[str, float]:
        """Time per part."""
        wait()
        total: dict[str, float] = {}
        for part, _, began, ended in self.samples:
            total[part] = total.get(part, 0.0) + (began.elapsed_time(ended) if self.cuda else ended - began)
        return total


@torch.no_grad()
def where_time_goes(model: UnifiedModel, packed: Batch, rounds: int = 5) -> dict[str, float]:
    """Median milliseconds per forward inside the routed layers: router and selection, decoder layer, and the rest (gather,
    new intervals, scatter). Empty for a dense model."""
    routed = routed_layers(model)
    samples: dict[str, list[float]] = {"router and selection": [], "decoder layer": [], "gather and scatter": []}
    spent: dict[str, float] = {}

    def clock(key: str, module: nn.Module) -> list:
        began: list[float] = []

        def before(*_: object) -> None:
            wait()
            began.append(time.perf_counter())

        def after(*_: object) -> None:
            wait()
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
