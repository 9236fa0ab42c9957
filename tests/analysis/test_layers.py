"""Importance against direct computation, without touching the model; every way to collapse, made by hand and named by
its name alone, while routers that read their tokens are not named."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimod.analysis.layers import collapsed, importance
from unimod.batch import IGNORE, Modality, Task, TokenSequence, pack
from unimod.capture import capture
from unimod.config import GATES, ParameterError, RouterConfig
from unimod.evaluate import evaluate, pictures_right, questions_right
from unimod.generate import answer, calibrate, draw
from unimod.layers import apply_mod
from unimod.losses import losses
from unimod.mask import prefix_hi
from unimod.models.unified import without
from unimod.plan import last_half
from unimod.router import TaskRouter


@pytest.mark.parametrize("name", ("showo-tiny", "emu3-tiny"))
def test_skipping_a_layer(untouched, name):
    model, batches = untouched[name]
    mmu = [batches.single_task(Task.MMU, "validation", 2, start=2 * i) for i in range(2)]
    found = importance(model, mmu, Task.MMU)
    short = copy.deepcopy(model)
    del short.lm.model.layers[3]
    with torch.no_grad():
        without_3, whole = losses(short, mmu[1]).per_task[Task.MMU], losses(model, mmu[0]).per_task[Task.MMU]
    assert found.value[3, 1].item() == pytest.approx(without_3.item(), abs=1e-5)
    assert found.base[0].item() == pytest.approx(whole.item(), abs=1e-5)
    assert found.damage.shape == (8, 2) and (found.cosine.abs() <= 1).all() and len(found.table()) == 8
    with pytest.raises(ValueError, match="no t2i target"):
        importance(model, mmu, Task.T2I)
    assert not model.skipped                                                # also after an error


@pytest.mark.parametrize("name", ("showo-tiny", "emu3-tiny"))
@pytest.mark.parametrize("routed", (False, True))
def test_a_model_without_a_layer_answers_and_draws_like_one_that_lost_it(untouched, name, routed):
    model, batches = untouched[name]
    codes, model = batches.codes(batches.samples("test", 0, 3)), copy.deepcopy(model)
    rows = [model.layout.mmu(c, [("what is it?", "")], open_ended=True) for c in codes]
    if routed:
        apply_mod(model, last_half(8, 0.3), RouterConfig())
        calibrate(model, batches.single_task(Task.T2I, "train", 8))
    short = copy.deepcopy(model)
    del short.lm.model.layers[5]
    with without(model, 5):
        told, drawn = answer(model, rows), draw(model, ["a red circle"], steps=2, seed=3)
        with torch.no_grad(), capture(model) as record:
            model(pack(rows).to(model.device))
    assert record.layers == (0, 1, 2, 3, 4, 6, 7)
    assert told == answer(short, rows) and torch.equal(drawn, draw(short, ["a red circle"], steps=2, seed=3))
    batch = batches.held_out("validation", 2)
    with torch.no_grad():
        whole = model(batch)
        with without(model, 5), without(model, 2):
            twice = model(batch)
        del short.lm.model.layers[2]
        torch.testing.assert_close(twice, short(batch))
        assert torch.equal(whole, model(batch)) and not torch.allclose(whole, twice)


def test_a_layer_comes_back_after_an_error(untouched):
    model, _ = untouched["showo-tiny"]
    for bad in (8, -1):
        with pytest.raises(ParameterError, match="allowed: 0 to 7"), without(model, bad):
            pass
    with pytest.raises(ParameterError, match="left out already"), without(model, 1), without(model, 1):
        pass
    with pytest.raises(KeyError), without(model, 1):
        raise KeyError
    assert model.skipped == frozenset()


def test_any_metric_with_its_spread_over_seeds(untouched):
    model, _ = untouched["showo-tiny"]

    def toy(model, batch):
        return batch - 10.0 * sum(model.skipped)

    found = importance(model, [1, 3, 5, 7], Task.T2I, toy, name="toy", seeds=[0, 0, 4, 4])
    row = found.table()[2]
    assert found.damage.tolist() == [[-10.0 * i] * 4 for i in range(8)] and found.cosine.isnan().all()
    assert found.per_seed(found.base).tolist() == [2, 6]
    assert [row[name] for name in ("metric", "value", "base", "seeds", "batches")] == ["toy", 4 - 20, 4, 2, 4]
    assert row["value_sd"] == pytest.approx(8**0.5) and row["damage_sd"] == 0
    with pytest.raises(ParameterError, match="3 seeds for 4 batches"):
        importance(model, [1, 3, 5, 7], Task.T2I, toy, seeds=[0, 1, 2])


def test_shares_of_right_answers_are_those_of_the_evaluation(untouched):
    model, batches = untouched["emu3-tiny"]
    samples = batches.samples("validation", 3, 4, seed=0)
    whole = evaluate(model, batches.image_tokenizer, batches.data, "validation", 4, start=3)
    assert sum(questions_right(model, batches, samples)["all"]) / 8 == whole.questions["all"]
    pictures = pictures_right(model, batches.image_tokenizer, samples)
    assert sum(pictures["all"]) / 4 == whole.pictures["all"]


TEXT, SIDE = 10, 5


def row(ids, task=Task.T2I, rule="topk", text=TEXT):
    """Text before a picture, one segment."""
    n = len(ids)
    modality = torch.tensor([int(Modality.TEXT)] * text + [int(Modality.IMAGE)] * (n - text))
    return TokenSequence(task, ids, torch.arange(n), modality, prefix_hi(n, n), torch.full((n,), IGNORE), ((n, rule),))


def random_ids(rows, n, seed):
    return torch.randint(0, 1000, (rows, n), generator=torch.Generator().manual_seed(seed))


def made(rows=8, seed=0, text=TEXT, image=SIDE * SIDE):
    """Rows that have nothing in common."""
    return pack([row(ids, text=text) for ids in random_ids(rows, text + image, seed)])


def choose(batch, score, gate="tanh", capacity=0.4):
    """What a real router decides when these are its scores, [T]."""
    config = RouterConfig(shared=True, gate=gate)
    router = TaskRouter(1, dict.fromkeys(("t2i", "mmu", "lm"), capacity), config).to(score.dtype)
    torch.nn.init.ones_(router.proj.weight)
    return {3: router(score[:, None], batch)}


def noise(batch, seed=1):
    return torch.randn(len(batch), generator=torch.Generator().manual_seed(seed))


def names(batch, score, gate="tanh", capacity=0.4):
    return [f.name for f in collapsed(choose(batch, score, gate, capacity), batch, gate)]


BATCH = made()
NOISE = noise(BATCH)
IMAGE = BATCH.modality == Modality.IMAGE


@pytest.mark.parametrize("gate", GATES)
def test_a_router_that_looks_is_not_named(gate):
    assert names(BATCH, NOISE, gate) == []


@pytest.mark.parametrize("score", [torch.full((len(BATCH),), 3.0), torch.zeros(len(BATCH)), 1000 + 1e-5 * NOISE])
def test_constant_scores(score):
    assert names(BATCH, score, "none") == ["constant"]
    assert names(BATCH, 1 + 1e-3 * NOISE, "none") == [], "in float32 these differ enough"
    assert names(BATCH, score, "none", capacity=0.99) == [], "where all are kept nothing is decided"


def test_the_same_places_whatever_the_picture():
    score = NOISE.clone()
    score[IMAGE] = noise(BATCH, 7)[: SIDE * SIDE].repeat(8)
    found, = collapsed(choose(BATCH, score), BATCH, "tanh")
    assert (found.layer, found.task, found.name, found.figure) == (3, "t2i", "positional", pytest.approx(1))
    assert str(found).startswith("layer 3, t2i, positional: ")
    assert names(BATCH, score, capacity=0.98) == [], "whoever keeps all keeps the same"
    score[IMAGE] += 0.7 * NOISE[IMAGE]
    assert names(BATCH, score) == [], "half by content"
    same = pack([row(BATCH.ids[:35])] * 8)
    assert names(same, NOISE[:35].repeat(8)) == [], "the same picture may be kept the same way"


@pytest.mark.parametrize(("push", "rate", "capacity"), [(1, 1, 0.4), (-1, 0, 0.4), (0.5, 1, 0.6)])
def test_one_modality_whole_or_not_at_all(push, rate, capacity):
    score = 0.05 * NOISE + push * ~IMAGE
    found, = collapsed(choose(BATCH, score, capacity=capacity), BATCH, "tanh")
    assert (found.name, found.figure) == ("one-sided", rate)
    assert found.sentence == f"{rate:.0%} of its text tokens are kept, where an even choice keeps {capacity:.0%}"
    assert names(BATCH, 0.05 * NOISE + 0.05 * ~IMAGE) == [], "a preference is no collapse"


def test_one_prompt_in_all_rows_is_little_evidence():
    batch = made()
    batch.ids[~IMAGE] = torch.arange(TEXT).repeat(8)
    assert names(batch, 0.05 * NOISE + IMAGE) == []


def test_only_tokens_that_compete_with_another_modality_are_one_sided():
    alone = made(text=0)
    assert names(alone, noise(alone)) == []
    ids = torch.cat([BATCH.ids.view(8, 35), random_ids(8, 20, seed=3)], 1)
    modality = torch.cat([BATCH.modality[:35], torch.zeros(20, dtype=torch.long)])
    questions = pack([replace(row(i), modality=modality, parts=((35, "topk"), (20, "topk"))) for i in ids])
    score = 0.05 * noise(questions) + (questions.modality == Modality.IMAGE)
    found, = collapsed(choose(questions, score), questions, "tanh")
    assert (found.name, found.figure) == ("one-sided", 0), "a question's own words compete among themselves alone"


@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
def test_gates_at_their_end(gate):
    assert [names(BATCH, 20 + NOISE, g) for g in (gate, "raw", "none")] == [["saturated"], [], []]
    assert names(BATCH, 1 + 0.5 * NOISE, gate) == []


def test_gates_that_let_nothing_through():
    assert names(BATCH, 1e-3 * NOISE, "raw") == ["dead gate"]
    assert names(BATCH, 1e-3 * NOISE, "tanh") == [], "this gate is at the identity"
    assert names(BATCH, NOISE - 20, "sigmoid") == ["saturated", "dead gate"]


def test_tasks_are_judged_apart_and_rules_are_no_evidence():
    rules = {Task.T2I: "topk", Task.MMU: "topk", Task.LM: "keep"}
    both = pack([row(BATCH.ids[:35], task, rule) for task, rule in rules.items()])
    score = torch.cat([torch.full((35,), 2.0), NOISE[:35], torch.full((35,), 2.0)])
    assert [(f.task, f.name) for f in collapsed(choose(both, score), both, "tanh")] == [("t2i", "constant")]
    assert collapsed({}, both, "tanh") == []


def test_a_few_tokens_prove_nothing():
    small = made(rows=2, text=1, image=2)
    for score, gate in ((torch.full((6,), 2.0), "tanh"), (20 + torch.rand(6), "tanh"),
                        (torch.tensor([1.0, 0, 0.5] * 2), "tanh"), (1e-4 * torch.rand(6), "raw")):
        assert names(small, score, gate) == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 12), text=st.integers(0, 30),
       image=st.sampled_from([0, 1, 4, 36]), capacity=st.floats(0.02, 0.99), gate=st.sampled_from(GATES))
def test_chance_is_never_named(seed, rows, text, image, capacity, gate):
    batch = made(rows, seed, text=max(text, 1), image=image)
    assert names(batch, noise(batch, seed + 1), gate, capacity) == []
