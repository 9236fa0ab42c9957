"""The command `python -m unimod bench`: its record, one JSON object, and the table to read.

    found = bench("layer", "cpu", rounds=9)         # {"device", "versions", "commit", "command", "rows": [...]}
    table(found)                                    # Markdown
    on_gpu(Path("notebooks/records"))               # realised shares on a GPU, or the estimate on paper
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..config import ParameterError
from ..files import facts, writable, write
from ..presets import CAPTURE_SIZES, CUDA, SIZES
from .capture import capture
from .cases import attention, decode, layer, step
from .counts import counts
from .jobs import Job, jobs_of
from .parts import PARTS
from .timing import MIN_ROUNDS, OutOfTime, describe, ends_at

MEASURES = {"layer": layer, "step": step, "decode": decode, "attention": attention, "capture": capture}
GPU_SECONDS = 450.0
"""Deadline of the whole GPU set where none is given: with loading it ends within 8 minutes."""
COLUMNS = {
    "layer": "preset tokens batch layers capacity backend flops time time_wall realised realised_wall memory ms rounds "
    "note",
    "step": "preset tokens layers way capacity backend flops time realised memory ms rounds note",
    "shares": "preset tokens layers capacity " + " ".join(PARTS),
    "decode": "preset what batch layers capacity backend per_second time of_floor ms rounds note",
    "attention": "preset tokens batch backend time ms rounds note",
    "capture": "preset tokens layers way ms memory kept disk rounds note",
    "counts": "preset tokens routed device_ops dispatches host_ops uploads uploads_per_step signatures filler "
    "decode_ops",
}
"""What the table shows of each kind of row; shares: of each part in the steps."""
HEADS = {
    "flops": "FLOPs", "time_wall": "wall time", "realised_wall": "realised, wall", "per_second": "tokens/s",
    "of_floor": "of the read floor",
}


def bench(kind: str, preset: str = "", rounds: int = 9, deadline: float = 0.0, out: str | Path = "") -> dict:
    """Measure and return the record.

    kind: layer, step, decode, attention, capture, or gpu (all of them on all released sizes); preset: by default cpu,
    for capture released; deadline: seconds, 0 for none; out: a file that holds the record after every job. Raises
    `ParameterError` for what is not known or cannot run here.
    """
    if kind == "looking":
        print("unimod bench: looking is now called capture", file=sys.stderr)
        kind = "capture"
    if kind not in (*MEASURES, "counts", "gpu"):
        raise ParameterError(f"bench {kind!r} is not known. Allowed: {', '.join(MEASURES)}, counts, gpu.")
    if out:  # before minutes are spent
        writable(Path(out).absolute().parent, "The folder of --out", "Name a file elsewhere.")
    if kind == "counts":
        return _counted(preset, out)
    captures = kind == "capture"
    preset, known = preset or ("released" if captures else "cpu"), CAPTURE_SIZES if captures else (*SIZES, "gpu")
    if preset not in known:
        raise ParameterError(f"--preset {preset} is not known. Allowed: {', '.join(known)}.")
    if rounds < MIN_ROUNDS:
        raise ParameterError(f"--rounds {rounds}: nothing is claimed from less than {MIN_ROUNDS} rounds.")
    if not deadline >= 0:
        raise ParameterError(f"--deadline {deadline:g} must be seconds, or 0 for none.")
    whole = "gpu" in (kind, preset)
    if whole or (preset in CUDA and not captures):
        needs_cuda("The GPU set" if whole else f"--preset {preset}")
    command = f"python -m unimod bench {kind}" + (f" --preset {preset}" if kind != "gpu" else "")
    command += f" --rounds {rounds}" + (f" --deadline {deadline:g}" if deadline else "")
    if "OMP_NUM_THREADS" in os.environ:
        command = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} {command}"
    sizes = [size for name in (CUDA if whole else (preset,)) for size in (CAPTURE_SIZES if captures else SIZES)[name]]
    deadline = deadline or (GPU_SECONDS if whole else math.inf)
    # what is left is for freeing what a job that is cut off has built
    until = time.monotonic() + deadline - min(5.0, 0.1 * deadline)
    if kind == "gpu":
        jobs = jobs_of([name for name in MEASURES if name != "capture"], sizes, rounds, until)
        jobs += jobs_of(["capture"], CAPTURE_SIZES["released"], rounds, until)
    else:
        jobs = jobs_of([kind], sizes, rounds, until)
    found = record(command, jobs[0].device, [])

    def keep(rows: list[dict]) -> None:
        found["rows"] = rows
        if out:
            write(Path(out), json.dumps(found, indent=1) + "\n")

    run_jobs(jobs, MEASURES, keep)
    return found


def _counted(preset: str, out: str) -> dict:
    """The record of `counts`, which takes no time that could be measured."""
    if preset:
        raise ParameterError(f"--preset {preset}: counts are always of {', '.join(CUDA)}; leave it out.")
    found = record("python -m unimod bench counts", "cpu", counts())
    if out:
        write(Path(out), json.dumps(found, indent=1) + "\n")
    return found


def needs_cuda(what: str) -> None:
    """Raise `ParameterError` where torch sees no CUDA device."""
    if not torch.cuda.is_available():
        on_cpu = ", ".join(name for name in SIZES if name not in CUDA)
        raise ParameterError(f"{what} needs CUDA, and torch sees no CUDA device here. Presets for a CPU: {on_cpu}.")


def run_jobs(
    jobs: Sequence[Job], measures: dict[str, Callable[[Job], Iterator[dict]]],
    keep: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """The rows of all jobs; one that finds no time or memory leaves a row with the reason. Progress goes to stderr.

    Each job may take its share, by weight, of the time that is left until its deadline: a slow one is cut off and costs
    the others nothing; what a fast one leaves is theirs. `keep` is given all rows after every job.
    """
    rows: list[dict] = []
    for n, job in enumerate(jobs, 1):
        began, end, before = time.monotonic(), job.until, len(rows)
        share = job.weight / sum(other.weight for other in jobs[n - 1 :])
        try:
            if began > end:
                raise OutOfTime("no time was left")
            job = replace(job, until=began + share * (end - began))
            with ends_at(job.until):
                rows.extend(measures[job.kind](job))
        except OutOfTime as error:
            rows.append(job.missing(f"dropped at the deadline: {error}"))
        except torch.OutOfMemoryError:
            rows.append(job.missing("out of memory"))
        except Exception as error:  # a backend that breaks must not cost the others their rows
            message = (str(error).splitlines() or [""])[0][:200]
            rows.append(job.missing(f"failed: {type(error).__name__}: {message}"))
        if began <= end:
            gc.collect()  # a routed layer and its norm refer to one another
            if job.device == "cuda":
                torch.cuda.empty_cache()
        spent, note = time.monotonic() - began, f" ({rows[-1]['note']})" if rows[-1]["note"] else ""
        done = f"unimod bench: {n} of {len(jobs)}, {job}: {len(rows) - before} rows in {spent:.0f} s{note}"
        print(done, file=sys.stderr, flush=True)
        keep(rows)
    return rows


def record(command: str, device: str, rows: list[dict]) -> dict:
    """The JSON object: what ran where, and the rows."""
    known = facts()
    return {
        "device": describe(device),
        "versions": {k: known["versions"].get(k) for k in ("python", "torch", "transformers", "triton")},
        "commit": (known["git"]["sha"] or "unknown") + ("+changes" if known["git"]["dirty"] else ""),
        "command": command, "rows": rows,
    }


def table(found: dict) -> str:
    """The record as Markdown, one table per kind of row: what the command prints and RESULTS.md holds."""
    # rows of earlier records are of kind "looking", the former name of capture
    every = [row | {"bench": "capture"} if row["bench"] == "looking" else row for row in found["rows"]]
    every += [{**row, **row["shares"], "bench": "shares"} for row in every if row.get("shares")]
    parts = []
    for kind, columns in COLUMNS.items():
        rows = [row for row in every if row["bench"] == kind]
        if rows:
            shown = [c for c in columns.split() if any(row.get(c) not in (None, "") for row in rows)]
            lines = [[HEADS.get(c, c) for c in shown], *([_cell(row, c) for c in shown] for row in rows)]
            width = [max(len(line[i]) for line in lines) for i in range(len(shown))]
            lines.insert(1, ["-" * w for w in width])
            padded = [" | ".join(cell.ljust(w) for cell, w in zip(line, width)) for line in lines]
            parts.append("".join(f"| {line} |\n" for line in padded))
    return "\n".join(parts)


def _cell(row: dict, column: str) -> str:
    value = row.get(column)
    if value is None or value == "":
        return ""
    if column == "time":
        return f"{value:.2f} [{row['time_low']:.2f}, {row['time_high']:.2f}]"
    if column in ("memory", "kept", "disk"):
        if value >= 2**30:
            return f"{value / 2**30:.1f} GiB"
        return f"{value / 2**20:.0f} MiB" if value >= 2**20 else f"{value / 2**10:.0f} KiB"
    if column in ("ms", "per_second"):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    if column == "capacity":
        return str(value) if isinstance(value, str) else "dense" if value == 1 else f"{value:g}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


_EARLIER = re.compile(r"-before-([0-9a-f]{7})-")
"""In the name of a record that was made before later work on speed, by an export without git: the commit."""


def commit_of(name: str, found: dict) -> str:
    """The commit of a record: its own, or where it was made without git the one in its file's name."""
    earlier = _EARLIER.search(name)
    return earlier[1] if earlier and found["commit"] == "unknown" else found["commit"]


