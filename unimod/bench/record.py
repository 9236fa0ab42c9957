"""What a benchmark leaves: one JSON object, or a table to read.

    {"device", "versions", "commit", "command", "rows": [{"preset", "tokens", "capacity", "backend", "realised", ...}]}
"""

from __future__ import annotations

import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..files import facts
from .clock import OutOfTime
from .job import Job
from .parts import PARTS

COLUMNS = {
    "layer": ("preset", "tokens", "batch", "layers", "capacity", "backend", "flops", "time", "time_wall", "realised", "realised_wall", "memory", "ms", "rounds",
              "note"),
    "step": ("preset", "tokens", "layers", "way", "capacity", "backend", "flops", "time", "realised", "memory", "ms", "rounds", "note"),
    "shares": ("preset", "tokens", "layers", "capacity", *PARTS),
    "decode": ("preset", "what", "batch", "layers", "capacity", "backend", "per_second", "time", "of_floor", "ms", "rounds", "note"),
    "attention": ("preset", "tokens", "batch", "backend", "time", "ms", "rounds", "note"),
    "looking": ("preset", "tokens", "layers", "way", "ms", "memory", "kept", "disk", "rounds", "note"),
}
"""What the table shows of each kind of row; shares: of each part in the steps."""
HEADS = {"flops": "FLOPs", "time_wall": "wall time", "realised_wall": "realised, wall", "per_second": "tokens/s", "of_floor": "of the read floor"}


def record(command: str, device: str, rows: list[dict]) -> dict:
    """The JSON object: what ran where, and the rows."""
    known = facts()
    return {"device": describe(device), "versions": {k: known["versions"].get(k) for k in ("python", "torch", "transformers", "triton")},
            "commit": (known["git"]["sha"] or "unknown") + ("+changes" if known["git"]["dirty"] else ""), "command": command, "rows": rows}


def describe(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")] if info.exists() else []
    return f"CPU ({names[0] if names else platform.machine()}), {torch.get_num_threads()} of {os.cpu_count()} cores"


def measure(jobs: Sequence[Job], measures: dict[str, Callable[[Job], Iterator[dict]]]) -> list[dict]:
    """The rows of all jobs; one that finds no time or memory leaves a row that says so. Progress goes to stderr."""
    rows: list[dict] = []
    for n, job in enumerate(jobs, 1):
        began, before = time.monotonic(), len(rows)
        try:
            if began > job.until:
                raise OutOfTime("no time was left")
            rows.extend(measures[job.kind](job))
        except OutOfTime as error:
            rows.append(job.missing(f"dropped at the deadline: {error}"))
        except torch.OutOfMemoryError:
            rows.append(job.missing("out of memory"))
        except Exception as error:                          # a backend that breaks must not cost the others their rows
            rows.append(job.missing(f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"))
        gc.collect()                                        # a routed layer and its norm refer to one another
        if job.device == "cuda":
            torch.cuda.empty_cache()
        print(f"unimod bench: {n} of {len(jobs)}, {job}: {len(rows) - before} rows in {time.monotonic() - began:.0f} s"
              + (f" ({rows[-1]['note']})" if rows[-1]["note"] else ""), file=sys.stderr, flush=True)
    return rows


def table(found: dict) -> str:
    """The record as Markdown, one table per kind of row: what the command prints and the README quotes."""
    parts, shares = [], [{**row, **row["shares"], "bench": "shares"} for row in found["rows"] if row.get("shares")]
    for kind, columns in COLUMNS.items():
        rows = [row for row in (*found["rows"], *shares) if row["bench"] == kind]
        if rows:
            shown = [c for c in columns if any(row.get(c) not in (None, "") for row in rows)]
            lines = [[HEADS.get(c, c) for c in shown], *([_cell(row, c) for c in shown] for row in rows)]
            width = [max(len(line[i]) for line in lines) for i in range(len(shown))]
            lines.insert(1, ["-" * w for w in width])
            parts.append("".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width)) + " |\n" for line in lines))
    return "\n".join(parts)


def _cell(row: dict, column: str) -> str:
    value = row.get(column)
    if value is None or value == "":
        return ""
    if column == "time":
        return f"{value:.2f} [{row['time_low']:.2f}, {row['time_high']:.2f}]"
    if column in ("memory", "kept", "disk"):
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB" if value >= 2**20 else f"{value / 2**10:.0f} KiB"
    if column in ("ms", "per_second"):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    if column == "capacity":
        return str(value) if isinstance(value, str) else "dense" if value == 1 else f"{value:g}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
