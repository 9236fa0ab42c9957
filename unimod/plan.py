"""Capacity plans: which share of each task's tokens every layer processes.

    plan = last_half(layers=8, saving=0.3)          # a maker
    plan = CapacityPlan.load("plan.yaml")           # or a file
    print(plan)                                     # one line per task

In a file, layers that are not named are dense:

    layers: 8
    capacity:
      t2i: {4: 0.4, 5: 0.4, 6: 0.4, 7: 0.4}
      mmu: {4: 0.6, 5: 0.5, 6: 0.3, 7: 0.2}

The three kinds of layer of UniMoD (arXiv 2502.06474) fall out: a layer below 1 for t2i only is a T2I layer, for mmu only an
MMU layer, for both a Shared layer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from .config import TASKS, ParameterError

FLOOR = 0.05
"""Smallest capacity a maker gives: below it a layer sees almost nothing of a short sequence."""


@dataclass(frozen=True)
class CapacityPlan:
    """Fraction of tokens kept, per task (t2i, mmu, lm) and layer; 1 is dense. Raises `ParameterError` on a fraction outside (0, 1]."""

    capacity: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        full = {}
        layers = {len(row) for row in self.capacity.values()}
        if len(layers) != 1 or 0 in layers:
            raise ParameterError(f"A plan needs one capacity per layer for every task; got rows of {sorted(layers)} layers.")
        for task in self.capacity:
            if task not in TASKS:
                raise ParameterError(f"A plan has no task {task!r}. Allowed: {', '.join(TASKS)}.")
        for task in TASKS:
            row = tuple(float(c) for c in self.capacity.get(task, (1.0,) * max(layers)))
            for layer, c in enumerate(row):
                if not 0 < c <= 1:
                    raise ParameterError(f"Capacity {c:g} of {task} in layer {layer} must lie in (0, 1]: 1 keeps every token, "
                                         "0.5 half of them; to drop a layer altogether give it a small capacity.")
            full[task] = row
        object.__setattr__(self, "capacity", full)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.capacity[TASKS[0]])

    def at(self, layer: int) -> dict[str, float]:
        """Capacity of every task at one layer."""
        return {task: row[layer] for task, row in self.capacity.items()}

    def routed(self) -> tuple[int, ...]:
        """The layers in which at least one task drops tokens."""
        return tuple(i for i in range(self.layers) if min(self.at(i).values()) < 1)

    def kind(self, layer: int) -> str:
        """dense, T2I, MMU, LM or Shared: the paper's name for the layer, read off its capacities."""
        tasks = [task for task, c in self.at(layer).items() if c < 1]
        return "dense" if not tasks else tasks[0].upper() if len(tasks) == 1 else "Shared"

    def saving(self, task: str) -> float:
        """Share of the task's token-layer computations saved: 1 - mean capacity (the paper's way of counting)."""
        return 1 - sum(self.capacity[task]) / self.layers

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML."""
        rows = {task: {i: round(c, 6) for i, c in enumerate(row) if c < 1} for task, row in self.capacity.items()}
        Path(path).write_text(yaml.safe_dump({"layers": self.layers, "capacity": {t: r for t, r in rows.items() if r}}, sort_keys=False))

    @classmethod
    def load(cls, path: str | Path) -> CapacityPlan:
        """Read a plan from YAML. Raises `ParameterError` for a missing file, a layer that does not exist or a wrong capacity."""
        try:
            data = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ParameterError(f"Cannot read the plan {str(path)!r}: {error}. Give a YAML file such as notebook 03 writes, "
                                 f"or one of the makers: {', '.join(MAKERS)}.") from None
        if not isinstance(data, dict) or not isinstance(data.get("layers"), int) or not isinstance(data.get("capacity"), dict):
            raise ParameterError(f"{path} is not a plan: it needs 'layers: <number>' and 'capacity: {{t2i: {{4: 0.5}}, ...}}'.")
        n, rows = data["layers"], {}
        for task, named in data["capacity"].items():
            rows[task] = [1.0] * n
            if not isinstance(named, dict):
                raise ParameterError(f"{path}: capacity of {task} must map layers to fractions, such as {{4: 0.5}}; got {named!r}.")
            for layer, c in named.items():
                if not isinstance(layer, int) or not 0 <= layer < n:
                    raise ParameterError(f"{path}: layer {layer!r} of {task} does not exist; the plan has layers 0 to {n - 1}.")
                if not isinstance(c, (int, float)) or isinstance(c, bool):
                    raise ParameterError(f"{path}: capacity {c!r} of {task} in layer {layer} is not a number in (0, 1].")
                rows[task][layer] = c
        return cls(rows or {TASKS[0]: [1.0] * n})

    def __str__(self) -> str:
        width = max(len(t) for t in TASKS)
        return "\n".join(f"{task:{width}s}  " + " ".join("1  " if c == 1 else f"{c:.2f}"[1:] for c in row) + f"   -{self.saving(task):.0%}"
                         for task, row in self.capacity.items())


def last_half(layers: int, saving: float = 0.3) -> CapacityPlan:
    """The second half of the layers at one capacity for all tasks, saving `saving` of the stack (the paper's Emu3 run has saving 0.4)."""
    return _uniform(layers, range(layers // 2, layers), saving)


def interleaved(layers: int, saving: float = 0.3) -> CapacityPlan:
    """Every other layer, the first dense: where Mixture-of-Depths puts its routers (arXiv 2404.02258)."""
    return _uniform(layers, range(1, layers, 2), saving)


def random_layers(layers: int, saving: float = 0.3, seed: int = 0) -> CapacityPlan:
    """Half of the layers, drawn by `seed`, at one capacity: a control for every rule that chooses layers."""
    return _uniform(layers, sorted(random.Random(seed).sample(range(layers), layers // 2)), saving)


def cosine_decay(layers: int, saving: float = 0.0) -> CapacityPlan:
    """p-MoD's falling capacity (arXiv 2412.04449): c_l = 0.5 cos(pi l / (L - 1)) + 0.5, dense above 0.85 and at least 0.15.

    The formula fixes what is saved; `saving` has no effect.
    """
    falling = [0.5 * math.cos(math.pi * i / max(1, layers - 1)) + 0.5 for i in range(layers)]
    return CapacityPlan({task: [1.0 if c > 0.85 else max(0.15, c) for c in falling] for task in TASKS})


def dense(layers: int, saving: float = 0.0) -> CapacityPlan:
    """Every layer keeps every token; `saving` is accepted as by the other makers and has no effect."""
    return CapacityPlan({TASKS[0]: (1.0,) * layers})


def paper_showo(layers: int = 24, saving: float = 0.15) -> CapacityPlan:
    """The paper's Show-o run: last half routed, t2i at 0.8, mmu falling linearly to 0.2, lm dense.

    The first routed mmu layer keeps 1 and the last 0.2, mean 0.6 over the 12 layers, as the paper's FLOPs imply: -20 % mmu,
    -10 % t2i. The run fixes `saving`; another value has no effect.
    """
    half = layers // 2
    falling = [1 - 0.8 * i / max(1, layers - half - 1) for i in range(layers - half)]
    return CapacityPlan({"t2i": [1.0] * half + [0.8] * (layers - half), "mmu": [1.0] * half + falling})


def paper_emu3(layers: int = 32, saving: float = 0.4) -> CapacityPlan:
    """The paper's Emu3 run: capacity 0.2 in the last half for both tasks, lm dense. `saving` is fixed by the run."""
    half = layers // 2
    return CapacityPlan({task: [1.0] * half + [0.2] * (layers - half) for task in ("t2i", "mmu")})


def from_arank(arank: Mapping[str, list[float]], saving: float = 0.3, highest: bool = False) -> CapacityPlan:
    """The layer switch of UniMoD with its missing formula stated.

    arank: per task, one number per layer: ARank divided by the sequence length. For each task the half of the layers with
    the lowest values is routed; their capacities are proportional to ARank, c_l = clip(s * a_l, FLOOR, 1), and s is found by
    bisection so that the task saves exactly `saving`. With `highest` the other half of the layers is routed: the control that
    tells whether a low rank is what makes a layer cheap to skip. Raises `ParameterError` when half of the layers cannot save that much.
    """
    rows = {}
    for task, values in arank.items():
        layers = len(values)
        chosen = sorted(range(layers), key=lambda i: values[i], reverse=highest)[: layers // 2]
        if saving * layers > len(chosen) * (1 - FLOOR):
            raise ParameterError(f"saving={saving:g} is more than half of the layers can save; ask for less than {len(chosen) * (1 - FLOOR) / layers:.2f}.")
        low, high = 0.0, 1 / max(min(values), 1e-9)
        for _ in range(60):
            s = (low + high) / 2
            kept = {i: min(1.0, max(FLOOR, s * values[i])) for i in chosen}
            low, high = (s, high) if layers - sum(1 - c for c in kept.values()) < (1 - saving) * layers else (low, s)
        rows[task] = [kept.get(i, 1.0) for i in range(layers)]
    return CapacityPlan(rows)


MAKERS: dict[str, Callable[..., CapacityPlan]] = {
    "dense": dense, "last_half": last_half, "interleaved": interleaved, "random": random_layers, "cosine_decay": cosine_decay,
    "paper_showo": paper_showo, "paper_emu3": paper_emu3,
}


def make_plan(name_or_file: str, layers: int, saving: float = 0.3) -> CapacityPlan:
    """The plan of a maker's name or of a YAML file, for a model of `layers` layers.

    Raises `ParameterError` when it is neither, or when the file is for another number of layers.
    """
    if name_or_file in MAKERS:
        return MAKERS[name_or_file](layers, saving)
    if not Path(name_or_file).exists():
        raise ParameterError(f"plan={name_or_file!r} is neither a maker ({', '.join(MAKERS)}) nor a file.")
    plan = CapacityPlan.load(name_or_file)
    if plan.layers != layers:
        raise ParameterError(f"{name_or_file} plans {plan.layers} layers, the model has {layers}. Make a plan for this model in notebook 03.")
    return plan


def _uniform(layers: int, where: Sequence[int], saving: float) -> CapacityPlan:
    kept = 1 - saving * layers / len(where)
    if kept < FLOOR:
        raise ParameterError(f"saving={saving:g} is more than {len(where)} of {layers} layers can save; "
                             f"ask for less than {len(where) * (1 - FLOOR) / layers:.2f}.")
    return CapacityPlan({task: [kept if i in where else 1.0 for i in range(layers)] for task in TASKS})
