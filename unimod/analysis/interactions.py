"""Do the tasks fight: over gradients, over tokens, over the weights.

    gradient_cosine(model, t2i_packs, mmu_packs)                 # do they pull each layer the same way?
    compete(model, mixed_packs, held_out)                        # one router for both at capacity 0.5: who keeps its tokens?
    joint_or_single(model, t2i_packs, mmu_packs, t2i, mmu)       # what does training together cost each?

Third analysis of UniMoD (arXiv 2502.06474, section 3). The paper finds little help or harm in joint training, and that under one router
with a straight-through Gumbel choice generation keeps nearly all its tokens while understanding loses most. It states neither
steps nor rates; here they are arguments. No function changes the model it is given.

Letters: L layers, N pairs of batches, T tokens of a packed batch, K kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..baselines import PRESETS
from ..batch import Batch, Modality, Task
from ..layers import apply_mod, record_routing
from ..losses import losses
from ..models.unified import UnifiedModel
from ..plan import CapacityPlan
from ..router import Routing

BOTH = (Task.T2I, Task.MMU)


@dataclass(frozen=True)
class GradientCosine:
    """Gradients of two losses, layer by layer, flattened over the layer's weights; float32 [L, N]."""

    cosine: Tensor
    norm_a: Tensor
    norm_b: Tensor

    def table(self, pair: str) -> list[dict[str, object]]:
        """One row per layer: mean cosine and norms, and `_sd`, the standard deviation over pairs of batches (nan for one pair)."""
        rows: list[dict[str, object]] = [{"pair": pair, "layer": i, "pairs": self.cosine.shape[1]} for i in range(len(self.cosine))]
        for name in ("cosine", "norm_a", "norm_b"):
            for row, values in zip(rows, getattr(self, name)):
                row |= {name: float(values.mean()), f"{name}_sd": float(values.std()) if len(values) > 1 else float("nan")}
        return rows


def gradient_cosine(model: UnifiedModel, a: Sequence[Batch], b: Sequence[Batch]) -> GradientCosine:
    """Cosine between the gradients of the loss on a[i] and on b[i]. Two batches of one task give the ceiling to compare with."""
    pairs = [[_gradients(model, packed) for packed in pair] for pair in zip(a, b, strict=True)]
    cosine = [[torch.cosine_similarity(x, y, dim=0).item() for x, y in zip(*pair)] for pair in pairs]
    norms = [[[g.norm().item() for g in side] for side in pair] for pair in pairs]
    first, second = (torch.tensor([pair[side] for pair in norms]).T for side in (0, 1))
    return GradientCosine(torch.tensor(cosine).T, first, second)


def _gradients(model: UnifiedModel, packed: Batch) -> list[Tensor]:
    """One flat gradient per layer; nothing is left in `.grad`."""
    weights = [[p for p in layer.parameters() if p.requires_grad] for layer in model.layers]
    total = losses(model, packed.to(model.device)).total
    flat = iter(torch.autograd.grad(total, [p for group in weights for p in group], materialize_grads=True))
    return [torch.cat([next(flat).flatten().float() for _ in group]) for group in weights]


@dataclass(frozen=True)
class Competition:
    """Who kept its tokens under one router, and at what loss. Shares are in [0, 1]; a fair share is the capacity."""

    layers: tuple[int, ...]
    capacity: float
    history: Tensor
    """float32 [steps, 2]: share of t2i and of mmu tokens kept in each training step, mean over the routed layers."""
    kept: Tensor
    """float32 [routed layers, 2]: the same on the held-out batch after training, without noise."""
    kept_modality: Tensor
    """float32 [routed layers, 2, 3]: split by modality (text, image, special)."""
    loss: Tensor
    """float32 [3, 2]: held-out loss of t2i and mmu: dense, with the fresh router, with the trained router."""
    seed: int

    def table(self) -> list[dict[str, object]]:
        """One row per routed layer, task and modality ("all" for the task's tokens together)."""
        names = ("all", *(m.name.lower() for m in Modality))
        shares = torch.cat([self.kept[..., None], self.kept_modality], -1)
        return [
            {"seed": self.seed, "layer": layer, "task": task.name.lower(), "modality": name, "kept": float(shares[i, t, m]), "capacity": self.capacity}
            for i, layer in enumerate(self.layers)
            for t, task in enumerate(BOTH)
            for m, name in enumerate(names)
        ]

    def steps(self) -> list[dict[str, object]]:
        """One row per training step and task."""
        return [
            {"seed": self.seed, "step": s + 1, "task": task.name.lower(), "kept": float(share[t])}
            for s, share in enumerate(self.history)
            for t, task in enumerate(BOTH)
        ]


