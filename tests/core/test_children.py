"""A routed layer and the layer it wraps have one set of children: what is replaced, hooked, or saved through either is
what runs."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from unimod import seam
from unimod.baselines import PRESETS
from unimod.config import RouterConfig
from unimod.layers import apply_mod, remove_mod
from unimod.plan import last_half
from unimod.routing import ForwardState

CONFIGS = {"unimod": RouterConfig(std=0.5), "gamma-mod": PRESETS["gamma-mod"], "p-mod": PRESETS["p-mod"]}


class Doubled(nn.Module):
    """Another MLP, or another norm: twice what was there."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@torch.no_grad()
def hidden(model, packed):
    return model(packed)


@pytest.mark.parametrize("child", ["mlp", "input_layernorm", "self_attn.v_proj"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_child_that_is_replaced_is_the_one_that_runs(model, packed, config, child):
    """By assignment through the routed layer, as before it was routed."""
    parent, _, name = f"layers.5.{child}".rpartition(".")
    first, last = copy.deepcopy(model), model
    at = first.get_submodule(f"lm.model.{parent}")
    setattr(at, name, Doubled(getattr(at, name)))
    torch.manual_seed(0)
    apply_mod(first, last_half(8), CONFIGS[config])
    torch.manual_seed(0)
    apply_mod(last, last_half(8), CONFIGS[config])
    before = hidden(last, packed)
    at = last.get_submodule(f"lm.model.{parent}")
    stock = getattr(at, name)
    setattr(at, name, Doubled(getattr(stock, "stock", stock)))
    after = hidden(last, packed)
    assert torch.equal(after, hidden(first, packed)) and (after - before).abs().max() > 1e-3
    assert isinstance(remove_mod(last).get_submodule(f"lm.model.layers.5.{child}"),
                      Doubled), "and stays when the router goes"
    assert hidden(last, packed).isfinite().all()


@pytest.mark.parametrize("config", CONFIGS)
def test_every_linear_swapped_as_a_quantiser_does_it(model, packed, config):
    apply_mod(model, last_half(8), CONFIGS[config])
    before, ran = hidden(model, packed), []

    class Counted(nn.Linear):
        def forward(self, x):
            ran.append(self)
            return super().forward(x)
    swapped = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                other = Counted(child.in_features, child.out_features, child.bias is not None)
                other.load_state_dict(child.state_dict())
                setattr(parent, name, other)
                swapped += 1
    assert torch.equal(hidden(model, packed), before)
    assert len({*map(id, ran)}) >= swapped - 1, "all but the head, which a forward does not call"


@pytest.mark.parametrize("config", CONFIGS)
def test_hooks_fire_on_the_layer_and_on_its_children(model, packed, config):
    apply_mod(model, last_half(8), CONFIGS[config])
    seen, layer = [], model.layers[5]
    handles = [part.register_forward_hook(lambda module, args,
                                          out: seen.append((module, seam.layer_output(out).shape[1])))
               for part in (layer, layer.router.proj, layer.mlp, layer.self_attn, layer.input_layernorm)]
    hidden(model, packed)
    sizes = dict(seen)
    assert len(sizes) == 5
    assert sizes[layer] == len(packed) > sizes[layer.mlp] == sizes[layer.self_attn] == sizes[layer.input_layernorm]
    for handle in handles:
        handle.remove()


def test_keys_are_stock_wherever_they_are_asked_for(model, packed):
    dense = [*model.state_dict()]
    apply_mod(model, last_half(8), RouterConfig(std=0.5))
    ways = {"state_dict": model.state_dict(), "named_parameters": dict(model.named_parameters()),
            "distributed": get_model_state_dict(model)}
    for way, found in ways.items():
        assert [key for key in found if ".router." not in key] == [key for key in dense if key in found
                                                                   or way != "named_parameters"], way
        assert len([key for key in found if ".router." in key]) == 4 * (2 if way == "named_parameters" else 3), way
    expected = hidden(model, packed)
    kept = {key: value.clone() for key, value in ways["distributed"].items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    set_model_state_dict(model, kept)
    assert torch.equal(hidden(model, packed), expected)


def test_removing_leaves_nothing_behind(model, packed):
    before, modules, keys = hidden(model, packed), [type(m) for m in model.modules()], [*model.state_dict()]
    remove_mod(apply_mod(model, last_half(8), PRESETS["p-mod"]))
    assert torch.equal(hidden(model, packed),
                       before) and [type(m) for m in model.modules()] == modules and [*model.state_dict()] == keys
    assert not any(m._forward_hooks for m in model.modules())


def test_what_is_asked_of_a_norm_is_answered_by_the_stock_one(model):
    stock = model.layers[5].input_layernorm
    apply_mod(model, last_half(8), RouterConfig())
    norm = model.layers[5].input_layernorm
    assert norm is not stock
    assert norm.weight is stock.weight
    assert [*dict(norm.named_parameters())] == [*dict(stock.named_parameters())]
    assert getattr(norm, "eps", None) == getattr(stock, "eps", None)
    assert getattr(norm, "variance_epsilon", 0) == getattr(stock, "variance_epsilon", 0)
    with pytest.raises(AttributeError):
        _ = norm.no_such_thing
    assert copy.deepcopy(norm).stock.weight is not stock.weight


def test_what_hangs_on_a_norm_or_a_scorer_sees_its_call(model, packed, monkeypatch):
    """Kernels that would do a module's work pass its hooks by: with hooks, the module does it itself."""
    hook = model.layers[6].input_layernorm.register_forward_hook(lambda *_: None)
    layer = apply_mod(model, last_half(8)).layers[6]
    monkeypatch.setattr("unimod.layers.backend", lambda *_: "triton")
    plan, state = model.plan(packed), ForwardState(packed)
    angles = torch.zeros(1, len(packed), 4), torch.zeros(1, len(packed), 4)

    def fused():
        return layer._gather(model.embed(packed)[None], angles, state, plan.layers[6]) is not None

    assert not fused()
    hook.remove()
    assert fused()
    layer.router.proj.register_forward_pre_hook(lambda *_: None)
    assert not fused()
