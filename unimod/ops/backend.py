"""Which implementation of an op runs: chosen once per device and dtype, reported once with the reason, forced by name
on request.

    UNIMOD_BACKEND=reference python ...     # or triton; sdpa, varlen, flash; one of each: triton,varlen
    with use_backend("reference", "sdpa"): ...
    with meta_as("cuda"), count_launches() as launched: ...     # the way of a GPU without one: shapes only

Every op has a reference that runs anywhere; the others must give the same numbers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from ..config import ParameterError

# On an H200 in bf16, rows of equal length, sdpa took .50 to .88 of varlen's time; FlexAttention (1.43 ms where sdpa
# took .95, else at least 1.5 times sdpa's) was dropped. Rows of different lengths are not measured yet: there sdpa pads
# and varlen does not.
FAMILIES = {"kernels": ("triton", "reference"), "attention": ("flash", "varlen", "sdpa")}
"""Implementations by family, the preferred first; the last one runs anywhere."""
_HALF = (torch.float16, torch.bfloat16)


def _triton(device: str, dtype: torch.dtype) -> str:
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'unimod[gpu]')"
    if dtype not in (torch.float32, *_HALF):
        return f"its kernels compute in float32, this is {_short(dtype)}"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton needs a CUDA device, or TRITON_INTERPRET=1"
    return ""


def _flash(device: str, dtype: torch.dtype) -> str:
    if find_spec("flash_attn") is None and find_spec("flash_attn_interface") is None:
        return "flash-attn is not installed (pip install 'unimod[flash]')"
    if why := _half(device, dtype):
        return why
    from .attention_varlen import flash_function

    return "" if flash_function() else "the installed flash-attn has no flash_attn_varlen_func; install version 2 or 3"


def _half(device: str, dtype: torch.dtype) -> str:
    if device == "cuda" and dtype in _HALF:
        return ""
    return f"it needs float16 or bfloat16 on CUDA, this is {_short(dtype)} on {device}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_MISSING: dict[str, Callable[[str, torch.dtype], str]] = {
    "triton": _triton, "reference": lambda *_: "", "flash": _flash, "varlen": _half, "sdpa": lambda *_: ""}
"""Why an implementation cannot run on a device and dtype; empty when it can."""
_forced: tuple[str, ...] | None = None
_meta = "meta"
"""The device type whose implementations run on tensors of the meta device."""
_launched: list[str] | None = None
_chosen: dict[tuple[str, str, torch.dtype, tuple[str, ...]], str] = {}


def backend(family: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """The implementation of a family of ops on a device type (cpu, cuda) for a dtype. Raises `ParameterError` when a
    forced one cannot run there."""
    key = (family, _meta if device == "meta" else device, dtype, forced())
    if key not in _chosen:
        _chosen[key] = _choose(*key)
    return _chosen[key]


def choice(family: str, device: str, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The implementation that `backend` gives, and for each preferred one that is not taken the reason. Raises as
    `backend`."""
    return _choice(family, device, dtype, forced())


def forced() -> tuple[str, ...]:
    """The names in force by `use_backend`, else by UNIMOD_BACKEND. Raises `ParameterError` for a name that no family
    has."""
    if _forced is not None:
        return _forced
    return _checked(os.environ.get("UNIMOD_BACKEND", "").replace(",", " ").split())


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Force implementations inside the block; no name: the automatic choice, whatever UNIMOD_BACKEND is."""
    global _forced
    before, _forced = _forced, _checked(names)
    try:
        yield
    finally:
        _forced = before


@contextmanager
def meta_as(device: str) -> Iterator[None]:
    """Inside the block tensors of the meta device go the way of another device type: what would run is counted."""
    global _meta
    before, _meta = _meta, device
    try:
        yield
    finally:
        _meta = before


@contextmanager
def count_launches() -> Iterator[list[str]]:
    """The names of the Triton kernels that are launched inside the block, in order."""
    global _launched
    before, _launched = _launched, []
    try:
        yield _launched
    finally:
        _launched = before


def launch(kernel: Callable, grid: tuple[int, ...], *tensors: object, **options: object) -> None:
    """Run a Triton kernel over `grid` on the device of its first argument; on the meta device nothing runs."""
    if _launched is not None:
        _launched.append(kernel.fn.__name__)
    if tensors[0].is_meta:
        return
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, **options)


def _checked(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in _MISSING:
            allowed = "; ".join(f"{' or '.join(members)} for {family}" for family, members in FAMILIES.items())
            raise ParameterError(f"There is no backend {name!r}. Allowed: {allowed}.")
    return tuple(names)


@torch.compiler.assume_constant_result
def _choose(family: str, device: str, dtype: torch.dtype, names: tuple[str, ...]) -> str:
    """The choice, reported on stderr where it is automatic."""
    name, reasons = _choice(family, device, dtype, names)
    if name not in names:
        why = "; ".join(f"{other}: {reason}" for other, reason in reasons.items())
        say(f"unimod: {family} by {name} on {device}" + (f" ({why})" if why else ""))
    return name


def _choice(family: str, device: str, dtype: torch.dtype, names: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The first forced name of the family, else the preferred implementation that can run and why those before it
    cannot."""
    missing = {name: _MISSING[name](device, dtype) for name in FAMILIES[family]}
    possible = [name for name, why in missing.items() if not why]
    for name in names:
        if name in missing:
            if missing[name]:
                raise ParameterError(f"UNIMOD_BACKEND or use_backend asks for {name!r}, but {missing[name]}. "
                                     f"Allowed here: {', '.join(possible)}.")
            return name, {}
    preferred = FAMILIES[family][:FAMILIES[family].index(possible[0])]
    return possible[0], {name: missing[name] for name in preferred}


def say(line: str) -> None:
    """Print a line on stderr; in a notebook, which frames stderr like an error, on stdout."""
    print(line, file=sys.stdout if "ipykernel" in sys.modules else sys.stderr, flush=True)
