"""What routing saves in training: the stack of decoder layers alone, forward and backward, and a whole training step.

    for row in layer(job): ...        # realised share of the counted saving, per plan and backend
    for row in step(job): ...         # packed dense, packed routed and the padded way, with memory and the share of each part

All arms of a job have the same weights and the same batch and are timed in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..batch import pack
from ..flops import count
from ..layers import apply_mod
from ..losses import losses
from ..models.unified import UnifiedModel
from ..ops.backend import use_backend
from .clock import columns, compared, realised, rounds_of, saved_for_backward, wait
from .compare import Padded, padded_step
from .job import Job
from .parts import part_shares
from .sizes import ragged, twin


def layer(job: Job) -> Iterator[dict]:
    """The stack with its final norm, from given hidden states: dense, and routed by each plan with each kernels backend.

    Dense and routed attend by the same backend, the job's.
    """
    size, device = job.size, job.device
    model, rows = size.build(device, job.dtype)
    packed = pack(rows).to(device)
    h = torch.randn(len(packed), model.width, device=device, dtype=job.dtype, requires_grad=True)
    grad = torch.randn_like(h)
    arms = {"1": model} | {name: apply_mod(twin(model), plan).train() for name, plan in size.plans(len(model.layers)).items()}
    for arm in arms.values():
        arm.__dict__["embed"] = lambda _: h                  # the stack alone: hidden states come in where embeddings would
    runs = {("1", job.kernels[0]): model} | {(name, kernels): arms[name] for kernels in job.kernels for name in arms if name != "1"}

    def run(arm: UnifiedModel, kernels: str) -> None:
        with use_backend(kernels, job.attention):
            arm(packed).backward(grad)

    def clear() -> None:
        h.grad = None
        for arm in arms.values():
            arm.zero_grad(set_to_none=True)

    times = compared(rounds_of({key: (lambda key=key, arm=arm: run(arm, key[1])) for key, arm in runs.items()}, job.rounds, warmup=2, after=clear,
                               until=job.until), job.headline)
    for (name, kernels), arm in runs.items():
        t, flops = times[name, kernels], 1 - count(arm, packed).saved
        with use_backend(kernels, job.attention):
            memory = peak(arm, lambda arm=arm: arm(packed), lambda out: out.backward(grad))
        clear()
        yield job.row(len(packed), model, capacity=_number(name), backend=f"{kernels},{job.attention}", realised=realised(t["ratio"], flops),
                      realised_wall=realised(t["wall"], flops), flops=flops, memory=memory, **columns(t))


def step(job: Job) -> Iterator[dict]:
    """Forward, loss, backward, clipping and AdamW on a ragged batch of t2i and mmu rows: dense, by each plan, and the padded way.

    The learning rate is 0, so that all arms keep the same weights; the work is the same. FLOPs and `realised` are of the whole step.
    """
    size, device = job.size, job.device
    model, _ = size.build(device, job.dtype, step=True)
    rows = ragged(model.layout, size.tokens, size.batch)
    packed, padded = pack(rows).to(device), Padded.of(rows, model.head.weight)
    arms = {"1": model} | {name: apply_mod(twin(model), plan).train() for name, plan in size.plans(len(model.layers)).items()}
    ours, fused = {id(p) for p in model.parameters()}, device == "cuda" or None
    shared = torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused)      # one state for the weights that all arms have
    own = {name: [p for p in arm.parameters() if id(p) not in ours] for name, arm in arms.items()}
    routers = {name: torch.optim.AdamW(params, lr=0.0, fused=fused) for name, params in own.items() if params}

    def forward(name: str) -> torch.Tensor:
        return padded_step(model, padded) if name == "padded" else losses(arms[name], packed).total

    def update(name: str) -> None:
        torch.nn.utils.clip_grad_norm_(arms.get(name, model).parameters(), 1.0)
        shared.step()
        if name in routers:
            routers[name].step()

    def run(name: str) -> None:
        forward(name).backward()
        update(name)

    def clear() -> None:
        for arm in arms.values():
            arm.zero_grad(set_to_none=True)

    kernels = job.kernels[0]
    with use_backend(kernels, job.attention):
        names = [*arms, "padded"]
        times = compared(rounds_of({name: (lambda name=name: run(name)) for name in names}, job.rounds, warmup=2, after=clear, until=job.until),
                         job.headline)
        for name in names:
            arm = arms.get(name, model)
            cost = count(arm, packed)
            flops = None if name == "padded" else cost.step / cost.dense_step      # its padding is not counted
            memory = peak(arm, lambda name=name: forward(name), lambda out, name=name: (out.backward(), update(name)))
            clear()
            shares = part_shares(arm, lambda name=name: forward(name), lambda name=name: update(name)) if name != "padded" else None
            clear()
            yield job.row(len(packed), model, capacity=1.0 if name == "padded" else _number(name), way="padded" if name == "padded" else "packed",
                          backend="stock,sdpa" if name == "padded" else f"{kernels},{job.attention}", flops=flops, memory=memory,
                          realised=realised(times[name]["ratio"], flops or 1), realised_wall=realised(times[name]["wall"], flops or 1), shares=shares,
                          **columns(times[name]))


def peak(model: UnifiedModel, forward: Callable[[], torch.Tensor], rest: Callable[[torch.Tensor], object]) -> int:
    """Bytes: on CUDA the most that was allocated during `rest(forward())`, on a CPU what the forward keeps for the backward."""
    if model.device.type != "cuda":
        return saved_for_backward(model, forward)
    wait()
    torch.cuda.reset_peak_memory_stats()
    rest(forward())
    wait()
    return torch.cuda.max_memory_allocated()


def _number(name: str) -> float | str:
    return name if name == "paper" else float(name)
