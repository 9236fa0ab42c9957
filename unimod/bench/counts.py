"""What routing costs the host and the device in operations, counted without a GPU: the way of a GPU, shapes only.

    counts()                                # a row for each released size; seconds on a CPU
    with Counter() as counter: ...          # counter.device_ops, .dispatches, .host_ops, .uploads

Show-o's layers are so short that their kernels' launches decide the time: on an H200 a routed layer had 104 kernels
more than a dense one, and saved nothing.
"""

from __future__ import annotations

import random
from collections import Counter as Tally
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..batch import Batch, TokenSequence, pack
from ..config import ParameterError
from ..decode import Choice, ChosenSteps, next_tokens
from ..graph import signature_of
from ..layers import apply_mod, routed_layers
from ..models.cache import KVCache
from ..models.unified import UnifiedModel
from ..ops.backend import choice, count_launches, meta_as, use_backend
from ..plan import CapacityPlan
from ..presets import CUDA, SIZES, Size, preset, row_of
from ..train import Objective

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {"_unsafe_view", "_reshape_alias", "detach", "lift_fresh"}
"""Views that an operator's schema does not show."""
BATCHES = 2000
TEXTS = 64
"""Different lengths of text of either task, evenly spread, among the rows that are shuffled."""


class Counter(TorchDispatchMode):
    """Counts what torch's dispatcher is asked for, and Triton's launches beside it, inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.device_ops: Tally[str] = Tally()
        """By name: operators on device tensors but views and allocations, and launches."""
        self.dispatches = 0
        """All operators on device tensors, and launches."""
        self.host_ops = 0
        """Operators on tensors of the host alone."""
        self.uploads = 0
        """Copies of host tensors to the device."""
        self._launches: AbstractContextManager = count_launches()

    def __enter__(self) -> Counter:
        self._launched = self._launches.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._launches.__exit__(*error)
        self.device_ops.update(self._launched)
        self.dispatches += len(self._launched)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        there, here = any(x.is_meta for x in tensors), any(not x.is_meta and x.ndim for x in tensors)
        self.uploads += there and here
        self.host_ops += here and not there
        self.dispatches += there
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if there and not view and name not in ALLOCATIONS | VIEWS:
            self.device_ops[name] += 1
        return out


def counts() -> list[dict]:
    """A row for each released size, routed by the paper's plan, in bfloat16. Raises `ParameterError` without Triton.

    device_ops, dispatches, host_ops, uploads: what a routed layer adds to a dense one, mean over the routed layers,
    forward and backward, once the batch's plan is made; uploads_per_step: of a whole training step, plan included;
    signatures, filler: sizes of recorded steps that 2,000 shuffled batches need, and the share of tokens they are
    filled up with; decode_ops: per layer of a static decoding step, dense or
    routed, whichever has more.
    """
    with use_backend(), meta_as("cuda"):
        name, missing = choice("kernels", "cuda", torch.bfloat16)
        if name != "triton":
            raise ParameterError(f"What a GPU runs cannot be counted: {missing['triton']}.")
        return [_row(name, SIZES[name][-1]) for name in CUDA]


def _row(name: str, size: Size) -> dict:
    model, rows = replace(size, layers=0).outline()
    model, batch = model.to(torch.bfloat16).train(), pack(rows)
    dense = _stack(model, batch)
    apply_mod(model, size.plans(len(model.layers))["paper"]).train()
    routed, layers = _stack(model, batch), len(routed_layers(model))

    def added(mine: int, theirs: int) -> float:
        return round((mine - theirs) / layers, 2)

    with Counter() as step:
        Objective(model)(batch.to("meta")).objective.backward()
    signatures, filler = _signatures(model, size)
    decoded = [decode_step(name, plan) for plan in (None, size.plans(len(model.layers))["paper"])]
    return {
        "bench": "counts", "preset": name, "tokens": len(batch), "layers": len(model.layers), "routed": layers,
        "device_ops": added(routed.device_ops.total(), dense.device_ops.total()),
        "dispatches": added(routed.dispatches, dense.dispatches),
        "host_ops": added(routed.host_ops, dense.host_ops), "uploads": added(routed.uploads, dense.uploads),
        "uploads_per_step": step.uploads, "signatures": signatures, "filler": round(filler, 4),
        "decode_ops": round(max(counter.device_ops.total() / n for counter, n in decoded), 1),
    }


def _stack(model: UnifiedModel, batch: Batch) -> Counter:
    """Forward and backward of the layers from given hidden states, the batch's plan made before."""
    batch = batch.to("meta")
    model.zero_grad(set_to_none=True)
    h = torch.empty(len(batch), model.width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    model.rotary.to("meta")                                 # moved by the first forward, once
    plan, model.__dict__["embed"] = model.plan(batch, targets=False), lambda _: h
    try:
        with Counter() as counter:
            out = model(batch, plan=plan)
            out.backward(torch.empty_like(out))
    finally:
        del model.__dict__["embed"]
    return counter


def _signatures(model: UnifiedModel, size: Size) -> tuple[int, float]:
    """How many signatures `BATCHES` batches need that are drawn from texts of all lengths, and their mean filler."""
    pool = [[row_of(model.layout, size.tokens, mmu, text=i / (TEXTS - 1)) for i in range(TEXTS)]
            for mmu in (False, True)]
    routers = {layer.router.capacities(): layer.router for layer in routed_layers(model)}
    drawn, known, given, used = random.Random(0), set(), 0, 0
    for _ in range(BATCHES):
        rows: list[TokenSequence] = [drawn.choice(pool[i % 2]) for i in range(size.batch)]
        drawn.shuffle(rows)
        batch = pack(rows)
        signature = signature_of(batch, [router.kept_counts(batch) for router in routers.values()], known)
        known.add(signature)
        given += len(batch)
        used += signature.tokens
    return len(known), used / given - 1


@torch.no_grad()
def decode_step(name: str, plan: CapacityPlan | None = None) -> tuple[Counter, int]:
    """One static decoding step of a preset in bfloat16, from the ids of its tokens to those of the next, and the number
    of layers.

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
    with meta_as("cuda"):
        hidden = torch.empty(len(rows), model.width, dtype=torch.bfloat16, device="meta")
        batch = next_tokens(rows, range(len(rows)), first, torch.stack([r.position[-1] + 1 for r in rows]), layout)
        table = layout.code_ids if layout.causal_images else None
        steps = ChosenSteps(model, batch, cache, choice, 4, hidden, table)
        steps.run_chosen()                                  # the cache is allocated here
        with Counter() as counter:
            steps.run_chosen()
    return counter, len(model.layers)
