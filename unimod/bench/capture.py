"""What it takes to capture the attention of one long row: memory, time and size, each way in a process of its own.

    for row in capture(job): ...      # plain forward, unimod's ways, full maps, and BertViz where it is installed

The stack of decoder layers alone with random weights, from random hidden states. Every way but BertViz's has the
forward in it, which is the first row; BertViz is given maps that exist already. Memory is what came on top of weights
and input: on a CPU the high-water mark of resident memory (VmHWM of Linux), on CUDA what was allocated at most.
"""

from __future__ import annotations

import importlib.metadata
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import seam
from ..analysis.attention import capture_overview, capture_patterns
from ..batch import Batch, pack
from ..capture import LayerAttention, capture_batch, capture_summary
from ..config import ParameterError
from ..models.unified import UnifiedModel
from ..ops.backend import use_backend
from ..presets import materialise
from .cases import time_columns
from .jobs import Job
from .timing import OutOfTime, Times, paired_ratios, time_interleaved

ENOUGH = 10.0
"""Seconds after which no further round begins."""
ENTRIES = 2**22
"""Entries of maps that BertViz is given: each takes about 40 bytes of page and 200 of memory; all else is scaled."""
SHARE = 0.8
"""Of the free memory, what full maps may take."""
STATUS = Path("/proc/self/status")


class Way(NamedTuple):
    """run: returns the bytes of what it made, and how to write that to a folder; share: of all map entries, those it
    makes; note: of the row."""

    run: Callable[[], tuple[int, Callable[[Path], object] | None]]
    share: float = 1.0
    note: str = ""


def capture(job: Job) -> Iterator[dict]:
    """One row per way: `ms`, `memory`, `kept` (bytes of what is left to read) and `disk` (bytes of it as files)."""
    if job.device == "cpu" and not STATUS.exists():
        raise ParameterError(
            f"bench capture reads the peak of memory from {STATUS}, which is not here: run it on Linux, or with CUDA."
        )
    model, rows = stack(job)
    need = sum(p.numel() * p.element_size() for p in model.to(job.dtype).parameters())
    free = _free(job.device)
    if need > SHARE * free:
        raise MemoryError(f"{need / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB of memory free")
    for way in WAYS:
        if time.monotonic() > job.until:
            raise OutOfTime(f"no time was left for {way}")
        found, note = _in_own_process(job, way)
        columns = {"way": way, "capacity": 1.0, "backend": job.backend, "realised": None, **found, "note": note}
        yield job.row(len(rows[0].ids), model, **columns)


def stack(job: Job) -> tuple[UnifiedModel, list]:
    """The layers and the final norm on the meta device, and the row."""
    model, rows = job.size.outline()
    # no embeddings and next to no head: with one or two layers they would be most of the weights
    seam.set_embedding(model.decoder, nn.Identity())
    model.lm.lm_head = nn.Linear(model.width, 1, bias=False, device="meta")
    return model, rows


def built(job: Job) -> tuple[UnifiedModel, Batch]:
    """`stack` with random weights and hidden states, the same in every process."""
    torch.manual_seed(0)
    model, rows = stack(job)
    model, batch = materialise(model, job.device, job.dtype).eval(), pack(rows).to(job.device)
    h = torch.randn(len(batch), model.width, device=job.device, dtype=job.dtype)
    model.__dict__["embed"] = lambda part: h[: len(part)]
    return model, batch


def _in_own_process(job: Job, way: str) -> tuple[dict, str]:
    """The measured columns and the note of one way; no columns and the reason where it failed."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, way, sending))
    process.start()
    sending.close()
    try:
        found = receiving.recv()
        process.join()
    except EOFError:
        found = {}, "out of memory: the system ended it"
    finally:
        process.kill()  # no more than a word where it has ended; at the deadline it has not
    return found


def _child(job: Job, way: str, pipe: Connection) -> None:
    try:
        with use_backend(job.kernels[0], job.attention), torch.no_grad():
            pipe.send(_measured(job, way))
    except Exception as error:  # goes into the record: the other ways are measured all the same
        pipe.send(({}, f"not measured: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"))


def _measured(job: Job, way: str) -> tuple[dict, str]:
    run, share, note = WAYS[way](*built(job))
    times, made = Times(), []

    def once() -> None:
        made[:] = [run()]

    before = _peak(job.device, reset=True)
    while not times.wall or (len(times.wall) < job.rounds and sum(times.wall) < ENOUGH):
        made.clear()
        one = time_interleaved({way: once}, 1, warmup=0)[way]
        times.wall += one.wall
        times.cpu += one.cpu
    memory = _peak(job.device) - before
    ((kept, save),) = made
    with tempfile.TemporaryDirectory() as folder:
        if save is not None:
            save(Path(folder))
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    spent = time_columns(paired_ratios({way: times}, job.clock)[way])
    sizes = {"memory": memory, "kept": kept, "disk": disk}
    scaled = {"ms": spent["ms"] / share} | {name: round(x / share) or None for name, x in sizes.items()}
    return scaled | {"rounds": spent["rounds"], "measured_share": share}, note


def _peak(device: str, reset: bool = False) -> int:
    """The most bytes that were in use since the last reset; right after one, those that are."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        # sets the high-water mark to what is resident now
        STATUS.with_name("clear_refs").write_text("5", encoding="ascii")
    return _kib(STATUS, "VmHWM")


