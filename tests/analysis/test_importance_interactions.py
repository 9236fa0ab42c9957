"""Importance, gradients, competition: against direct computation, and without touching the model."""

import copy

import pytest
import torch

from unimod.analysis.importance import importance
from unimod.analysis.interactions import compete, gradient_cosine, joint_or_single
from unimod.baselines import PRESETS
from unimod.batch import Task, pack
from unimod.capture import capture
from unimod.config import ParameterError, RouterConfig
from unimod.evaluate.quality import evaluate, pictures_right, questions_right
from unimod.generate import answer, calibrate, draw
from unimod.layers import apply_mod
from unimod.losses import losses
from unimod.models.unified import without
from unimod.plan import last_half
from unimod.router import TaskRouter


def mixed(batches, i, rows=2):
    return batches.mixed(batches.samples("train", 4 * i, 2 * rows, seed=0), (rows, rows, 0), torch.Generator().manual_seed(i), drop=False)


@pytest.fixture
def untouched(world):
    """Fails the test when a model's weights or layers changed."""
    before = {name: copy.deepcopy(model.state_dict()) for name, (model, _) in world.items()}
    yield world
    for name, (model, _) in world.items():
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before[name].items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ("showo-tiny", "emu3-tiny"))
def test_skipping_a_layer(untouched, name):
    model, batches = untouched[name]
    packs = [batches.single_task(Task.MMU, "validation", 2, start=2 * i) for i in range(2)]
    found = importance(model, packs, Task.MMU)
    short = copy.deepcopy(model)
    del short.lm.model.layers[3]
    with torch.no_grad():
        assert found.value[3, 1].item() == pytest.approx(losses(short, packs[1]).per_task[Task.MMU].item(), abs=1e-5)
        assert found.base[0].item() == pytest.approx(losses(model, packs[0]).per_task[Task.MMU].item(), abs=1e-5)
    assert found.damage.shape == (8, 2) and (found.cosine.abs() <= 1).all() and len(found.table()) == 8
    with pytest.raises(ValueError, match="no t2i target"):
        importance(model, packs, Task.T2I)
    assert not model.skipped                                                            # also after an error


@pytest.mark.parametrize("name", ("showo-tiny", "emu3-tiny"))
@pytest.mark.parametrize("routed", (False, True))
def test_a_model_without_a_layer_answers_and_draws_like_one_that_lost_it(untouched, name, routed):
    model, batches = untouched[name]
    model, rows = copy.deepcopy(model), [model.layout.mmu(c, [("what is it?", "")], open_ended=True) for c in batches.codes(batches.samples("test", 0, 3))]
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
    packed = batches.held_out("validation", 2)
    with torch.no_grad():
        whole = model(packed)
        with without(model, 5), without(model, 2):
            twice = model(packed)
        del short.lm.model.layers[2]
        torch.testing.assert_close(twice, short(packed))
        assert torch.equal(whole, model(packed)) and not torch.allclose(whole, twice)


def test_a_layer_comes_back_after_an_error(untouched):
    model, _ = untouched["showo-tiny"]
    for bad, words in ((8, "allowed: 0 to 7"), (-1, "allowed: 0 to 7")):
        with pytest.raises(ParameterError, match=words), without(model, bad):
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
    assert (row["metric"], row["value"], row["base"], row["seeds"], row["batches"]) == ("toy", 4 - 20, 4, 2, 4)
    assert row["value_sd"] == pytest.approx(8**0.5) and row["damage_sd"] == 0
    with pytest.raises(ParameterError, match="3 seeds for 4 batches"):
        importance(model, [1, 3, 5, 7], Task.T2I, toy, seeds=[0, 1, 2])


def test_shares_of_right_answers_are_those_of_the_evaluation(untouched):
    model, batches = untouched["emu3-tiny"]
    samples = batches.samples("validation", 3, 4, seed=0)
    whole = evaluate(model, batches.image_tokenizer, batches.data, "validation", 4, start=3)
    assert sum(questions_right(model, batches, samples)["all"]) / 8 == whole.questions["all"]
    assert sum(pictures_right(model, batches.image_tokenizer, samples)["all"]) / 4 == whole.pictures["all"]


