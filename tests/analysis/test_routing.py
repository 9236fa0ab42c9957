"""What routers do, against tables counted by hand on a few tokens, and on real models."""

import copy
import itertools
import math

import pytest
import torch

from unimod.analysis.routing import (
    choosing,
    diagnose,
    figures,
    histograms,
    kept,
    neighbours,
    overlap,
    positions,
    routings,
    tasks,
)
from unimod.baselines import PRESETS
from unimod.batch import IGNORE, Modality, Task, TokenSequence, pack
from unimod.layers import apply_mod, record_routing
from unimod.mask import prefix_hi
from unimod.plan import last_half
from unimod.routing import Routing

KIND = {"t": Modality.TEXT, "i": Modality.IMAGE, "s": Modality.SPECIAL}


def row(task, kinds, ids=None):
    """A row of one segment: a letter per token."""
    n = len(kinds)
    ids = torch.arange(n) if ids is None else torch.tensor(ids)
    modality, target = torch.tensor([int(KIND[k]) for k in kinds]), torch.full((n,), IGNORE)
    return TokenSequence(task, ids, torch.arange(n), modality, prefix_hi(n, n), target, ((n, "topk"),))


def routing(batch, index, rule=(), score=None, weight=None):
    """Tokens `index` are kept, those of `rule` without a choice."""
    up = torch.ones(len(batch), dtype=torch.bool)
    up[list(rule)] = False
    score = torch.arange(len(batch)).float() if score is None else torch.tensor(score)
    weight = torch.ones(len(index)) if weight is None else torch.tensor(weight)
    return Routing(torch.tensor(index), weight, score, (), torch.tensor([]), up)


TWO = pack([row(Task.T2I, "tiis"), row(Task.MMU, "iit")])


def test_kept_by_rule_is_counted_apart():
    found = {(r["task"], r["modality"]): r for r in kept({3: routing(TWO, [1, 3, 4, 5, 6], rule=[3, 6])}, TWO)}
    assert set(found) == {("t2i", "text"), ("t2i", "image"), ("t2i", "special"), ("mmu", "text"), ("mmu", "image")}
    assert found["t2i", "image"] == {"layer": 3, "task": "t2i", "modality": "image", "kept": 0.5, "up": 2,
                                     "processed": 0.5, "tokens": 2}
    assert found["t2i", "text"]["kept"] == 0 and found["mmu", "image"]["kept"] == 1
    special = found["t2i", "special"]
    assert math.isnan(special["kept"]) and special["processed"] == 1 and special["up"] == 0
    mixed = pack([row(Task.MMU, "tttt")])
    only, = kept({0: routing(mixed, [0, 2, 3], rule=[2, 3])}, mixed)
    assert (only["kept"], only["up"], only["processed"], only["tokens"]) == (0.5, 2, 0.75, 4)


def test_overlap_by_hand_and_chance_is_the_mean_over_all_choices():
    counts = (torch.tensor(x) for x in ([1, 0], [2, 1], [1, 1], [4, 2]))
    assert overlap(*counts) == {"overlap": 0.5, "chance": 0.5, "excess": 0.0, "tokens": 6}
    nested = overlap(*(torch.tensor([x]) for x in (2, 2, 4, 5)))
    assert nested["overlap"] == 1 and nested["chance"] == pytest.approx(0.8) and nested["excess"] == pytest.approx(1)
    assert math.isnan(overlap(*(torch.tensor([x]) for x in (2, 2, 2, 2)))["excess"])
    choices = itertools.product(itertools.combinations(range(5), 2), itertools.combinations(range(5), 3))
    both = [len(set(a) & set(b)) for a, b in choices]
    found = overlap(*(torch.tensor([x]) for x in (0, 2, 3, 5)))
    assert found["chance"] == pytest.approx(sum(both) / len(both) / 2) and found["excess"] < 0


def test_neighbours_compare_the_next_routed_layer_task_by_task():
    log = {1: routing(TWO, [0, 1, 4], rule=[3]), 4: routing(TWO, [1, 2, 4, 5, 6], rule=[3, 4, 5, 6]),
           6: routing(TWO, [0, 1, 2, 5], rule=[3])}
    found = neighbours(log, TWO)
    pairs = [(r["layer"], r["next"], r["task"]) for r in found]
    assert pairs == [(1, 4, "t2i"), (4, 6, "t2i")], "no mmu token was eligible in layer 4"
    assert found[0]["overlap"] == 0.5 and found[0]["chance"] == pytest.approx(2 * 2 / 3 / 2) and found[0]["tokens"] == 3
    assert found[1]["overlap"] == 1 and found[1]["chance"] == 1 and math.isnan(found[1]["excess"])
    far = neighbours({1: log[1], 6: log[6]}, TWO)
    assert [(r["task"], r["overlap"]) for r in far] == [("t2i", 1), ("mmu", 0)]
    assert far[1]["excess"] == pytest.approx(-0.5)


def test_tasks_compare_the_same_pictures():
    pairs = pack([row(Task.T2I, "tiii", [9, 1, 2, 3]), row(Task.T2I, "iii", [4, 5, 6]),
                  row(Task.MMU, "iiit", [1, 2, 3, 8]), row(Task.MMU, "iii", [4, 5, 6])])
    found, = tasks({2: routing(pairs, [0, 1, 4, 5, 7, 8, 13])}, pairs)
    assert (found["layer"], found["task"], found["tokens"]) == (2, "t2i and mmu", 6)
    assert found["overlap"] == 0.5 and found["chance"] == pytest.approx((1 * 2 / 3 + 2 * 1 / 3) / 2)
    assert tasks({2: routing(pairs, [0], rule=range(7))}, pairs) == []
    with pytest.raises(ValueError, match=r"Batches\.paired"):
        tasks({}, TWO)


