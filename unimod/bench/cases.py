"""What the command measures: a job (`jobs.Job`) is one shape on one device, a case one row of it; all its cases are
timed in turn.

    layer(job)                        # the stack, forward and backward: realised share of the counted saving
    step(job)                         # a training step: packed dense and routed, and the padded way
    attention(job)                    # attention by every backend that runs here
    decode(job)                       # tokens per second, against reading the weights once per step

All cases of a job have the same weights and the same batch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch import Batch, pack
from ..flops import count
from ..generate import answer, calibrate, draw
from ..layers import apply_mod
from ..losses import losses
from ..models.unified import UnifiedModel
from ..ops.attention import interval_attention
from ..ops.backend import use_backend
from ..presets import ragged, shared_copy
from ..recording import record, warm_up
from ..routing import BatchPlan
from .jobs import Job, available
from .parts import part_shares
from .stock import Padded
from .timing import OutOfTime, Times, bandwidth, paired_ratios, peak_memory, realised, time_interleaved

BATCHES = (1, 8)
"""Rows that decode together."""
NEW = {"cpu": (2, 10), "cuda": (2, 34)}
"""Tokens of the short and the long answer."""
PROMPT = 1024
"""Most image tokens of a prompt."""
TIMED = 0.75
"""Of a job's time, what rounds may take; the rest is for memory and the parts of a step."""


@dataclass(frozen=True)
class Case:
    """A row to measure: `run`, which is `finish(forward())` under `backends`; `columns` are known before.

    model: whose memory is measured, None for no memory; update: what ends a step whose parts are measured.
    """

    columns: dict
    backends: tuple[str, ...]
    forward: Callable[[], Tensor]
    finish: Callable[[Tensor], object]
    model: UnifiedModel | None = None
    update: Callable[[], object] | None = None
    planned: Callable[[], Tensor] | None = None
    """`forward` on a plan of the batch that was made before, which a CUDA graph can hold."""

    def run(self) -> None:
        """What is timed: without arguments, on the same tensors each time, and no case does more on the host than its
        way has to."""
        with use_backend(*self.backends):
            self.finish(self.forward())

    def recorded(self, device: str, clear: Callable[[], None]) -> Callable[[], object]:
        """`run` as one CUDA graph; on a CPU the same way without a graph. Raises RuntimeError where it cannot be one.

        clear: frees gradients, which a recording makes anew.
        """
        def run() -> None:
            with use_backend(*self.backends):
                self.finish((self.planned or self.forward)())

        if device != "cuda":
            return run
        try:
            for _ in range(2):
                warm_up(run)
                clear()
            graph, _ = record(run)
        finally:
            clear()
        return graph.replay


GRAPHS = ("cuda",)
"""Devices on which stacks and steps are also measured as one graph each: Show-o's are bound by the host."""


def rows(job: Job, model: UnifiedModel, tokens: int, cases: list[Case], leaves: Iterable[Tensor]) -> Iterator[dict]:
    """The measured cases, the first of which is the base; the gradients of `leaves` are freed after each run. Where the
    device has graphs, all of them once more as graphs, with the first one's as the base."""
    leaves, graphs = list(leaves), cases[0].planned is not None and job.device in GRAPHS

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    began = time.monotonic()
    until = began + TIMED / (1 + graphs) * (job.until - began)
    yield from _timed(job, model, tokens, cases, [case.run for case in cases], clear, until)
    if not graphs:
        return
    runs, again = [], []
    for case in cases:
        named = case.columns | {"backend": f"{case.columns['backend']},graph"}
        try:
            runs.append(case.recorded(job.device, clear))
            again.append(replace(case, columns=named, model=None, update=None))
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0][:160]
            yield job.missing(f"{named.get('way', 'stack')} at {named['capacity']} is no graph: {reason}")
            if not runs:                                    # the others would have no base
                return
    yield from _timed(job, model, tokens, again, runs, clear, job.until)


def _timed(job: Job, model: UnifiedModel, tokens: int, cases: list[Case], runs: list[Callable[[], object]],
           clear: Callable[[], None], until: float) -> Iterator[dict]:
    """The rows of cases whose `runs` are timed in turn."""
    # two rounds of warm-up: every other round is reversed, so each case has been the first and the last once
    times = time_interleaved(dict(enumerate(runs)), job.rounds, warmup=2, after=clear, until=until)
    for case, t in zip(cases, paired_ratios(times, job.clock).values()):
        columns, late = {"realised": None} | case.columns, ""
        try:
            if time.monotonic() > job.until:
                raise OutOfTime
            with use_backend(*case.backends):
                if case.model is not None:
                    columns["memory"] = peak_memory(case.model, case.forward, case.finish)
                    clear()
                if case.update is not None:
                    columns["shares"] = part_shares(case.model, case.forward, case.update)
                    clear()
        except OutOfTime:
            late = "no time was left for memory and shares"
        if "flops" in columns:
            saved_to = columns["flops"] or 1
            columns |= {"realised": realised(t["ratio"], saved_to), "realised_wall": realised(t["wall"], saved_to)}
        row = job.row(tokens, model, **columns, **time_columns(t))
        yield row | {"note": "; ".join(filter(None, (row["note"], late)))}


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