def compete(
    model: UnifiedModel,
    packs: Sequence[Batch],
    held_out: Batch,
    *,
    steps: int = 40,
    capacity: float = 0.5,
    lr: float = 0.05,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Competition:
    """Train one router per layer (default: the last half) for `steps` steps, the model frozen, on batches that mix t2i and mmu.

    The router is the preset "competitive": all tokens of a batch, whatever their task, for the places of all, with a straight-through Gumbel choice. The
    packs are used in turn. Raises ValueError when a batch lacks one of the tasks.
    """
    for packed in (*packs, held_out):
        if not all(packed.target_counts[t] for t in BOTH):
            raise ValueError("compete() needs t2i and mmu targets in every batch: the tasks cannot compete otherwise.")
    device = model.device
    packs, held_out = [p.to(device) for p in packs], held_out.to(device)
    frozen = copy.deepcopy(model)
    where = tuple(layers if layers is not None else range(len(model.layers) // 2, len(model.layers)))
    results, history = [_loss(frozen, held_out)], []
    plan = CapacityPlan({task.name.lower(): [capacity if i in where else 1.0 for i in range(len(model.layers))] for task in Task})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        apply_mod(frozen, plan, replace(PRESETS["competitive"], alone=True))
        results.append(_loss(frozen.eval(), held_out))
        optimizer = torch.optim.Adam([p for p in frozen.parameters() if p.requires_grad], lr=lr)
        for step in range(steps):
            packed = packs[step % len(packs)]
            with record_routing() as log:
                loss = losses(frozen.train(), packed)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            history.append(torch.stack([_kept(log[i], packed)[0] for i in where]).mean(0))
    with record_routing() as log:
        results.append(_loss(frozen.eval(), held_out))
    kept, split = (torch.stack(shares) for shares in zip(*(_kept(log[i], held_out) for i in where)))
    return Competition(where, capacity, torch.stack(history), kept, split, torch.stack(results), seed)


@torch.no_grad()
def _loss(model: UnifiedModel, packed: Batch) -> Tensor:
    return losses(model, packed).per_task[list(BOTH)].cpu()


def _kept(routing: Routing, packed: Batch) -> tuple[Tensor, Tensor]:
    """Shares kept per task [2], and per task and modality [2, 3] (nan where a task has no such token)."""
    stays = routing.stays.float()
    mine = [packed.task == t for t in BOTH]
    per_task = torch.stack([stays[m].mean() for m in mine])
    return per_task.cpu(), torch.stack([torch.stack([stays[m & (packed.modality == k)].mean() for k in Modality]) for m in mine]).cpu()


@dataclass(frozen=True)
class JointOrSingle:
    """Held-out loss per task (t2i, mmu) before, and after the same number of steps together or alone; float32 [runs, 2], nats."""

    before: Tensor
    joint: Tensor
    single: Tensor

    @property
    def harm(self) -> Tensor:
        """What training together costs each task, run by run, as a share of the loss after training alone; below 0 it helps: [runs, 2]."""
        return (self.joint - self.single) / self.single

    def table(self) -> list[dict[str, object]]:
        """One row per task, way and run."""
        return [
            {"task": task.name.lower(), "way": way, "run": r, "loss": float(getattr(self, way)[r, t])}
            for t, task in enumerate(BOTH)
            for way in ("before", "joint", "single")
            for r in range(len(self.joint))
        ]


def joint_or_single(
    model: UnifiedModel, t2i: Sequence[Batch], mmu: Sequence[Batch], held_out: Batch, *, steps: int = 16, lr: float = 3e-4, runs: int = 2
) -> JointOrSingle:
    """Fine-tune copies of the model for `steps` steps on t2i, on mmu, and on both; run r takes batches r * steps, r * steps + 1, ...

    A joint step sees the very rows of both single steps, so each task has the same data and number of updates either way; batches
    are taken in turn. `held_out` holds rows of both tasks.
    """
    held_out = held_out.to(model.device)
    before, joint, single = [], [], []
    for run in range(runs):
        at = [run * steps + s for s in range(steps)]
        before.append(_loss(model, held_out))
        joint.append(_tuned(model, [[t2i[i % len(t2i)], mmu[i % len(mmu)]] for i in at], held_out, lr))
        alone = [_tuned(model, [[packs[i % len(packs)]] for i in at], held_out, lr) for packs in (t2i, mmu)]
        single.append(torch.stack([alone[0][0], alone[1][1]]))
    return JointOrSingle(torch.stack(before), torch.stack(joint), torch.stack(single))


def _tuned(model: UnifiedModel, packs: Sequence[Sequence[Batch]], held_out: Batch, lr: float) -> Tensor:
    """Held-out losses of a copy after one AdamW step per entry; the losses of an entry's batches are added."""
    tuned = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.01)
    for together in packs:
        optimizer.zero_grad()
        for packed in together:
            losses(tuned, packed.to(held_out.ids.device)).total.backward()
        nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
    return _loss(tuned.eval(), held_out)