def test_positions_by_hand():
    batch = pack([row(Task.T2I, "tiiii"), row(Task.T2I, "iiii"), row(Task.LM, "tt")])
    maps = positions({5: routing(batch, [1, 4, 5, 6]), 7: routing(batch, [1], rule=range(9))}, batch, (2, 2))
    assert maps.shape == (2, 2, 2, 2) and maps[0, 0].tolist() == [[1, 0.5], [0, 0.5]]
    assert maps[0, 1].isnan().all() and maps[1].isnan().all()
    with pytest.raises(ValueError, match=r"have 4 tokens, a grid of \(3, 3\) has 9"):
        positions({}, batch, (3, 3))
    with pytest.raises(ValueError, match="between 1 and 2 tokens"):
        positions({}, pack([row(Task.MMU, "it"), row(Task.MMU, "ii")]), (1, 2))


def test_histograms_hold_only_what_was_chosen():
    log = {0: routing(TWO, [0, 2, 3, 4], rule=[3], score=[0.0, 1, 2, 99, 4, 3, 6], weight=[0.5, 1.5, 77, 1.0])}
    found = histograms(log, TWO, bins=4)
    assert len(found) == 2 * 2 * 4
    rows = {key: [r for r in found if (r["task"], r["value"]) == key]
            for key in itertools.product(("t2i", "mmu"), ("score", "gate"))}
    shares = {key: [r["share"] for r in part] for key, part in rows.items()}
    assert shares["t2i", "score"] == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert shares["mmu", "score"] == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert shares["t2i", "gate"] == [0.5, 0, 0, 0.5]
    assert shares["mmu", "gate"] == [0, 0, 1, 0], "one value stands in the middle of its range"
    assert [(r["low"], r["high"]) for r in rows["mmu", "score"]] == [(3, 3.75), (3.75, 4.5), (4.5, 5.25), (5.25, 6)]


def test_flat_figures_are_means_over_layers_and_say_what_stayed():
    start = {0: routing(TWO, [0, 1, 4]), 1: routing(TWO, [1, 2, 4])}
    now = {0: routing(TWO, [1, 2, 6], score=[-3.0, 1, 2, 3, 1, 1, -5], weight=[0.5, 1.5, 1.0]),
           1: routing(TWO, [1, 2, 4])}
    found = figures(now, TWO, start)
    assert set(found) == {f"routing/{name}" for name in (
        "kept_t2i_text", "kept_t2i_image", "kept_mmu_text", "kept_mmu_image", "neighbours_t2i", "neighbours_mmu",
        "same_t2i", "same_mmu", "score", "gate", "gate_sd")}
    assert found["routing/same_t2i"] == 0.75 and found["routing/same_mmu"] == 0.5
    assert found["routing/kept_t2i_image"] == 1
    assert found["routing/neighbours_t2i"] == pytest.approx(1) and found["routing/score"] == pytest.approx((2 + 3) / 2)
    assert found["routing/gate"] == 1 and found["routing/gate_sd"] == pytest.approx((1 / 6) ** 0.5 / 2)
    nothing = {0: routing(TWO, [0, 1], rule=range(7))}
    assert figures(nothing, TWO, nothing) == {} == figures({}, TWO, {})
    assert choosing(now) and not choosing(nothing) and not choosing({})


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_tables_of_a_routed_model(world, name):
    model, batches = world[name]
    pairs = batches.paired("test", 3)
    assert pairs.tasks == (Task.T2I,) * 3 + (Task.MMU,) * 3
    image = pairs.ids[pairs.modality == Modality.IMAGE].view(2, 3, -1)
    assert torch.equal(image[0], image[1]) and set(image.flatten().tolist()) <= set(batches.layout.code_ids.tolist())

    routed = apply_mod(copy.deepcopy(model), last_half(8, 0.3), PRESETS["unimod"]).eval()
    found = diagnose(routed, batches, 3)
    assert list(found) == ["kept", "positions", "overlaps", "histograms"]
    assert {r["layer"] for r in found["kept"]} == {4, 5, 6, 7}
    assert len(found["positions"]) == 4 * 2 * batches.layout.image_tokens
    assert {r["task"] for r in found["overlaps"]} == {"t2i", "mmu", "lm", "t2i and mmu"}
    assert len(found["overlaps"]) == 3 * 3 + 4
    batch = batches.held_out("test", 3)
    with torch.no_grad(), record_routing() as log:
        routed(batch)
    again = routings(routed, batch)
    for i in (4, 5, 6, 7):
        assert torch.equal(log[i].index, again[i].index) and torch.equal(log[i].score, again[i].score)
    cells = [r["kept"] for r in found["positions"] if (r["layer"], r["task"]) == (4, "t2i")]
    image = next(r for r in found["kept"] if (r["layer"], r["task"], r["modality"]) == (4, "t2i", "image"))
    assert sum(cells) / len(cells) == pytest.approx(image["kept"], rel=1e-5)

    assert diagnose(model, batches, 2) == {}, "dense"
    random = apply_mod(copy.deepcopy(model), last_half(8, 0.3), PRESETS["random"]).eval()
    assert diagnose(random, batches, 2) == {}, "random keeps all in evaluation"
