"""Routed layers: what is kept, what it costs, what it must not touch."""

import copy

import pytest
import torch

from unimod.baselines import PRESETS
from unimod.batch import Task, pack
from unimod.config import ParameterError, RouterConfig
from unimod.flops import count
from unimod.generate import answer, calibrate, draw
from unimod.layers import MoDLayer, apply_mod, record_routing, remove_mod
from unimod.losses import losses
from unimod.plan import CapacityPlan, interleaved, last_half

PLAN = CapacityPlan({"t2i": [1, 1, .5, .5, 1, .2, .2, .6], "mmu": [1, .7, .5, 1, 1, .2, .3, .6]})
CONFIGS = {"mod": RouterConfig(shared=True), "unimod": RouterConfig(),
           "raw": RouterConfig(gate="raw", std=0.5), "sigmoid": RouterConfig(gate="sigmoid", std=0.5)}
FALLING = CapacityPlan({"t2i": [1, .8, .5, .5, .5, .2, .2, .2], "mmu": [1, .7, .5, .5, .4, .2, .2, .2]})
LOOKING = {"a-mod": RouterConfig(score="attention", gate="none", predictor=True),
           "early-exit": RouterConfig(decision_scope="exit", std=0.5),
           "run": RouterConfig(decision_scope="span", std=0.5), "p-mod": PRESETS["p-mod"]}
"""Routers that look back at earlier layers, or touch what they skip."""


@pytest.fixture(params=CONFIGS)
def routed(model, request):
    torch.manual_seed(1)
    return apply_mod(model, PLAN, CONFIGS[request.param])


@pytest.fixture(params=[*CONFIGS, *LOOKING])
def anyhow(model, request):
    """A model routed by any configuration, on a plan that it can carry out."""
    torch.manual_seed(1)
    if request.param in CONFIGS:
        return apply_mod(model, PLAN, CONFIGS[request.param])
    return apply_mod(model, last_half(8) if request.param == "run" else FALLING, LOOKING[request.param])


@torch.no_grad()
def test_remove_mod_gives_back_the_dense_logits_bit_for_bit(model, packed):
    before, keys = model(packed), set(model.state_dict())
    apply_mod(model, PLAN)
    assert {k for k in model.state_dict() if ".router." not in k} == keys, "a wrapped layer saves like an unwrapped one"
    assert not torch.equal(model(packed), before)
    assert torch.equal(remove_mod(model)(packed), before) and set(model.state_dict()) == keys


@torch.no_grad()
def test_capacity_one_and_identity_layers_change_nothing(model, packed):
    before = model(packed)
    apply_mod(model, CapacityPlan({"t2i": [1.0] * 8}))
    assert not any(isinstance(layer, MoDLayer) for layer in model.layers) and torch.equal(model(packed), before)
    layers = copy.deepcopy(model)
    for layer in layers.layers[2:3]:                        # an update of zero: both residual branches write nothing
        for name, p in layer.named_parameters():
            if name.split(".")[-2] in ("dense", "o_proj", "fc2", "down_proj"):
                p.zero_()
    dense = layers(packed)
    apply_mod(layers, CapacityPlan({"t2i": [1, 1, .3, 1, 1, 1, 1, 1], "mmu": [1, 1, .2, 1, 1, 1, 1, 1]}),
              RouterConfig(std=0.5))
    assert torch.equal(layers(packed), dense)


@torch.no_grad()
@pytest.mark.parametrize("gate", ["tanh", "sigmoid", "raw"])
def test_only_tokens_that_were_up_for_choice_are_weighted(model, packed, gate):
    """Text that is always kept, and a task that the layer leaves dense, pass as in the dense layer: weight exactly
    1."""
    apply_mod(model, CapacityPlan({"mmu": [.5] + [1.0] * 7}), RouterConfig(gate=gate, std=0.5))
    with record_routing() as log:
        model(packed)
    chosen = torch.cat([torch.full((s.length,), s.task == Task.MMU and s.rule != "keep") for s in log[0].segments])
    assert chosen.any() and not chosen.all()
    assert torch.equal(log[0].weight[~chosen], torch.ones(int((~chosen).sum())))
    assert (log[0].weight[chosen] != 1).all()