def test_gradient_cosine(untouched):
    model, batches = untouched["showo-tiny"]
    a, b = (batches.single_task(task, "train", 2) for task in (Task.T2I, Task.MMU))
    same = gradient_cosine(model, [a], [a])
    assert same.cosine.allclose(torch.ones(8, 1), atol=1e-5)
    other = gradient_cosine(model, [a], [b])
    clone = copy.deepcopy(model)
    gradients = []
    for packed in (a, b):
        clone.zero_grad()
        losses(clone, packed).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in clone.layers[2].parameters()]))
    assert other.cosine[2, 0].item() == pytest.approx(torch.cosine_similarity(*gradients, dim=0).item(), abs=1e-5)
    assert other.norm_b[2, 0].item() == pytest.approx(gradients[1].norm().item(), rel=1e-4)
    row = gradient_cosine(model, [a, b], [b, b]).table("mixed")[2]
    assert row["pairs"] == 2 and row["cosine_sd"] == pytest.approx(abs(other.cosine[2, 0].item() - 1) / 2**0.5, rel=1e-3) and row["norm_b_sd"] == 0
    with pytest.raises(ValueError):
        gradient_cosine(model, [a, a], [b])


def test_the_competing_router_keeps_the_best_of_the_whole_batch(world):
    _, batches = world["showo-tiny"]
    packed, width = mixed(batches, 0), 8
    router = TaskRouter(width, dict.fromkeys(("t2i", "mmu", "lm"), 0.5), PRESETS["competitive"]).eval()
    h = torch.randn(len(packed), width, generator=torch.Generator().manual_seed(1))
    h[packed.task == Task.T2I] += 1e4 * router.proj.weight[0].detach()                  # t2i tokens score higher than any other
    routing = router(h, packed)
    k = int(len(packed) / 2 + 0.5)
    assert len(routing.index) == k == sum(s.length for s in routing.segments)
    want = min(1.0, k / int((packed.task == Task.T2I).sum()))
    assert (packed.task[routing.index] == Task.T2I).sum() / (packed.task == Task.T2I).sum() == pytest.approx(want)
    assert torch.equal(routing.weight, torch.ones(k))
    routing.weight.sum().backward()
    assert router.proj.weight.grad.abs().sum() > 0                                      # straight through
    assert packed.take(routing.index, routing.segments).lengths is not None


def test_compete(untouched):
    model, batches = untouched["emu3-tiny"]
    packs = [mixed(batches, i) for i in range(2)]
    found = compete(model, packs, mixed(batches, 3), steps=3, layers=(5, 6))
    again = compete(model, packs, mixed(batches, 3), steps=3, layers=(5, 6))
    assert torch.equal(found.history, again.history) and found.history.shape == (3, 2)
    held = mixed(batches, 3)
    sizes = torch.tensor([(held.task == t).sum() for t in (Task.T2I, Task.MMU)]).float()
    torch.testing.assert_close((found.kept * sizes).sum(1), torch.full((2,), float(int(0.5 * len(held) + 0.5))))
    with torch.no_grad():
        torch.testing.assert_close(found.loss[0], losses(model, held).per_task[:2])
    assert len(found.table()) == 2 * 2 * 4 and len(found.steps()) == 6 and {row["seed"] for row in found.table() + found.steps()} == {0}
    other = compete(model, packs, mixed(batches, 3), steps=3, layers=(5, 6), seed=7)
    assert other.seed == 7 and not torch.equal(other.history, found.history)
    with pytest.raises(ValueError, match="needs t2i and mmu"):
        compete(model, [batches.single_task(Task.MMU, "train", 2)], held)


def test_joint_or_single(untouched):
    model, batches = untouched["showo-tiny"]
    t2i, mmu = ([batches.single_task(task, "train", 2, start=2 * i) for i in range(2)] for task in (Task.T2I, Task.MMU))
    found = joint_or_single(model, t2i, mmu, mixed(batches, 5), steps=4, runs=1, lr=1e-3)
    assert found.joint.shape == found.single.shape == (1, 2)
    assert (found.single < found.before).all() and (found.joint < found.before).all()
    torch.testing.assert_close(found.single * (1 + found.harm), found.joint)
    assert len(found.table()) == 6
