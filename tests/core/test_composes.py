"""Routed models together with what people train with: checkpointing, bf16, deepcopy."""

import copy

import pytest
import torch

from unimod.baselines import PRESETS
from unimod.config import RouterConfig
from unimod.layers import apply_mod, record_routing
from unimod.losses import losses
from unimod.plan import last_half
from unimod.routing import BatchPlan, ForwardState, RoutingState

METHODS = ("gamma-mod", "p-mod", "random", "a-mod", "tread", "early-exit", "layer-drop", "competitive")


def gradients(model, packed):
    loss = losses(model, packed).total
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", [RouterConfig(std=0.5), *(PRESETS[n] for n in METHODS)], ids=["unimod", *METHODS])
def test_checkpointing_recomputes_routed_layers_with_the_same_tokens(model, packed, config, reentrant):
    apply_mod(model, last_half(8), config).train()
    torch.manual_seed(0)
    loss, plain = gradients(model, packed)
    ran = []
    model.layers[5].layer.mlp.register_forward_pre_hook(lambda module, args: ran.append(args[0].shape[1]))
    model.lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    again, recomputed = gradients(model, packed)
    assert len(ran) == 2 and ran[0] == ran[1] < len(packed), "forward and once more in the backward pass, both routed"
    assert torch.equal(again, loss) and recomputed.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, msg=lambda said, name=name: f"{name}: {said}")
    model.lm.gradient_checkpointing_disable()
    ran.clear()
    gradients(model, packed)
    assert len(ran) == 1


@pytest.mark.parametrize("config", [RouterConfig(std=0.5), PRESETS["p-mod"],
                                    RouterConfig(gate="sigmoid", hidden=8, normalised=True)],
                         ids=["unimod", "p-mod", "hidden"])
def test_autocast_and_bf16_weights_run_and_stay_near(model, packed, config):
    for p in model.parameters():
        p.data.mul_(0.5)
    apply_mod(model, last_half(8), config).train()
    loss, grads = gradients(model, packed)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses(model, packed).total
    mixed.backward()
    assert mixed.item() == pytest.approx(loss.item(), rel=0.05)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == grads.keys()
    half = losses(copy.deepcopy(model).to(torch.bfloat16), packed).total
    assert half.item() == pytest.approx(loss.item(), rel=0.05)


def test_a_deepcopy_is_independent_and_equal(model, packed):
    apply_mod(model, last_half(8), PRESETS["gamma-mod"]).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad(), record_routing() as log:
        before = model(packed)
        assert torch.equal(twin(packed), before) and len(log) == 4
        twin.layers[5].router.proj.weight.add_(1)
        assert torch.equal(model(packed), before)
        assert twin.layers[4].router.proj is twin.layers[7].router.proj, "shared routers stay shared in the copy"


@pytest.mark.parametrize("config", [RouterConfig(std=0.5), PRESETS["gamma-mod"],
                                    RouterConfig(std=0.5, predictor=True, always_keep=("special",)),
                                    RouterConfig(std=0.5, decision_scope="exit"), PRESETS["p-mod"]],
                         ids=["unimod", "gamma-mod", "predictor", "early-exit", "p-mod"])
def test_a_routed_layer_compiles_without_a_graph_break(model, packed, config):
    apply_mod(model, last_half(8), config).train()
    layer = model.layers[5]
    with torch.no_grad():
        h = model.embed(packed)[None]
        rotary = model.rotary(h.new_empty(0), position_ids=packed.position[None])
    arguments = {"position_embeddings": rotary, "attention_mask": None, "position_ids": packed.position[None]}
    plan = BatchPlan({5: layer.router.layer_plan(packed)})    # as the model makes it before its layers run
    weight, found = layer.mlp.fc1.weight if hasattr(layer.mlp, "fc1") else layer.mlp.up_proj.weight, []
    torch.compiler.reset()
    for run in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
        state = RoutingState(active=torch.arange(len(packed)) % 7 > 0 if config.decision_scope == "exit" else None)
        out = run(h, **arguments, unimod=ForwardState(packed, plan=plan, earlier=state))
        found.append((out, torch.autograd.grad(out.square().sum(), (weight, layer.router.proj.weight))))
    torch.testing.assert_close(found[0], found[1])
