"""Routed models as they decode: per-token decisions against top-k, cache memory, guidance branches that share one."""

import pytest
import torch

from unimod.baselines import PRESETS
from unimod.batch import Task, pack
from unimod.config import RouterConfig
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.evaluate import agreement, cache_share, guidance, loss_by_decision, per_token
from unimod.generate import calibrate, draw
from unimod.layers import apply_mod, record_routing
from unimod.losses import losses
from unimod.models.checkpoint import from_pretrained, shipped
from unimod.plan import last_half

DATA = open_data("scenes")


@pytest.fixture(scope="module", params=["showo-tiny", "emu3-tiny"])
def world(request):
    model, tokenizer = from_pretrained(shipped(request.param))
    torch.manual_seed(0)
    apply_mod(model, last_half(8, 0.3), RouterConfig(std=0.02))
    batches = Batches(DATA, tokenizer, model.layout, (6, 6, 1))
    calibrate(model, batches.held_out("train", 16))
    return model, tokenizer, batches


def test_agreement_is_that_of_the_thresholds_with_top_k(world):
    model, _, batches = world
    batch = batches.held_out("validation", 6)
    rows = agreement(model, batch)
    assert {(r["layer"], r["task"]) for r in rows} == {(n, t) for n in range(4, 8) for t in ("t2i", "mmu", "lm")}
    with torch.no_grad(), record_routing() as log:
        model(batch)
    for r in rows:
        routing, task = log[r["layer"]], Task[r["task"].upper()]
        threshold = float(model.layers[r["layer"]].router.threshold[task])
        tokens = [i for i in range(len(batch)) if routing.eligible[i] and batch.task[i] == task]
        kept = set(routing.index.tolist())
        assert r["tokens"] == len(tokens) and r["by"] == "threshold"
        agree = [(float(routing.score[i]) >= threshold) == (i in kept) for i in tokens]
        assert r["agree"] == pytest.approx(sum(agree) / len(tokens))
        assert r["planned"] == pytest.approx(sum(i in kept for i in tokens) / len(tokens))
    shares = [r["agree"] for r in rows if r["task"] != "lm"]
    assert sum(shares) / len(shares) > 0.6 and min(shares) < 1


def test_a_per_token_decision_has_its_own_loss(world):
    model, _, batches = world
    batch = batches.held_out("validation", 4)
    rows = {(r["task"], r["decided"]): r for r in loss_by_decision(model, batch)}
    with torch.no_grad():
        direct = losses(model, batch).per_task
    assert rows["t2i", "top-k"]["loss"] == pytest.approx(float(direct[Task.T2I]))
    assert rows["t2i", "alone"]["loss"] != rows["t2i", "top-k"]["loss"]
    assert rows["t2i", "top-k"]["kept"] == pytest.approx(0.4, abs=0.03) and 0.1 < rows["t2i", "alone"]["kept"] < 0.8
    assert per_token(batch).segments != batch.segments and all(s.rule != "topk" for s in per_token(batch).segments)


def test_routers_without_a_per_token_decision_are_refused(world):
    model, _, batches = world
    routed = apply_mod(from_pretrained(shipped(model.layout.kind + "-tiny"))[0], last_half(8, 0.3), PRESETS["a-mod"])
    with pytest.raises(RuntimeError, match="needs predictor=True"):
        agreement(routed, batches.held_out("validation", 1))


def test_the_cache_holds_what_is_kept(world):
    model, _, batches = world
    codes = batches.codes(batches.samples("test", 0, 3))
    rows = [model.layout.mmu(c, [("is there a red circle?", "yes")]) for c in codes]
    with torch.no_grad(), record_routing() as log:
        model(pack(rows))
    n = len(pack(rows))
    assert cache_share(model, rows) == pytest.approx((4 * n + sum(len(r.index) for r in log.values())) / (8 * n))
    assert 0.65 < cache_share(model, rows) < 0.85


def test_branches_that_share_keep_the_same_picture_tokens(world):
    model, tokenizer, batches = world
    split, shared = guidance(model, tokenizer, batches.samples("test", 0, 6))
    assert (split["branches"], shared["branches"]) == ("split", "share") and split["same"] < shared["same"]
    # with masked decoding the branches' rows differ in length, so they keep different numbers of tokens
    assert shared["same"] == (1.0 if model.layout.causal_images else pytest.approx(1, abs=0.1))
    assert all(0 <= row["right"] <= 1 and row["pictures"] == 6 for row in (split, shared))


def test_sharing_changes_nothing_without_guidance_or_routers(world):
    def same(model, guidance):
        captions = ["a red circle at the top left", "a blue square at the bottom right"]
        return torch.equal(*(draw(model, captions, seed=1, guidance=guidance, share=share) for share in (True, False)))

    model, _, _ = world
    dense, _ = from_pretrained(shipped(model.layout.kind + "-tiny"))
    assert same(model, 0.0) and same(dense, 1.5) and not same(model, 1.5)
