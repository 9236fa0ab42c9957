"""A record as files: `tokens.parquet`, one row per token of the batch, and `attention.npz`, queries and keys per layer, bit for bit.

npz knows no bfloat16, so every tensor is stored as the bytes it is, with its dtype's name beside it. Written whole or not at all.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..tokens import Packed, Segment, Task

COLUMNS = ("ids", "row", "position", "task", "modality", "lo", "hi", "target")


class Damaged(ValueError):
    """A folder that cannot be read as a record: the message names the file and what is wrong."""


def save(folder: Path, layers: dict, whole: Packed, about: dict[str, str]) -> Path:
    """Write the layers (number -> LayerAttention) and the batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    host = whole.to("cpu")
    each = {i: {"scale": a.scale, "segments": _plain(a.packed.segments), "dtype": str(a.q.dtype).removeprefix("torch.")} for i, a in layers.items()}
    notes = {"about": about, "masks": host.masks, "segments": _plain(host.segments), "layers": each}
    arrays = {"notes": np.frombuffer(json.dumps(notes).encode(), np.uint8)}
    for i, a in layers.items():
        parts = {name: getattr(a.packed, name) for name in COLUMNS}
        arrays |= {f"{i}/{name}": value.to(torch.int64).cpu().numpy() for name, value in parts.items()}
        arrays |= {f"{i}/{name}": _bytes(x) for name, x in (("q", a.q), ("k", a.k))}
    pq.write_table(pa.table({name: getattr(host, name).numpy() for name in COLUMNS}), folder / "tokens.part")
    with open(folder / "attention.part", "wb") as file:
        np.savez_compressed(file, **arrays)
    for name, suffix in (("tokens", "parquet"), ("attention", "npz")):
        os.replace(folder / f"{name}.part", folder / f"{name}.{suffix}")
    return folder


def load(folder: Path) -> tuple[dict[int, tuple[Tensor, Tensor, float, Packed]], Packed, dict[str, str]]:
    """Layers (q, k, scale, packed), batch, and what is known of the model. Raises `Damaged`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    missing = [name for name in ("tokens.parquet", "attention.npz") if not (folder / name).is_file()]
    if missing:
        raise Damaged(f"{folder} holds no attention record: {' and '.join(missing)} missing. Give a folder that AttentionRecord.save wrote.")
    try:
        with np.load(folder / "attention.npz") as store:
            notes = json.loads(store["notes"].tobytes())
            arrays = {name: store[name] for name in store.files}
        table = pq.read_table(folder / "tokens.parquet")
        whole = _packed({name: table[name].to_numpy() for name in COLUMNS}, notes["segments"], notes["masks"])
        seen = {}
        for i, kept in notes["layers"].items():
            part = _packed({name: arrays[f"{i}/{name}"] for name in COLUMNS}, kept["segments"], notes["masks"])
            q, k = (_tensor(arrays[f"{i}/{name}"], kept["dtype"]) for name in ("q", "k"))
            seen[int(i)] = q, k, kept["scale"], part
    except (KeyError, ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile, pa.ArrowException) as error:
        raise Damaged(f"{folder} cannot be read as an attention record ({type(error).__name__}: {error}). Save it again.") from error
    return seen, whole, notes["about"]


def _plain(segments: tuple[Segment, ...]) -> list[list]:
    return [[s.row, int(s.task), s.length, s.rule] for s in segments]


def _packed(columns: dict[str, np.ndarray], segments: list[list], masks: list[str]) -> Packed:
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in columns.items()}
    return Packed(**tensors, segments=tuple(Segment(row, Task(task), n, rule) for row, task, n, rule in segments), masks=tuple(masks))


def _bytes(x: Tensor) -> np.ndarray:
    """[..., d] as uint8 [..., d * bytes of an entry]."""
    return x.detach().cpu().contiguous().view(torch.uint8).numpy()


def _tensor(raw: np.ndarray, dtype: str) -> Tensor:
    return torch.from_numpy(raw).view(getattr(torch, dtype))
