"""Attention by every backend that runs here, forward and backward, on the rows of a preset.

    for row in attention(job): ...
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..batch import pack
from ..ops.attention import interval_attention
from ..ops.backend import use_backend
from .clock import columns, compared, rounds_of
from .job import Job, available


def attention(job: Job) -> Iterator[dict]:
    """One row per backend; times are relative to the preferred one's."""
    model, rows = job.size.outline()
    packed = pack(rows).to(job.device)
    config = model.decoder.config
    heads, d = config.num_attention_heads, model.width // config.num_attention_heads
    q, k, v = (torch.randn(n, len(packed), d, device=job.device, dtype=job.dtype, requires_grad=True)
               for n in (heads, config.num_key_value_heads, config.num_key_value_heads))
    grad = torch.randn(len(packed), heads, d, device=job.device, dtype=job.dtype)

    memo: dict[str, dict] = {name: {} for name in available("attention", job.device)}      # what a forward works out once for all its layers

    def run(name: str) -> None:
        with use_backend(name):
            interval_attention(q, k, v, packed.lo, packed.hi, packed.lengths, d ** -0.5, packed.masks, memo[name]).backward(grad)

    def clear() -> None:
        q.grad = k.grad = v.grad = None

    names = list(memo)
    times = compared(rounds_of({name: (lambda name=name: run(name)) for name in names}, job.rounds, warmup=2, after=clear, until=job.until), job.headline)
    for name, t in times.items():
        yield job.row(len(packed), model, capacity=1.0, backend=name, realised=None, **columns(t)) | {"note": "one layer"}
