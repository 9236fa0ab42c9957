"""Capacity plans: makers, files, and the paper's own arithmetic."""

import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimod.config import ParameterError
from unimod.plan import (
    FIXED,
    FLOOR,
    MAKERS,
    CapacityPlan,
    cosine_decay,
    dense,
    from_arank,
    interleaved,
    last_half,
    last_half_per_task,
    make_plan,
    middle,
    paper_emu3,
    paper_showo,
    random_layers,
    solve,
)


def test_the_papers_runs_save_what_the_paper_counts():
    showo, emu3 = paper_showo(), paper_emu3()
    assert showo.saving("mmu") == pytest.approx(0.2)
    assert showo.saving("t2i") == pytest.approx(0.1)
    assert showo.saving("lm") == 0
    assert emu3.saving("mmu") == emu3.saving("t2i") == pytest.approx(0.4)
    assert showo.kind(0) == "dense" and showo.kind(12) == "T2I" and showo.kind(23) == "Shared"
    assert showo == last_half_per_task(24, 0.15) and showo.capacity["t2i"][12:] == pytest.approx([0.8] * 12)
    assert showo.capacity["mmu"][12:] == pytest.approx([1 - 0.8 * i / 11 for i in range(12)])


@given(st.integers(2, 40), st.one_of(st.just(0.0), st.floats(1e-4, 0.3)))
def test_the_per_task_half_falls_and_saves_twice_as_much_on_understanding(layers, saving):
    plan, half = last_half_per_task(layers, saving), layers // 2
    assert plan.saving("mmu") == pytest.approx(2 * plan.saving("t2i"), abs=1e-6)
    assert (plan.saving("mmu") + plan.saving("t2i")) / 2 == pytest.approx(saving)
    assert plan.saving("lm") == 0
    assert max(plan.routed(), default=half) >= half > max((i for i in range(half) if plan.kind(i) != "dense"),
                                                          default=-1)
    t2i, mmu = (plan.capacity[task][half:] for task in ("t2i", "mmu"))
    assert len(set(t2i)) == 1 and list(mmu) == sorted(mmu, reverse=True) and min(mmu) >= FLOOR - 1e-9
    steps = {round(a - b, 9) for a, b in zip(mmu, mmu[1:])}
    assert len(steps) <= 1 and (len(mmu) == 1 or mmu[0] == 1 or mmu[-1] == pytest.approx(FLOOR))


def test_the_per_task_half_refuses_what_it_cannot_save():
    with pytest.raises(ParameterError, match=r"saving=0.36 is more than 4 of 8 layers can save; ask for 0 to 0.356"):
        last_half_per_task(8, 0.36)


def test_the_middle_lies_between_the_outer_quarters():
    assert middle(24).routed() == tuple(range(6, 18))
    assert middle(8, 0.2).routed() == (2, 3, 4, 5)
    assert len(middle(10).routed()) == 5
    with pytest.raises(ParameterError, match="0 of 1 layers"):
        middle(1)


@pytest.mark.parametrize("name", MAKERS)
def test_fixed_makers_are_those_that_ignore_saving(name):
    assert (MAKERS[name](8, 0.1) == MAKERS[name](8, 0.2)) == (name in FIXED)


@pytest.mark.parametrize("maker", [last_half, interleaved, random_layers, middle])
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
        chosen = [values[i] for i in routed]
        assert min(chosen) >= sorted(values)[4] if highest else max(chosen) <= sorted(values)[3]
        order = sorted(routed, key=lambda i: values[i])
        assert all(plan.capacity[task][a] <= plan.capacity[task][b] + 1e-9 for a, b in zip(order, order[1:]))


def quadratic(plan):
    """A price with a term that kept tokens meet twice, as attention's."""
    return sum(c + c * c for row in plan.capacity.values() for c in row)


RANKS = {"t2i": [0.9, 0.4, 0.5, 0.8], "mmu": [0.3, 0.7, 0.2, 0.6], "lm": [0.5, 0.6, 0.7, 0.8]}


@pytest.mark.parametrize("maker", [partial(last_half, 8), partial(last_half_per_task, 8), partial(from_arank, RANKS),
                                   partial(from_arank, RANKS, highest=True)])
def test_a_budget_is_solved_for(maker):
    least = quadratic(dense(maker(0.1).layers))
    for share in (1.0, 0.9, 0.75):
        assert quadratic(solve(maker, quadratic, share * least)) == pytest.approx(share * least, rel=1e-3)
    with pytest.raises(ParameterError, match=rf"A price of {0.3 * least:.4g} is out of reach: these plans cost [\d.]+ "
                                             rf"to {least:.4g}"):
        solve(maker, quadratic, 0.3 * least)
    with pytest.raises(ParameterError, match="out of reach"):
        solve(maker, quadratic, 1.01 * least)


def test_lm_is_a_column_like_the_others_and_dense_without_values():
    three, two = from_arank(RANKS, 0.2), from_arank({task: RANKS[task] for task in ("t2i", "mmu")}, 0.2)
    assert three.saving("lm") == pytest.approx(0.2)
    assert [c < 1 for c in three.capacity["lm"]] == [True, True, False, False]
    assert two.saving("lm") == 0 and two.capacity["mmu"] == three.capacity["mmu"]


@pytest.mark.parametrize("bad", [math.nan, 0.0, -0.1, math.inf])
def test_what_is_no_arank_is_refused(bad):
    with pytest.raises(ParameterError, match="ARank of mmu is .* every layer needs a number above 0"):
        from_arank({"mmu": [0.5, bad, 0.5, 0.5]})


def test_the_drawing_has_a_bar_per_layer():
    assert paper_showo(8).draw().splitlines() == ["t2i  ████▆▆▆▆   -10%", "mmu  █████▆▄▂   -20%", "lm   ████████   -0%",
                                                  "     0   4"]
    bars = CapacityPlan({"t2i": [0.01, 0.125, 0.99, 1]}).draw().splitlines()[0]
    assert bars.split()[1] == "▁▁▇█", "only a dense layer has a full bar"


def test_random_layers_are_settled_by_their_seed():
    assert random_layers(8, 0.3, 1) == random_layers(8, 0.3, 1)
    assert len({random_layers(8, 0.3, seed).routed() for seed in range(5)}) > 1


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
