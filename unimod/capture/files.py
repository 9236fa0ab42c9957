"""A record as files: `tokens.parquet`, one row per token of the batch, and `attention.npz`, queries and keys per layer, bit for bit.

npz knows no bfloat16, so every tensor is stored as the bytes it is, with its dtype's name beside it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Segment, Task
from .folder import reading, write

COLUMNS = ("ids", "row", "position", "task", "modality", "lo", "hi", "target")


def save(folder: Path, layers: dict, whole: Batch, about: dict[str, str]) -> Path:
    """Write the layers (number -> LayerAttention) and the batch."""
    host = whole.to("cpu")
    each = {i: {"scale": a.scale, "segments": _plain(a.packed.segments), "dtype": str(a.q.dtype).removeprefix("torch.")} for i, a in layers.items()}
    arrays = {}
    for i, a in layers.items():
        arrays |= {f"{i}/{name}": getattr(a.packed, name).to(torch.int64).cpu().numpy() for name in COLUMNS}
        arrays |= {f"{i}/{name}": _bytes(x) for name, x in (("q", a.q), ("k", a.k))}
    return write(folder, {"tokens": {name: getattr(host, name).numpy() for name in COLUMNS}}, "attention", arrays,
                 {"about": about, "masks": host.masks, "segments": _plain(host.segments), "layers": each})


def load(folder: Path) -> tuple[dict[int, tuple[Tensor, Tensor, float, Batch]], Batch, dict[str, str]]:
    """Layers (q, k, scale, packed), batch, and what is known of the model. Raises `CaptureError`."""
    with reading(folder, ["tokens"], "attention", "attention record", "AttentionRecord.save") as ((table,), arrays, notes):
        whole = _packed({name: table[name].to_numpy() for name in COLUMNS}, notes["segments"], notes["masks"])
        seen = {}
        for i, kept in notes["layers"].items():
            part = _packed({name: arrays[f"{i}/{name}"] for name in COLUMNS}, kept["segments"], notes["masks"])
            q, k = (_tensor(arrays[f"{i}/{name}"], kept["dtype"]) for name in ("q", "k"))
            seen[int(i)] = q, k, kept["scale"], part
        return seen, whole, notes["about"]


def _plain(segments: tuple[Segment, ...]) -> list[list]:
    return [[s.row, int(s.task), s.length, s.rule] for s in segments]


def _packed(columns: dict[str, np.ndarray], segments: list[list], masks: list[str]) -> Batch:
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in columns.items()}
    return Batch(**tensors, segments=tuple(Segment(row, Task(task), n, rule) for row, task, n, rule in segments), masks=tuple(masks))


def _bytes(x: Tensor) -> np.ndarray:
    """[..., d] as uint8 [..., d * bytes of an entry]."""
    return x.detach().cpu().contiguous().view(torch.uint8).numpy()


def _tensor(raw: np.ndarray, dtype: str) -> Tensor:
    return torch.from_numpy(raw).view(getattr(torch, dtype))
