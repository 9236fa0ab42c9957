"""What the command measures: a job is one shape on one device, a case one row of it; all its cases are timed in turn.

    for job in jobs_of(["layer"], SIZES["cpu"], rounds=9):
        for row in layer(job): ...    # the stack, forward and backward: realised share of the counted saving
    step(job)                         # a training step: packed dense and routed, and the padded way
    attention(job)                    # attention by every backend that runs here
    decode(job)                       # tokens per second, against reading the weights once per step

All cases of a job have the same weights and the same batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch import pack
from ..config import ParameterError
from ..flops import count
from ..generate import answer, calibrate, draw
from ..layers import apply_mod
from ..losses import losses
from ..models.unified import UnifiedModel
from ..ops.attention import interval_attention
from ..ops.backend import FAMILIES, backend, use_backend
from ..presets import Size, ragged, shared_copy
from .stock import Padded, padded_step
from .timing import Times, bandwidth, dtype_of, paired_ratios, part_shares, peak_memory, realised, time_interleaved

BATCHES = (1, 8)
"""Rows that decode together."""
NEW = {"cpu": (2, 10), "cuda": (2, 34)}
"""Tokens of the short and the long answer."""
PROMPT = 1024
"""Most image tokens of a prompt."""


@dataclass(frozen=True)
class Job:
    """What is measured in one go.

    kernels: backends of the kernels to try, the preferred first; attention: its backend; until: the `time.monotonic()`
    at which to end.
    """

    kind: str
    size: Size
    rounds: int
    kernels: tuple[str, ...]
    attention: str
    until: float = math.inf

    @property
    def device(self) -> str:
        """cuda where there is one, but for the cpu preset."""
        return device_of(self.size)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on CUDA, float32 on a CPU."""
        return dtype_of(self.device)

    @property
    def clock(self) -> str:
        """The clock that counts: this process's CPU time on a CPU, wall time on CUDA."""
        return "wall" if self.device == "cuda" else "cpu"

    @property
    def backend(self) -> str:
        """The preferred backends, as a row names them."""
        return f"{self.kernels[0]},{self.attention}"

    def __str__(self) -> str:
        shape = f"{self.size.preset} {self.size.tokens or ''}x{self.size.batch}"
        return f"{self.kind} {shape} {','.join(self.kernels)} {self.attention}"

    def row(self, tokens: int, model: UnifiedModel, **columns: object) -> dict:
        """A row of the record with what every row has; numbers to four digits."""
        columns = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in columns.items()}
        note = f"{len(model.layers)} layers only: more do not fit the memory" if self.size.layers else ""
        return {
            "bench": self.kind, "preset": self.size.preset, "tokens": tokens, "batch": self.size.batch,
            "layers": len(model.layers), "width": model.width, "dtype": str(self.dtype).removeprefix("torch."),
            "note": note, **columns,
        }

    def missing(self, why: str) -> dict:
        """The row of a job that was not measured, or not to the end."""
        size = self.size
        return {
            "bench": self.kind, "preset": size.preset, "tokens": size.tokens * size.batch, "batch": size.batch,
            "capacity": None, "backend": f"{','.join(self.kernels)},{self.attention}", "realised": None, "note": why,
        }


def device_of(size: Size) -> str:
    """Where a size is measured."""
    return "cuda" if size.preset != "cpu" and torch.cuda.is_available() else "cpu"


def available(family: str, device: str) -> tuple[str, ...]:
    """The backends of a family, "kernels" or "attention", that run on a device, the preferred first; a forced one
    alone."""
    dtype, found = dtype_of(device), []
    if device == "cpu" and family == "kernels":
        return ("reference",)  # triton is an interpreter on a CPU
    preferred = backend(family, device, dtype)
    for name in FAMILIES[family]:
        try:
            with use_backend(name):
                found.append(backend(family, device, dtype))
        except ParameterError:
            continue
    return (preferred, *(name for name in found if name != preferred))


def jobs_of(kinds: Sequence[str], sizes: Sequence[Size], rounds: int, until: float = math.inf) -> list[Job]:
    """What to measure, in order: first everything by the preferred attention, with every kernels backend; then the
    stack at the first capacity by the other attentions. Of several sizes of one model, the first decodes."""
    jobs, later, decoding = [], [], set()
    for kind in kinds:
        for size in sizes:
            if kind == "decode" and size.family in decoding:
                continue
            if kind == "decode":
                decoding.add(size.family)
            device = device_of(size)
            kernels, (first, *others) = available("kernels", device), available("attention", device)
            jobs.append(Job(kind, size, rounds, kernels, first, until))
            if kind == "layer":
                # attention backends matter less than kernels: one capacity each, and only where time is left
                once = replace(size, capacities=size.capacities[:1])
                later += [Job(kind, once, rounds, kernels[:1], name, until) for name in others]
    return jobs + later


