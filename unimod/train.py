"""The training loop: one function, read from top to bottom: evaluate, save, stop, step, log.

    records = train(model, batches, TrainConfig(steps=200), folder="runs/x", evaluate=lambda model: {...})

Masked-token prediction for t2i, next-token prediction for mmu and lm, weighted 1 / 1 / 0.1; AdamW with warm-up and a cosine
to zero; routers learn faster than the backbone. With a folder, an interrupted run goes on where it stopped, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from .auxiliary import membership, prediction
from .config import ParameterError
from .data.batches import Batches
from .flops import BACKWARD, count
from .layers import record_routing
from .models.backbone import UnifiedModel, losses
from .tokens import Task


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to train."""

    steps: int
    lr: float = 1.5e-3
    """Peak learning rate of the backbone."""
    router_lr: float = 5.0
    """Factor on it for routers."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly."""
    membership: float = 0.0
    """Weight of the auxiliary loss that pushes kept and dropped tokens' scores apart (`auxiliary.membership`)."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest gradient norm."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    save_every: int = 200
    """Steps between checkpoints, when there is a folder."""
    device: str = "cpu"
    """cpu or cuda."""

    def lr_at(self, step: int) -> float:
        """Learning rate of a step relative to its peak: linear warm-up, then half a cosine to 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def train(model: UnifiedModel, batches: Batches, config: TrainConfig, *, folder: str | Path | None = None, resume: bool = True,
          evaluate: Callable[[UnifiedModel], dict] | None = None, log: Callable[[dict], None] = lambda record: None) -> list[dict]:
    """Train in place and return one record per step: losses per task, tokens, FLOPs (forward and backward), seconds.

    `evaluate(model)` returns figures that join the record of the step they were taken after. With `folder`, records are
    appended to metrics.jsonl and last.pt holds the state to resume from; it is removed when the run is complete.
    Raises `ParameterError` when the folder holds an interrupted run of another configuration, RuntimeError on a loss that is
    not finite.
    """
    accelerator = Accelerator(cpu=config.device == "cpu")
    optimizer = torch.optim.AdamW(_groups(model, config), betas=(0.9, 0.999), eps=1e-8)
    model, optimizer = accelerator.prepare(model, optimizer)
    records: list[dict] = []
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        records = _restore(Path(folder), model, optimizer, config) if resume else []

    for step in range(len(records), config.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * config.lr_at(step)
        packed = batches.train(step).to(accelerator.device)
        model.train()
        with record_routing() as log_of_routers:
            loss = losses(model, packed)
        beside = prediction(log_of_routers) + (config.membership * membership(log_of_routers) if config.membership else 0)
        accelerator.backward(loss.total + beside.to(loss.total.device))
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        value = loss.total.item()                          # the step's only wait for the device
        if not math.isfinite(value):
            raise RuntimeError(f"The loss of step {step} is {value}; lower lr={config.lr:g} (the last checkpoint is untouched).")
        cost = count(model, packed)
        record = {"step": step + 1, "loss": value, **{f"loss_{t.name.lower()}": loss.per_task[t].item() for t in Task}, "grad_norm": float(norm),
                  "lr": config.lr * config.lr_at(step), "tokens": len(packed), "flops": (1 + BACKWARD) * cost.total,
                  "dense_flops": (1 + BACKWARD) * cost.dense_total, "seconds": time.perf_counter() - began}
        last = step + 1 == config.steps
        if evaluate is not None and (last or (config.evaluate_every and (step + 1) % config.evaluate_every == 0)):
            model.eval()
            record |= evaluate(model)
        records.append(record)
        log(record)
        if folder is not None and not last and (step + 1) % config.save_every == 0:
            _save(Path(folder), model, optimizer, config, records)
    if folder is not None:
        (Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (Path(folder) / "last.pt").unlink(missing_ok=True)
    model.eval()
    return records


def _groups(model: UnifiedModel, config: TrainConfig) -> list[dict]:
    """Routers at their own rate; vectors (norms, biases) without weight decay."""
    groups: dict[tuple[bool, bool], list] = {}
    for name, p in model.named_parameters():
        groups.setdefault((".router." in name, p.ndim > 1), []).append(p)
    return [{"params": params, "peak": config.lr * (config.router_lr if router else 1), "lr": config.lr, "weight_decay": config.weight_decay * matrix}
            for (router, matrix), params in groups.items()]


def _save(folder: Path, model: UnifiedModel, optimizer: torch.optim.Optimizer, config: TrainConfig, records: list[dict]) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": asdict(config), "records": records}
    torch.save(state, folder / "last.pt.part")
    os.replace(folder / "last.pt.part", folder / "last.pt")


def _restore(folder: Path, model: UnifiedModel, optimizer: torch.optim.Optimizer, config: TrainConfig) -> list[dict]:
    if not (folder / "last.pt").exists():
        return []
    try:
        state = torch.load(folder / "last.pt", weights_only=True)
    except Exception as error:
        raise ParameterError(f"{folder / 'last.pt'} cannot be read ({error}). Delete it to start this run afresh.") from None
    if state["config"] != asdict(config):
        changed = [k for k, v in asdict(config).items() if state["config"].get(k) != v]
        raise ParameterError(f"{folder} holds an interrupted run with other settings ({', '.join(changed)}). Set resume=false, or use another folder.")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["records"]
