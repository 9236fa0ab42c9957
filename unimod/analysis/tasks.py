"""Whether the tasks compete: over gradients, over tokens, over the weights; and the paper's findings, tested.

    gradient_cosine(model, t2i_batches, mmu_batches)                 # do they pull each layer the same way?
    compete(model, mixed_batches, held_out)                          # whose tokens does one router for both keep?
    joint_or_single(model, t2i_batches, mmu_batches, held_out)       # what does training together cost each?
    all_findings(session.model, session.batches, competitions, joint, samples=32)      # [Finding, ...]

Third analysis of UniMoD (arXiv 2502.06474, section 3). The paper finds little help or harm in joint training, and that
under one router with a straight-through Gumbel choice T2I keeps nearly all its tokens while MMU loses most. It states
neither steps nor rates; here they are arguments. No function changes the model it is given.

The findings of all three analyses: (1) which modality dominates attention flips between the tasks; (2) early layers
matter more, ARank falls with depth and is higher for T2I; (3) joint training neither helps nor harms much, and under
one router T2I keeps more tokens. Each is one number that is above 0 when the finding is right, decided by the 95 %
interval of its mean under resampling of samples or seeds (`redundancy.Finding`). Samples of one model say nothing about
another training of it.

Letters: L layers, N pairs of batches or samples, H heads, R routed layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..baselines import PRESETS
from ..batch import Batch, Modality, Task
from ..capture import capture_batch
from ..data.batches import Batches
from ..layers import apply_mod, record_routing
from ..losses import losses
from ..models.unified import UnifiedModel
from ..plan import CapacityPlan
from ..routing import Routing
from .attention import Patterns, patterns
from .layers import early_matters, importance
from .redundancy import Finding, arank, arank_falls, arank_higher, cells, decide, mean_sd, resampled_means

BOTH = (Task.T2I, Task.MMU)
NAMES = tuple(task.name.lower() for task in BOTH)


@dataclass(frozen=True)
class GradientCosine:
    """Gradients of two losses, layer by layer, flattened over the layer's weights; float32 [L, N]."""

    cosine: Tensor
    norm_a: Tensor
    norm_b: Tensor

    def table(self, pair: str) -> list[dict[str, object]]:
        """One row per layer: mean cosine and norms, and `_sd`, the standard deviation over pairs (nan for one pair)."""
        return [{"pair": pair, "layer": i, "pairs": len(row)}
                | mean_sd({"cosine": row, "norm_a": self.norm_a[i], "norm_b": self.norm_b[i]})
                for i, row in enumerate(self.cosine)]


def gradient_cosine(model: UnifiedModel, a: Sequence[Batch], b: Sequence[Batch]) -> GradientCosine:
    """Cosine between the gradients of the loss on a[i] and on b[i]; two batches of one task give the ceiling to compare
    with. Raises ValueError when a and b do not have the same length."""
    cosine, norms = [], []
    for pair in zip(a, b, strict=True):
        gradients = list(zip(*(_gradients(model, batch) for batch in pair)))            # [L] of two vectors
        cosine.append([torch.cosine_similarity(x, y, dim=0).item() for x, y in gradients])
        norms.append([[x.norm().item(), y.norm().item()] for x, y in gradients])
    return GradientCosine(torch.tensor(cosine).T, *torch.tensor(norms).permute(2, 1, 0))


def _gradients(model: UnifiedModel, batch: Batch) -> list[Tensor]:
    """One flat gradient per layer; nothing is left in `.grad`."""
    weights = [[p for p in layer.parameters() if p.requires_grad] for layer in model.layers]
    total = losses(model, batch.to(model.device)).total
    # zeros for a weight that the loss does not reach, so that every batch gives vectors of one size
    flat = iter(torch.autograd.grad(total, [p for group in weights for p in group], materialize_grads=True))
    return [torch.cat([next(flat).flatten().float() for _ in group]) for group in weights]


@dataclass(frozen=True)
class Competition:
    """Shares of tokens kept under one router, in [0, 1], and losses; a fair share is the capacity."""

    layers: tuple[int, ...]
    capacity: float
    history: Tensor  # float32 [steps, 2]: share of t2i and mmu tokens kept per training step, mean over routed layers
    kept: Tensor  # float32 [R, 2]: the same on the held-out batch after training, without noise
    kept_modality: Tensor  # float32 [R, 2, 3]: split by modality (text, image, special); nan where a task has none
    loss: Tensor  # float32 [3, 2]: held-out loss of t2i and mmu in nats: dense, with the fresh and the trained router
    seed: int

    def table(self) -> list[dict[str, object]]:
        """One row per routed layer, task and modality ("all" for the task's tokens together)."""
        shares = torch.cat([self.kept[..., None], self.kept_modality], -1)
        kinds = ("all", *(m.name.lower() for m in Modality))
        rows = cells("kept", shares, seed=[self.seed], layer=self.layers, task=NAMES, modality=kinds)
        return [row | {"capacity": self.capacity} for row in rows]

    def steps(self) -> list[dict[str, object]]:
        """One row per training step and task."""
        return cells("kept", self.history, seed=[self.seed], step=range(1, len(self.history) + 1), task=NAMES)


