"""Which backend attends fastest: measured when the first batch of a class of shapes comes, and remembered.

    fastest(("varlen", "sdpa"), mask, "cuda", torch.bfloat16, (32, 8, 128), interval_attention)     # in about 2 s

Neither is always the faster: on an H200 SDPA took .50 to .88 of varlen's time on rows of equal length, but it pads rows
of different lengths. A class is a device, dtype, heads and their width, kinds of masks, and sizes rounded to powers of
two. What was measured is kept in the process and in `~/.cache/unimod/attention.json`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache

import torch

from ..config import SetupError
from ..files import cache_folder, write
from ..mask import IntervalMask
from ..upload import upload
from .backend import say, use_backend

SECONDS = 2.0
"""After so long no further round begins."""
ROUNDS = 7
_fastest: dict[str, str] = {}
"""By class, as JSON."""


def fastest(names: tuple[str, ...], mask: IntervalMask, device: str, dtype: torch.dtype, shape: tuple[int, int, int],
            attend: Callable) -> str:
    """The fastest of these backends, forward and backward. device: its type; shape: heads, heads of keys, their width;
    attend: `attention.interval_attention`.

    While a CUDA graph is recorded nothing is measured: what is not known then goes by varlen.
    """
    key = _class(names, mask.lengths, mask.kinds, device, dtype, shape, _torchs_flash())
    if key not in _fastest:
        if device == "cuda" and torch.cuda.is_current_stream_capturing():
            return "varlen"
        known = _stored().get(key)
        _fastest[key] = known["fastest"] if known else _measure(names, mask, device, dtype, shape, attend, key)
    return _fastest[key]


@lru_cache(1024)
def _class(names: tuple[str, ...], lengths: tuple[int, ...], kinds: tuple[str, ...], device: str, dtype: torch.dtype,
           shape: tuple[int, int, int], flash: str | None) -> str:
    rows = "equal" if len(set(lengths)) == 1 else "different"
    sizes = [_power(n) for n in (len(lengths), max(lengths), sum(lengths))]
    where = [_device(device), torch.__version__, flash, names]
    return json.dumps([*where, str(dtype), shape, sorted(set(kinds)), rows, sizes])


def _power(n: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(0, n - 1).bit_length()


@cache
def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _torchs_flash() -> str | None:
    """The implementation that was activated for torch's own kernels, such as FA3, where torch can be asked."""
    asked = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return asked() if asked else None


def _stored() -> dict[str, dict]:
    """What was measured before, by class; empty where the file is not there or not readable."""
    try:
        found = json.loads((cache_folder() / "attention.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _measure(names: tuple[str, ...], mask: IntervalMask, device: str, dtype: torch.dtype, shape: tuple[int, int, int],
             attend: Callable, key: str) -> str:
    """The backend with the least median time, said with all times and stored."""
    times, failed = _times(names, mask, device, dtype, shape, attend)
    milliseconds = {name: 1000 * statistics.median(each) for name, each in times.items()}
    # sdpa runs anywhere
    name = min(milliseconds, key=milliseconds.get, default="sdpa")
    heads, kv_heads, width = shape
    found = [f"{other} {ms:.3g} ms" for other, ms in milliseconds.items()]
    found += [f"{other}: {why}" for other, why in failed.items()]
    say(f"unimod: attention by {name} on {device} for {len(mask.lengths)} rows of at most {max(mask.lengths)} tokens, "
        f"{heads} heads ({kv_heads} of keys) of {width}, measured: {', '.join(found)}")
    with suppress(SetupError):                              # a cache that cannot be written costs the next process 2 s
        stored = _stored() | {key: {"fastest": name, "ms": milliseconds}}
        write(cache_folder() / "attention.json", json.dumps(stored, indent=1) + "\n")
    return name


def _times(names: tuple[str, ...], mask: IntervalMask, device: str, dtype: torch.dtype, shape: tuple[int, int, int],
           attend: Callable) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each counted round, forward and backward, and why a backend failed. Rounds are interleaved."""
    heads, kv_heads, width = shape
    # numbers of its own: the user's random state must not depend on what was measured
    generator = torch.Generator(device).manual_seed(0)
    times, failed = {name: [] for name in names}, {}
    until = time.perf_counter() + SECONDS
    with torch.inference_mode(False), torch.enable_grad():
        mask, memos = upload(mask, device), {name: {} for name in names}
        # [T, H, d] in memory, as projections give them
        q, k, v = (torch.randn(len(mask), n, width, generator=generator, dtype=dtype, device=device).transpose(0, 1)
                   .requires_grad_() for n in (heads, kv_heads, kv_heads))
        for n in range(ROUNDS + 1):
            for name in [name for name in names[:: 1 if n % 2 else -1] if name not in failed]:
                if n > 1 and time.perf_counter() > until:
                    break
                _synchronize(device)
                began = time.perf_counter()
                try:
                    with use_backend(name):
                        out = attend(q, k, v, mask, width ** -0.5, memos[name])
                    torch.autograd.grad(out, (q, k, v), out.detach())
                    _synchronize(device)
                except Exception as error:                  # another one runs instead
                    failed[name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
                    continue
                if n:                                       # the first round compiles and works the mask out
                    times[name].append(time.perf_counter() - began)
    return {name: each for name, each in times.items() if each and name not in failed}, failed


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
