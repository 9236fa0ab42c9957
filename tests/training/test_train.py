"""The training loop, checkpoints and arms on a few steps of a fresh tiny model."""


import copy

import pytest
import torch

from unimod.analysis.redundancy import shares
from unimod.baselines import PRESETS, RandomRouter
from unimod.batch import Task
from unimod.bench import time_steps
from unimod.config import ParameterError, RouterConfig
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.evaluate import evaluate
from unimod.experiment import Session, arms_of, fit_image_tokenizer, read_arms, run_arm, vocabulary
from unimod.layers import apply_mod, learn_capacity
from unimod.models.checkpoint import build_model
from unimod.params import Params
from unimod.plan import last_half
from unimod.train import TrainConfig, train

DATA = open_data("scenes")
TOKENIZER = fit_image_tokenizer(DATA, count=500)


def fresh(name="showo-tiny", seed=0):
    return build_model(name, vocabulary(), TOKENIZER.codebook_size, seed=seed)


def batches(model, batch=2):
    return Batches(DATA, TOKENIZER, model.layout, (batch, batch, 1))


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_loss_falls_for_every_task_dense_and_routed(name):
    model = apply_mod(fresh(name), last_half(8))
    records = train(model, batches(model, 4), TrainConfig(steps=12, lr=3e-3))
    for task in ("t2i", "mmu", "lm"):
        assert records[-1][f"loss_{task}"] < records[0][f"loss_{task}"] - 0.5
    assert [r["step"] for r in records] == list(range(1, 13))
    assert all(r["flops"] < r["dense_flops"] for r in records)


@pytest.mark.parametrize("router", ["dense", "unimod", "tread", "layer-drop", "noisy", "learned"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, router):
    """Also where routers draw at random, and while capacities are learned."""
    def made(seed=0):
        model = fresh(seed=seed)
        if router != "dense":
            torch.manual_seed(seed)
            apply_mod(model, last_half(8),
                      {**PRESETS, "noisy": RouterConfig(noise=1.0), "learned": RouterConfig()}[router])
        if router == "learned":
            learn_capacity(model, 0.3)
        return model

    config = TrainConfig(steps=5, save_every=2)
    whole = made()
    expected = train(whole, batches(whole), config, folder=tmp_path / "whole")

    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    broken = made()
    with pytest.raises(KeyboardInterrupt):
        train(broken, batches(broken), config, folder=tmp_path / "broken", log=stop)
    assert not (tmp_path / "broken" / "metrics.jsonl").exists(), "half a run must not look finished"
    again = made(seed=7)
    records = train(again, batches(again), config, folder=tmp_path / "broken")
    assert [r["loss"] for r in records] == [r["loss"] for r in expected]
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)
    assert not (tmp_path / "broken" / "last.pt").exists()
    assert len((tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()) == 5


def test_resuming_refuses_other_settings_and_damage(tmp_path):
    def stop(record):
        if record["step"] == 2:
            raise KeyboardInterrupt
    model = fresh()
    with pytest.raises(KeyboardInterrupt):
        train(model, batches(model), TrainConfig(steps=3, save_every=1), folder=tmp_path, log=stop)
    with pytest.raises(ParameterError, match=r"other settings \(lr\)"):
        train(model, batches(model), TrainConfig(steps=3, save_every=1, lr=1e-4), folder=tmp_path)
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ParameterError, match=r"last\.pt cannot be read"):
        train(model, batches(model), TrainConfig(steps=3, save_every=1), folder=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run():
    model = fresh()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="The loss of step 0 is nan; lower lr"):
        train(model, batches(model), TrainConfig(steps=1))


