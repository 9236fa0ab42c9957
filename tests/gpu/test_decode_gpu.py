"""Decoding on a GPU: static steps recorded as a CUDA graph say and draw what steps one by one do; a training step waits
for nothing."""

import pytest
import torch
from ops.decode_cases import CONFIGS, check_applied, check_attention, check_decision, check_norm

from unimod.config import RouterConfig
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.decode import Replayed
from unimod.generate import answer, calibrate, draw
from unimod.layers import apply_mod
from unimod.models.checkpoint import from_pretrained, shipped
from unimod.plan import last_half
from unimod.train import Objective

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_graphs_say_and_draw_the_same(name, routed):
    model, tokenizer = from_pretrained(shipped(name), device="cuda")
    batches = Batches(open_data("scenes"), tokenizer, model.layout, (2, 2, 1))
    if routed:
        calibrate(apply_mod(model, last_half(8, 0.2), RouterConfig(std=0.02)), batches.held_out("train", 8))
    samples = batches.samples("test", 0, 5)
    asked = [model.layout.mmu(c, [(s.questions[0].text, "")], open_ended=True)
             for s, c in zip(samples, batches.codes(samples))]
    assert answer(model, asked, static=True) == answer(model, asked)
    if model.layout.causal_images:
        a, b = (draw(model, ["a red circle", ""], static=static, top_k=1) for static in (True, False))
        assert (a == b).float().mean() > 0.9, "kernels of other sizes may round otherwise"


@pytest.mark.parametrize("routed", [False, True])
def test_sampled_steps_are_recorded_and_repeat_by_seed(routed, capfd):
    model, tokenizer = from_pretrained(shipped("emu3-tiny"), device="cuda")
    if routed:
        batches = Batches(open_data("scenes"), tokenizer, model.layout, (2, 2, 1))
        calibrate(apply_mod(model, last_half(8, 0.2), RouterConfig(std=0.02)), batches.held_out("train", 8))
    options = {"static": True, "guidance": 1.0, "share": True, "top_k": 64}
    drawn = [draw(model, ["a red circle", ""], seed=s, **options) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].min() >= 0 and drawn[0].max() < model.layout.codebook_size
    assert "not recorded" not in capfd.readouterr().err


@pytest.mark.parametrize("routed", [False, True])
def test_masked_steps_replayed_draw_what_steps_one_by_one_draw(routed, monkeypatch, capfd):
    model, _ = from_pretrained(shipped("showo-tiny"), device="cuda", dtype=torch.bfloat16)
    if routed:
        apply_mod(model, last_half(8, 0.2), RouterConfig(std=0.02))
    replayed = draw(model, ["a red circle", ""], seed=1, steps=8)
    assert "not recorded" not in capfd.readouterr().err
    monkeypatch.setattr("unimod.decode.WARM", 100)
    assert (replayed == draw(model, ["a red circle", ""], seed=1, steps=8)).float().mean() > 0.9


def test_a_step_that_waits_is_not_recorded_and_says_so(capfd):
    x, ran = torch.zeros(1, device="cuda"), []

    def step():
        x.add_(1)
        ran.append(x.item())
    replayed = Replayed(x.device)
    for _ in range(5):
        replayed(step)
    assert ran == [1, 2, 3, 4, 5]
    assert capfd.readouterr().err.count("steps are not recorded as a CUDA graph") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_of_a_step(dtype):
    for active in (None, (False, True)):
        check_attention("cuda", dtype, 32, 8, 128, 8300, (8200, 3), active)
        check_attention("cuda", dtype, 32, 32, 64, 500, (0, 257), active)
    for config in CONFIGS:
        check_decision("cuda", dtype, config, 4)
    for gated in (False, True):
        check_applied("cuda", dtype, gated, not gated)
    check_norm("cuda", dtype)


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_lots_are_drawn_where_the_model_is_or_by_a_generator_of_the_cpu(name):
    model, _ = from_pretrained(shipped(name))
    lots = torch.Generator()
    here = draw(model, ["a red circle"] * 8, generator=lots.manual_seed(0))
    model.to("cuda")
    there = draw(model, ["a red circle"] * 8, generator=lots.manual_seed(0))
    assert here.device == there.device == torch.device("cpu")
    assert (here == there).float().mean() > 0.5, "one code that rounds otherwise changes later ones"
    again = [draw(model, ["a red circle"], seed=1, temperature=1.0) for _ in range(2)]
    assert torch.equal(*again) and again[0].min() >= 0 and again[0].max() < model.layout.codebook_size


def test_a_step_never_waits():
    model, tokenizer = from_pretrained(shipped("showo-tiny"), device="cuda")
    objective = Objective(apply_mod(model, last_half(8))).train()
    batches = Batches(open_data("scenes"), tokenizer, model.layout, (8, 8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(packed):
        objective(packed).objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    step(batches.train(0).to("cuda"))                       # kernels are compiled and chosen here
    packed = batches.train(0).to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
