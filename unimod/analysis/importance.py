"""Which layers can be skipped: leave one out and see what each task loses.

    found = importance(model, [batches.single_task(Task.MMU, "validation", 4, start=4 * i) for i in range(4)], Task.MMU)
    found.damage.mean(1)          # rise of the loss per layer, in nats
    1 - found.cosine.mean(1)      # the cheap proxy: how much a layer turns the residual stream

Second analysis of UniMoD (arXiv 2502.06474, section 3), which skipped odd layers and measured GQA for understanding only; here every layer,
both tasks, and the loss, with the spread over small batches. A layer that turns the stream little is often, not always, one to skip.

Letters: L layers, N batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.backbone import UnifiedModel, losses
from ..tokens import Packed, Task


@dataclass(frozen=True)
class Importance:
    """What every layer does for one task; float32."""

    task: Task
    base: Tensor
    """[N]: loss with all layers, nats per target."""
    loss: Tensor
    """[L, N]: loss without the layer."""
    cosine: Tensor
    """[L, N]: cosine between a layer's input and output, mean over tokens, all layers running."""

    @property
    def damage(self) -> Tensor:
        """Rise of the loss, nats per target: [L, N]."""
        return self.loss - self.base

    def table(self) -> list[dict[str, object]]:
        """One row per layer: means over the batches and `_sd`, the standard deviation (nan for one batch)."""
        rows = []
        for layer in range(len(self.loss)):
            row: dict[str, object] = {"task": self.task.name.lower(), "layer": layer, "base": float(self.base.mean())}
            for name in ("loss", "damage", "cosine"):
                values = getattr(self, name)[layer]
                row |= {name: float(values.mean()), f"{name}_sd": float(values.std()) if len(values) > 1 else float("nan")}
            rows.append(row)
        return rows


@torch.no_grad()
def importance(model: UnifiedModel, packs: Sequence[Packed], task: Task) -> Importance:
    """Skip every layer in turn on every batch. Raises ValueError when a batch has no target of the task."""
    base, loss, cosine = [], [], []
    for packed in packs:
        if not packed.target_counts[task]:
            raise ValueError(f"A batch has no {task.name.lower()} target, so its loss cannot be measured; give batches of that task.")
        packed = packed.to(model.device)
        turned: list[float] = []

        def compare(_: nn.Module, args: tuple, y: Tensor, turned: list[float] = turned, mine: Tensor = packed.task == task) -> None:
            turned.append(float(F.cosine_similarity(args[0][0, mine].float(), y[0, mine].float(), dim=-1).mean()))

        hooks = [layer.register_forward_hook(compare) for layer in model.layers]
        try:
            base.append(losses(model, packed).per_task[task].item())
        finally:
            for hook in hooks:
                hook.remove()
        loss.append([losses(model, packed, skip=i).per_task[task].item() for i in range(len(model.layers))])
        cosine.append(turned)
    return Importance(task, torch.tensor(base), torch.tensor(loss).T, torch.tensor(cosine).T)
