"""The paper's findings: decided by an interval on made-up results, and on the shipped models as the committed record says."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unimod.analysis.findings import LEAST, all_findings, arank_falls, arank_higher, drawing_wins, early_matters, flips, joint_is_harmless
from unimod.analysis.importance import Importance
from unimod.analysis.interactions import Competition, JointOrSingle
from unimod.analysis.redundancy import ARank
from unimod.batch import Task
from unimod.config import MODELS, Params
from unimod.session import load
from unimod.views.runs import table_of_findings

RECORD = json.loads((Path(__file__).parents[2] / "notebooks/records/findings.json").read_text())
N = 12


def around(mean, *shape, spread=0.02):
    return mean + spread * torch.randn(*shape, generator=torch.Generator().manual_seed(int(1000 * mean)))


def made_patterns(image, even_image=0.4, n=N):
    """Four layers, two heads; the mass on pictures is about `image`, special tokens get 0.1."""
    picture = around(image, 4, n, 2)
    received = torch.stack([0.9 - picture, picture, torch.full_like(picture, 0.1)], -1)
    even = torch.tensor([0.9 - even_image, even_image, 0.1]).expand(4, n, 3)
    return SimpleNamespace(received=received, even=even)


@pytest.mark.parametrize(("t2i", "mmu", "want"), [(0.3, 0.6, "yes"), (0.6, 0.3, "yes"), (0.6, 0.7, "no"), (0.2, 0.3, "no"), (0.45, 0.6, "undecided")])
def test_dominance_flips(t2i, mmu, want):
    found = flips(made_patterns(t2i), made_patterns(mmu))
    assert found.outcome == want and found.n == N and found.low <= found.high
    assert found.one == pytest.approx(2 * t2i - 0.9, abs=0.01) and found.other == pytest.approx(2 * mmu - 0.9, abs=0.01)


def test_even_attention_may_explain_a_flip():
    """Both tasks look at pictures less than even attention would; only one by mass."""
    both = made_patterns(0.3, even_image=0.5), made_patterns(0.6, even_image=0.8)
    assert flips(*both).outcome == "yes" and flips(*both, relative=True).outcome == "no"


def made_importance(*means, spread=0.02, n=N):
    value = torch.stack([around(mean, n, spread=spread) for mean in means])
    return Importance(Task.MMU, torch.zeros(n), value, torch.zeros(len(means), n))


def test_early_layers_matter():
    steep = made_importance(5.0, 0.1, 0.2, 0.2)
    assert early_matters(steep).outcome == "yes" and early_matters(steep).one == pytest.approx(2.55, abs=0.02)
    assert early_matters(steep, start=1).outcome == "no" and early_matters(steep, start=1).one == pytest.approx(0.1, abs=0.02)
    assert early_matters(made_importance(0.1, 0.1, 0.1, 0.1, spread=1.0)).outcome == "undecided"


def test_what_was_not_measured_is_undecided():
    """Two layers: behind the first one the early half is empty. A routed layer without a row's tokens: the others speak for the row."""
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
    assert (arank_falls(falling).outcome, arank_falls(rising).outcome) == ("yes", "no")
    assert (arank_higher(falling, rising).outcome, arank_higher(rising, falling).outcome) == ("yes", "no")
    assert arank_falls(falling).one == pytest.approx(0.85, abs=0.02) and arank_falls(falling).other == pytest.approx(0.35, abs=0.02)


def test_joint_training_has_a_stated_margin():
    single = around(1.0, 6, 2, spread=0.001)
    found = JointOrSingle(single, single * torch.tensor([1.05, 1.5]), single)
    assert (joint_is_harmless(found, Task.T2I).outcome, joint_is_harmless(found, Task.MMU).outcome) == ("yes", "no")
    assert joint_is_harmless(found, Task.T2I, margin=0.01).outcome == "no" and joint_is_harmless(found, Task.MMU, margin=0.6).outcome == "yes"
    noisy = JointOrSingle(single, single * around(1.0, 6, 2, spread=0.3), single)
    assert joint_is_harmless(noisy, Task.T2I).outcome == "undecided"


def made_competition(t2i, mmu, seed):
    return Competition((4, 5), 0.5, torch.zeros(7, 2), torch.tensor([[t2i, mmu], [t2i, mmu]]), torch.zeros(2, 2, 3), torch.zeros(3, 2), seed)


def test_one_run_decides_nothing():
    runs = [made_competition(0.8 + 0.01 * seed, 0.2, seed) for seed in range(LEAST)]
    assert drawing_wins(runs).outcome == "yes" and {drawing_wins(runs[:n]).outcome for n in range(1, LEAST)} == {"undecided"}
    assert drawing_wins([made_competition(0.2, 0.5 + 0.1 * seed, seed) for seed in range(LEAST)]).outcome == "no"
    assert drawing_wins([made_competition(0.2 + 0.15 * seed, 0.5, seed) for seed in range(LEAST)]).outcome == "undecided"
    row = drawing_wins(runs).table()[0]
    assert (row["outcome"], row["n"], row["over"]) == ("yes", LEAST, "seeds") and "after 7 steps" in row["sentence"] and "holds" not in row


STABLE = {"1. the dominant modality flips (absolute)": ("yes", "yes"), "2a. early layers matter more, t2i": ("yes", "yes"),
          "2a. early layers matter more, mmu": ("yes", "yes"), "2b. ARank falls with depth, t2i": ("no", "no")}
"""Outcomes on Show-o-tiny and Emu3-tiny that a small run repeats."""


@pytest.mark.parametrize("name", MODELS)
def test_a_small_fresh_run_says_what_the_record_says(name):
    torch.set_num_threads(1)
    session = load(Params(), name)
    joint = JointOrSingle(*(torch.ones(3, 2) for _ in range(3)))
    fresh = {f.name: f for f in all_findings(session.model, session.batches, [made_competition(0.5, 0.5, 0)], joint, samples=8)}
    recorded = {row["finding"]: row for row in RECORD["rows"] if row["model"] == name}
    assert set(fresh) == set(recorded)
    for finding, outcomes in STABLE.items():
        assert fresh[finding].outcome == recorded[finding]["outcome"] == outcomes[MODELS.index(name)], finding
    opposite = {"yes": "no", "no": "yes"}
    measured = [finding for finding in fresh if finding[0] in "12"]
    assert not [f for f in measured if fresh[f].outcome == opposite.get(recorded[f]["outcome"])], "a fresh run contradicts the record"
    for finding in measured:                                # the figures, not only the words
        row, spread = recorded[finding], 4 * (fresh[finding].high - fresh[finding].low)
        assert abs(fresh[finding].one - row["one"]) < spread + 0.01 and abs(fresh[finding].other - row["other"]) < spread + 0.01, finding


def test_the_table_has_a_row_per_finding_and_a_column_per_model():
    lines = table_of_findings(RECORD).splitlines()
    assert len(lines) == 2 + len({row["finding"] for row in RECORD["rows"]}) and lines[0] == "| finding | showo-tiny | emu3-tiny |"
    assert all(line.count("|") == 4 for line in lines)
