"""Capacity plans: which share of each task's tokens every layer processes.

    plan = last_half(layers=8, saving=0.3)          # a maker
    plan = CapacityPlan.load("plan.yaml")           # or a file
    print(plan)                                     # one line per task; plan.draw() shows it as bars
    plan = solve(partial(last_half, 8), price, 0.7) # whatever saving meets a budget of FLOPs or seconds

In a file, layers that are not named are dense:

    layers: 8
    capacity:
      t2i: {4: 0.4, 5: 0.4, 6: 0.4, 7: 0.4}
      mmu: {4: 0.6, 5: 0.5, 6: 0.3, 7: 0.2}

The three kinds of layer of UniMoD (arXiv 2502.06474) fall out: a layer below 1 for t2i only is a T2I layer, for mmu
only an MMU layer, for both a Shared layer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from .config import TASKS, ParameterError, expanded

FLOOR = 0.05
"""Smallest capacity a maker gives: below it a layer sees almost nothing of a short sequence."""


@dataclass(frozen=True)
class CapacityPlan:
    """Fraction of tokens kept, per task (t2i, mmu, lm) and layer; 1 is dense. Raises `ParameterError` on a fraction
    outside (0, 1]."""

    capacity: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        full = {}
        layers = {len(row) for row in self.capacity.values()}
        if len(layers) != 1 or 0 in layers:
            raise ParameterError(f"A plan needs one capacity per layer for every task; got rows of {sorted(layers)} "
                                 f"layers.")
        for task in self.capacity:
            if task not in TASKS:
                raise ParameterError(f"A plan has no task {task!r}. Allowed: {', '.join(TASKS)}.")
        for task in TASKS:
            row = tuple(float(c) for c in self.capacity.get(task, (1.0,) * max(layers)))
            for layer, c in enumerate(row):
                if not 0 < c <= 1:
                    raise ParameterError(f"Capacity {c:g} of {task} in layer {layer} must lie in (0, 1]: 1 keeps every "
                                         f"token, "
                                         "0.5 half of them; to drop a layer altogether give it a small capacity.")
            full[task] = tuple(1.0 if c > 1 - 1e-6 else c for c in row)      # what bisection leaves of a dense layer
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
        rows = {task: {i: c for i, c in enumerate(row) if c < 1} for task, row in self.capacity.items()}
        text = yaml.safe_dump({"layers": self.layers, "capacity": {t: r for t, r in rows.items() if r}},
                              sort_keys=False)
        Path(expanded(path)).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CapacityPlan:
        """Read a plan from YAML. Raises `ParameterError` for a missing file, a layer that does not exist or a wrong
        capacity."""
        try:
            data = yaml.safe_load(Path(expanded(path)).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ParameterError(f"Cannot read the plan {str(path)!r}: {error}. Give a YAML file such as notebook 03 "
                                 f"writes, "
                                 f"or one of the makers: {', '.join(MAKERS)}.") from None
        if not isinstance(data, dict) or type(data.get("layers")) is not int or not isinstance(data.get("capacity"),
                                                                                               dict):
            raise ParameterError(f"{path} is not a plan: it needs 'layers: <number>' and 'capacity: {{t2i: {{4: 0.5}}, "
                                 f"...}}'.")
        n, rows = data["layers"], {}
        for task, named in data["capacity"].items():
            rows[task] = [1.0] * n
            if not isinstance(named, dict):
                raise ParameterError(f"{path}: capacity of {task} must map layers to fractions, such as {{4: 0.5}}; "
                                     f"got {named!r}.")
            for layer, c in named.items():
                if type(layer) is not int or not 0 <= layer < n:
                    raise ParameterError(f"{path}: layer {layer!r} of {task} does not exist; the plan has layers 0 to "
                                         f"{n - 1}.")
                if not isinstance(c, (int, float)) or isinstance(c, bool):
                    raise ParameterError(f"{path}: capacity {c!r} of {task} in layer {layer} is not a number in "
                                         f"(0, 1].")
                rows[task][layer] = c
        return cls(rows or {TASKS[0]: [1.0] * n})

    def __str__(self) -> str:
        width = max(len(t) for t in TASKS)
        return "\n".join(f"{task:{width}s}  " + " ".join("1  " if c == 1 else f"{c:.2f}"[1:] for c in row)
                         + f"   -{self.saving(task):.0%}"
                         for task, row in self.capacity.items())

    def draw(self) -> str:
        """The plan as bars, one per layer and a line per task; a full bar is a dense layer. Below, the number of every
        fourth layer."""
        bars = {task: "".join("█" if c == 1 else "▁▂▃▄▅▆▇"[min(6, max(0, round(8 * c) - 1))] for c in row) for task,
                row in self.capacity.items()}
        numbers = "".join(f"{i:<4d}" for i in range(0, self.layers, 4))
        return "\n".join([*(f"{task:3s}  {bar}   -{self.saving(task):.0%}" for task, bar in bars.items()),
                          f"     {numbers}".rstrip()])


def last_half(layers: int, saving: float = 0.3) -> CapacityPlan:
    """The second half of the layers at one capacity for all tasks, saving `saving` of the stack (the paper's Emu3 run
    has saving 0.4)."""
    return _uniform(layers, range(layers // 2, layers), saving)


def last_half_per_task(layers: int, saving: float = 0.3) -> CapacityPlan:
    """The second half of the layers in the shape of the paper's Show-o run: mmu saves twice what t2i saves, both
    together `saving`; lm dense.

    t2i has one capacity, mmu falls linearly with mean m over the half: from min(1, 2 m - FLOOR) to 2 m minus that.
    """
    half, n = layers // 2, layers - layers // 2
    t2i, m = (_kept(layers, n, saving, share) for share in (2 / 3, 4 / 3))
    reach = min(1.0, 2 * m - FLOOR) - m
    falling = [m + reach * (n - 1 - 2 * i) / max(1, n - 1) for i in range(n)]
    return CapacityPlan({"t2i": [1.0] * half + [t2i] * n, "mmu": [1.0] * half + falling})


def middle(layers: int, saving: float = 0.3) -> CapacityPlan:
    """Half of the layers, those between the first and the last quarter: where a route of random tokens lies (TREAD,
    arXiv 2501.04765)."""
    return _uniform(layers, range(layers // 4, layers // 4 + layers // 2), saving)


def interleaved(layers: int, saving: float = 0.3) -> CapacityPlan:
    """Every other layer, the first dense: where Mixture-of-Depths puts its routers (arXiv 2404.02258)."""
    return _uniform(layers, range(1, layers, 2), saving)


def random_layers(layers: int, saving: float = 0.3, seed: int = 0) -> CapacityPlan:
    """Half of the layers, drawn by `seed`, at one capacity: a control for every rule that chooses layers."""
    return _uniform(layers, sorted(random.Random(seed).sample(range(layers), layers // 2)), saving)


def cosine_decay(layers: int, saving: float = 0.0) -> CapacityPlan:
    """p-MoD's falling capacity (arXiv 2412.04449): c_l = 0.5 cos(pi l / (L - 1)) + 0.5, dense above 0.85 and at least
    0.15.

    The formula fixes what is saved; `saving` has no effect.
    """
    falling = [0.5 * math.cos(math.pi * i / max(1, layers - 1)) + 0.5 for i in range(layers)]
    return CapacityPlan({task: [1.0 if c > 0.85 else max(0.15, c) for c in falling] for task in TASKS})


def dense(layers: int, saving: float = 0.0) -> CapacityPlan:
    """Every layer keeps every token; `saving` is accepted as by the other makers and has no effect."""
    return CapacityPlan({TASKS[0]: (1.0,) * layers})


def paper_showo(layers: int = 24, saving: float = 0.15) -> CapacityPlan:
    """The paper's Show-o run: last half routed, t2i at 0.8, mmu falling linearly to 0.2, lm dense.

    The first routed mmu layer keeps 1 and the last 0.2, mean 0.6 over the 12 layers, as the paper's FLOPs imply: -20 %
    mmu, -10 % t2i. The run fixes `saving`; another value has no effect.
    """
    return last_half_per_task(layers, 0.3 * (layers - layers // 2) / layers)


def paper_emu3(layers: int = 32, saving: float = 0.4) -> CapacityPlan:
    """The paper's Emu3 run: capacity 0.2 in the last half for both tasks, lm dense. `saving` is fixed by the run."""
    half = layers // 2
    return CapacityPlan({task: [1.0] * half + [0.2] * (layers - half) for task in ("t2i", "mmu")})


