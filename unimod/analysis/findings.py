"""The three findings of UniMoD's analyses, each as a question to the models at hand: does it hold here, with what spread?

    found = flips(patterns(t2i_record, Task.T2I), patterns(mmu_record, Task.MMU))
    found.outcome, found.sentence
    all_findings(session.model, session.batches, competitions, joint, samples=32)

The paper (arXiv 2502.06474, section 3) says: (1) which modality dominates attention flips between the tasks; (2) early layers matter more,
ARank falls with depth and is higher for drawing; (3) training together neither helps nor harms much, and under one router drawing keeps more tokens.

One rule decides: every finding is one number that is above 0 when the finding is right, and the 95 % interval of its mean under resampling of
samples or seeds. All above 0: it holds. All below: it does not. Else, with fewer than `LEAST` to resample, or where nothing was
measured (nan), it is undecided. Nothing is known of other models, and samples of one model say nothing about another training of it.

Letters: L layers, N samples, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..batch import Modality, Task
from ..capture import capture_batch
from ..data.batches import Batches
from ..models.unified import UnifiedModel
from .attention import Patterns, patterns
from .importance import Importance, importance
from .interactions import Competition, JointOrSingle
from .redundancy import ARank, arank

LEAST = 5
"""Samples or seeds below which nothing is decided: all of three fall on one side by chance one time in four, of five one time in sixteen."""
DRAWS = 2000


@dataclass(frozen=True)
class Finding:
    """One finding, tested."""

    name: str
    """Number in the paper's order and what is asked."""
    holds: bool | None
    """None: undecided."""
    one: float
    other: float
    """The two numbers that are compared, as `sentence` says."""
    low: float
    high: float
    """95 % interval of the number that is above 0 when the finding is right."""
    n: int
    over: str
    """What the interval is over: samples or seeds."""
    sentence: str

    @property
    def outcome(self) -> str:
        """yes, no or undecided."""
        return {True: "yes", False: "no", None: "undecided"}[self.holds]

    def table(self) -> list[dict[str, object]]:
        """One row: all fields, with the outcome in a word."""
        return [{"finding": self.name, "outcome": self.outcome, **{k: v for k, v in asdict(self).items() if k not in ("name", "holds")}}]


def flips(t2i: Patterns, mmu: Patterns, relative: bool = False) -> Finding:
    """(1) Does drawing look at one modality and answering at the other? Mass received by picture minus text tokens, mean over layers and heads.

    relative: each modality's mass over what even attention would give it, so that the mask and the number of tokens have no say.
    What is above 0 when it holds: the smaller of the two margins where their signs differ, minus it where they do not.
    """
    margins = [_margin(found, relative) for found in (t2i, mmu)]
    draws = torch.stack([_resampled(margin.nanmean(0), seed) for seed, margin in enumerate(margins)])
    weaker = -draws.prod(0).sign() * draws.abs().amin(0)
    one, other = (float(margin.nanmean()) for margin in margins)
    apart = int((margins[0].nanmean(1) * margins[1].nanmean(1) < 0).sum())
    unit = "times what even attention gives, picture minus text" if relative else "of the attention mass, picture minus text"
    return _decided(f"1. the dominant modality flips ({'relative to even attention' if relative else 'absolute'})", weaker, one, other,
                    min(m.shape[1] for m in margins), "samples",
                    f"drawing {one:+.2f}, answering {other:+.2f} {unit}; opposite signs in {apart} of {len(margins[0])} layers")


def early_matters(found: Importance, start: int = 0) -> Finding:
    """(2a) Does skipping a layer of the early half raise the loss more than one of the late half, layers before `start` left out?"""
    middle = len(found.value) // 2
    early, late = found.damage[start:middle].mean(0), found.damage[middle:].mean(0)
    return _decided(f"2a. early layers matter more, {found.task.name.lower()}" + (f", from layer {start} on" if start else ""), _resampled(early - late),
                    float(early.mean()), float(late.mean()), len(early), "batches", f"{found.metric} without one layer of {start} to {middle - 1} "
                    f"{float(early.mean()):+.3f}, of {middle} to {len(found.value) - 1} {float(late.mean()):+.3f}")


