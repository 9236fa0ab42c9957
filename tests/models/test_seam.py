"""The one way into transformers' decoder layers: one keyword of our own name that carries one object.

On every release that is tested: the object that a layer is given arrives in the registered attention, for each
architecture that is routed.
"""

import inspect
from dataclasses import fields

import pytest
import torch
import transformers
from core.tiny_rows import rows_of
from tiny_more import inner, stock_model
from tiny_showo import make_model
from transformers import AttentionInterface

from unimod import versions
from unimod.baselines import PRESETS
from unimod.batch import pack
from unimod.config import RouterConfig
from unimod.generate import answer, calibrate, draw
from unimod.layers import apply_mod
from unimod.losses import losses
from unimod.models.checkpoint import build_model
from unimod.models.unified import compile_layers
from unimod.plan import last_half
from unimod.routing import ForwardState

OURS = {field.name for field in fields(ForwardState)} | {"unimod", "outside", "mask", "plan", "routing", "observer",
                                                         "batch"}
STOCK = {"attention_mask", "position_ids", "position_embeddings"}
WORDS = ("a", "red", "circle", "is", "there", "yes", "no", "?")


def decoder_of(kind):
    if kind == "phi":
        return make_model().decoder
    if kind == "emu3":
        return build_model("emu3-tiny", WORDS, codebook_size=16, grid=(3, 4), text_budget=24).decoder
    return inner(stock_model(kind))


@pytest.mark.parametrize("kind", ["phi", "emu3", "chameleon", "chameleon swin", "janus"])
def test_the_object_reaches_the_registered_attention_unchanged(kind, capsys):
    decoder, seen = decoder_of(kind), []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((kwargs.get("unimod"), attention_mask, query.shape, kwargs["scaling"]))
        return query.transpose(1, 2), None
    AttentionInterface.register("contract", attention)
    decoder.set_attn_implementation("contract")
    layer, token = decoder.layers[1], object()
    h, position = torch.randn(1, 5, decoder.config.hidden_size), torch.arange(5)[None]
    rotary = decoder.rotary_emb(h, position_ids=position)
    layer(h, attention_mask=None, position_ids=position, position_embeddings=rotary, unimod=token)
    ((given, mask, shape, scaling),) = seen
    assert given is token and mask is None and shape[0] == 1 and shape[2] == 5 and scaling > 0
    parts = (layer.forward, layer.self_attn.forward)
    claimed = OURS & {name for part in parts for name in inspect.signature(part).parameters}
    with capsys.disabled():
        print(f"\n{type(layer).__name__} of transformers {transformers.__version__} has parameters of its own with "
              f"words of ours: {', '.join(sorted(claimed)) or 'none'}")
    assert "unimod" not in claimed


def model_of(name):
    torch.manual_seed(0)
    model = build_model(name, WORDS, codebook_size=16, grid=(3, 4), text_budget=24).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return model


def ways(model, packed):
    """Everything that runs decoder layers: a forward, a training step, an answer and a drawing token by token."""
    layout = model.layout
    with torch.no_grad():
        yield "forward", model(packed)
    model.train()
    total = losses(model, packed).total
    total.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    model.eval()
    yield "training", torch.cat([total.detach()[None], grads])
    codes = torch.arange(layout.image_tokens) % layout.codebook_size
    routers = [layer.router for layer in model.layers if hasattr(layer, "router")]
    asked = [layout.mmu(codes.roll(i), [("is there a circle ?", "")], open_ended=True) for i in range(2)]
    by_itself = not any(
        router.config.score == "attention" for router in routers
    )  # such a router cannot judge a token that is generated
    if routers and by_itself:
        calibrate(model, packed)
    for static in (False, True):
        said = answer(model, asked, max_new=4, top_k=5, static=static)
        yield f"answer, static {static}", torch.tensor([len(said), *map(ord, "|".join(said))])
    if by_itself or not layout.causal_images:
        yield "drawing", draw(model, ["a red circle", "a circle"], steps=3)


METHODS = {"dense": None, "unimod": RouterConfig(std=0.5, predictor=True), "a-mod": PRESETS["a-mod"],
           "early-exit": PRESETS["early-exit"]}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_no_word_of_ours_but_the_one_goes_through_a_stock_layer(name, method, recompute):
    model, passed = model_of(name), set()
    stock = list(model.layers)
    if METHODS[method]:
        apply_mod(model, last_half(8), METHODS[method])
    if recompute:
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in stock:
        layer.register_forward_pre_hook(lambda module, args, kwargs: passed.update(kwargs), with_kwargs=True)
    ran = [way for way, _ in ways(model, pack(rows_of(model.layout)))]
    assert len(ran) >= 3 and passed == STOCK | {"unimod"}, passed


def test_nor_through_a_compiled_one():
    model, passed = model_of("showo-tiny"), set()
    apply_mod(model, last_half(8), RouterConfig(std=0.5))
    forward = type(model.layers[0]).forward

    def spied(self, *args, **kwargs):
        passed.update(kwargs)
        return forward(self, *args, **kwargs)
    compile_layers(model, backend=lambda graph, example: graph.forward)
    try:
        type(model.layers[0]).forward = spied
        with torch.no_grad():
            model(pack(rows_of(model.layout)))
    finally:
        type(model.layers[0]).forward = forward
    assert passed == STOCK | {"unimod"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_a_release_that_takes_our_words_for_its_own_changes_nothing(name, method):
    """As transformers 5.24 did with `cache`: layer and attention swallow every word of ours but the one."""
    def claimed(stock):
        class Future(stock):
            def forward(self, hidden_states, packed=None, cache=None, trail=None, keep=None, compiled=None,
                        outside=None, mask=None, plan=None, routing=None, observer=None, batch=None, **kwargs):
                assert [packed, cache, trail, keep, compiled, outside, mask, plan, routing, observer, batch] == [
                    None
                ] * 11
                return super().forward(hidden_states, **kwargs)
        return Future
    found = []
    for future in (False, True):
        model = model_of(name)
        if future:
            for layer in model.layers:
                layer.__class__, layer.self_attn.__class__ = claimed(type(layer)), claimed(type(layer.self_attn))
        torch.manual_seed(1)
        if METHODS[method]:
            apply_mod(model, last_half(8), METHODS[method])
        found.append(dict(ways(model, pack(rows_of(model.layout)))))
    assert found[0].keys() == found[1].keys()
    for way, value in found[0].items():
        assert torch.equal(value, found[1][way]), way


def test_a_failure_inside_a_stock_layer_says_when_the_release_is_untested(monkeypatch):
    model = model_of("showo-tiny")

    def broken(*_, **__):
        raise TypeError("forward() got an unexpected keyword argument")
    monkeypatch.setattr(model.layers[2], "forward", broken)
    packed = pack(rows_of(model.layout))
    with pytest.raises(TypeError) as error:
        model(packed)
    assert not hasattr(error.value, "__notes__") or not versions.advice()
    monkeypatch.setattr(versions, "installed", lambda name: {"transformers": "9.0.0"}.get(name, "2.12.0"))
    with pytest.raises(TypeError) as error:
        model(packed)
    (note,) = error.value.__notes__
    assert "transformers 9.0.0 (tested: " in note and "make install" in note
