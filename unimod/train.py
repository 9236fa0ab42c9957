"""The training loop: one function, read from top to bottom: evaluate, save, stop, step, log.

    records = train(model, batches, TrainConfig(steps=200), folder="runs/x", evaluate=lambda model: {...})

Masked-token prediction for t2i, next-token prediction for mmu and lm, weighted 1 / 1 / 0.1; AdamW with warm-up and a
cosine to zero; routers learn faster than the backbone. With a folder, an interrupted run goes on where it stopped, bit
for bit. Started by torchrun or `accelerate launch` (DDP), every process takes its own batches, and gradients are
averaged over them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .batch import Batch, Task
from .config import ParameterError
from .data.batches import Batches
from .flops import count
from .graph import Signature, StaticStep, mean_of, whole_step_refused
from .layers import record_routing
from .losses import budget, losses, membership, prediction
from .models.unified import UnifiedModel, compile_layers
from .ops.backend import say
from .routing import BatchPlan


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to train."""

    steps: int
    seed: int = 0
    """Seed of what routers draw while training; torch's generators are set from it at every step."""
    lr: float = 1.5e-3
    """Peak learning rate of the backbone."""
    router_lr: float = 5.0
    """Factor on it for routers."""
    capacity_lr: float = 100.0
    """Factor on it for learned capacities, which are few and move by about the rate in a step, whatever their
    gradient."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly."""
    membership: float = 0.0
    """Weight of the auxiliary loss that pushes kept and dropped tokens' scores apart (`losses.membership`)."""
    budget: float = 0.0
    """Weight of the loss that holds the share of tokens with sigmoid(score) > 0.5 near what the plan keeps
    (`losses.budget`)."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest gradient norm."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    save_every: int = 200
    """Steps between checkpoints, when there is a folder."""
    device: str = "cpu"
    """cpu or cuda."""
    compile: bool = False
    """Compile the decoder layers (`compile_layers`): minutes at the start, for CUDA."""
    accumulate: int = 1
    """Batches of a step, whose gradients are averaged."""
    graph: bool = False
    """Take whole steps on static memory (`graph.StaticStep`), which CUDA replays as one graph; one process only."""

    def lr_at(self, step: int) -> float:
        """Learning rate of a step relative to its peak: linear warm-up, then half a cosine to 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class Outcome(NamedTuple):
    """What a training step computes from a batch; a tuple, so that whatever wraps an `Objective` finds its tensors."""

    objective: Tensor
    """What is descended: `total` and the losses on routers."""
    total: Tensor
    """Weighted sum of the tasks' losses."""
    per_task: Tensor
    """Mean cross entropy per task, [3], without a gradient; nan where the batch has no target of it."""


class Objective(nn.Module):
    """A model with its losses in one forward, so that DDP's and FSDP's hooks see every parameter at work.

    The losses on routers are weighted as `config` says. The model's own state dict keeps its keys; here they begin with
    "model.". FSDP2: `fully_shard` each of `model.layers`, then this; first, by itself, a scorer that all layers share
    (`shared_layers`). Mixed precision needs `cast_forward_inputs=False`, or rotary angles are rounded too.
    """

    def __init__(self, model: UnifiedModel, config: TrainConfig | None = None) -> None:
        super().__init__()
        self.model, self.config = model, config or TrainConfig(steps=1)

    def forward(self, batch: Batch, plan: BatchPlan | None = None) -> Outcome:
        """The losses of a batch; plan as in `losses`. Raises ValueError when it has no target."""
        with record_routing() as log:
            loss = losses(self.model, batch, plan)
        beside = prediction(log)
        for weight, extra in ((self.config.membership, membership), (self.config.budget, budget)):
            beside = beside + weight * extra(log) if weight else beside
        return Outcome(loss.total + beside, loss.total, loss.per_task)