def compete(model: UnifiedModel, batches: Sequence[Batch], held_out: Batch, *, steps: int = 40, capacity: float = 0.5,
            lr: float = 0.05, layers: Sequence[int] | None = None, seed: int = 0) -> Competition:
    """Train one router per layer (default: the last half) for `steps` steps, the model frozen, on batches of t2i and
    mmu rows, used in turn.

    The router is the preset "competitive": top-k over all tokens of a batch, whatever their task, with a
    straight-through Gumbel choice. Raises ValueError when a batch lacks one of the tasks.
    """
    if not all(batch.target_counts[task] for batch in (*batches, held_out) for task in BOTH):
        raise ValueError("compete() needs t2i and mmu targets in every batch: the tasks cannot compete otherwise.")
    batches, held_out = [batch.to(model.device) for batch in batches], held_out.to(model.device)
    frozen, number = copy.deepcopy(model), len(model.layers)
    where = tuple(layers if layers is not None else range(number // 2, number))
    results, history = [_loss(frozen, held_out)], []
    plan = CapacityPlan({task.name.lower(): [capacity if i in where else 1.0 for i in range(number)] for task in Task})
    with torch.random.fork_rng():                   # the seed makes routers and Gumbel noise; the caller's stream stays
        torch.manual_seed(seed)
        apply_mod(frozen, plan, replace(PRESETS["competitive"], freeze_backbone=True))
        results.append(_loss(frozen.eval(), held_out))
        optimizer = torch.optim.Adam([p for p in frozen.parameters() if p.requires_grad], lr=lr)
        for step in range(steps):
            batch = batches[step % len(batches)]
            with record_routing() as log:
                loss = losses(frozen.train(), batch)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            history.append(torch.stack([_kept(log[i], batch)[:, 0] for i in where]).mean(0))
    with record_routing() as log:
        results.append(_loss(frozen.eval(), held_out))
    kept = torch.stack([_kept(log[i], held_out) for i in where])
    return Competition(where, capacity, torch.stack(history), kept[..., 0], kept[..., 1:], torch.stack(results), seed)


@torch.no_grad()
def _loss(model: UnifiedModel, batch: Batch) -> Tensor:
    """Loss of t2i and mmu, in nats: float32 [2] on the CPU."""
    return losses(model, batch).per_task[list(BOTH)].cpu()


def _kept(routing: Routing, batch: Batch) -> Tensor:
    """Shares kept per task, of all its tokens and by modality: [2, 4] (nan where a task has no such token)."""
    kinds = [torch.ones_like(batch.task, dtype=torch.bool), *(batch.modality == modality for modality in Modality)]
    shares = [routing.kept[(batch.task == task) & kind].float().mean() for task in BOTH for kind in kinds]
    return torch.stack(shares).view(2, -1).cpu()


@dataclass(frozen=True)
class JointOrSingle:
    """Held-out loss of t2i and mmu before, and after as many steps on both tasks or one; float32 [runs, 2], in nats."""

    before: Tensor
    joint: Tensor
    single: Tensor

    @property
    def harm(self) -> Tensor:
        """Cost of joint training, as a share of the loss after training on one task; below 0 it helps: [runs, 2]."""
        return (self.joint - self.single) / self.single

    def table(self) -> list[dict[str, object]]:
        """One row per task, way and run."""
        values = torch.stack([self.before, self.joint, self.single]).permute(2, 0, 1)       # [2, 3, runs]
        return cells("loss", values, task=NAMES, way=("before", "joint", "single"), run=range(len(self.before)))


def joint_or_single(model: UnifiedModel, t2i: Sequence[Batch], mmu: Sequence[Batch], held_out: Batch, *,
                    steps: int = 16, lr: float = 3e-4, runs: int = 2) -> JointOrSingle:
    """Fine-tune copies of the model for `steps` steps on t2i, on mmu, and on both, run after run on further batches.

    A joint step sees the very rows of both single steps, so each task has the same data and number of updates either
    way. `held_out` holds rows of both tasks.
    """
    held_out = held_out.to(model.device)
    found = []
    for run in range(runs):
        pairs = [(t2i[i % len(t2i)], mmu[i % len(mmu)]) for i in range(run * steps, (run + 1) * steps)]
        alone = [_tuned(model, [pair[t : t + 1] for pair in pairs], held_out, lr)[t] for t in (0, 1)]
        found.append((_loss(model, held_out), _tuned(model, pairs, held_out, lr), torch.stack(alone)))
    return JointOrSingle(*map(torch.stack, zip(*found)))


def _tuned(model: UnifiedModel, steps: Sequence[Sequence[Batch]], held_out: Batch, lr: float) -> Tensor:
    """Held-out losses [2] of a copy after one AdamW step per entry; the losses of an entry's batches are added."""
    tuned = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.01)
    for together in steps:
        optimizer.zero_grad()
        for batch in together:                      # gradients add up
            losses(tuned, batch.to(held_out.ids.device)).total.backward()
        nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
    return _loss(tuned.eval(), held_out)


def flips(t2i: Patterns, mmu: Patterns, relative: bool = False) -> Finding:
    """(1) Whether the modality that dominates attention differs between the tasks: mass received by image minus text
    tokens, mean over layers and heads.

    relative: each modality's mass over what even attention would give it, so that mask and token counts have no part.
    The number above 0 when it holds: the smaller of the margins where their signs differ, minus it where they do not.
    """
    margins = []
    for found in (t2i, mmu):
        mass = found.received.nanmean(2) / (found.even if relative else 1.0)
        margins.append(mass[..., Modality.IMAGE] - mass[..., Modality.TEXT])            # [L, N]
    draws = torch.stack([resampled_means(margin.nanmean(0), seed=seed) for seed, margin in enumerate(margins)])
    weaker = -draws.prod(0).sign() * draws.abs().amin(0)
    one, other = (float(margin.nanmean()) for margin in margins)
    apart = int((margins[0].nanmean(1) * margins[1].nanmean(1) < 0).sum())
    way = "relative to even attention" if relative else "absolute"
    unit = "times what even attention gives" if relative else "of the attention mass"
    return decide(f"1. the dominant modality flips ({way})", weaker, one, other, min(m.shape[1] for m in margins),
                  "samples", f"T2I {one:+.2f}, MMU {other:+.2f} {unit}, picture minus text; opposite signs in {apart} "
                  f"of {len(margins[0])} layers")


def joint_is_harmless(found: JointOrSingle, task: Task, margin: float = 0.1) -> Finding:
    """(3a) Whether joint training changes the task's loss by less than `margin`, a share of the loss after training on
    that task only."""
    t = BOTH.index(task)
    harm, joint, single = found.harm[:, t], float(found.joint[:, t].mean()), float(found.single[:, t].mean())
    return decide(f"3a. joint training helps or harms by less than {margin:.0%}, {NAMES[t]}",
                  margin - resampled_means(harm).abs(), joint, single, len(harm), "runs",
                  f"loss {joint:.4f} together, {single:.4f} alone, {float(harm.mean()):+.1%}")


def t2i_keeps_more(found: Sequence[Competition]) -> Finding:
    """(3b) Whether T2I keeps a larger share of its tokens under one router, mean over routed layers, a run per seed."""
    kept = torch.stack([one.kept.mean(0) for one in found])     # [seeds, 2]
    a, b = kept.mean(0).tolist()
    return decide("3b. drawing keeps more tokens under one router", resampled_means(kept[:, 0] - kept[:, 1]), a, b,
                  len(kept), "seeds", f"share kept {a:.2f} T2I, {b:.2f} MMU, at capacity {found[0].capacity:g} after "
                  f"{len(found[0].history)} steps")


def all_findings(model: UnifiedModel, batches: Batches, competitions: Sequence[Competition], joint: JointOrSingle, *,
                 samples: int = 16, tolerance: float = 1e-2, margin: float = 0.1) -> list[Finding]:
    """All findings on one dense model: attention, ARank and skipping on `samples` validation rows per task (skipping:
    eight batches of an eighth each)."""
    records = {task: capture_batch(model, batches.single_task(task, "validation", samples)) for task in BOTH}
    attention = [patterns(record, task) for task, record in records.items()]
    ranks = [arank(record, task, tolerance) for task, record in records.items()]
    parts = min(8, samples)
    rows, skipped = samples // parts, []
    for task in BOTH:
        some = [batches.single_task(task, "validation", rows, start=rows * i) for i in range(parts)]
        skipped.append(importance(model, some, task))
    return [flips(*attention), flips(*attention, relative=True),
            *(early_matters(found, start) for start in (0, 1) for found in skipped),
            *map(arank_falls, ranks), arank_higher(*ranks),
            *(joint_is_harmless(joint, task, margin) for task in BOTH), t2i_keeps_more(competitions)]
