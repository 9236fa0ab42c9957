"""Learned capacity: on the budget at every step, an exact gradient of it, and more for the layers that need more."""


import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unimod.baselines import PRESETS
from unimod.capacity import LearnedCapacity
from unimod.config import TASKS, ParameterError, RouterConfig
from unimod.layers import apply_mod, learn_capacity, record_routing, remove_mod
from unimod.losses import losses
from unimod.plan import FLOOR, CapacityPlan, last_half

BOTH = {"t2i": 1.0, "mmu": 1.0}


@given(st.lists(st.floats(-8, 8), min_size=9, max_size=9), st.floats(0.05, 0.3), st.floats(0.1, 10))
def test_any_theta_is_on_the_budget(theta, saving, weight):
    learned = LearnedCapacity(6, (1, 3, 5), {"t2i": weight, "mmu": 1.0}, saving)
    with torch.no_grad():
        learned.theta.copy_(torch.tensor(theta).view(3, 3))
    c = learned.fractions().detach()
    assert torch.equal(c[:, 2], torch.ones(3)), "lm counts nothing in this budget and stays dense"
    assert c.min() >= FLOOR and c.max() <= 1
    saved = ((1 - c[:, 0]).sum() * weight + (1 - c[:, 1]).sum()) / (weight + 1) / 6
    assert float(saved) == pytest.approx(saving, abs=1e-5)
    plan = learned.plan()
    assert all(plan.capacity[t][3] == pytest.approx(float(c[1, i])) for i, t in enumerate(TASKS))
    assert set(plan.routed()) <= {1, 3, 5} and all(float(c[n].min()) > 1 - 1e-5 for n, layer in enumerate((1, 3, 5))
                                                   if layer not in plan.routed())


