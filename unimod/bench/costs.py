"""Plans by predicted time: what one decoder layer takes on this device at a few kept shares, measured once and stored.

    table = costs(model, rows, config)                   # a CostTable, from ~/.cache/unimod/costs where it is known
    seconds = predicted_seconds(model, plan, batch, table, config)
    plan = solve(partial(last_half, 8), lambda plan: predicted_seconds(...) / (8 * table.dense), 0.8)    # 20 % less

A FLOP that is not spent may still cost: routers, gather and scatter take the same time whatever is kept, so a small
saving may be none. The table holds whole routed layers, so the prediction includes them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import seam
from ..batch import Batch, TokenSequence, pack
from ..config import TASKS, ParameterError, RouterConfig, SetupError
from ..files import cache_folder, facts, write
from ..flops import planned
from ..layers import MoDLayer, apply_mod
from ..models.unified import UnifiedModel
from ..ops.backend import backend
from ..plan import CapacityPlan
from ..presets import materialise, shared_copy
from .timing import describe, dtype_of, time_interleaved

SHARES = (0.05, 0.15, 0.3, 0.5, 0.75, 0.95)
"""Capacities at which a routed layer is measured."""
TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of the measured batch, at least: the rows again and again."""
SLOW = 1e11
"""FLOPs of one layer's forward above which a CPU is not asked to measure."""


@dataclass(frozen=True)
class CostTable:
    """Seconds of one decoder layer, forward and backward, on a batch of `tokens`: `dense`, and routed in `seconds` at
    `kept`, the shares of tokens it processed, ascending. Raises `ParameterError` where the numbers make no table."""

    device: str
    tokens: int
    dense: float
    kept: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = bool(self.kept) and list(self.kept) == sorted(set(self.kept))
        if not ascending or len(self.kept) != len(self.seconds) or min(self.dense, *self.seconds) <= 0:
            found = f"dense={self.dense}, kept={self.kept}, seconds={self.seconds}"
            raise ParameterError(f"Not a table of costs: {found}; delete its file to measure anew.")

    def routed(self, share: float) -> float:
        """Seconds of a routed layer that processes this share of the tokens: linear between the measured ones."""
        # never less for more tokens: one noisy measurement must not make a plan look cheaper by keeping more
        return float(np.interp(share, self.kept, np.maximum.accumulate(self.seconds)))


def predicted_seconds(
    model: UnifiedModel, plan: CapacityPlan, batch: Batch, table: CostTable, config: RouterConfig | None = None
) -> float:
    """Seconds of the layer stack under a plan, forward and backward, on a batch of `table.tokens` like `batch`.

    The dense model is left as it was.
    """
    with planned(model, plan, config):
        shares = [sum(layer.router.kept_counts(batch)) / len(batch) if isinstance(layer, MoDLayer) else None
                  for layer in model.layers]
    return sum(table.dense if share is None else table.routed(share) for share in shares)


def costs(
    model: UnifiedModel, rows: Sequence[TokenSequence], config: RouterConfig | None = None, folder: Path | None = None
) -> CostTable:
    """The table of a dense model (on any device; weights do not matter), measured now or before.

    Kept under `folder` (default ~/.cache/unimod/costs) by device, dtype, threads, versions, backends, router and sizes.
    Raises `ParameterError` for a layer too large to be measured on a CPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = sum(p.numel() for p in model.layers[0].parameters())
    lengths = [len(row.ids) for row in rows]
    if device == "cpu" and 2 * weights * max(sum(lengths), TOKENS["cpu"]) > SLOW:
        raise ParameterError(
            f"A layer of {weights / 1e6:.0f} M weights is not timed on a CPU, and its time here would say nothing "
            "about a GPU. Run this where there is CUDA, or count FLOPs: --count full."
        )
    versions = {k: v for k, v in facts()["versions"].items() if k in ("unimod", "torch", "transformers", "triton")}
    backends = [backend(family, device, dtype_of(device)) for family in ("kernels", "attention")]
    key = {
        "device": describe(device), "dtype": str(dtype_of(device)), "versions": versions,
        "model": model.decoder.config.to_dict(), "rows": lengths, "backends": backends,
        "router": asdict(config or RouterConfig()),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = (folder or cache_folder() / "costs") / f"{name}.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["table"]
        return CostTable(**known | {"kept": tuple(known["kept"]), "seconds": tuple(known["seconds"])})
    except (OSError, ValueError, KeyError, TypeError):  # not there, half-written or of another make
        table = measured(model, rows, config, device)
    with suppress(SetupError):  # a cache that cannot be written costs the next process the measurement
        write(path, json.dumps({"key": key, "table": asdict(table)}, indent=1, default=str) + "\n")
    return table


def measured(
    model: UnifiedModel, rows: Sequence[TokenSequence], config: RouterConfig | None, device: str, rounds: int = 7
) -> CostTable:
    """Time one layer with random weights: dense, and routed at each of `SHARES`, in turn."""
    one = copy.deepcopy(model).to("meta")
    one.decoder.layers = one.decoder.layers[-1:]
    seam.set_final_norm(one.decoder, nn.Identity())  # what is not timed
    seam.set_embedding(one.decoder, nn.Embedding(1, 1))
    one.lm.lm_head = nn.Linear(1, 1)
    one = materialise(one, device, dtype_of(device))
    batch = pack(list(rows) * math.ceil(TOKENS[device] / sum(len(row.ids) for row in rows))).to(device)
    h = torch.randn(len(batch), model.width, device=device, dtype=dtype_of(device), requires_grad=True)
    plans = {share: CapacityPlan(dict.fromkeys(TASKS, (share,))) for share in SHARES}
    arms = {1.0: one} | {share: apply_mod(shared_copy(one), plan, config).train() for share, plan in plans.items()}
    for arm in arms.values():
        arm.__dict__["embed"] = lambda _: h

    def clear() -> None:
        h.grad = None
        for arm in arms.values():
            arm.zero_grad(set_to_none=True)

    steps = {share: (lambda arm=arm: arm(batch).sum().backward()) for share, arm in arms.items()}
    times = time_interleaved(steps, rounds, warmup=2, after=clear)
    seconds = {share: statistics.median(t.wall if device == "cuda" else t.cpu) for share, t in times.items()}
    kept = {share: sum(arms[share].layers[0].router.kept_counts(batch)) / len(batch) for share in SHARES}
    ascending = sorted(SHARES, key=kept.get)
    return CostTable(
        describe(device), len(batch), seconds[1.0],
        tuple(kept[share] for share in ascending), tuple(seconds[share] for share in ascending),
    )