@dataclass(frozen=True)
class Case:
    """A row to measure: `finish(forward())` is timed, under `backends`; `columns` are known before.

    model: whose memory is measured, None for no memory; update: what ends a step whose parts are measured.
    """

    columns: dict
    backends: tuple[str, ...]
    forward: Callable[[], Tensor]
    finish: Callable[[Tensor], object]
    model: UnifiedModel | None = None
    update: Callable[[], object] | None = None

    def run(self) -> None:
        """What is timed."""
        with use_backend(*self.backends):
            self.finish(self.forward())


def rows(job: Job, model: UnifiedModel, tokens: int, cases: list[Case], leaves: Iterable[Tensor]) -> Iterator[dict]:
    """The measured cases, the first of which is the base; the gradients of `leaves` are freed after each run."""
    leaves = list(leaves)

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    steps = dict(enumerate(case.run for case in cases))
    # two rounds of warm-up: every other round is reversed, so each case has been the first and the last once
    times = time_interleaved(steps, job.rounds, warmup=2, after=clear, until=job.until)
    for case, t in zip(cases, paired_ratios(times, job.clock).values()):
        columns = {"realised": None} | case.columns
        with use_backend(*case.backends):
            if case.model is not None:
                columns["memory"] = peak_memory(case.model, case.forward, case.finish)
                clear()
            if case.update is not None:
                columns["shares"] = part_shares(case.model, case.forward, case.update)
                clear()
        if "flops" in columns:
            saved_to = columns["flops"] or 1
            columns |= {"realised": realised(t["ratio"], saved_to), "realised_wall": realised(t["wall"], saved_to)}
        yield job.row(tokens, model, **columns, **time_columns(t))


def time_columns(t: dict[str, float]) -> dict[str, float]:
    """A row's columns of time, from what `paired_ratios` gives for it."""
    names = {"ms": "ms", "time": "ratio", "time_low": "ratio_low", "time_high": "ratio_high", "time_wall": "wall"}
    return {column: t[name] for column, name in names.items()} | {"rounds": t["rounds"]}


def routed_arms(job: Job, model: UnifiedModel) -> dict[float | str, UnifiedModel]:
    """By capacity: 1.0, the dense model; every plan of the size, and the paper's, with the same weights."""
    plans = job.size.plans(len(model.layers))
    arms = {name: apply_mod(shared_copy(model), plan).train() for name, plan in plans.items()}
    return {1.0: model} | {name if name == "paper" else float(name): arm for name, arm in arms.items()}


def weights_of(arms: dict[float | str, UnifiedModel]) -> list[Tensor]:
    """The parameters of all arms."""
    return [p for arm in arms.values() for p in arm.parameters()]


def layer(job: Job) -> Iterator[dict]:
    """The stack with its final norm, forward and backward from given hidden states: dense, and routed by each plan with
    each kernels backend. Dense and routed attend by the same backend, the job's."""
    model, sequences = job.size.build(job.device, job.dtype)
    batch = pack(sequences).to(job.device)
    h = torch.randn(len(batch), model.width, device=job.device, dtype=job.dtype, requires_grad=True)
    grad = torch.randn_like(h)
    arms = routed_arms(job, model)
    for arm in arms.values():
        arm.__dict__["embed"] = lambda _: h  # hidden states come in where embeddings would
    cases = []
    for kernels in job.kernels:
        for capacity, arm in arms.items():
            if capacity != 1 or kernels == job.kernels[0]:
                columns = {"capacity": capacity, "backend": f"{kernels},{job.attention}"}
                columns["flops"] = 1 - count(arm, batch).saved
                forward, finish = (lambda arm=arm: arm(batch)), (lambda out: out.backward(grad))
                cases.append(Case(columns, (kernels, job.attention), forward, finish, arm))
    yield from rows(job, model, len(batch), cases, [h, *weights_of(arms)])


