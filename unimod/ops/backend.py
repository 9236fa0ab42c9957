"""Which implementation of an op runs: chosen once per device and dtype, said once with the reason, forced by hand where wanted.

    UNIMOD_BACKEND=reference python ...            # or triton; an attention: sdpa, varlen, flash, flex; or one of each: triton,varlen
    with use_backend("reference", "sdpa"): ...

Every op has a reference, written to be read, which runs anywhere; the others must give the same numbers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from ..config import ParameterError

FAMILIES = {"kernels": ("triton", "reference"), "attention": ("flash", "varlen", "sdpa", "flex")}
"""Implementations by family, the preferred first; what stands behind one that runs anywhere is taken by name only."""
_HALF = (torch.float16, torch.bfloat16)


def _triton(device: str, dtype: torch.dtype) -> str:
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'unimod[gpu]')"
    if dtype not in (torch.float32, *_HALF):
        return f"its kernels compute in float32, this is {str(dtype).removeprefix('torch.')}"
    return "" if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "triton needs a CUDA device, or TRITON_INTERPRET=1"


def _flash(device: str, dtype: torch.dtype) -> str:
    if find_spec("flash_attn") is None and find_spec("flash_attn_interface") is None:
        return "flash-attn is not installed (pip install 'unimod[flash]')"
    return _half(device, dtype)


def _half(device: str, dtype: torch.dtype) -> str:
    return "" if device == "cuda" and dtype in _HALF else f"it needs float16 or bfloat16 on CUDA, this is {str(dtype).removeprefix('torch.')} on {device}"


def _flex(device: str, dtype: torch.dtype) -> str:
    return "" if device == "cuda" else f"it has no backward on {device}"


_MISSING: dict[str, Callable[[str, torch.dtype], str]] = {
    "triton": _triton, "flash": _flash, "varlen": _half, "flex": _flex, "reference": lambda *_: "", "sdpa": lambda *_: ""}
"""Why an implementation cannot run on a device and dtype; empty when it can."""
_forced: tuple[str, ...] | None = None
_chosen: dict[tuple[str, str, torch.dtype, tuple[str, ...]], str] = {}


def backend(family: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """The implementation of a family of ops on a device type (cpu, cuda) for a dtype. Raises `ParameterError` when a forced one cannot run there."""
    names = forced()
    key = (family, device, dtype, names)
    if key not in _chosen:
        _chosen[key] = _choose(*key)
    return _chosen[key]


def forced() -> tuple[str, ...]:
    """The names in force by `use_backend`, else by UNIMOD_BACKEND. Raises `ParameterError` for a name that no family has."""
    return _checked(os.environ.get("UNIMOD_BACKEND", "").replace(",", " ").split()) if _forced is None else _forced


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Force implementations for as long as the block lasts; none: the automatic choice, whatever UNIMOD_BACKEND says."""
    global _forced
    before, _forced = _forced, _checked(names)
    try:
        yield
    finally:
        _forced = before


def _checked(names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in _MISSING:
            raise ParameterError(f"There is no backend {name!r}. Allowed: " + "; ".join(f"{' or '.join(f)} for {n}" for n, f in FAMILIES.items()) + ".")
    return tuple(names)


@torch.compiler.assume_constant_result
def _choose(family: str, device: str, dtype: torch.dtype, names: tuple[str, ...]) -> str:
    for name in names:
        if name in FAMILIES[family]:
            if why := _MISSING[name](device, dtype):
                raise ParameterError(f"UNIMOD_BACKEND or use_backend asks for {name!r}, but {why}. Allowed here: "
                                     f"{', '.join(n for n in FAMILIES[family] if not _MISSING[n](device, dtype))}.")
            return name
    name, reasons = _automatic(family, device, dtype)
    why = "; ".join(f"{other}: {reason}" for other, reason in reasons.items())
    say(f"unimod: {family} by {name} on {device}" + (f" ({why})" if why else ""))
    return name


def _automatic(family: str, device: str, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The preferred implementation that can run, and of those before it why they cannot."""
    reasons = {}
    for name in FAMILIES[family]:
        if not (why := _MISSING[name](device, dtype)):
            break
        reasons[name] = why
    return name, reasons


def choice(family: str, device: str, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The implementation that `backend` gives, and for each preferred one that is not taken the reason. Raises as `backend` does."""
    taken = [name for name in forced() if name in FAMILIES[family]]
    if taken:
        return backend(family, device, dtype), {}
    return _automatic(family, device, dtype)


def say(line: str) -> None:
    """Say a line on stderr, but in a notebook, which frames stderr like an error, as ordinary output."""
    print(line, file=sys.stdout if "ipykernel" in sys.modules else sys.stderr, flush=True)
