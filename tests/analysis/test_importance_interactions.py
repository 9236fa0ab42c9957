"""Importance, gradients, competition: against direct computation, and without touching the model."""

import copy

import pytest
import torch

from unimod.analysis.importance import importance
from unimod.analysis.interactions import compete, gradient_cosine, joint_or_single
from unimod.methods import PRESETS
from unimod.models.backbone import losses
from unimod.router import TaskRouter
from unimod.tokens import Task


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
        assert found.loss[3, 1].item() == pytest.approx(losses(short, packs[1]).per_task[Task.MMU].item(), abs=1e-5)
        assert found.base[0].item() == pytest.approx(losses(model, packs[0]).per_task[Task.MMU].item(), abs=1e-5)
    assert found.damage.shape == (8, 2) and (found.cosine.abs() <= 1).all() and len(found.table()) == 8
    with pytest.raises(ValueError, match="no t2i target"):
        importance(model, packs, Task.T2I)


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
    assert len(found.table()) == 6
