"""Losses on routers: by hand on three tokens, what they move, and a predictor that learns to foresee top-k."""

import math

import pytest
import torch

from unimod.config import RouterConfig
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.generate import draw
from unimod.layers import apply_mod, record_routing
from unimod.losses import budget, losses, membership, prediction
from unimod.models.checkpoint import from_pretrained, shipped
from unimod.plan import last_half
from unimod.routing import Routing
from unimod.train import TrainConfig, train

DATA = open_data("scenes")


def decision(score, kept, up=(True, True, True), predicted=None):
    return Routing(torch.tensor(kept), torch.ones(len(kept)), torch.tensor(score, requires_grad=True), (),
                   torch.tensor([0]), torch.tensor(up), predicted)


def test_membership_by_hand():
    log = {0: decision([2.0, -1.0, 0.5], [0, 2]), 1: decision([0.0, 3.0, 1.0], [0, 1], up=(True, False, False))}
    first = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(-0.5))) / 3
    assert membership(log).item() == pytest.approx((first + math.log(2)) / 2)
    membership(log).backward()
    assert log[1].score.grad.tolist() == pytest.approx([-0.25, 0, 0]), "tokens that had no choice learn nothing"
    assert membership({0: decision([1.0, 1.0, 1.0], [0, 1, 2],
                                   up=(False,) * 3)}).item() == 0 and prediction(log).item() == 0


def test_the_budget_by_hand():
    log = {0: decision([2.0, -1.0, 0.5], [0, 2]), 1: decision([0.0, 3.0, 1.0], [0, 1], up=(True, False, False))}
    expected = (sum(1 / (1 + math.exp(-s)) for s in (2.0, -1.0, 0.5)) + 0.5) / 4
    assert budget(log).item() == pytest.approx((expected
                                                - 3 / 4) ** 2), "three of the four that were up for choice were kept"
    assert budget(log, 0.2).item() == pytest.approx((expected - 0.2) ** 2)
    budget(log, 0.2).backward()
    assert (log[0].score.grad > 0).all()
    assert log[1].score.grad[1:].tolist() == [0, 0], "too much: every score that counts goes down"
    assert budget({}).item() == 0 == budget({0: decision([1.0, 1.0, 1.0], [0, 1, 2], up=(False,) * 3)}).item()


def loaded(name, config):
    model, tokenizer = from_pretrained(shipped(name))
    torch.manual_seed(0)
    apply_mod(model, last_half(8, 0.3), config)
    return model, tokenizer, Batches(DATA, tokenizer, model.layout, (6, 6, 1))


def test_the_predictor_moves_nothing_but_itself():
    model, _, batches = loaded("showo-tiny", RouterConfig(predictor=True))
    with record_routing() as log:
        losses(model.train(), batches.train(0))
    prediction(log).backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved and all(".router.predict." in n for n in moved)


def test_the_predictor_learns_to_foresee_top_k_and_then_draws_without_calibration():
    model, _, batches = loaded("emu3-tiny", RouterConfig(predictor=True, std=0.02))
    with pytest.raises(RuntimeError, match="call unimod.generate.calibrate"):
        draw(loaded("emu3-tiny", RouterConfig())[0], ["a red circle"])
    train(model, batches, TrainConfig(steps=40, lr=3e-4, router_lr=30.0))
    held_out = batches.held_out("validation", 8)
    with record_routing() as log, torch.no_grad():
        model(held_out)
    share = {layer: float(r.eligible[r.index].float().sum() / r.eligible.sum()) for layer, r in log.items()}
    always = {layer: max(s, 1 - s) for layer, s in share.items()}
    right = {i: float(((r.predicted > 0) == r.kept)[r.eligible].float().mean()) for i, r in log.items()
             if r.predicted is not None}
    assert right.keys() == {4, 5, 6, 7} and sum(right.values()) > sum(always.values()) + 0.2, (right, always)
    assert draw(model, ["a red circle"]).shape == (1, 36)


def test_the_auxiliary_loss_makes_the_sign_of_the_score_the_decision():
    signs = {}
    for weight in (0.0, 1.0):
        model, _, batches = loaded("showo-tiny", RouterConfig(gate="sigmoid", std=0.02))
        train(model, batches, TrainConfig(steps=25, lr=3e-4, router_lr=30.0, membership=weight))
        with record_routing() as log, torch.no_grad():
            model(batches.held_out("validation", 4))
        agree = [((r.score > 0) == torch.zeros_like(r.eligible).index_fill(0, r.index,
                                                                           True))[r.eligible].float().mean()
                 for r in log.values()]
        signs[weight] = float(torch.stack(agree).mean())
    assert signs[1.0] > signs[0.0] + 0.1, signs