def step(job: Job) -> Iterator[dict]:
    """Forward, loss, backward, clipping and AdamW on a ragged batch of t2i and mmu rows: dense, by each plan, and the
    padded way. FLOPs and `realised` are of the whole step."""
    size, device = job.size, job.device
    model, _ = size.build(device, job.dtype, step=True)
    sequences = ragged(model.layout, size.tokens, size.batch)
    batch, padded = pack(sequences).to(device), Padded.of(sequences, model.head.weight)
    arms = routed_arms(job, model)
    # The learning rate is 0: all arms keep the same weights, and the work is the same. One optimizer's state serves
    # the weights that all arms share; each arm's routers have another.
    options = {"lr": 0.0, "fused": device == "cuda" or None}
    shared, weights = torch.optim.AdamW(model.parameters(), **options), {id(p) for p in model.parameters()}

    def update_of(arm: UnifiedModel) -> Callable[[], object]:
        routers = [p for p in arm.parameters() if id(p) not in weights]
        optimizers = [shared, *([torch.optim.AdamW(routers, **options)] if routers else [])]

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(arm.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()

        return update

    cases, backends = [], (job.kernels[0], job.attention)
    for capacity, arm in arms.items():
        cost, update = count(arm, batch), update_of(arm)
        columns = {"capacity": capacity, "way": "packed", "backend": job.backend, "flops": cost.step / cost.dense_step}
        forward = lambda arm=arm: losses(arm, batch).total  # noqa: E731
        finish = lambda loss, update=update: (loss.backward(), update())  # noqa: E731
        cases.append(Case(columns, backends, forward, finish, arm, update))
    # its FLOPs are not counted: the counting knows no padding
    columns = {"capacity": 1.0, "way": "padded", "backend": "stock,sdpa", "flops": None, "shares": None}
    cases.append(Case(columns, backends, lambda: padded_step(model, padded), cases[0].finish, model))
    yield from rows(job, model, len(batch), cases, weights_of(arms))


def attention(job: Job) -> Iterator[dict]:
    """One layer's attention by every backend that runs here, forward and backward; the preferred one is the base."""
    model, sequences = job.size.outline()
    batch = pack(sequences).to(job.device)
    config = model.decoder.config
    heads, d = config.num_attention_heads, model.width // config.num_attention_heads
    options = {"device": job.device, "dtype": job.dtype}
    q, k, v = (
        torch.randn(n, len(batch), d, **options, requires_grad=True)
        for n in (heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    grad = torch.randn(len(batch), heads, d, **options)

    cases = []
    for name in available("attention", job.device):
        memo = {}  # kept from run to run: a model's forward, too, works it out once for all its layers

        def forward(memo: dict = memo) -> Tensor:
            return interval_attention(q, k, v, batch.mask, d**-0.5, memo)

        columns = {"capacity": 1.0, "backend": name, "note": "one layer"}
        cases.append(Case(columns, (name,), forward, lambda out: out.backward(grad)))
    yield from rows(job, model, len(batch), cases, [q, k, v])


def decode(job: Job) -> Iterator[dict]:
    """Decoding with the cache: answers, and pictures of causal models; 1 and 8 rows; dense and routed.

    `per_second`: tokens of all rows together; `of_floor`: the share of what reading the weights once per step allows.
    """
    model, _ = job.size.build(job.device, job.dtype)
    model.layout = copy.copy(model.layout)
    model.layout.stop = -1  # answers of random weights must not end early
    model.eval()
    read = [p for part in (model.layers, model.head) for p in part.parameters()]
    floor = sum(p.numel() * p.element_size() for p in read) / bandwidth(job.device)
    plans = job.size.plans(len(model.layers))
    routed = "paper" if "paper" in plans else float(next(iter(plans)))
    arms = {1.0: model, routed: routed_arms(job, model)[routed]}
    layout = model.layout
    layout = layout.resized((max(1, min(layout.grid[0], PROMPT // layout.grid[1])), layout.grid[1]))
    codes = torch.zeros(layout.image_tokens, dtype=torch.long)
    if layout.causal_images:
        calibrate(arms[routed], pack([layout.t2i("x" * 20, codes)]))
    arms[routed].eval()
    question = layout.mmu(codes, [("x" * 20, "")], open_ended=True)
    new, width, static = NEW[job.device], NEW[job.device][1] // 2, job.device == "cuda"

    def answers(arm: UnifiedModel, batch: int, long: bool) -> int:
        return new[long] * len(answer(arm, [question] * batch, max_new=new[long], static=static))

    def pictures(arm: UnifiedModel, batch: int, long: bool) -> int:
        draw(arm, ["x" * 20] * batch, guidance=0.0, grid=(1 + long, width), static=static)
        return (1 + long) * (width + 1) * batch  # ends of line are generated too

    kinds = {"answer": answers} | ({"picture": pictures} if layout.causal_images else {})
    for what, generate, batch in ((what, generate, batch) for what, generate in kinds.items() for batch in BATCHES):
        with use_backend(job.kernels[0], job.attention):
            counts, times = _difference(arms, lambda arm, long, g=generate, b=batch: g(arm, b, long), job)
        for capacity, t in times.items():
            speed = counts[capacity] / (t["ms"] / 1000)
            columns = {"what": what, "capacity": capacity, "backend": job.backend, "realised": None, "batch": batch}
            columns |= {"per_second": speed, "floor_per_second": batch / floor, "of_floor": speed * floor / batch}
            yield job.row(len(question.ids), model, **columns, **time_columns(t))


def _difference(arms: dict, generate: Callable[[UnifiedModel, bool], int], job: Job) -> tuple[dict, dict]:
    """Per arm, tokens of a long generation beyond a short one's, and their time, which is free of the prompt's."""
    counts = {}

    def run(key: tuple[float | str, bool]) -> None:
        counts[key] = generate(arms[key[0]], key[1])

    keys = [(name, long) for name in arms for long in (False, True)]
    times = time_interleaved({key: (lambda key=key: run(key)) for key in keys}, job.rounds, until=job.until)
    only = {}
    for name in arms:
        short, long = times[name, False], times[name, True]
        only[name] = Times([b - a for a, b in zip(short.wall, long.wall)], [b - a for a, b in zip(short.cpu, long.cpu)])
    return {name: counts[name, True] - counts[name, False] for name in arms}, paired_ratios(only, job.clock)