def source_of(name: str, found: dict) -> str:
    """Where the figures of a record of the benchmark come from: file or age, device, commit."""
    what = "measured before, " if _EARLIER.search(name) else f"{name}: "
    return f"{what}{found['device']}, commit {commit_of(name, found)[:10]}"


PAPER = "estimate on paper, H200, not measured"
ESTIMATE = (
    # Per routed layer at capacity 0.5: matrix products at 790 TFLOP/s, memory at 4.3 TB/s; with x = 2 D T bytes,
    # router, gather and scatter move (10 + 22 c) x in plain torch, (4 + 15 c) x fused, (1 + 6 c) x fused in place,
    # forward and backward.
    ("showo-256, 387 x 10", {"plain torch": 0.75, "fused": 0.90, "fused in place": 0.95}),
    ("showo-512, 1,155 x 24", {"plain torch": 0.91, "fused": 0.95, "fused in place": 0.98}),
    ("emu3-4k, 4,096 x 4", {"plain torch": 0.955, "fused": 0.98, "fused in place": 0.99}),
)
"""Realised share of the theoretical saving, shown until there is a record of a GPU."""
COMMAND = "python -m unimod bench gpu --out notebooks/records/bench-gpu.json"
"""Makes the record that takes the estimate's place."""


def on_gpu(folder: Path) -> list[dict]:
    """Realised shares of the stack on a GPU, of the committed records (bench-*.json); where there is none, the
    estimate. `source` tells which; `kept` is the capacity of every other layer, or "paper" for the paper's own plan;
    `way` the backends, of an earlier record with "before"."""
    rows = []
    for path in sorted(folder.glob("bench-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["device"].startswith("CPU"):
            continue
        source, age = source_of(path.name, found), ", before" if _EARLIER.search(path.name) else ""
        for row in found["rows"]:
            if row["bench"] == "layer" and row["realised"] is not None:
                model = f"{row['preset']}, {row['tokens']} tokens"
                measured = {"way": row["backend"] + age, "realised": row["realised"], "source": source}
                rows.append({"model": model, "kept": str(row["capacity"]), **measured})
    estimates = [(model, way, share) for model, ways in ESTIMATE for way, share in ways.items()]
    return rows or [
        {"model": model, "kept": "0.5", "way": way, "realised": share, "source": PAPER}
        for model, way, share in estimates
    ]
