"""Which layers can be skipped: leave one out and see what each task loses.

    found = importance(model, [batches.single_task(Task.MMU, "validation", 4, start=4 * i) for i in range(4)], Task.MMU)
    found.damage.mean(1)          # rise of the loss per layer, in nats
    1 - found.cosine.mean(1)      # the cheap proxy: how much a layer turns the residual stream
    right = importance(model, starts, Task.MMU, lambda model, start: share_right(model, start), name="questions right")

Second analysis of UniMoD (arXiv 2502.06474, section 3), which skipped odd layers and measured GQA for understanding only; here every layer,
both tasks and any metric, with the spread over seeds or batches. A layer that turns the stream little is often, not always, one to skip.

Letters: L layers, N batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Batch, Task
from ..config import ParameterError
from ..losses import losses
from ..models.unified import UnifiedModel, without
from ..seam import layer_output

Metric = Callable[[UnifiedModel, object], float]
"""Any number that a model earns on a batch, which is whatever the metric takes."""


@dataclass(frozen=True)
class Importance:
    """What every layer does for one task; float32."""

    task: Task
    base: Tensor
    """[N]: the metric with all layers; the loss in nats per target."""
    value: Tensor
    """[L, N]: the metric without the layer."""
    cosine: Tensor
    """[L, N]: cosine between a layer's input and output, mean over the task's tokens, all layers running; nan where a batch is not a `Batch`."""
    metric: str = "loss"
    seeds: tuple[int, ...] = ()
    """[N]: the seed that each batch was made with; empty: one for all."""

    @property
    def damage(self) -> Tensor:
        """Change of the metric without the layer: [L, N]. A loss that rises is damage, and so is a share of right answers that falls."""
        return self.value - self.base

    def per_seed(self, values: Tensor) -> Tensor:
        """[..., N] -> [..., seeds]: the mean over each seed's batches, seeds ascending; as it is where all batches have one seed."""
        kinds = sorted(set(self.seeds))
        if len(kinds) < 2:
            return values
        return torch.stack([values[..., torch.tensor([s == kind for s in self.seeds])].mean(-1) for kind in kinds], -1)

    def table(self) -> list[dict[str, object]]:
        """One row per layer: means over the batches and `_sd`, the standard deviation over seeds, or over batches where there is one seed (nan for
        a single one)."""
        rows = []
        for layer in range(len(self.value)):
            row: dict[str, object] = {"task": self.task.name.lower(), "metric": self.metric, "layer": layer, "base": float(self.base.mean()),
                                      "batches": len(self.base), "seeds": max(1, len(set(self.seeds)))}
            for name in ("value", "damage", "cosine"):
                values = getattr(self, name)[layer]
                spread = self.per_seed(values)
                row |= {name: float(values.mean()), f"{name}_sd": float(spread.std()) if len(spread) > 1 else float("nan")}
            rows.append(row)
        return rows


@torch.no_grad()
def importance(model: UnifiedModel, batches: Sequence, task: Task, metric: Metric | None = None, *, name: str = "loss",
               seeds: Sequence[int] = ()) -> Importance:
    """Skip every layer in turn on every batch and measure what `metric`, called `name` in tables, says (default: the task's loss, on `Batch`).

    seeds: the seed that each batch was made with, so that the spread is one over seeds. Raises `ParameterError` for another number of seeds than
    batches, and ValueError when the loss is asked for and a batch has no target of the task.
    """
    if len(seeds) not in (0, len(batches)):
        raise ParameterError(f"{len(seeds)} seeds for {len(batches)} batches: give one per batch, or none.")
    metric = metric or loss_of(task)
    base = [metric(model, batch) for batch in batches]
    cosine = [_turned(model, batch, task) if isinstance(batch, Batch) else torch.full((len(model.layers),), torch.nan) for batch in batches]
    value = []
    for layer in range(len(model.layers)):
        with without(model, layer):
            value.append([metric(model, batch) for batch in batches])
    return Importance(task, torch.tensor(base), torch.tensor(value), torch.stack(cosine, 1), name, tuple(seeds))


def loss_of(task: Task) -> Metric:
    """The metric that is a task's loss on a `Batch`, in nats per target; it raises ValueError for a batch without a target of the task."""

    def loss(model: UnifiedModel, packed: Batch) -> float:
        if not packed.target_counts[task]:
            raise ValueError(f"A batch has no {task.name.lower()} target, so its loss cannot be measured; give batches of that task.")
        return losses(model, packed.to(model.device)).per_task[task].item()

    return loss


def _turned(model: UnifiedModel, packed: Batch, task: Task) -> Tensor:
    """Cosine between every layer's input and output, mean over the task's tokens: float32 [L]."""
    packed, turned = packed.to(model.device), []
    mine = packed.task == task

    def compare(_: nn.Module, args: tuple, y: Tensor | tuple) -> None:
        turned.append(F.cosine_similarity(args[0][0, mine].float(), layer_output(y)[0, mine].float(), dim=-1).mean())

    hooks = [layer.register_forward_hook(compare) for layer in model.layers]
    try:
        model(packed)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(turned).cpu()
