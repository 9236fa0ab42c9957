"""CUDA graphs: a step that reads and writes tensors which stay where they are, recorded once and then replayed.

    warm_up(step)                           # kernels are compiled and workspaces allocated
    graph, out = record(step)               # nothing runs
    graph.replay()                          # what the step would compute anew is in `out`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def warm_up(step: Callable[[], object]) -> None:
    """Run a step on a stream of its own, as torch asks for before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)


def record(step: Callable[[], T], generator: torch.Generator | None = None,
           pool: object | None = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of a step and what the step returned.

    generator: of the device, by which the step draws samples, beside torch's own. pool: the memory of an earlier graph,
    `graph.pool()`, to be shared. Raises RuntimeError, in one line, with the reason why the step cannot be a graph.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    if generator is not None:
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph, pool=pool):
            out = step()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)                       # where its end fails, the capture's own stays in place
        # the capture's end complains too: what came first is the reason
        first = error.__context__ or error
        raise RuntimeError((str(first).splitlines() or [type(first).__name__])[0]) from error
    return graph, out