def planned(arm: UnifiedModel, batch: Batch, backends: tuple[str, str],
            forward: Callable[[BatchPlan], Tensor]) -> Callable[[], Tensor]:
    """`forward` on the plan of the batch, made now: a graph can hold no work of the host."""
    with use_backend(*backends):
        plan = arm.plan(batch)
    return lambda: forward(plan)


def layer(job: Job) -> Iterator[dict]:
    """The stack with its final norm, forward and backward from given hidden states: dense, and routed by each plan with
    each kernels backend. Dense and routed attend by the same backend, the job's."""
    model, sequences = job.size.build(job.device, job.dtype)
    batch = pack(sequences).to(job.device)
    job = job.on(model, batch.mask)
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
                backends = kernels, job.attention
                ready = planned(arm, batch, backends, lambda plan, arm=arm: arm(batch, plan=plan))
                cases.append(Case(columns, backends, forward, finish, arm, planned=ready))
    yield from rows(job, model, len(batch), cases, [h, *weights_of(arms)])


def step(job: Job) -> Iterator[dict]:
    """Forward, loss, backward, clipping and AdamW on a ragged batch of t2i and mmu rows: dense, by each plan, and the
    padded way, whose stock model has the same weights. FLOPs and `realised` are of the whole step."""
    size, device = job.size, job.device
    model, _ = size.build(device, job.dtype, step=True)
    sequences = ragged(model.layout, size.tokens, size.batch)
    batch, padded = pack(sequences).to(device), Padded.of(sequences, model.head.weight)
    job = job.on(model, batch.mask)
    arms = routed_arms(job, model)
    # The learning rate is 0: all arms keep the same weights, and the work is the same. One optimizer's state serves
    # the weights that all arms share; each arm's routers have another.
    options = {"lr": 0.0, "fused": device == "cuda" or None, "capturable": device == "cuda"}
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
        ready = planned(arm, batch, backends, lambda plan, arm=arm: losses(arm, batch, plan).total)
        cases.append(Case(columns, backends, forward, finish, arm, update, ready))
    # its FLOPs are not counted: the counting knows no padding
    columns = {"capacity": 1.0, "way": "padded", "backend": "stock,sdpa", "flops": None, "shares": None}
    stock = shared_copy(model)  # of its own: to change the attention of a model takes the host some time
    stock.lm.set_attn_implementation("sdpa")
    cases.append(Case(columns, backends, lambda: padded.loss(stock.lm), cases[0].finish, stock))
    yield from rows(job, model, len(batch), cases, weights_of(arms))


def attention(job: Job) -> Iterator[dict]:
    """One layer's attention by every backend that runs here, forward and backward; the preferred one is the base."""
    model, sequences = job.size.outline()
    batch = pack(sequences).to(job.device)
    heads, kv_heads, d = model.attention_shape
    options = {"device": job.device, "dtype": job.dtype}
    q, k, v = (torch.randn(n, len(batch), d, **options, requires_grad=True) for n in (heads, kv_heads, kv_heads))
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
    job = job.on(model, pack([question]).mask)
    new, width, static = NEW[job.device], NEW[job.device][1] // 2, job.device == "cuda"

    def answers(arm: UnifiedModel, batch: int, long: bool) -> int:
        return new[long] * len(answer(arm, [question] * batch, max_new=new[long], static=static))

    def pictures(arm: UnifiedModel, batch: int, long: bool) -> int:
        draw(arm, ["x" * 20] * batch, guidance=0.0, grid=(1 + long, width), static=static)
        return (1 + long) * (width + 1) * batch  # ends of line are generated too

    kinds = {"answer": answers} | ({"picture": pictures} if layout.causal_images else {})
    shapes = [(what, generate, batch) for what, generate in kinds.items() for batch in BATCHES]
    for n, (what, generate, batch) in enumerate(shapes):
        began = time.monotonic()
        share = replace(job, until=began + (job.until - began) / (len(shapes) - n))
        try:
            with use_backend(job.kernels[0], job.attention):
                counts, times = _difference(arms, lambda arm, long, g=generate, b=batch: g(arm, b, long), share)
        except OutOfTime as error:
            yield job.missing(f"dropped at the deadline: {error}") | {"what": what, "batch": batch}
            continue
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