def test_the_same_theta_on_another_budget():
    learned = LearnedCapacity(4, (1, 2, 3), BOTH, 0.3)
    with torch.no_grad():
        learned.theta.copy_(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    plan, less = learned.plan(), learned.plan(0.2)
    assert [p.saving("t2i") + p.saving("mmu") for p in (plan, less)] == pytest.approx([0.6, 0.4], abs=1e-4)
    assert all(b > a for task in BOTH for a,
               b in zip(plan.capacity[task][1:], less.capacity[task][1:])), "every one of them grows"
    with pytest.raises(ParameterError, match="saving=0.8: 3 of 4 layers can save"):
        learned.plan(0.8)


def test_the_gradient_stays_on_the_budget_and_is_exact():
    learned = LearnedCapacity(4, (2, 3), BOTH, 0.3).double()
    with torch.no_grad():
        learned.theta.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    pull = torch.tensor([[1.0, -2.0, 5.0], [0.5, 3.0, 5.0]], dtype=torch.double)
    (learned.fractions() * pull).sum().backward()
    expected = torch.zeros(2, 3, dtype=torch.double)
    for at in [(r, t) for r in range(2) for t in range(2)]:
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                learned.theta[at] += step
                sides.append(float((learned.fractions() * pull).sum()))
                learned.theta[at] -= step
        expected[at] = (sides[0] - sides[1]) / 2e-5
    torch.testing.assert_close(learned.theta.grad, expected, atol=1e-6, rtol=1e-5)


def test_the_edge_by_hand():
    """Half of forty tokens, of which the last four fade; of four tokens, only what is less than one token above the
    edge."""
    learned = LearnedCapacity(1, (0,), BOTH, 0.5)
    t2i = torch.zeros(5, dtype=torch.long)
    assert learned.edge(0, t2i, torch.tensor([0, 16, 17, 18, 19]),
                        torch.tensor([40] * 5)).tolist() == pytest.approx([1, 1, 0.75, 0.5, 0.25], abs=1e-4)
    assert learned.edge(0, t2i[:4], torch.arange(4), torch.tensor([4] * 4)).tolist() == pytest.approx([1, 1, 0, 0],
                                                                                                      abs=1e-4)


@torch.no_grad()
def test_it_keeps_what_the_plan_it_stands_for_keeps(model, packed):
    apply_mod(model, last_half(8), RouterConfig(std=0.5)).train()
    learned = learn_capacity(model, 0.3)
    learned.theta.copy_(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    with record_routing() as log:
        model(packed)
    first = log[4]
    assert (first.weight < 1).any() and torch.equal(first.weight[~first.eligible[first.index]],
                                                    torch.ones(int((~first.eligible[first.index]).sum())))
    with record_routing() as log:
        faded = model.eval()(packed)
    assert (log[4].weight > 0.7).all(), "outside training nothing fades"
    routers = [layer.router for layer in model.layers[4:]]
    again = apply_mod(remove_mod(model), learned.plan(), RouterConfig(std=0.5))
    for layer, old in zip(again.layers[4:], routers):
        layer.router.proj = old.proj
    with record_routing() as log:
        assert torch.equal(model(packed), faded)
    assert torch.equal(log[4].index, first.index)


@pytest.mark.parametrize("model", ["showo-tiny"], indirect=True)
def test_the_gradient_is_that_of_the_loss(model, packed):
    """Central differences through the whole model, in double precision (Emu3's norms round to single)."""
    apply_mod(model, last_half(8), RouterConfig(std=0.5)).double().train()
    learned = learn_capacity(model, 0.31).double()
    pull = torch.randn(len(packed), model.width, generator=torch.Generator().manual_seed(0)).double()
    (model(packed) * pull).sum().backward()                 # losses() rounds to float32
    for at in ((0, 0), (2, 1), (3, 0)):
        sides = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                learned.theta[at] += step
                sides.append(float((model(packed) * pull).sum()))
                learned.theta[at] -= step
        assert learned.theta.grad[at].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-3, abs=1e-7)


@torch.no_grad()
def test_it_is_saved_as_the_plan_it_has_come_to(tmp_path, model, packed):
    from unimod.models.checkpoint import from_pretrained, save_pretrained

    learned = learn_capacity(apply_mod(model, last_half(8), RouterConfig(std=0.5)), 0.3)
    learned.theta.copy_(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    again, _ = from_pretrained(save_pretrained(tmp_path, model))
    assert torch.equal(again(packed), model(packed)) and again.layers[5].router.learned is None
    assert tuple(again.layers[6].router.capacity) == pytest.approx(learned.host(2), abs=0)


def test_a_second_budget_starts_anew(model, packed):
    learn_capacity(apply_mod(model, last_half(8), RouterConfig(std=0.5)), 0.2)
    learned = learn_capacity(model, 0.1)
    model.train()(packed).sum().backward()
    assert learned.theta.grad.abs().sum() > 0 and learned.plan().saving("t2i") == pytest.approx(0.1, abs=1e-3)


def test_layers_that_do_nothing_give_their_capacity_to_those_that_do(model, packed):
    """Layers 4 and 6 write nothing. The loss wants the others' updates, so capacity moves there, as fast as the rate
    allows, at the same total."""
    with torch.no_grad():
        for layer in (model.layers[4], model.layers[6]):
            for name, p in layer.named_parameters():
                if name.split(".")[-2] in ("dense", "o_proj", "fc2", "down_proj"):
                    p.zero_()
    pull = model(packed).detach()                           # what the dense model says
    apply_mod(model, last_half(8, 0.2), RouterConfig(std=0.1)).train()
    learned = learn_capacity(model, 0.2)
    optimizer = torch.optim.Adam([learned.theta], lr=0.1)
    for _ in range(15):
        optimizer.zero_grad()
        (model(packed) - pull).square().mean().backward()
        optimizer.step()
    c = learned.fractions()[:, :2].detach()
    assert c.mean() == pytest.approx(0.6, abs=1e-5)
    assert c[[0, 2]].max() < 0.6 < c[[1, 3]].mean(), c


def test_what_cannot_be_learned_is_refused(model):
    with pytest.raises(ParameterError, match="call apply_mod with a router of topk_scope='segment'"):
        learn_capacity(model, 0.3)
    with pytest.raises(ParameterError, match="and decision_scope='layer' first"):
        learn_capacity(apply_mod(model, last_half(8), PRESETS["early-exit"]), 0.3)
    remove_mod(model)
    apply_mod(model, CapacityPlan({"t2i": [.5, *[1.0] * 7]}))
    with pytest.raises(ParameterError, match="saving=0.3: 1 of 8 layers can save more than 0 and less than 0.12"):
        learn_capacity(model, 0.3)
    with pytest.raises(ParameterError, match="at least one of t2i, mmu, lm"):
        LearnedCapacity(8, (1, 2), {"lm": 0.0}, 0.1)


def test_it_trains_in_step_with_the_model(model, packed):
    apply_mod(model, last_half(8), RouterConfig(std=0.1)).train()
    learned = learn_capacity(model, 0.3)
    losses(model, packed).total.backward()
    assert learned.theta.grad[:3, :2].abs().min() > 0 and learned.theta.grad[:, 2].abs().max() == 0
    assert sum("theta" in name for name, _ in model.named_parameters()) == 1
