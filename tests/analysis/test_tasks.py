"""Gradients, competition and joint training against direct computation; the paper's findings, decided by an interval on
made-up results, and on the shipped models as the committed record says."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unimod.analysis.layers import Importance, early_matters
from unimod.analysis.redundancy import MIN_SAMPLES, ARank, arank_falls, arank_higher
from unimod.analysis.tasks import (
    Competition,
    JointOrSingle,
    all_findings,
    compete,
    flips,
    gradient_cosine,
    joint_is_harmless,
    joint_or_single,
    t2i_keeps_more,
)
from unimod.baselines import PRESETS, BatchRouter
from unimod.batch import Task
from unimod.config import MODELS
from unimod.experiment import load
from unimod.losses import losses
from unimod.params import Params
from unimod.views.runs import table_of_findings

RECORD = json.loads((Path(__file__).parents[2] / "notebooks/records/findings.json").read_text())
N = 12


def mixed(batches, i, rows=2):
    samples = batches.samples("train", 4 * i, 2 * rows, seed=0)
    return batches.mixed(samples, (rows, rows, 0), torch.Generator().manual_seed(i), drop=False)


def test_gradient_cosine(untouched):
    model, batches = untouched["showo-tiny"]
    a, b = (batches.single_task(task, "train", 2) for task in (Task.T2I, Task.MMU))
    assert gradient_cosine(model, [a], [a]).cosine.allclose(torch.ones(8, 1), atol=1e-5)
    other = gradient_cosine(model, [a], [b])
    clone = copy.deepcopy(model)
    gradients = []
    for batch in (a, b):
        clone.zero_grad()
        losses(clone, batch).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in clone.layers[2].parameters()]))
    want = torch.cosine_similarity(*gradients, dim=0).item()
    assert other.cosine[2, 0].item() == pytest.approx(want, abs=1e-5)
    assert other.norm_b[2, 0].item() == pytest.approx(gradients[1].norm().item(), rel=1e-4)
    row = gradient_cosine(model, [a, b], [b, b]).table("mixed")[2]
    assert row["pairs"] == 2 and row["norm_b_sd"] == 0
    assert row["cosine_sd"] == pytest.approx(abs(other.cosine[2, 0].item() - 1) / 2**0.5, rel=1e-3)
    with pytest.raises(ValueError):
        gradient_cosine(model, [a, a], [b])


def test_the_competing_router_keeps_the_best_of_the_whole_batch(world):
    _, batches = world["showo-tiny"]
    batch, width = mixed(batches, 0), 8
    router = BatchRouter(width, dict.fromkeys(("t2i", "mmu", "lm"), 0.5), PRESETS["competitive"]).eval()
    h = torch.randn(len(batch), width, generator=torch.Generator().manual_seed(1))
    h[batch.task == Task.T2I] += 1e4 * router.proj.weight[0].detach()       # t2i tokens score higher than any other
    routing = router(h, batch)
    k = int(len(batch) / 2 + 0.5)
    assert len(routing.index) == k == sum(s.length for s in routing.segments)
    t2i = int((batch.task == Task.T2I).sum())
    assert (batch.task[routing.index] == Task.T2I).sum() / t2i == pytest.approx(min(1.0, k / t2i))
    assert torch.equal(routing.weight, torch.ones(k))
    routing.weight.sum().backward()
    assert router.proj.weight.grad.abs().sum() > 0                          # straight through
    assert batch.take(routing.index, routing.segments).lengths is not None


def test_compete(untouched):
    model, batches = untouched["emu3-tiny"]
    train, held = [mixed(batches, i) for i in range(2)], mixed(batches, 3)
    found, again = (compete(model, train, held, steps=3, layers=(5, 6)) for _ in range(2))
    assert torch.equal(found.history, again.history) and found.history.shape == (3, 2)
    sizes = torch.tensor([(held.task == t).sum() for t in (Task.T2I, Task.MMU)]).float()
    torch.testing.assert_close((found.kept * sizes).sum(1), torch.full((2,), float(int(0.5 * len(held) + 0.5))))
    with torch.no_grad():
        torch.testing.assert_close(found.loss[0], losses(model, held).per_task[:2])
    assert len(found.table()) == 2 * 2 * 4 and len(found.steps()) == 6
    assert {row["seed"] for row in found.table() + found.steps()} == {0}
    other = compete(model, train, held, steps=3, layers=(5, 6), seed=7)
    assert other.seed == 7 and not torch.equal(other.history, found.history)
    with pytest.raises(ValueError, match="needs t2i and mmu"):
        compete(model, [batches.single_task(Task.MMU, "train", 2)], held)


def test_joint_or_single(untouched):
    model, batches = untouched["showo-tiny"]
    t2i, mmu = ([batches.single_task(t, "train", 2, start=2 * i) for i in range(2)] for t in (Task.T2I, Task.MMU))
    found = joint_or_single(model, t2i, mmu, mixed(batches, 5), steps=4, runs=1, lr=1e-3)
    assert found.joint.shape == found.single.shape == (1, 2)
    assert (found.single < found.before).all() and (found.joint < found.before).all()
    torch.testing.assert_close(found.single * (1 + found.harm), found.joint)
    assert len(found.table()) == 6


def around(mean, *shape, spread=0.02):
    return mean + spread * torch.randn(*shape, generator=torch.Generator().manual_seed(int(1000 * mean)))


def made_patterns(image, even_image=0.4, n=N):
    """Four layers, two heads; the mass on pictures is about `image`, special tokens get 0.1."""
    picture = around(image, 4, n, 2)
    received = torch.stack([0.9 - picture, picture, torch.full_like(picture, 0.1)], -1)
    even = torch.tensor([0.9 - even_image, even_image, 0.1]).expand(4, n, 3)
    return SimpleNamespace(received=received, even=even)


@pytest.mark.parametrize(("t2i", "mmu", "want"), [(0.3, 0.6, "yes"), (0.6, 0.3, "yes"), (0.6, 0.7, "no"),
                                                  (0.2, 0.3, "no"), (0.45, 0.6, "undecided")])
def test_dominance_flips(t2i, mmu, want):
    found = flips(made_patterns(t2i), made_patterns(mmu))
    assert found.outcome == want and found.n == N and found.low <= found.high
    assert found.one == pytest.approx(2 * t2i - 0.9, abs=0.01) and found.other == pytest.approx(2 * mmu - 0.9, abs=0.01)


def test_even_attention_may_explain_a_flip():
    """Both tasks attend to pictures less than even attention would; only one by mass."""
    both = made_patterns(0.3, even_image=0.5), made_patterns(0.6, even_image=0.8)
    assert flips(*both).outcome == "yes" and flips(*both, relative=True).outcome == "no"


def made_importance(*means, spread=0.02, n=N):
    value = torch.stack([around(mean, n, spread=spread) for mean in means])
    return Importance(Task.MMU, torch.zeros(n), value, torch.zeros(len(means), n))


def test_early_layers_matter():
    steep = made_importance(5.0, 0.1, 0.2, 0.2)
    whole, later = early_matters(steep), early_matters(steep, start=1)
    assert whole.outcome == "yes" and whole.one == pytest.approx(2.55, abs=0.02)
    assert later.outcome == "no" and later.one == pytest.approx(0.1, abs=0.02)
    assert early_matters(made_importance(0.1, 0.1, 0.1, 0.1, spread=1.0)).outcome == "undecided"


def test_what_was_not_measured_is_undecided():
    """Two layers: behind the first one the early half is empty. Where a routed layer has no token, the others count."""
    assert early_matters(made_importance(0.2, 0.1), start=1).outcome == "undecided"
    routed = made_patterns(0.3)
    routed.received[3, 0] = torch.nan
    found = flips(routed, made_patterns(0.6))
    assert found.outcome == "yes" and found.one == pytest.approx(-0.3, abs=0.01) and "nan" not in found.sentence


def made_arank(task, *shares, n=N):
    share = torch.stack([around(s, n) for s in shares])
    return ARank(task, tuple(range(len(shares))), 1e-2, 50 * share, torch.full_like(share, 50), share)


def test_arank_falls_and_is_higher():
    falling, rising = made_arank(Task.T2I, 0.9, 0.8, 0.4, 0.3), made_arank(Task.MMU, 0.2, 0.2, 0.3, 0.3)
    found = arank_falls(falling)
    assert (found.outcome, arank_falls(rising).outcome) == ("yes", "no")
    assert (arank_higher(falling, rising).outcome, arank_higher(rising, falling).outcome) == ("yes", "no")
    assert found.one == pytest.approx(0.85, abs=0.02) and found.other == pytest.approx(0.35, abs=0.02)


def test_joint_training_has_a_stated_margin():
    def outcome(found, task, **margin):
        return joint_is_harmless(found, task, **margin).outcome

    single = around(1.0, 6, 2, spread=0.001)
    found = JointOrSingle(single, single * torch.tensor([1.05, 1.5]), single)
    assert (outcome(found, Task.T2I), outcome(found, Task.MMU)) == ("yes", "no")
    assert outcome(found, Task.T2I, margin=0.01) == "no" and outcome(found, Task.MMU, margin=0.6) == "yes"
    noisy = JointOrSingle(single, single * around(1.0, 6, 2, spread=0.3), single)
    assert outcome(noisy, Task.T2I) == "undecided"


def made_competition(t2i, mmu, seed):
    kept = torch.tensor([[t2i, mmu], [t2i, mmu]])
    return Competition((4, 5), 0.5, torch.zeros(7, 2), kept, torch.zeros(2, 2, 3), torch.zeros(3, 2), seed)


def test_one_run_decides_nothing():
    runs = [made_competition(0.8 + 0.01 * seed, 0.2, seed) for seed in range(MIN_SAMPLES)]
    assert {t2i_keeps_more(runs[:n]).outcome for n in range(1, MIN_SAMPLES)} == {"undecided"}
    row = t2i_keeps_more(runs).table()[0]
    assert (row["outcome"], row["n"], row["over"]) == ("yes", MIN_SAMPLES, "seeds") and "holds" not in row
    assert "after 7 steps" in row["sentence"]
    falling = [made_competition(0.2, 0.5 + 0.1 * seed, seed) for seed in range(MIN_SAMPLES)]
    mixed = [made_competition(0.2 + 0.15 * seed, 0.5, seed) for seed in range(MIN_SAMPLES)]
    assert t2i_keeps_more(falling).outcome == "no" and t2i_keeps_more(mixed).outcome == "undecided"


STABLE = {"1. the dominant modality flips (absolute)": ("yes", "yes"),
          "2a. early layers matter more, t2i": ("yes", "yes"),
          "2a. early layers matter more, mmu": ("yes", "yes"), "2b. ARank falls with depth, t2i": ("no", "no")}
"""Outcomes on Show-o-tiny and Emu3-tiny that a small run repeats."""


@pytest.mark.parametrize("name", MODELS)
def test_a_small_fresh_run_agrees_with_the_record(name):
    torch.set_num_threads(1)
    session = load(Params(), name)
    joint = JointOrSingle(*(torch.ones(3, 2) for _ in range(3)))
    found = all_findings(session.model, session.batches, [made_competition(0.5, 0.5, 0)], joint, samples=8)
    fresh = {f.name: f for f in found}
    recorded = {row["finding"]: row for row in RECORD["rows"] if row["model"] == name}
    assert set(fresh) == set(recorded)
    for finding, outcomes in STABLE.items():
        assert fresh[finding].outcome == recorded[finding]["outcome"] == outcomes[MODELS.index(name)], finding
    opposite = {"yes": "no", "no": "yes"}
    for finding in (finding for finding in fresh if finding[0] in "12"):
        mine, row = fresh[finding], recorded[finding]
        assert mine.outcome != opposite.get(row["outcome"]), f"{finding}: a fresh run contradicts the record"
        spread = 4 * (mine.high - mine.low) + 0.01
        assert abs(mine.one - row["one"]) < spread and abs(mine.other - row["other"]) < spread, finding


def test_the_table_has_a_row_per_finding_and_a_column_per_model():
    lines = table_of_findings(RECORD).splitlines()
    assert len(lines) == 2 + len({row["finding"] for row in RECORD["rows"]})
    assert lines[0] == "| finding | showo-tiny | emu3-tiny |" and all(line.count("|") == 4 for line in lines)
