"""Routers one by one: every configuration's formula by hand on three tokens, and what is never dropped."""

import copy
import math

import pytest
import torch
from torch import nn

from unimod.config import ParameterError
from unimod.flops import count
from unimod.layers import apply_mod, record_routing, remove_mod, train_routers_only
from unimod.models.backbone import losses
from unimod.plan import CapacityPlan, last_half
from unimod.router import PRESETS, RouterConfig, TaskRouter
from unimod.tokens import IGNORE, KINDS, Modality, Task, TokenSequence, pack

X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
"""Three tokens of width 2."""
W = torch.tensor([0.5, -1.0])


class Toy(nn.Module):
    """A decoder layer whose attention adds 10 and whose MLP doubles what it is given: y = x + 10 + 2 x."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(2, 2, bias=False)
        self.mlp.weight.data = 2 * torch.eye(2)

    def forward(self, hidden_states, packed, position_embeddings):
        return hidden_states + 10 + self.mlp(hidden_states)


class Stack(nn.Module):
    """What `apply_mod` asks of a model."""

    width = 2

    def __init__(self, layers=1):
        super().__init__()
        self.layers = nn.ModuleList(Toy() for _ in range(layers))


def three(task=Task.MMU, modality=(Modality.IMAGE,) * 3, rule="topk"):
    n = torch.arange(3)
    return pack([TokenSequence(task, n, n, torch.tensor([int(m) for m in modality]), n + 1, torch.tensor([IGNORE, 5, IGNORE]), ((3, rule),))])


def routed(config, capacity=2 / 3, layers=1):
    stack = apply_mod(Stack(layers), CapacityPlan({"mmu": [capacity] * layers}), config)
    for layer in stack.layers:
        if config.score == "learned" and not config.hidden:
            layer.router.proj.weight.data = W.expand(layer.router.proj.weight.shape).clone()
    return stack


def run(stack, packed, number=0):
    with record_routing() as log:
        out = stack.layers[number](X[None], packed=packed, position_embeddings=(torch.zeros(1, 3, 1), torch.zeros(1, 3, 1)))[0]
    return out.detach(), log[number]


UPDATE, MLP = 10 + 2 * X, 2 * X
SCORES = X @ W                                              # 0.5, -2.0, 0.5: tokens 0 and 2 are kept of three


@pytest.mark.parametrize("config, expected", [
    (PRESETS["unimod"], lambda s: X + (1 + 0.2 * math.tanh(s)) * UPDATE),
    (PRESETS["mod"], lambda s: X + s * UPDATE),
    (PRESETS["gamma-mod"], lambda s: X + 10 + MLP / (1 + math.exp(-s))),
    (PRESETS["p-mod"], lambda s: X + 10 + (1 + 0.2 * math.tanh(s)) * MLP),
    (RouterConfig(gate="none"), lambda s: X + UPDATE),
    (RouterConfig(gate="sigmoid"), lambda s: X + UPDATE / (1 + math.exp(-s))),
], ids=["unimod", "mod", "gamma-mod", "p-mod", "none", "sigmoid"])
def test_the_formula_on_three_tokens(config, expected):
    out, routing = run(routed(config), three())
    assert routing.index.tolist() == [0, 2] and torch.allclose(routing.score, SCORES)
    torch.testing.assert_close(out[[0, 2]], expected(0.5)[[0, 2]])
    assert torch.equal(out[1], X[1]), "a dropped token passes by"


def test_the_normalised_score_and_the_hidden_layer_by_hand():
    stack = routed(RouterConfig(normalised=True))
    centred = X - X.mean(1, keepdim=True)
    _, routing = run(stack, three())
    torch.testing.assert_close(routing.score, (centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()) @ W)
    stack = routed(RouterConfig(hidden=3))
    first, _, last = stack.layers[0].router.proj
    _, routing = run(stack, three())
    z = X @ first.weight.T + first.bias
    torch.testing.assert_close(routing.score, ((z * torch.sigmoid(z)) @ last.weight[Task.MMU]))
    assert stack.layers[0].router.flops() == 2 * (2 * 3 + 3 * 3)


def test_random_routing_draws_anew_in_training_and_keeps_all_in_evaluation():
    stack = routed(PRESETS["random"], capacity=1 / 3).train()
    torch.manual_seed(0)
    kept = {tuple(run(stack, three())[1].index.tolist()) for _ in range(40)}
    assert kept == {(0,), (1,), (2,)}, "any token, one of three at a time"
    out, routing = run(stack, three())
    assert torch.equal(out[routing.index], (X + UPDATE)[routing.index])
    assert not list(stack.layers[0].router.parameters())
    out, routing = run(stack.eval(), three())
    assert routing.index.tolist() == [0, 1, 2] and torch.equal(out, X + UPDATE)


@pytest.mark.parametrize("kind, modality, kept", [
    ("image", (Modality.TEXT, Modality.IMAGE, Modality.TEXT), [0, 1]), ("text", (Modality.IMAGE, Modality.TEXT, Modality.IMAGE), [0, 1]),
    ("special", (Modality.IMAGE, Modality.SPECIAL, Modality.IMAGE), [0, 1]), ("question", (Modality.IMAGE, Modality.TEXT, Modality.IMAGE), [0, 1]),
    ("labelled", (Modality.IMAGE,) * 3, [0, 1])])
def test_what_is_never_dropped_is_kept_at_weight_one_beside_the_best_of_the_rest(kind, modality, kept):
    """Token 1 has the lowest score; of the two others one is kept, the earlier at a tie."""
    out, routing = run(routed(RouterConfig(keep=(kind,), gate="sigmoid"), capacity=0.4), three(modality=modality))
    assert routing.index.tolist() == kept and routing.weight[1] == 1 and routing.weight[0] == torch.sigmoid(SCORES[0])
    assert torch.equal(out[1], (X + UPDATE)[1])


def test_a_segment_of_nothing_but_kept_tokens_passes_whole():
    out, routing = run(routed(RouterConfig(keep=("image",)), capacity=0.1), three())
    assert routing.index.tolist() == [0, 1, 2] and torch.equal(out, X + UPDATE)


def test_routers_across_layers_are_one_and_survive_a_file(tmp_path, model, packed):
    from unimod.models.checkpoint import from_pretrained, save_pretrained

    apply_mod(model, last_half(8), PRESETS["gamma-mod"])
    routers = [layer.router for layer in model.layers[4:]]
    assert len({id(r.proj) for r in routers}) == 1
    with torch.no_grad():
        again, _ = from_pretrained(save_pretrained(tmp_path, model))
        assert torch.equal(again(packed), model(packed)) and len({id(layer.router.proj) for layer in again.layers[4:]}) == 1
    assert again.layers[5].router.config == PRESETS["gamma-mod"]


@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_removed_without_a_trace(model, packed, name):
    dense = model(packed)
    stock = [(len(m._forward_hooks), len(m._modules)) for m in model.modules()]
    apply_mod(model, last_half(8), PRESETS[name])
    model(packed)
    assert torch.equal(remove_mod(model)(packed), dense)
    assert [(len(m._forward_hooks), len(m._modules)) for m in model.modules()] == stock


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "random"])
def test_every_preset_trains_its_routers_and_saves_flops(model, packed, name):
    apply_mod(model, last_half(8), PRESETS[name])
    losses(model.train(), packed).total.backward()
    grads = [layer.router.proj.weight.grad for layer in model.layers[4:7]]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    assert 0 < count(model, packed).saved < 0.3


def test_router_tuning_trains_routers_only(model, packed):
    dense = copy.deepcopy(model)
    train_routers_only(apply_mod(model, last_half(8)))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters() if ".router." in n}
    losses(model, packed).total.backward()
    with torch.no_grad():
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
        assert torch.equal(remove_mod(model)(packed), dense(packed))


@pytest.mark.parametrize("options, words", [
    ({"gate": "relu"}, "gate='relu' is not known. Allowed: tanh"), ({"branch": "attention"}, "branch='attention' is not known. Allowed: update, mlp"),
    ({"score": "loss"}, "score='loss' is not known"), ({"keep": ("pictures",)}, f"'pictures' is not known. Allowed: {', '.join(KINDS)}"),
    ({"hidden": -1}, "hidden=-1 is not a width"), ({"score": "random"}, "a random one goes with gate='none'")])
def test_bad_options_are_refused_before_a_model_is_touched(options, words):
    with pytest.raises(ParameterError, match=words):
        RouterConfig(**options)


def test_kept_counts_follow_the_batch_to_another_device():
    packed = three(modality=(Modality.IMAGE, Modality.TEXT, Modality.IMAGE))
    router = TaskRouter(2, {"t2i": 1, "mmu": 0.5, "lm": 1}, RouterConfig(keep=("text",)))
    assert router.kept(packed.to("meta")) == router.kept(packed) == (2,)