def arank_falls(found: ARank) -> Finding:
    """(2b) Is ARank over tokens higher in the early half of the layers than in the late half, sample by sample?"""
    middle = len(found.layers) // 2
    early, late = found.share[:middle].nanmean(0), found.share[middle:].nanmean(0)
    return _decided(f"2b. ARank falls with depth, {found.task.name.lower()}", _resampled(early - late), float(early.mean()), float(late.mean()),
                    len(early), "samples", f"ARank / tokens {float(early.mean()):.3f} in the early half, {float(late.mean()):.3f} in the late half")


def arank_higher(t2i: ARank, mmu: ARank) -> Finding:
    """(2c) Is ARank over tokens, mean over layers, higher for drawing than for answering?"""
    a, b = t2i.share.nanmean(0), mmu.share.nanmean(0)
    return _decided("2c. ARank is higher for drawing", _resampled(a) - _resampled(b, 1), float(a.mean()), float(b.mean()), min(len(a), len(b)), "samples",
                    f"ARank / tokens {float(a.mean()):.3f} drawing, {float(b.mean()):.3f} answering")


def joint_is_harmless(found: JointOrSingle, task: Task, margin: float = 0.1) -> Finding:
    """(3a) Does training together change the task's loss by less than `margin`, as a share of the loss after training alone?"""
    column = (Task.T2I, Task.MMU).index(task)
    harm, joint, single = found.harm[:, column], float(found.joint[:, column].mean()), float(found.single[:, column].mean())
    return _decided(f"3a. joint training helps or harms by less than {margin:.0%}, {task.name.lower()}", margin - _resampled(harm).abs(), joint, single,
                    len(harm), "runs", f"loss {joint:.4f} together, {single:.4f} alone, {float(harm.mean()):+.1%}")


def drawing_wins(found: Sequence[Competition]) -> Finding:
    """(3b) Under one router with a straight-through choice, does drawing keep a larger share of its tokens? Mean over routed layers, one run per seed."""
    kept = torch.stack([one.kept.mean(0) for one in found])     # [seeds, 2]
    a, b = kept.mean(0).tolist()
    return _decided("3b. drawing keeps more tokens under one router", _resampled(kept[:, 0] - kept[:, 1]), a, b, len(kept), "seeds",
                    f"share kept {a:.2f} drawing, {b:.2f} answering, at capacity {found[0].capacity:g} after {len(found[0].history)} steps")


def all_findings(model: UnifiedModel, batches: Batches, competitions: Sequence[Competition], joint: JointOrSingle, *, samples: int = 16,
                 tolerance: float = 1e-2, margin: float = 0.1) -> list[Finding]:
    """All of them on one dense model: attention, ARank and skipping on `samples` validation rows per task (skipping: eight batches of an eighth each)."""
    records = {task: capture_batch(model, batches.single_task(task, "validation", samples)) for task in (Task.T2I, Task.MMU)}
    seen = [patterns(record, task) for task, record in records.items()]
    ranks = [arank(record, task, tolerance) for task, record in records.items()]
    parts = min(8, samples)
    rows = samples // parts
    skipped = [importance(model, [batches.single_task(task, "validation", rows, start=rows * i) for i in range(parts)], task) for task in records]
    return [flips(*seen), flips(*seen, relative=True), *(early_matters(found, start) for start in (0, 1) for found in skipped),
            *map(arank_falls, ranks), arank_higher(*ranks), *(joint_is_harmless(joint, task, margin) for task in records), drawing_wins(competitions)]


def _margin(found: Patterns, relative: bool) -> Tensor:
    """Picture minus text, [L, N]: mass received, mean over heads, relative to even attention or as it is."""
    mass = found.received.nanmean(2) / (found.even if relative else 1.0)
    return mass[..., Modality.IMAGE] - mass[..., Modality.TEXT]


def _resampled(values: Tensor, seed: int = 0) -> Tensor:
    """Means of `DRAWS` resamples of values [N]: float32 [DRAWS]."""
    picks = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(seed))
    return values[picks].nanmean(-1)


def _decided(name: str, draws: Tensor, one: float, other: float, n: int, over: str, sentence: str) -> Finding:
    """draws: resampled means of the number that is above 0 when the finding is right."""
    low, high = draws.quantile(torch.tensor([0.025, 0.975])).tolist()
    holds = low > 0 if n >= LEAST and (low > 0 or high < 0) else None
    return Finding(name, holds, one, other, low, high, n, over, sentence)