@torch.no_grad()
def test_the_tanh_gate_starts_as_the_identity_of_the_layer(model, packed):
    apply_mod(model, CapacityPlan({"t2i": [.5] + [1.0] * 7}), RouterConfig(std=0.0))
    with record_routing() as log:
        model(packed)
    assert torch.equal(log[0].weight, torch.ones_like(log[0].weight))


@torch.no_grad()
def test_exactly_k_of_every_segment_are_kept_in_order(routed, packed):
    with record_routing() as log:
        routed(packed)
    assert set(log) == set(PLAN.routed())
    for number, routing in log.items():
        assert torch.equal(routing.index, routing.index.unique())
        bounds, at = [], 0
        for before, after in zip(packed.segments, routing.segments):
            c = PLAN.at(number)[before.task.name.lower()]
            assert after.length == (before.length if before.rule == "keep" else max(1, int(c * before.length + 0.5)))
            kept = routing.index[at:at + after.length] - sum(bounds)
            assert (kept >= 0).all() and (kept < before.length).all()
            if after.length < before.length:
                dropped = torch.ones(before.length, dtype=torch.bool)
                dropped[kept] = False
                score = routing.score[sum(bounds):sum(bounds) + before.length]
                assert score[kept].min() >= score[dropped].max()
            bounds.append(before.length)
            at += after.length