def _free(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else _kib(Path("/proc/meminfo"), "MemAvailable")


def _kib(file: Path, name: str) -> int:
    """A figure that the kernel gives in KiB, in bytes."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _tensors(holder: object) -> list[Tensor]:
    return [x for x in vars(holder).values() if isinstance(x, Tensor)]


def _forward(model: UnifiedModel, batch: Batch) -> tuple[int, None]:
    model(batch)
    return 0, None


def _overview(model: UnifiedModel, batch: Batch) -> tuple[int, Callable]:
    found = capture_overview(model, batch)
    return _size(found.kept, found.maps, found.received, *_tensors(found.patterns)), found.save


def _patterns(model: UnifiedModel, batch: Batch) -> tuple[int, None]:
    return _size(*_tensors(capture_patterns(model, [batch], batch.tasks[0]))), None


def _record(model: UnifiedModel, batch: Batch) -> tuple[int, Callable]:
    record = capture_batch(model, batch)
    return record.nbytes, record.save


def _maps(model: UnifiedModel, batch: Batch) -> Way:
    """Each layer's maps as one float32 [H, n, n], what `output_attentions` hands back; its own copies of logits and
    weights are not counted."""
    n, heads = len(batch), model.decoder.config.num_attention_heads
    one = 4 * n * n * len(model.layers)
    fit = min(heads, int(SHARE * _free(batch.ids.device.type) / one))
    if not fit:
        raise MemoryError(f"the maps of one head take {one / 2**30:.1f} GiB, more than is free")
    note = "" if fit == heads else f"scaled from {fit} of {heads} heads, which fit the memory"
    maps = lambda: capture_summary(model, batch, lambda layer: full(layer, fit)).values()  # noqa: E731
    return Way(lambda: (_size(*maps()), None), fit / heads, note)


def full(layer: LayerAttention, heads: int) -> Tensor:
    """The maps of the first heads over a batch of one row: float32 [heads, n, n]."""
    n = layer.q.shape[1]
    out = torch.empty(heads, n, n, device=layer.q.device)
    for some, a in layer.blocks(slice(0, n), None, slice(0, heads)):
        out[:, some[0] : some[-1] + 1] = a
    return out


def _bertviz(view: str, model: UnifiedModel, batch: Batch) -> Way:
    """Of the first layer as many heads as `ENTRIES` allow, of a longer row one head over its first tokens."""
    try:
        import bertviz
    except ImportError as error:
        raise ModuleNotFoundError("bertviz is not installed") from error
    n, heads, layers = len(batch), model.decoder.config.num_attention_heads, len(model.layers)
    fit, m = max(1, min(heads, ENTRIES // n**2)), min(n, math.isqrt(ENTRIES))
    short = batch.take(torch.arange(m, device=batch.ids.device), (replace(batch.segments[0], length=m),))
    model.decoder.layers = model.decoder.layers[:1]
    a = full(capture_batch(model, short).layer(0), fit)[None].cpu()
    tokens = [model.layout.token(i) for i in short.ids.tolist()]

    def run() -> tuple[int, Callable]:
        drawn = getattr(bertviz, view)(attention=[a], tokens=tokens, html_action="return")
        page = drawn.data.encode()
        return len(page), lambda folder: (folder / "page.html").write_bytes(page)

    what = f"{fit} of {layers * heads} maps" if m == n else f"{m} x {m} of one map"
    note = f"scaled from {what}; bertviz {importlib.metadata.version('bertviz')}"
    return Way(run, a.numel() / (layers * heads * n * n), note)


WAYS: dict[str, Callable[[UnifiedModel, Batch], Way]] = {
    "plain forward": lambda *given: Way(lambda: _forward(*given)),
    "look": lambda *given: Way(lambda: _overview(*given)),
    "measure": lambda *given: Way(lambda: _patterns(*given)),
    "observe": lambda *given: Way(lambda: _record(*given)),
    "full maps": _maps,
    "bertviz head_view": lambda *given: _bertviz("head_view", *given),
    "bertviz model_view": lambda *given: _bertviz("model_view", *given),
}