def from_arank(arank: Mapping[str, Sequence[float]], saving: float = 0.3, highest: bool = False) -> CapacityPlan:
    """The layer switch of UniMoD with its missing formula stated.

    arank: per task (t2i, mmu, lm; one that is not named stays dense), one number per layer: ARank divided by the
    sequence length. For each task the half of the layers with the lowest values is routed; their capacities are
    proportional to ARank, c_l = clip(s * a_l, FLOOR, 1), and s is found by bisection so that the task saves exactly
    `saving`. With `highest` the other half of the layers is routed: the control that tells whether a low rank is what
    makes a layer cheap to skip. For a budget of FLOPs or seconds: solve(partial(from_arank, arank), price, budget).
    Raises `ParameterError` when half of the layers cannot save that much, or for a value that is no ARank.
    """
    rows = {}
    for task, values in arank.items():
        if not all(0 < a < math.inf for a in values):
            raise ParameterError(f"ARank of {task} is {[round(a, 3) for a in values]}: every layer needs a number "
                                 f"above 0, measured on a dense model.")
        layers = len(values)
        chosen = sorted(range(layers), key=lambda i: values[i], reverse=highest)[: layers // 2]
        _kept(layers, len(chosen), saving)
        low, high = 0.0, 1 / min(values)
        for _ in range(60):
            s = (low + high) / 2
            kept = {i: min(1.0, max(FLOOR, s * values[i])) for i in chosen}
            low, high = (s, high) if layers - sum(1 - c for c in kept.values()) < (1 - saving) * layers else (low, s)
        rows[task] = [kept.get(i, 1.0) for i in range(layers)]
    return CapacityPlan(rows)


MAKERS: dict[str, Callable[..., CapacityPlan]] = {
    "dense": dense, "last_half": last_half, "last_half_per_task": last_half_per_task, "middle": middle,
    "interleaved": interleaved,
    "random": random_layers, "cosine_decay": cosine_decay, "paper_showo": paper_showo, "paper_emu3": paper_emu3,
}
FIXED = ("dense", "cosine_decay", "paper_showo", "paper_emu3")
"""Makers whose formula or run says what is saved: they accept `saving` and ignore it."""


def maker_of(name_or_file: str) -> Callable[[int, float], CapacityPlan]:
    """The maker of that name, or one that gives the plan of a YAML file, to be called with (layers, saving).

    Raises `ParameterError` when it is neither or the file holds no plan, and when called for another number of layers
    than the file has.
    """
    if name_or_file in MAKERS:
        return MAKERS[name_or_file]
    if not Path(expanded(name_or_file)).exists():
        raise ParameterError(f"plan={name_or_file!r} is neither a maker ({', '.join(MAKERS)}) nor a file.")
    plan = CapacityPlan.load(name_or_file)

    def stored(layers: int, saving: float = 0.0) -> CapacityPlan:
        if plan.layers != layers:
            raise ParameterError(f"{name_or_file} plans {plan.layers} layers, the model has {layers}. Make a plan for "
                                 f"this model in notebook 03.")
        return plan
    return stored


def make_plan(name_or_file: str, layers: int, saving: float = 0.3) -> CapacityPlan:
    """The plan of a maker's name or of a YAML file, for a model of `layers` layers. Raises `ParameterError` as
    `maker_of`."""
    return maker_of(name_or_file)(layers, saving)


def solve(maker: Callable[[float], CapacityPlan], price: Callable[[CapacityPlan], float],
          target: float) -> CapacityPlan:
    """The plan of `maker(saving)` whose price comes closest to `target`, by bisection over saving.

    price: any number that falls when a plan saves more, such as FLOPs, seconds, or a share of the dense model's. A
    saving that the maker refuses is out of reach. Raises `ParameterError` for a target that no plan of this maker
    meets, naming what they cost.
    """
    tried = [(price(plan := maker(0.0)), plan)]
    low, high = 0.0, 1.0
    # to 2^-16 of the stack
    for _ in range(16):
        saving = (low + high) / 2
        try:
            tried.append((price(plan := maker(saving)), plan))
        except ParameterError:
            high = saving
            continue
        low, high = (saving, high) if tried[-1][0] > target else (low, saving)
    least, most = (pick(p for p, _ in tried) for pick in (min, max))
    if not least * (1 - 1e-6) <= target <= most * (1 + 1e-6):
        raise ParameterError(f"A price of {target:.4g} is out of reach: these plans cost {least:.4g} to {most:.4g}.")
    return min(tried, key=lambda pair: abs(pair[0] - target))[1]


def _kept(layers: int, routed: int, saving: float, share: float = 1.0) -> float:
    """Mean capacity of the routed layers of a task that saves `share * saving`. Raises `ParameterError` where that is
    below FLOOR."""
    if not 0 <= share * saving * layers <= routed * (1 - FLOOR):
        raise ParameterError(f"saving={saving:g} is more than {routed} of {layers} layers can save; "
                             f"ask for 0 to {routed * (1 - FLOOR) / layers / share:.3g}.")
    return 1 - share * saving * layers / max(1, routed)


def _uniform(layers: int, where: Sequence[int], saving: float) -> CapacityPlan:
    kept = _kept(layers, len(where), saving)
    return CapacityPlan({task: [kept if i in where else 1.0 for i in range(layers)] for task in TASKS})