@torch.no_grad()
def test_a_sequence_alone_equals_itself_in_the_batch(anyhow, rows, packed):
    anyhow.double()
    together = anyhow(packed)
    for row, where in zip(rows, packed.rows()):
        torch.testing.assert_close(anyhow(pack([row])), together[where], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_editing_one_sequence_moves_no_other(anyhow, rows, packed):
    before = anyhow(packed)
    edited = copy.deepcopy(rows)
    edited[1].ids[3:9] = 7
    after = anyhow(pack(edited))
    for b, where in enumerate(packed.rows()):
        assert torch.equal(before[where], after[where]) != (b == 1)


@torch.no_grad()
def test_one_tasks_capacity_does_not_touch_the_other_task(model, packed):
    dense = model(packed)
    apply_mod(model, CapacityPlan({"t2i": [.3] * 8}), RouterConfig(std=0.5))
    routed = model(packed)
    mine = packed.task == Task.T2I
    assert torch.equal(routed[~mine], dense[~mine]) and not torch.equal(routed[mine], dense[mine])


def test_gradients_reach_every_router_and_only_kept_tokens(routed, packed):
    with record_routing() as log:
        loss = losses(routed, packed).total
    through_scores = torch.autograd.grad(loss, [log[n].score for n in log], retain_graph=True)
    for (number, routing), grad in zip(log.items(), through_scores):
        capacity = routed.layers[number].router.capacity
        free = [capacity[s.task] < 1 and s.rule == "topk" for s in routing.segments]
        chosen = routing.index[torch.tensor(free).repeat_interleave(torch.tensor([s.length for s in routing.segments]))]
        assert set(grad.nonzero()[:, 0].tolist()) <= set(chosen.tolist()), "a dropped or an unrouted token has no say"
        assert grad[chosen].abs().sum() > 0
    # In the last layer every mmu token that predicts something is always kept, so what happens to the others there
    # cannot reach the loss through their gates: that router is the one that learns nothing.
    loss.backward()
    for number in PLAN.routed():
        router = routed.layers[number].router
        tasks = [0] if router.config.shared else [t for t in (Task.T2I, Task.MMU)
                                                  if PLAN.at(number)[t.name.lower()] < 1
                                                  and (t, number) != (Task.MMU, 7)]
        assert all(router.proj.weight.grad[t].abs().sum() > 0 for t in tasks)


def test_the_choice_never_depends_on_text_that_is_generated_later(model):
    """Open-ended rows grow by decoding; what was kept of the prompt, and so its hidden states, must not move."""
    apply_mod(model.double(), CapacityPlan({"mmu": [.5] * 8}), RouterConfig(std=0.5))
    codes = torch.arange(12)
    one = model.layout.mmu(codes, [("is there a circle", "yes")])
    two = model.layout.mmu(codes, [("is there a circle", "yes"), ("a red square", "no")])
    with torch.no_grad():
        a, b = model(pack([one])), model(pack([two]))
    torch.testing.assert_close(a, b[: len(one.ids)], atol=1e-9, rtol=1e-9)


def test_answers_and_pictures_come_out_of_routed_models(routed, packed):
    row = routed.layout.mmu(torch.arange(12), [("is there a circle", "")], open_ended=True)
    assert len(answer(routed, [row, row], max_new=3)) == 2
    if routed.layout.causal_images:
        with pytest.raises(RuntimeError, match="calibrate"):
            draw(routed, ["a red circle"])
        calibrate(routed, packed)
        with record_routing() as log:
            a = draw(routed, ["a red circle", "a"], seed=3)
        assert all(r.index.numel() <= len(r.score) for r in log.values())
    else:
        a = draw(routed, ["a red circle", "a"], seed=3, steps=4)
    assert a.shape == (2, 12) and int(a.min()) >= 0 and int(a.max()) < 16
    assert torch.equal(a, draw(routed, ["a red circle", "a"], seed=3,
                               **({} if routed.layout.causal_images else {"steps": 4})))


def test_counted_flops(model, packed):
    dense = count(model, packed)
    masked = [] if model.layout.causal_images else [torch.ones(12, dtype=torch.bool)]
    assert dense.saved == 0 == dense.saved_paper
    layer = model.layers[0]
    weights = sum(p.numel() for n, p in layer.named_parameters() if "proj.weight" in n
                  or n.endswith(("dense.weight", "fc1.weight", "fc2.weight")))
    assert dense.stack == 8 * (2 * weights * len(packed) + 4 * 128 * sum(n * n for n in packed.lengths))
    only_t2i = pack([model.layout.t2i("a", torch.arange(12), *masked)] * 4)
    saved = count(apply_mod(model, last_half(8, 0.3)), only_t2i)
    assert abs(saved.saved_paper - 0.3) < 0.02 and 0.25 < saved.saved < 0.35


def test_deepcopy_and_training_mode(routed, packed):
    twin = copy.deepcopy(routed)
    with torch.no_grad():
        twin.layers[2].router.proj.weight.add_(1)
        for p in twin.layers[2].layer.parameters():
            p.add_(0.1)
        assert torch.equal(next(iter(twin.layers[2].self_attn.parameters())),
                           next(iter(twin.layers[2].layer.self_attn.parameters())))
        assert not torch.equal(routed(packed), twin(packed))
    routed.train()
    assert routed.layers[2].layer.training and not twin.layers[2].layer.training


def test_bad_plans_are_refused(model):
    with pytest.raises(ParameterError, match=r"Capacity 0 of t2i in layer 1 must lie in \(0, 1\]"):
        CapacityPlan({"t2i": [1, 0]})
    with pytest.raises(ParameterError, match=r"Capacity 1.2 of mmu in layer 0"):
        CapacityPlan({"mmu": [1.2, 1]})
    with pytest.raises(ParameterError, match="no task 'vqa'"):
        CapacityPlan({"vqa": [1, 1]})
    with pytest.raises(ParameterError, match="The plan has 4 layers, the model 8"):
        apply_mod(model, interleaved(4))
    with pytest.raises(ParameterError, match="Layers 4, 5, 6, 7 of this model are routed already"):
        apply_mod(apply_mod(model, last_half(8)), last_half(8))
    with pytest.raises(ParameterError, match="gate='relu'"):
        RouterConfig(gate="relu")
