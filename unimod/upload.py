"""What a batch is worked out to on the host goes to the device in one copy.

    batch, plan = upload((batch, plan), "cuda")            # one pinned copy, nothing waits for it
    upload((batch, plan), "cuda", into=buffer)             # into the same memory every time, as a CUDA graph needs it

Goes through dataclasses, dicts, lists and tuples; what is no tensor of the host stays as it is.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

ALIGNED = 16
"""Bytes: where each tensor begins in the copy, so that kernels may read it in full words."""
T = TypeVar("T")


def upload(made: T, device: torch.device | str, into: Tensor | None = None) -> T:
    """The same with its host tensors on `device`; to the CPU, without `into`, it is what was given.

    into: uint8 [>= `size_of(made)`] on the device, whose views the tensors become. One copy in place of one per tensor:
    at 24 routed layers these were 36 of a step, 27 of which the host waited for.
    """
    device = torch.device(device)
    if device.type == "cpu" and into is None:
        return made
    tensors = list(_tensors(made).values())
    if not tensors:
        return made
    *starts, size = _starts(tensors)
    # from pageable memory the host would wait for the copy
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for x, start in zip(tensors, starts):
        host[start:start + x.nbytes].view(x.dtype).copy_(x.reshape(-1))
    there = host.to(device, non_blocking=True) if into is None else into[:size].copy_(host, non_blocking=True)
    return _with(made, {id(x): there[start:start + x.nbytes].view(x.dtype).view(x.shape)
                        for x, start in zip(tensors, starts)})


def size_of(made: object) -> int:
    """Bytes of the copy that `upload` makes."""
    return _starts(list(_tensors(made).values()))[-1]


def layout_of(made: object) -> tuple:
    """What lies where in the copy: dtype and shape of each tensor."""
    return tuple((x.dtype, x.shape) for x in _tensors(made).values())


def _starts(tensors: list[Tensor]) -> list[int]:
    """Where each tensor begins in the copy, and where the last one ends."""
    return list(accumulate((-(-x.nbytes // ALIGNED) * ALIGNED for x in tensors), initial=0))


def _tensors(x: object) -> dict[int, Tensor]:
    """Host tensors inside x, each once, by id."""
    if isinstance(x, Tensor):
        return {id(x): x} if x.device.type == "cpu" else {}
    found: dict[int, Tensor] = {}
    for part in _parts(x).values():
        found |= _tensors(part)
    return found


def _with(x: T, moved: dict[int, Tensor]) -> T:
    """x with its host tensors replaced."""
    if isinstance(x, Tensor):
        return moved.get(id(x), x)
    parts = {name: _with(part, moved) for name, part in _parts(x).items()}
    if not parts:
        return x
    if is_dataclass(x):
        return replace(x, **parts)
    return parts if isinstance(x, dict) else type(x)(parts.values())


def _parts(x: object) -> dict:
    """What x holds that may hold tensors, by name; fields that are not given at the start stay behind."""
    if is_dataclass(x):
        held = {f.name: getattr(x, f.name) for f in fields(x) if f.init}
        return {name: part for name, part in held.items() if isinstance(part, Tensor) or is_dataclass(part)
                or (isinstance(part, dict | list | tuple) and _nested(part))}
    if isinstance(x, dict):
        return x
    return dict(enumerate(x)) if isinstance(x, list | tuple) and _nested(x) else {}


def _nested(x: dict | list | tuple) -> bool:
    """Whether a container holds tensors somewhere, judged by its first part: 50 segments are not walked through."""
    first = next(iter(x.values() if isinstance(x, dict) else x), None)
    return isinstance(first, Tensor) or bool(_parts(first))