def train(model: UnifiedModel, batches: Batches, config: TrainConfig, *, folder: str | Path | None = None,
          resume: bool = True, evaluate: Callable[[UnifiedModel], dict] | None = None,
          log: Callable[[dict], None] = lambda record: None) -> list[dict]:
    """Train in place and return one record per step: losses per task, tokens, FLOPs (forward and backward), seconds.

    `evaluate(model)` returns figures that join the record of the step they were taken after. With `folder`, records are
    appended to metrics.jsonl and last.pt holds the state to resume from; it is removed when the run is complete. In a
    group of n processes, process r takes batch n * step + r (with a batches accumulated a step, a of them from a * (n *
    step + r) on), a record is the mean of the losses and the sum of the tokens and FLOPs, and only the main process
    evaluates, logs and writes. Nothing waits for the device but the figures of a record, which are read while the next
    step runs: on CUDA `log` comes a step late, and so does the end of a run whose loss is not finite. Raises
    `ParameterError` when the folder holds an interrupted run of another configuration or number of processes,
    RuntimeError in every process on a loss that is not finite in one.
    """
    accelerator = Accelerator(cpu=config.device == "cpu")
    if config.compile:
        compile_layers(model)
    world, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    cuda = accelerator.device.type == "cuda"
    bare = torch.optim.AdamW(_groups(model, config), betas=(0.9, 0.999), eps=1e-8, fused=cuda,
                             capturable=cuda and config.graph)
    objective, optimizer = accelerator.prepare(Objective(model, config), bare)
    settings = {**asdict(config), "processes": world}
    records, sizes = [], []
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        records, sizes = _restore(Path(folder), model, optimizer, settings) if resume else ([], [])
    why = whole_step_refused(model)
    if world > 1:
        why = f"{world} processes average their gradients"
    elif accelerator.mixed_precision != "no":               # outside of autocast, where a whole step is planned
        why = f"accelerate casts to {accelerator.mixed_precision} on the way"
    if config.graph and why:
        say(f"unimod: training steps are taken one kernel at a time: {why}")
    take = _PlainStep(accelerator, objective, optimizer, config.clip)
    if config.graph and not why:
        take = StaticStep(objective, bare, config.clip, sizes)

    pending: list[tuple[int, float, Callable[[], Tensor]]] = []
    flushed = 0.0

    def flush() -> dict | None:
        """The record of the step whose metrics are pending. Raises RuntimeError for a loss that is not finite."""
        if not pending:
            return None
        nonlocal flushed
        step, began, metrics = pending.pop()
        per_process, before = metrics(), max(began, flushed)        # float64 [processes, 8]
        flushed = time.perf_counter()
        value, per_task = per_process[:, 0].mean().item(), per_process[:, 1:-4].nanmean(0).tolist()
        norm, (tokens, flops, dense_flops) = per_process[0, -4].item(), per_process[:, -3:].sum(0).tolist()
        if not math.isfinite(value):
            raise RuntimeError(f"The loss of step {step} is {value}; lower lr={config.lr:g} "
                               "(the last checkpoint is untouched).")
        records.append({
            "step": step + 1, "loss": value, **{f"loss_{t.name.lower()}": per_task[t] for t in Task}, "grad_norm": norm,
            "lr": config.lr * config.lr_at(step), "tokens": int(tokens), "flops": flops, "dense_flops": dense_flops,
            "seconds": flushed - before})
        return records[-1]

    for step in range(len(records), config.steps):
        began = time.perf_counter()
        first = config.accumulate * (world * step + rank)
        group = [batches.train(first + i) for i in range(config.accumulate)]
        objective.train()
        # another seed for every run, step and process: routers' noise and random scores never repeat, and a resumed run
        # draws what the interrupted one would have
        torch.manual_seed((config.seed * 1_000_003 + step) * world + rank)
        means, norm = take(group, config.lr_at(step))

        spent = torch.tensor([[len(batch), cost.step, cost.dense_step] for batch in group
                              for cost in [count(model, batch)]], dtype=torch.float64).sum(0)
        spent = spent.to(accelerator.device, non_blocking=True)
        mine = torch.cat([means, norm.detach()[None], spent])
        last = step + 1 == config.steps
        judged = evaluate is not None and (last or (config.evaluate_every and (step + 1) % config.evaluate_every == 0))
        saved = folder is not None and not last and (step + 1) % config.save_every == 0
        if (record := flush()) and main:                   # of the step before: while this one runs
            log(record)
        pending.append((step, began, _async_copy(accelerator.gather(mine[None]))))
        # on CUDA the metrics are read a step later, while the next one runs: reading them now would wait for the device
        if cuda and not (judged or saved or last):
            continue
        record = flush()
        if not main:                                        # it meets the main process again in the next step
            continue
        if judged:
            model.eval()
            record |= evaluate(model)
        log(record)
        if saved:
            _save(Path(folder), model, optimizer, settings, records, take)
    if folder is not None and main:
        (Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        (Path(folder) / "last.pt").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    model.eval()
    return records


class _PlainStep:
    """Losses, backward, clipping and update, one kernel after another; `graph.StaticStep` does the same."""

    def __init__(self, accelerator: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer,
                 clip: float) -> None:
        self.accelerator, self.objective, self.optimizer, self.clip = accelerator, objective, optimizer, clip

    def __call__(self, batches: list[Batch], rate: float) -> tuple[Tensor, Tensor]:
        """One step; as `graph.StaticStep.__call__`."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        found = []
        for i, batch in enumerate(batches, 1):
            # processes average their gradients once a step, in its last backward
            with nullcontext() if i == len(batches) else self.accelerator.no_sync(self.objective):
                outcome = self.objective(batch.to(self.accelerator.device))
                loss = outcome.objective if len(batches) == 1 else outcome.objective / len(batches)
                self.accelerator.backward(loss)
            found.append(torch.cat([outcome.total.detach()[None], outcome.per_task]))
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean_of(found), norm


def _async_copy(x: Tensor) -> Callable[[], Tensor]:
    """Start a copy to the host; what is returned waits for this copy, and for nothing asked of the device later."""
    if not x.is_cuda:
        return lambda: x
    host = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host
    return wait


def _groups(model: UnifiedModel, config: TrainConfig) -> list[dict]:
    """Routers and learned capacities at their own rates; vectors (norms, biases) and capacities without weight
    decay."""
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        if name.endswith(".theta"):
            rate, decay = config.capacity_lr, 0.0
        else:
            rate, decay = config.router_lr if ".router." in name else 1.0, config.weight_decay * (p.ndim > 1)
        groups.setdefault((config.lr * rate, decay), []).append(p)
    return [{"params": params, "peak": peak, "lr": config.lr, "weight_decay": decay}
            for (peak, decay), params in groups.items()]


def _save(folder: Path, model: UnifiedModel, optimizer: torch.optim.Optimizer, settings: dict,
          records: list[dict], step: object) -> None:
    # sizes too: a batch is filled up to those that are known, and a resumed run rounds as the interrupted one would
    sizes = [asdict(signature) for signature in getattr(step, "known", ())]
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": settings, "records": records,
             "sizes": sizes}
    # written beside and renamed: a run killed while saving finds the checkpoint before it
    torch.save(state, folder / "last.pt.part")
    os.replace(folder / "last.pt.part", folder / "last.pt")


def _restore(folder: Path, model: UnifiedModel, optimizer: torch.optim.Optimizer,
             settings: dict) -> tuple[list[dict], list[Signature]]:
    if not (folder / "last.pt").exists():
        return [], []
    try:
        state = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise ParameterError(f"{folder / 'last.pt'} cannot be read ({error}). Delete it to start this run "
                             f"afresh.") from None
    if state["config"] != settings:
        changed = [k for k, v in settings.items() if state["config"].get(k) != v]
        raise ParameterError(f"{folder} holds an interrupted run with other settings ({', '.join(changed)}). Set "
                             f"resume=false, or use another folder.")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["records"], [Signature(**sizes) for sizes in state.get("sizes", ())]
