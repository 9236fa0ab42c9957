"""Every way to collapse, made by hand and named by its name alone; routers that look at their tokens are not named."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimod.analysis.collapse import collapsed
from unimod.batch import IGNORE, Modality, Task, TokenSequence, pack
from unimod.config import GATES, RouterConfig
from unimod.mask import prefix_hi
from unimod.router import TaskRouter

TEXT, SIDE = 10, 5


def row(ids, task=Task.T2I, rule="topk", text=TEXT):
    """Text before a picture, one segment."""
    n = len(ids)
    modality = torch.tensor([int(Modality.TEXT)] * text + [int(Modality.IMAGE)] * (n - text))
    return TokenSequence(task, ids, torch.arange(n), modality, prefix_hi(n, n), torch.full((n,), IGNORE), ((n, rule),))


def batch(rows=8, seed=0, text=TEXT, image=SIDE * SIDE):
    """Rows that have nothing in common."""
    return pack([row(ids, text=text) for ids in torch.randint(0, 1000, (rows, text + image), generator=torch.Generator().manual_seed(seed))])


def choose(packed, score, gate="tanh", capacity=0.4):
    """What a real router decides when these are its scores, [T]."""
    router = TaskRouter(1, dict.fromkeys(("t2i", "mmu", "lm"), capacity), RouterConfig(shared=True, gate=gate)).to(score.dtype)
    torch.nn.init.ones_(router.proj.weight)
    return {3: router(score[:, None], packed)}


def noise(packed, seed=1):
    return torch.randn(len(packed), generator=torch.Generator().manual_seed(seed))


def names(packed, score, gate="tanh", capacity=0.4):
    return [f.name for f in collapsed(choose(packed, score, gate, capacity), packed, gate)]


BATCH = batch()
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
    assert names(pack([row(BATCH.ids[:35])] * 8), NOISE[:35].repeat(8)) == [], "the same picture may be kept the same way"


@pytest.mark.parametrize(("push", "rate", "capacity"), [(1, 1, 0.4), (-1, 0, 0.4), (0.5, 1, 0.6)])
def test_one_modality_whole_or_not_at_all(push, rate, capacity):
    score = 0.05 * NOISE + push * ~IMAGE
    found, = collapsed(choose(BATCH, score, capacity=capacity), BATCH, "tanh")
    assert (found.name, found.figure) == ("one-sided", rate)
    assert found.sentence == f"{rate:.0%} of its text tokens are kept, where an even choice keeps {capacity:.0%}"
    assert names(BATCH, 0.05 * NOISE + 0.05 * ~IMAGE) == [], "a preference is no collapse"


def test_one_prompt_in_all_rows_is_little_evidence():
    packed = batch()
    packed.ids[~IMAGE] = torch.arange(TEXT).repeat(8)
    assert names(packed, 0.05 * NOISE + IMAGE) == []


def test_only_tokens_that_compete_with_another_modality_are_one_sided():
    alone = batch(text=0)
    assert names(alone, noise(alone)) == []
    ids = torch.cat([BATCH.ids.view(8, 35), torch.randint(0, 1000, (8, 20), generator=torch.Generator().manual_seed(3))], 1)
    questions = pack([replace(row(i), modality=torch.cat([BATCH.modality[:35], torch.zeros(20, dtype=torch.long)]), parts=((35, "topk"), (20, "topk")))
                      for i in ids])
    found, = collapsed(choose(questions, 0.05 * noise(questions) + (questions.modality == Modality.IMAGE)), questions, "tanh")
    assert (found.name, found.figure) == ("one-sided", 0), "a question's own words compete among themselves and say nothing about that"


@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
def test_gates_at_their_end(gate):
    assert names(BATCH, 20 + NOISE, gate) == ["saturated"] and names(BATCH, 20 + NOISE, "raw") == [] == names(BATCH, 20 + NOISE, "none")
    assert names(BATCH, 1 + 0.5 * NOISE, gate) == []


def test_gates_that_let_nothing_through():
    assert names(BATCH, 1e-3 * NOISE, "raw") == ["dead gate"] and names(BATCH, 1e-3 * NOISE, "tanh") == [], "this one is at the identity"
    assert names(BATCH, NOISE - 20, "sigmoid") == ["saturated", "dead gate"]


def test_tasks_are_judged_apart_and_rules_are_no_evidence():
    both = pack([row(BATCH.ids[:35], task, rule) for task, rule in ((Task.T2I, "topk"), (Task.MMU, "topk"), (Task.LM, "keep"))])
    score = torch.cat([torch.full((35,), 2.0), NOISE[:35], torch.full((35,), 2.0)])
    assert [(f.task, f.name) for f in collapsed(choose(both, score), both, "tanh")] == [("t2i", "constant")]
    assert collapsed({}, both, "tanh") == []


def test_a_few_tokens_prove_nothing():
    small = batch(rows=2, text=1, image=2)
    for score, gate in ((torch.full((6,), 2.0), "tanh"), (20 + torch.rand(6), "tanh"),
                        (torch.tensor([1.0, 0, 0.5] * 2), "tanh"), (1e-4 * torch.rand(6), "raw")):
        assert names(small, score, gate) == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 12), text=st.integers(0, 30), image=st.sampled_from([0, 1, 4, 36]), capacity=st.floats(0.02, 0.99),
       gate=st.sampled_from(GATES))
def test_chance_is_never_named(seed, rows, text, image, capacity, gate):
    packed = batch(rows, seed, text=max(text, 1), image=image)
    assert names(packed, noise(packed, seed + 1), gate, capacity) == []