def test_schedule_warms_up_and_ends_near_zero():
    config = TrainConfig(steps=100, warmup=0.1)
    rates = [config.lr_at(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1 and rates.index(1) == 9 and rates[-1] < 0.001
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_evaluation_is_deterministic_and_counts_what_it_judged():
    model = fresh().eval()
    a, b = (evaluate(model, TOKENIZER, DATA, "test", 4) for _ in range(2))
    assert a == b and a.counts["questions/all"] == 8 and a.counts["pictures/all"] == 4
    assert set(a.losses) == {t.name.lower() for t in Task}


def test_any_router_goes_on_any_plan_at_the_same_cost(tmp_path):
    model = fresh().eval()
    names = ["unimod", "shared.last_half", "separate.interleaved", "separate.random", "gamma-mod.last_half",
             "random.last_half", "p-mod.cosine_decay"]
    params = Params(models=["showo-tiny"], arms=names, saving=0.25, steps=2, batch=2, eval_samples=2)
    session = Session("showo-tiny", model, TOKENIZER, DATA, batches(model))
    arms = {arm.name: arm for arm in arms_of(params, session)}
    assert list(arms) == names
    for name in names[1:6]:
        assert arms[name].cost.stack == pytest.approx(arms["unimod"].cost.stack, rel=0.02), name
    assert arms["shared.last_half"].router.shared and not arms["separate.interleaved"].router.shared
    assert arms["separate.interleaved"].plan.routed() == (1, 3, 5,
                                                          7) and arms["gamma-mod.last_half"].router.shared_layers
    assert all(abs(arm.steps * arm.cost.total - 2 * arms["unimod"].cost.dense_total) <= arm.cost.total
               for arm in arms.values())
    result = run_arm(params, session, arms["random.last_half"], 0, tmp_path / "random.last_half-0")
    assert result["arm"] == "random.last_half" and read_arms([tmp_path]) == [result]
    assert not any(key.startswith("routing/")
                   for key in result["evaluations"][-1]) and result["collapsed"] == [], "it keeps all in evaluation"


def test_layers_by_arank_and_capacities_per_task(monkeypatch):
    model = fresh().eval()
    session = Session("showo-tiny", model, TOKENIZER, DATA, batches(model))
    asked = []
    monkeypatch.setattr("unimod.experiment.shares", lambda *given: asked.append(given[2:]) or shares(*given))
    names = ["unimod", "separate.lowest_arank", "shared.highest_arank", "shared.last_half_per_task", "separate.middle"]
    arms = {a.name: a for a in arms_of(Params(models=["showo-tiny"], arms=names, samples=2, tolerance=0.1), session)}
    assert asked == [(2, 0.1)], "measured once, with the run's own samples and tolerance"
    ranks = shares(model, session.batches, 2, 0.1)
    for name, pick in (("separate.lowest_arank", sorted),
                       ("shared.highest_arank", lambda values: sorted(values, reverse=True))):
        for task, values in ranks.items():
            routed = [values[i] for i, c in enumerate(arms[name].plan.capacity[task]) if c < 1]
            assert sorted(routed) == sorted(pick(values)[:4]), (name, task)
    assert all(a.cost.stack == pytest.approx(arms["unimod"].cost.stack, rel=0.02) for a in arms.values())
    t2i, mmu = (arms["shared.last_half_per_task"].plan.saving(task) for task in ("t2i", "mmu"))
    assert mmu == pytest.approx(2 * t2i) and arms["separate.middle"].plan.routed() == (2, 3, 4, 5)


def test_capacities_learned_for_an_arm_cost_what_unimods_do():
    model = fresh().eval()
    session = Session("showo-tiny", model, TOKENIZER, DATA, batches(model))
    before = copy.deepcopy(model.state_dict())
    params = Params(models=["showo-tiny"], arms=["unimod", "separate.learned", "shared.learned"], steps=4, batch=2)
    arms = {a.name: a for a in arms_of(params, session)}
    plan = arms["separate.learned"].plan
    assert arms["shared.learned"].plan.routed() == plan.routed() == tuple(range(8))
    assert len(set(plan.capacity["t2i"])) > 1
    assert all(a.cost.stack == pytest.approx(arms["unimod"].cost.stack, rel=0.02) for a in arms.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "searched on a copy"


@pytest.mark.parametrize("arm, words", [("early-exit.interleaved",
                                         "arms: early-exit.interleaved does not go together. decision_scope='exit'"),
                                        ("tread.cosine_decay", "decision_scope='span': one decision"),
                                        ("a-mod.learned", "layer 0 cannot be routed"),
                                        ("tread.learned", "one decision"),
                                        ("early-exit.learned", "never comes back")])
def test_arms_that_do_not_go_together_are_refused(arm, words, monkeypatch):
    monkeypatch.setattr("unimod.experiment.train", lambda *_: pytest.fail("trained before it was refused"))
    session = Session("showo-tiny", fresh().eval(), TOKENIZER, DATA, batches(fresh()))
    with pytest.raises(ParameterError, match=words):
        arms_of(Params(models=["showo-tiny"], arms=["dense", arm], steps=1, batch=2), session)


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_routers_that_look_back_go_through_an_arm(tmp_path, name):
    """Attention received needs a predictor where pictures are drawn token by token."""
    model = fresh(name)
    session = Session(name, model, TOKENIZER, DATA, Batches(DATA, TOKENIZER, model.layout, (4, 4, 1)))
    names = ["a-mod.last_half", "early-exit.last_half", "tread.middle", "layer-drop.last_half"]
    params = Params(models=[name], arms=names, steps=2, batch=4, eval_samples=2, saving=0.27)
    for arm in arms_of(params, session):
        assert arm.router.predictor == (arm.name.startswith("a-mod") and name == "emu3-tiny")
        assert len(run_arm(params, session, arm, 0, tmp_path / arm.name)["evaluations"]) == 3, arm.name


def test_an_arm_that_cannot_meet_the_price_is_named():
    session = Session("showo-tiny", fresh().eval(), TOKENIZER, DATA, batches(fresh()))
    with pytest.raises(ParameterError, match=r"arms: p-mod.last_half cannot be as cheap as unimod, .* saving=0.3.*out "
                                             r"of reach: these plans cost 0\.\d+ to 1"):
        arms_of(Params(models=["showo-tiny"], arms=["dense", "p-mod.last_half"]), session)


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_arms_spend_equal_flops_and_are_read_back(tmp_path, name):
    model = fresh(name)
    params = Params(models=[name], steps=2, batch=2, eval_samples=2, device="cpu")
    session = Session(name, model, TOKENIZER, DATA, Batches(DATA, TOKENIZER, model.layout, (2, 2, 1)))
    arms = arms_of(params, session)
    dense, mod, unimod = arms
    assert dense.steps == 2 and dense.cost.saved == 0
    assert mod.cost.stack == pytest.approx(unimod.cost.stack,
                                           rel=0.01) and mod.router.shared and not unimod.router.shared
    assert 0.1 < unimod.cost.saved < 0.35
    before = [p.clone() for p in model.parameters()]
    results = [run_arm(params, session, arm, 0, tmp_path / arm.name) for arm in arms]
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters())), "every arm starts from the same model"
    assert [len(r["evaluations"]) for r in results] == [3, 3, 3]
    for r, routed in zip(results, (False, True, True)):
        figures = [{k: v for k, v in e.items() if k.startswith("routing/")} for e in r["evaluations"]]
        assert [len(f) for f in figures] == [11 * routed] * 3 and r["collapsed"] == []
        if routed:
            assert figures[0]["routing/same_t2i"] == figures[0]["routing/same_mmu"] == 1
            assert 0 < figures[-1]["routing/same_t2i"] <= 1
            assert 0 < figures[-1]["routing/kept_t2i_image"] < 1 and 0.8 <= figures[-1]["routing/gate"] <= 1.2
    assert read_arms([tmp_path]) == results == [run_arm(params, session, arm, 0, tmp_path / arm.name) for arm in arms]
    times = time_steps({arm.name: arm.model(model, 0) for arm in arms}, session.batches.train(0), rounds=1)
    assert times["dense"]["ratio"] == 1 and all(t["ms"] > 0 for t in times.values())
    with pytest.raises(ParameterError, match="No finished arm"):
        read_arms([tmp_path / "nowhere"])


def test_every_step_run_and_process_draws_other_noise(monkeypatch):
    """Random scores of every step of two runs: never the same, and the same again for the same seed."""
    drawn = []
    model = apply_mod(fresh(), last_half(8), PRESETS["random"])
    scores = RandomRouter.scores

    def recorded(*args):
        drawn.append(scores(*args))
        return drawn[-1]
    monkeypatch.setattr(RandomRouter, "scores", recorded)
    for seed in (0, 1, 0):
        train(model, batches(model, 1), TrainConfig(steps=3, seed=seed))
    first, other, again = drawn[:12], drawn[12:24], drawn[24:]
    assert len(again) == 12 and all(torch.equal(a, b) for a, b in zip(first, again))
    n = min(map(len, drawn))
    assert len({tuple(x[:n].tolist()) for x in first + other}) == 24
