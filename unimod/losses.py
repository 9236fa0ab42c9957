"""Losses: the model's own per task, and those on routers beside it.

    with record_routing() as log:
        loss = losses(model, batch).total
    loss = loss + 0.01 * membership(log) + prediction(log) + budget(log)

A token is a member of its segment's top-k or not; only eligible tokens count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Batch, Targets, Task
from .routing import BatchPlan, Routing


@dataclass(frozen=True)
class Losses:
    """Mean cross entropy per task (nan where the batch has no target of it), their weighted sum, and targets per
    task."""

    total: Tensor
    per_task: Tensor
    targets: tuple[int, ...]


CHUNKED = 2**28
"""Logits of a batch from which on the loss is made in chunks: 1 GiB in float32."""
COEFFICIENTS = {Task.T2I: 1.0, Task.MMU: 1.0, Task.LM: 0.1}
"""Loss weights of Show-o: t2i 1, lm 0.1, mmu 1."""


def targets_of(batch: Batch) -> Targets | None:
    """The labelled tokens of a batch on the host; None where there is none."""
    counts, index = batch.target_counts, batch.labelled
    if not sum(counts):
        return None
    # per task, not over all targets: a picture has 36 to 8,100 of them, an answer a few
    coefficient, scale = torch.tensor([[COEFFICIENTS[t] for t in Task], [1 / n if n else 0.0 for n in counts]])
    task = batch.task[index]
    return Targets(index, batch.target[index], task, coefficient, scale, (coefficient * scale)[task], counts)


def losses(model: nn.Module, batch: Batch, plan: BatchPlan | None = None) -> Losses:
    """Loss of a `UnifiedModel` on a batch; the head sees labelled tokens only. A task without targets contributes
    nothing.

    plan: `model.plan(batch)`, where it was made already. Raises ValueError when no token of the batch has a target.
    """
    plan = plan or model.plan(batch)
    if (targets := plan.targets) is None:
        raise ValueError("No token of this batch has a target, so there is nothing to learn from it.")
    hidden = model(batch, plan=plan).index_select(0, targets.index)     # not [], whose backward sorts the indices
    chunked = model.one_head and len(hidden) * model.head.out_features > CHUNKED
    # the sum that is learned from is made chunk by chunk, and never seen by its parts
    if chunked:
        total, entropy = model.weighted_nll(hidden, targets.target, targets.weight)
    else:
        entropy = model.nll(hidden, targets.target)
    # index_add, not a loop over tasks with boolean masks, whose sizes would be read from the device; a further place
    # for tokens that count in no loss
    sums = torch.zeros(len(Task) + 1, device=entropy.device).index_add(0, targets.task, entropy)
    per_task = sums[:len(Task)] * targets.scale
    total = total if chunked else (per_task * targets.coefficient).sum()
    return Losses(total, torch.where(targets.scale > 0, per_task.detach(), torch.nan), targets.counts)


def membership(log: Mapping[int, Routing]) -> Tensor:
    """Binary cross entropy of sigmoid(score) against membership, in nats, averaged over tokens and then layers.

    Pushes scores apart around 0, so that sigmoid(score) > 0.5 is a causal rule (Mixture-of-Depths, arXiv 2404.02258,
    section 3.5); with weight 0.01 and a sigmoid gate it is gamma-MoD's auxiliary cross entropy (arXiv 2410.13859).
    """
    return _mean([_against_members(routing.score, routing) for routing in log.values()])


def prediction(log: Mapping[int, Routing]) -> Tensor:
    """The same of the predictors' logits, for routers that have one; their input's gradient is stopped, so nothing else
    is moved."""
    return _mean([_against_members(routing.predicted, routing) for routing in log.values()
                  if routing.predicted is not None])


def budget(log: Mapping[int, Routing], share: float | None = None) -> Tensor:
    """Squared difference between the share of tokens that sigmoid(score) would keep and a budget, over all layers
    together.

        (sum sigmoid(score_i) / N - share)^2   over the N eligible tokens in all layers

    share: default what the layers did keep, i.e. the plan's own. Holds scores where a decision of each token for
    itself, sigmoid(score) > 0.5, costs what was planned, without telling any layer how much of it to spend.
    """
    if not log:
        return torch.zeros(())
    n = sum(routing.eligible.sum() for routing in log.values())
    expected = sum((torch.sigmoid(routing.score.float()) * routing.eligible).sum() for routing in log.values())
    kept = sum((routing.kept & routing.eligible).sum() for routing in log.values())
    return (expected / n.clamp(min=1) - (kept / n.clamp(min=1) if share is None else share)).square() * (n > 0)


def _against_members(logits: Tensor, routing: Routing) -> Tensor:
    """Mean over eligible tokens, 0 where there is none; their number is not read from the device."""
    each = F.binary_cross_entropy_with_logits(logits.float(), routing.kept.float(), reduction="none")
    return (each * routing.eligible).sum() / routing.eligible.sum().clamp(min=1)


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean() if parts else torch.zeros(())
