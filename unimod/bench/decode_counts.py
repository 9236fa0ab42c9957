"""Device operations of a static decode step, counted without a GPU: the way that a GPU goes, on the meta device.

    decode_ops("emu3-8k")                                   # per token and layer, the whole step included
    decode_ops("emu3-8k", paper_emu3(32))                   # routed
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..decode import Choice, ChosenSteps, next_tokens
from ..layers import apply_mod
from ..models.cache import KVCache
from ..ops.backend import count_launches, meta_as
from ..plan import CapacityPlan
from ..presets import preset

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {"_unsafe_view", "_reshape_alias", "detach", "lift_fresh"}
"""Operations that launch nothing although their schema does not say that they return their argument's memory."""


class DeviceOps(TorchDispatchMode):
    """Collects the names of operations that run on the meta device, without views and allocations, and of those that
    the host computes or uploads: `device`, `host`."""

    def __init__(self) -> None:
        super().__init__()
        self.device: list[str] = []
        self.host: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, alias = func.overloadpacket.__name__, func._schema.returns and func._schema.returns[0].alias_info
        if name in ALLOCATIONS | VIEWS or (alias is not None and not alias.is_write):
            return out
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        on_host = any(not x.is_meta and x.ndim for x in tensors)
        (self.host if on_host else self.device).append(name)
        return out


@torch.no_grad()
def decode_step(name: str, plan: CapacityPlan | None = None) -> tuple[list[str], list[str], int]:
    """One static step of a preset in bfloat16: names of its device operations, of those on the host, and the layers.

    A causal model draws one picture with guidance and samples among 2,048 codes; Show-o answers greedily.
    """
    model, (drawn, asked) = preset(name)
    if plan is not None:
        apply_mod(model, plan)
    model = model.to(torch.bfloat16).eval()
    model.__dict__["rotary"] = model.rotary.to("meta")
    layout = model.layout
    if layout.causal_images:
        row = layout.t2i("x", torch.zeros(0, dtype=torch.long), prompt=True)
        rows, choice = [row, row], Choice(model, codes=True, top_k=2048, temperature=0.9, guidance=2.0)
    else:
        rows, choice = [asked], Choice(model, codes=False, top_k=1, temperature=1.0)
    first = torch.zeros(len(rows), dtype=torch.long)
    cache = KVCache(len(rows), len(drawn.ids) + 1)
    cache.fresh = False
    with meta_as("cuda"), count_launches() as launched:
        hidden = torch.empty(len(rows), model.width, dtype=torch.bfloat16, device="meta")
        batch = next_tokens(rows, range(len(rows)), first, torch.stack([r.position[-1] + 1 for r in rows]), layout)
        table = layout.code_ids if layout.causal_images else None
        steps = ChosenSteps(model, batch, cache, choice, 4, hidden, table)
        steps.run_chosen()                                  # the cache is allocated here
        launched.clear()
        with DeviceOps() as ops:
            steps.run_chosen()
    return ops.device + launched, ops.host, len(model.layers)


def decode_ops(name: str, plan: CapacityPlan | None = None) -> float:
    """Device operations per token and layer of a static decode step: embedding, layers, final norm, head, choice and
    the ids of the next step, divided by the number of layers."""
    device, _, layers = decode_step(name, plan)
    return len(device) / layers
