"""Routers one by one: every configuration's formula by hand on three tokens, and what is never dropped."""

import copy
import math

import pytest
import torch
from torch import nn

import unimod.router
from unimod.baselines import PRESETS
from unimod.batch import IGNORE, Modality, Task, TokenSequence, pack
from unimod.config import KINDS, ParameterError, RouterConfig
from unimod.flops import count
from unimod.layers import apply_mod, learn_capacity, record_routing, remove_mod, train_routers_only
from unimod.losses import losses
from unimod.plan import CapacityPlan, last_half
from unimod.router import TaskRouter, scorer
from unimod.routing import ForwardState, RoutingState

X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
"""Three tokens of width 2."""
W = torch.tensor([0.5, -1.0])


class Toy(nn.Module):
    """A decoder layer whose attention adds 10 and whose MLP doubles what it is given: y = x + 10 + 2 x."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(2, 2, bias=False)
        self.mlp.weight.data = 2 * torch.eye(2)

    def forward(self, hidden_states, **_):
        return hidden_states + 10 + self.mlp(hidden_states)


class Stack(nn.Module):
    """What `apply_mod` asks of a model."""

    width = 2

    def __init__(self, layers=1):
        super().__init__()
        self.layers = nn.ModuleList(Toy() for _ in range(layers))


def three(task=Task.MMU, modality=(Modality.IMAGE,) * 3, rule="topk", rows=1):
    n = torch.arange(3)
    return pack([TokenSequence(task, n, n, torch.tensor([int(m) for m in modality]), n + 1,
                               torch.tensor([IGNORE, 5, IGNORE]), ((3, rule),))] * rows)


def routed(config, capacity=2 / 3, layers=1):
    stack = apply_mod(Stack(layers), CapacityPlan({"mmu": [capacity] * layers}), config)
    for layer in stack.layers:
        if config.score == "learned" and not config.hidden:
            layer.router.proj.weight.data = W.expand(layer.router.proj.weight.shape).clone()
    return stack


def run(stack, packed, number=0, state=None, x=X):
    nowhere = torch.zeros(1, len(x), 1)
    with record_routing() as log:
        out = stack.layers[number](x[None], unimod=ForwardState(packed, earlier=state or RoutingState()),
                                   position_embeddings=(nowhere, nowhere))[0]
    return out.detach(), log[number]


UPDATE, MLP = 10 + 2 * X, 2 * X
SCORES = X @ W                                              # 0.5, -2.0, 0.5: tokens 0 and 2 are kept of three


@pytest.mark.parametrize("config, expected", [
    (PRESETS["unimod"], lambda s: X + (1 + 0.2 * math.tanh(s)) * UPDATE),
    (PRESETS["mod"], lambda s: X + s * UPDATE),
    (PRESETS["gamma-mod"], lambda s: X + 10 + MLP / (1 + math.exp(-s))),
    (PRESETS["p-mod"], lambda s: X + 10 + (1 + 0.2 * math.tanh(s)) * MLP),
    (PRESETS["router-tuning"], lambda s: X + (1 + 0.2 * math.tanh(s)) * UPDATE),
    (RouterConfig(gate="none"), lambda s: X + UPDATE),
    (RouterConfig(gate="sigmoid"), lambda s: X + UPDATE / (1 + math.exp(-s))),
], ids=["unimod", "mod", "gamma-mod", "p-mod", "router-tuning", "none", "sigmoid"])
def test_the_formula_on_three_tokens(config, expected):
    out, routing = run(routed(config), three())
    assert routing.index.tolist() == [0, 2] and torch.allclose(routing.score, SCORES)
    torch.testing.assert_close(out[[0, 2]], expected(0.5)[[0, 2]])
    past = X[1] * (1 + 0.2 * math.tanh(-2)) if config.scale_skipped else X[1]
    torch.testing.assert_close(out[1], past, atol=0, rtol=1e-6 if config.scale_skipped else 0,
                               msg="a dropped token passes by, scaled in p-MoD alone")


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


def test_attention_received_decides_without_a_gate():
    """A-MoD: the two tokens that received most, whatever they are; nothing to train."""
    stack = apply_mod(Stack(2), CapacityPlan({"mmu": [1, 2 / 3]}), PRESETS["a-mod"])
    out, routing = run(stack, three(), 1, RoutingState(received=torch.tensor([0.5, 2.0, 1.0])))
    assert routing.index.tolist() == [1, 2] and torch.equal(out[1:], (X + UPDATE)[1:]) and torch.equal(out[0], X[0])
    with pytest.raises(RuntimeError, match="leave the first layer dense"):
        run(stack, three(), 1)
    with pytest.raises(RuntimeError, match="needs predictor=True"):
        run(stack, three(rule="threshold"), 1, RoutingState(received=torch.ones(3)))


def test_a_decision_reaches_over_the_whole_run():
    """TREAD: what layer 0 dropped skips layers 0 to 2, as if all three were one layer; the next run draws anew."""
    stack = apply_mod(Stack(5), CapacityPlan({"mmu": [1 / 3, 1 / 3, 1 / 3, 1, 1 / 3]}), PRESETS["tread"]).train()
    found = set()
    for seed in range(20):
        torch.manual_seed(seed)
        state = RoutingState()
        kept = [tuple(run(stack, three(), i, state)[1].index.tolist()) for i in (0, 1, 2, 4)]
        assert kept[0] == kept[1] == kept[2]
        found.add((kept[0], kept[3]))
    assert len(found) > 3, "the second run does not follow the first"
    assert not list(stack.layers[0].router.parameters())


def test_a_token_that_left_early_never_comes_back():
    """Scores are 0.5, -2, 0.5 in the first layer; then the router of the second would rather have the token that has
    left."""
    stack = apply_mod(Stack(2), CapacityPlan({"mmu": [2 / 3, 1 / 3]}), PRESETS["early-exit"])
    for layer, sign in zip(stack.layers, (1, -1)):
        layer.router.proj.weight.data = sign * W.expand(3, 2).clone()
    state = RoutingState()
    assert run(stack, three(), 0, state)[1].index.tolist() == [0, 2]
    assert state.active.tolist() == [True, False, True]
    out, routing = run(stack, three(), 1, state)
    assert routing.score.tolist() == (-SCORES).tolist() and routing.index.tolist() == [0], (
        "the best of those that are still in")
    torch.testing.assert_close(out[0], (X + (1 + 0.2 * math.tanh(-0.5)) * UPDATE)[0])
    assert torch.equal(out[1:], X[1:])


def test_layer_dropping_drops_whole_rows_in_training_only():
    stack, packed, x = routed(PRESETS["layer-drop"], capacity=0.5), three(rows=4), X.repeat(4, 1)
    stack.train()
    found = set()
    for seed in range(40):
        torch.manual_seed(seed)
        out, routing = run(stack, packed, x=x)
        rows = tuple(sorted(set((routing.index // 3).tolist())))
        assert len(rows) == 2 and [s.length for s in routing.segments] == [3 * (b in rows) for b in range(4)]
        assert torch.equal(out.view(4, 3, 2)[list(rows)], (X + UPDATE).expand(2, 3, 2))
        assert torch.equal(out.view(4, 3, 2)[[b for b in range(4) if b not in rows]], X.expand(2, 3, 2))
        found.add(rows)
    assert len(found) == 6, "any two of four"
    assert stack.layers[0].router.kept_counts(packed) == (3, 3, 0, 0), "for counting: as many"
    assert torch.equal(run(stack.eval(), packed, x=x)[0], x + 10 + 2 * x)


def test_one_router_for_the_whole_batch_by_hand():
    """The competitive experiment: six tokens of two rows and tasks for three places; forward 1, backward a sigmoid."""
    pieces = [three(task).rows() and TokenSequence(task, n := torch.arange(3), n, n * 0 + 1, n + 1, n, ((3, rule),))
              for task, rule in ((Task.T2I, "topk"), (Task.MMU, "keep"))]
    packed, x = pack(pieces), torch.cat([X, -X])             # scores 0.5, -2, 0.5 and -0.5, 2, -0.5
    stack = apply_mod(Stack(), CapacityPlan({"t2i": [0.5], "mmu": [0.5]}), PRESETS["competitive"]).eval()
    stack.layers[0].router.proj.weight.data = W[None].clone()
    out, routing = run(stack, packed, x=x)
    assert routing.index.tolist() == [0, 2, 4]
    assert [s.length for s in routing.segments] == [2, 1], "the second task wins one place of three"
    assert torch.equal(routing.weight, torch.ones(3)) and torch.equal(out[4], (x + 10 + 2 * x)[4])
    (grad,) = torch.autograd.grad(routing.weight.sum(), routing.score)
    s = torch.sigmoid(torch.tensor([0.5, 0.5, 2.0]))
    torch.testing.assert_close(grad, torch.zeros(6).index_copy(0, routing.index, s * (1 - s)))
    torch.manual_seed(0)
    noisy = torch.stack([run(stack.train(), packed, x=x)[1].score - routing.score for _ in range(300)]).detach()
    assert abs(noisy.mean()) < 0.2
    assert noisy.std() == pytest.approx(math.pi / 3**0.5, rel=0.1), "logistic: two Gumbels' difference"


@pytest.mark.parametrize("kind, modality, kept", [
    ("image", (Modality.TEXT, Modality.IMAGE, Modality.TEXT), [0, 1]),
    ("text", (Modality.IMAGE, Modality.TEXT, Modality.IMAGE), [0, 1]),
    ("special", (Modality.IMAGE, Modality.SPECIAL, Modality.IMAGE), [0, 1]),
    ("question", (Modality.IMAGE, Modality.TEXT, Modality.IMAGE), [0, 1]),
    ("labelled", (Modality.IMAGE,) * 3, [0, 1])])
def test_what_is_never_dropped_is_kept_at_weight_one_beside_the_best_of_the_rest(kind, modality, kept):
    """Token 1 has the lowest score; of the two others one is kept, the earlier at a tie."""
    out, routing = run(routed(RouterConfig(always_keep=(kind,), gate="sigmoid"), capacity=0.4),
                       three(modality=modality))
    assert routing.index.tolist() == kept and routing.weight[1] == 1 and routing.weight[0] == torch.sigmoid(SCORES[0])
    assert torch.equal(out[1], (X + UPDATE)[1])


def test_a_segment_of_nothing_but_kept_tokens_passes_whole():
    out, routing = run(routed(RouterConfig(always_keep=("image",)), capacity=0.1), three())
    assert routing.index.tolist() == [0, 1, 2] and torch.equal(out, X + UPDATE)


def test_routers_across_layers_are_one_and_survive_a_file(tmp_path, model, packed):
    from unimod.models.checkpoint import from_pretrained, save_pretrained

    apply_mod(model, last_half(8), PRESETS["gamma-mod"])
    routers = [layer.router for layer in model.layers[4:]]
    assert len({id(r.proj) for r in routers}) == 1
    with torch.no_grad():
        again, _ = from_pretrained(save_pretrained(tmp_path, model))
        assert torch.equal(again(packed),
                           model(packed)) and len({id(layer.router.proj) for layer in again.layers[4:]}) == 1
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


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_its_routers_and_saves_flops(model, packed, name):
    apply_mod(model, last_half(8), PRESETS[name])
    losses(model.train(), packed).total.backward()
    grads = [p.grad for layer in model.layers[4:7] for n, p in layer.router.named_parameters()
             if n.endswith("proj.weight")]
    assert all(g is not None and g.abs().sum() > 0 for g in grads) and bool(grads) == (PRESETS[name].score == "learned")
    assert 0 < count(model, packed).saved < 0.31


@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_file(tmp_path, model, packed, name):
    from unimod.models.checkpoint import from_pretrained, save_pretrained

    apply_mod(model, last_half(8), PRESETS[name])
    again, _ = from_pretrained(save_pretrained(tmp_path, model))
    assert torch.equal(again(packed), model(packed)) and again.layers[5].router.config == PRESETS[name]
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("way", ["preset", "call"])
def test_router_tuning_trains_routers_only(model, packed, way):
    dense = copy.deepcopy(model)
    if way == "preset":
        apply_mod(model, last_half(8), PRESETS["router-tuning"])
    else:
        train_routers_only(apply_mod(model, last_half(8)))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters()
                                                                           if ".router." in n}
    losses(model, packed).total.backward()
    with torch.no_grad():
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
        assert torch.equal(remove_mod(model)(packed), dense(packed))
    assert all(p.requires_grad for p in model.parameters()) == (way == "preset"), "a preset thaws what it froze"


@pytest.mark.parametrize("options, words", [
    ({"gate": "relu"}, "gate='relu' is not known. Allowed: tanh"),
    ({"branch": "attention"}, "branch='attention' is not known. Allowed: update, mlp"),
    ({"score": "loss"}, "score='loss' is not known"),
    ({"always_keep": ("pictures",)}, f"'pictures' is not known. Allowed: {', '.join(KINDS)}"),
    ({"hidden": -1}, "hidden=-1 is not a width"),
    ({"score": "random"}, "goes with gate='none'"), ({"noise": -1.0}, "noise=-1.0 is not a scale"),
    ({"std": float("nan")}, "std=nan is not a scale"), ({"gain": float("inf")}, "gain=inf is not"),
    ({"hidden": 2.5}, "hidden=2.5 must be a whole number"), ({"hidden": True}, "hidden=True must be"),
    ({"shared": "no"}, "shared='no' must be true or false"),
    ({"noise": "1"}, "noise='1' must be a number"),
    ({"always_keep": "text"}, r"always_keep='text' is a text; give a tuple, such as always_keep=\('text',\)"),
    ({"score": "random", "gate": "none", "hidden": 4}, "without shared_layers, hidden.*hidden=4"),
    ({"gate": "none", "branch": "mlp"}, "branch='mlp' need a gate"),
    ({"topk_scope": "batch", "always_keep": ("text",)}, "no predictor and no always_keep"),
    ({"topk_scope": "batch", "score": "random", "gate": "none"}, "score='learned'"),
    ({"topk_scope": "all"}, "topk_scope='all' is not known. Allowed: segment, batch, sequences"),
    ({"decision_scope": "all"}, "Allowed: layer, span, exit"),
    ({"score": "random", "gate": "none", "predictor": True}, "cannot foresee"),
    ({"topk_scope": "sequences"}, "goes with score='random'"),
    ({"topk_scope": "batch", "predictor": True}, "is an experiment"),
    ({"gate": "none", "scale_skipped": True}, "need a gate; allowed: tanh")])
def test_bad_options_are_refused_before_a_model_is_touched(options, words):
    with pytest.raises(ParameterError, match=words):
        RouterConfig(**options)


def test_the_names_of_before_are_read_from_a_file_with_a_notice(capsys):
    old = {"across": True, "keep": ["text"], "compete": "segment", "reach": "run", "alone": False, "gate": "sigmoid"}
    assert RouterConfig.stored(old) == RouterConfig(shared_layers=True, always_keep=("text",), decision_scope="span",
                                                    gate="sigmoid")
    (line,) = capsys.readouterr().err.splitlines()
    assert "reach is now decision_scope" in line and "save the model again" in line
    assert RouterConfig.stored({"compete": "rows", "score": "random", "gate": "none"}) == PRESETS["layer-drop"]
    assert RouterConfig.stored({"shared": True}) == RouterConfig(shared=True)
    assert capsys.readouterr().err.count("\n") <= 1


@pytest.mark.parametrize("name, rows, words", [
    ("a-mod", [0.5, 1, 1], "layer 0 cannot be routed"),
    ("early-exit", [1, 0.5, 0.6], "mmu keeps 0.5 in layer 1 and 0.6 in layer 2"),
    ("early-exit", [0.5, 1, 1], "never comes back"),
    ("tread", [1, 0.5, 0.4], "mmu keeps 0.5 in layer 1 and 0.4 in layer 2")])
def test_plans_that_a_router_cannot_carry_out_are_refused(name, rows, words):
    stack = Stack(3)
    with pytest.raises(ParameterError, match=words):
        apply_mod(stack, CapacityPlan({"mmu": rows}), PRESETS[name])
    assert all(isinstance(layer, Toy) for layer in stack.layers), "and nothing was wrapped"


def test_kept_counts_follow_the_batch_to_another_device():
    packed = three(modality=(Modality.IMAGE, Modality.TEXT, Modality.IMAGE))
    router = TaskRouter(2, {"t2i": 1, "mmu": 0.5, "lm": 1}, RouterConfig(always_keep=("text",)))
    assert router.kept_counts(packed.to("meta")) == router.kept_counts(packed) == (2,)


@pytest.mark.parametrize("hidden", [0, 4])
def test_scores_of_half_precision_are_summed_in_float32(hidden):
    """Against float32 arithmetic on the same rounded numbers: values to float32's, gradients to bfloat16's."""
    g = torch.Generator().manual_seed(0)
    score = scorer(64, RouterConfig(hidden=hidden, std=0.5)).bfloat16()
    x = torch.randn(50, 64, generator=g).bfloat16().requires_grad_()
    again, wide = copy.deepcopy(score).float(), x.detach().float().requires_grad_()
    out, expected = score(x), again(wide)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    weight = torch.randn(out.shape, generator=g)
    found, right = ((m(y) * weight).sum() for m, y in ((score, x), (again, wide)))
    for a, b in zip(torch.autograd.grad(found, (x, *score.parameters())),
                    torch.autograd.grad(right, (wide, *again.parameters()))):
        torch.testing.assert_close(a.float(), b, atol=0.05 * float(b.abs().max()), rtol=0.05)


def test_a_router_is_added_as_the_docstring_says(tmp_path):
    """The recipe in `unimod.router`, run as written: the model routes by it, trains it, and refuses nothing."""
    from unimod.models.checkpoint import CheckpointError, from_pretrained, save_pretrained, shipped
    lines = [line[4:] for line in unimod.router.__doc__.splitlines() if line.startswith("    ")]
    recipe = "\n".join(lines[lines.index("class ChangeRouter(TaskRouter):"):])
    assert len(recipe.splitlines()) < 20
    scope = {"TaskRouter": TaskRouter, "from_pretrained": from_pretrained, "shipped": shipped, "apply_mod": apply_mod,
             "last_half": last_half, "RouterConfig": RouterConfig}
    exec(recipe, scope)
    model = scope["model"]
    assert type(model.layers[7].router) is scope["ChangeRouter"]
    codes = torch.zeros(model.layout.image_tokens, dtype=torch.long)
    packed = pack([model.layout.t2i("a red circle", codes, torch.ones_like(codes, dtype=torch.bool))])
    with record_routing() as log:
        model(packed).sum().backward()
    assert sorted(log) == [4, 5, 6, 7] and model.layers[7].router.proj.weight.grad.abs().sum() > 0
    assert 0 < len(log[7].index) < len(packed)
    save_pretrained(tmp_path, model)
    again, _ = from_pretrained(tmp_path, router=scope["ChangeRouter"])
    assert torch.equal(again(packed), model.eval()(packed))
    with pytest.raises(CheckpointError, match="was routed by the class ChangeRouter; load it with router=ChangeRouter"):
        from_pretrained(tmp_path)
    save_pretrained(tmp_path, apply_mod(remove_mod(model), last_half(8)))
    with pytest.raises(CheckpointError, match="by no class of your own; load it with router=None"):
        from_pretrained(tmp_path, router=scope["ChangeRouter"])
    with pytest.raises(ParameterError, match="ChangeRouter does not do what the configuration asks of EarlyExitRouter"):
        apply_mod(remove_mod(model), last_half(8), PRESETS["early-exit"], router=scope["ChangeRouter"])
    apply_mod(model, last_half(8), router=scope["ChangeRouter"])
    with pytest.raises(ParameterError, match="ChangeRouter is a router of your own"):
        learn_capacity(model, 0.1)
    with pytest.raises(ParameterError, match="router='norm' is not a class of routers"):
        apply_mod(remove_mod(model), last_half(8), router="norm")
