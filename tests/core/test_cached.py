"""Decoding with a cache equals the full forward, token for token, whatever router stands before the layers and however
it decides."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unimod.baselines import PRESETS
from unimod.batch import pack
from unimod.config import RouterConfig
from unimod.decode import DecodeSession
from unimod.generate import calibrate, draw
from unimod.layers import apply_mod, learn_capacity, record_routing, remove_mod
from unimod.models.cache import KVCache
from unimod.plan import CapacityPlan, last_half

PLAN = CapacityPlan({"t2i": [1, .7, .7, .5, .5, .4, .4, .4], "mmu": [1, .7, .6, .5, .5, .3, .3, .3]})
ROUTERS = {name: config for name, config in PRESETS.items() if config.topk_scope != "batch"} | {
    "sharp": RouterConfig(std=0.5), "early-exit": RouterConfig(decision_scope="exit", std=0.5),
    "run": RouterConfig(decision_scope="span", std=0.5),
    "a-mod": RouterConfig(score="attention", gate="none", predictor=True),
    "predictor": RouterConfig(predictor=True, std=0.5)}
QUESTIONS = ("is there a red circle and a blue square ?", "circle ?", "is there a square ?")
ANSWERS = ("yes and no", "no", "a red and a blue circle")


def routed(model, name, packed):
    torch.manual_seed(1)
    config = ROUTERS[name]
    apply_mod(model, last_half(8) if config.decision_scope == "span" else PLAN, config).double()
    if config.score == "learned" and not config.predictor:
        calibrate(model, packed)
    return model


def grown(model, prompts, wholes, static=False):
    """Hidden states of every token after the prompts, decoded one by one; rows end when theirs is whole."""
    longest = max(len(w.ids) - len(p.ids) for p, w in zip(prompts, wholes))
    session, out = DecodeSession(model, prompts, longest, static=static), [[] for _ in prompts]
    for step in range(longest):
        live = [b for b, (p, w) in enumerate(zip(prompts, wholes)) if len(p.ids) + step < len(w.ids)]
        hidden = session.step(torch.stack([wholes[b].ids[len(prompts[b].ids) + step] for b in live]), live)
        for b, h in zip(live, hidden):
            out[b].append(h)
    return [torch.stack(h) for h in out], session.cache


def agree(model, prompts, wholes):
    with torch.no_grad(), record_routing() as log:
        full = model(pack(wholes))
    dropped = {n: len(r.score) - len(r.index) for n, r in log.items()}
    for static in (True, False):
        with torch.no_grad():
            decoded, cache = grown(model, prompts, wholes, static)
        for got, where, prompt in zip(decoded, pack(wholes).rows(), prompts):
            torch.testing.assert_close(got, full[where][len(prompt.ids):], atol=1e-5, rtol=1e-5)
    for layer, missing in dropped.items():
        assert int(cache.used[layer].sum()) == len(pack(wholes)) - missing, (
            "the cache holds what the full forward keeps, and no more")
    return dropped


@pytest.mark.parametrize("name", ROUTERS)
def test_answers(model, packed, name):
    """Top-k on the known prefix, generated text kept; rows of different lengths, one of them with a turn before."""
    model, layout = routed(model, name, packed), model.layout
    g = torch.Generator().manual_seed(0)
    codes = [torch.randint(16, (12,), generator=g) for _ in range(3)]
    turns = [[(QUESTIONS[0], ANSWERS[0])], [(QUESTIONS[1], ANSWERS[1])],
             [(QUESTIONS[1], ANSWERS[1]), (QUESTIONS[2], ANSWERS[2])]]
    prompts = [layout.mmu(c, [*t[:-1], (t[-1][0], "")], open_ended=True) for c, t in zip(codes, turns)]
    wholes = [layout.mmu(c, t, open_ended=True) for c, t in zip(codes, turns)]
    dropped = agree(model, prompts, wholes)
    assert any(dropped.values()) != (ROUTERS[name].score == "random"), (
        "random routing keeps everything here, all others drop")


@pytest.mark.parametrize("name", [n for n, c in ROUTERS.items() if c.predictor or c.score == "learned"])
@pytest.mark.parametrize("model", ["emu3-tiny"], indirect=True)
def test_pictures_drawn_token_by_token(model, packed, name):
    """Each token decides for itself, by a calibrated threshold or by the predictor; captions of different lengths."""
    model, layout = routed(model, name, packed), model.layout
    g, nothing = torch.Generator().manual_seed(0), torch.zeros(0, dtype=torch.long)
    codes = [torch.randint(16, (12,), generator=g) for _ in range(3)]
    captions = ("a red circle and a blue square", "", "zebra")
    prompts = [layout.t2i(c, nothing, prompt=True) for c in captions]
    wholes = [layout.t2i(c, k, prompt=True) for c, k in zip(captions, codes)]
    assert all(len(w.ids) > len(p.ids) + 11 and torch.equal(w.ids[:len(p.ids)], p.ids) for p, w in zip(prompts, wholes))
    assert any(agree(model, prompts, wholes).values())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=2, max_size=4), st.integers(0, 2**30))
def test_any_lengths(model, lengths, seed):
    """Questions and answers of any length, early exit and a decision per layer in turn."""
    g, layout = torch.Generator().manual_seed(seed), model.layout
    torch.manual_seed(seed)
    apply_mod(remove_mod(model), PLAN, RouterConfig(decision_scope="exit" if seed % 2 else "layer", std=0.5)).double()
    turns = [(" ".join(["circle"] * q), " ".join(["red"] * a)) for q, a in lengths]
    codes = [torch.randint(16, (12,), generator=g) for _ in turns]
    agree(model, [layout.mmu(c, [(q, "")], open_ended=True) for c, (q, _) in zip(codes, turns)],
          [layout.mmu(c, [t], open_ended=True) for c, t in zip(codes, turns)])


@pytest.mark.parametrize("model", ["emu3-tiny"], indirect=True)
@pytest.mark.parametrize("kind", ["image", "text", "special", "question"])
def test_kinds_that_are_never_dropped(model, packed, kind):
    torch.manual_seed(1)
    apply_mod(model, PLAN, RouterConfig(always_keep=(kind,), std=0.5)).double()
    calibrate(model, packed)
    nothing, codes = torch.zeros(0, dtype=torch.long), torch.arange(12)
    agree(model, [model.layout.t2i("a red circle", nothing, prompt=True)],
          [model.layout.t2i("a red circle", codes, prompt=True)])


@pytest.mark.parametrize("model", ["emu3-tiny"], indirect=True)
def test_targets_are_not_known_where_tokens_are_generated(model, packed):
    apply_mod(model, PLAN, RouterConfig(always_keep=("labelled",)))
    calibrate(model, packed)
    with pytest.raises(RuntimeError, match="always_keep='labelled' asks for targets"):
        draw(model, ["a red circle"])


@pytest.mark.parametrize("model", ["emu3-tiny"], indirect=True)
def test_while_capacities_are_learned(model, packed):
    learned = learn_capacity(routed(model, "sharp", packed), 0.3)
    with torch.no_grad():
        learned.theta.copy_(torch.randn(learned.theta.shape, generator=torch.Generator().manual_seed(0)))
    calibrate(model, packed)
    nothing, codes = torch.zeros(0, dtype=torch.long), torch.arange(12)
    assert any(agree(model, [model.layout.t2i("a", nothing, prompt=True)],
                     [model.layout.t2i("a", codes, prompt=True)]).values())


def test_nothing_is_generated_where_rows_compete(model):
    apply_mod(model, last_half(8), PRESETS["competitive"])
    with pytest.raises(ValueError, match="Nothing can be generated with topk_scope='batch'"):
        draw(model, ["a red circle"])


def test_a_cache_takes_one_token_per_row(model, rows):
    cache = KVCache(1, 40)
    with torch.no_grad():
        model(pack(rows[4:5]), cache=cache)
        with pytest.raises(RuntimeError, match="append one token per row at a time"):
            model(pack(rows[4:5]), cache=cache)
