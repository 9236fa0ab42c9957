"""Capacity plans: makers, files, and the paper's own arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimod.config import ParameterError
from unimod.plan import CapacityPlan, cosine_decay, from_arank, interleaved, last_half, make_plan, paper_emu3, paper_showo, random_layers


def test_the_papers_runs_save_what_the_paper_counts():
    showo, emu3 = paper_showo(), paper_emu3()
    assert showo.saving("mmu") == pytest.approx(0.2) and showo.saving("t2i") == pytest.approx(0.1) and showo.saving("lm") == 0
    assert emu3.saving("mmu") == emu3.saving("t2i") == pytest.approx(0.4)
    assert showo.kind(0) == "dense" and showo.kind(12) == "T2I" and showo.kind(23) == "Shared"


@pytest.mark.parametrize("maker", [last_half, interleaved, random_layers])
def test_makers_save_what_they_are_asked_for(maker):
    plan = maker(8, 0.3)
    assert all(plan.saving(t) == pytest.approx(0.3) for t in plan.capacity) and len(plan.routed()) == 4
    with pytest.raises(ParameterError, match=r"saving=0.49 is more than"):
        maker(8, 0.49)


ARANK = st.lists(st.floats(0.05, 1), min_size=8, max_size=8)


@given(ARANK, ARANK, st.sampled_from([0.1, 0.2, 0.3]), st.booleans())
def test_arank_plans_meet_the_budget_in_the_lowest_or_the_highest_half(t2i, mmu, saving, highest):
    plan = from_arank({"t2i": t2i, "mmu": mmu}, saving, highest)
    for task, values in (("t2i", t2i), ("mmu", mmu)):
        assert plan.saving(task) == pytest.approx(saving, abs=1e-6)
        routed = [i for i, c in enumerate(plan.capacity[task]) if c < 1]
        assert len(routed) <= 4
        assert min(values[i] for i in routed) >= sorted(values)[4] if highest else max(values[i] for i in routed) <= sorted(values)[3]
        order = sorted(routed, key=lambda i: values[i])
        assert all(plan.capacity[task][a] <= plan.capacity[task][b] + 1e-9 for a, b in zip(order, order[1:]))


def test_random_layers_are_settled_by_their_seed():
    assert random_layers(8, 0.3, 1) == random_layers(8, 0.3, 1) and len({random_layers(8, 0.3, seed).routed() for seed in range(5)}) > 1


def test_the_cosine_of_p_mod_by_hand():
    row = cosine_decay(9).capacity["mmu"]
    assert row[:3] == (1, 1, 1) and row[4] == pytest.approx(0.5) and row[6] == row[8] == 0.15
    assert row[3] == pytest.approx(0.5 * 0.3826834 + 0.5) and list(row) == sorted(row, reverse=True)


def test_a_plan_survives_its_file(tmp_path):
    plan = CapacityPlan({"t2i": [1, .5, .25], "mmu": [1, 1, .2]})
    plan.save(tmp_path / "plan.yaml")
    assert CapacityPlan.load(tmp_path / "plan.yaml") == plan == make_plan(str(tmp_path / "plan.yaml"), 3)
    assert len(str(plan).splitlines()) == 3
    with pytest.raises(ParameterError, match="plans 3 layers, the model has 8"):
        make_plan(str(tmp_path / "plan.yaml"), 8)


@pytest.mark.parametrize(("text", "message"), [
    ("layers: 8\ncapacity: {t2i: {9: 0.5}}", "layer 9 of t2i does not exist"),
    ("layers: 8\ncapacity: {t2i: {4: 0}}", "Capacity 0 of t2i in layer 4"),
    ("layers: 8\ncapacity: {t2i: {4: 1.2}}", "Capacity 1.2 of t2i in layer 4"),
    ("layers: 8\ncapacity: {t2i: {4: half}}", "'half' of t2i in layer 4 is not a number"),
    ("layers: 8\ncapacity: {t2i: 0.5}", "must map layers to fractions"),
    ("layers: eight", "is not a plan"),
    ("{", "Cannot read the plan"),
])
def test_bad_files_are_named(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ParameterError, match=message):
        CapacityPlan.load(tmp_path / "p.yaml")


def test_neither_maker_nor_file():
    with pytest.raises(ParameterError, match="neither a maker .* nor a file"):
        make_plan("paper_showoo", 8)
