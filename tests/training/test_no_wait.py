"""A training step asks nothing of the device: no size that depends on numbers, from the embedding to the optimiser."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.generate import Growing, answer, calibrate, draw
from unimod.layers import apply_mod, learn_capacity, record_routing
from unimod.methods import PRESETS, RouterConfig
from unimod.models.checkpoint import from_pretrained, shipped
from unimod.plan import last_half
from unimod.train import Objective, TrainConfig

DATA = open_data("scenes")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item")


class NoWaiting(TorchDispatchMode):
    """Raises at every operator whose result the host would have to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_numbers = name in WAITS or (name == "repeat_interleave" and (kwargs or {}).get("output_size") is None)
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_numbers or by_mask:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_waits():
    x = torch.arange(4.0)
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 1], lambda: bool(x[0]), lambda: torch.repeat_interleave(x.long())):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait()
    with NoWaiting():
        x[torch.tensor([1, 2])] + 1


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
@pytest.mark.parametrize("router", ["dense", "predictor", *(n for n, c in PRESETS.items() if c.compete != "batch")])
def test_a_step_never_waits(name, router):
    model, tokenizer = from_pretrained(shipped(name))
    config = RouterConfig(predictor=True) if router == "predictor" else PRESETS.get(router)
    if config:
        apply_mod(model, last_half(8), config)
    objective = Objective(model, TrainConfig(steps=1, membership=0.01, budget=0.1)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad] or model.parameters(), fused=True)
    packed = Batches(DATA, tokenizer, model.layout, (2, 2, 1)).train(0).to("cpu")      # `to` works out on the host what the host must know
    with NoWaiting():
        outcome = objective(packed)
        outcome.objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with record_routing() as log, torch.no_grad():
        model(packed)
    assert bool(log) == (router != "dense")


def test_learned_capacities_wait_once_a_step():
    model, tokenizer = from_pretrained(shipped("showo-tiny"))
    learned = learn_capacity(apply_mod(model, last_half(8)), 0.3)
    packed = Batches(DATA, tokenizer, model.layout, (2, 2, 1)).train(0).to("cpu")
    learned.host(0)                                         # the one read, after theta changed
    with NoWaiting():
        Objective(model).train()(packed).objective.backward()


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
@pytest.mark.parametrize("router", ["dense", "unimod", "p-mod", "early-exit"])
@torch.no_grad()
def test_a_static_decoding_step_never_waits(name, router):
    model, tokenizer = from_pretrained(shipped(name))
    batches = Batches(DATA, tokenizer, model.layout, (2, 2, 1))
    if router != "dense":
        calibrate(apply_mod(model, last_half(8), PRESETS[router]), batches.held_out("train", 4))
    nothing = torch.zeros(0, dtype=torch.long)
    asked = [model.layout.mmu(c, [("is there a red circle?", "")], open_ended=True) for c in batches.codes(batches.samples("test", 0, 2))]
    for rows in (asked, [model.layout.t2i(c, nothing, prompt=True) for c in ("a red circle", "")] if model.layout.causal_images else asked):
        growing = Growing(model, rows, 4, static=True)
        growing.push(torch.tensor([5, 6]), [0, 1])          # the first step makes what later ones reuse
        with NoWaiting():
            growing.push(torch.tensor([7, 8]), [0, 1])
            growing.push(torch.tensor([9]), [1])


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_static_steps_say_and_draw_the_same(name):
    model, tokenizer = from_pretrained(shipped(name))
    batches = Batches(DATA, tokenizer, model.layout, (2, 2, 1))
    calibrate(apply_mod(model, last_half(8, 0.2), RouterConfig(std=0.02)), batches.held_out("train", 8))
    samples = batches.samples("test", 0, 5)
    asked = [model.layout.mmu(c, [(s.questions[0].text, "")], open_ended=True) for s, c in zip(samples, batches.codes(samples))]
    assert answer(model, asked, static=True) == answer(model, asked)
    if model.layout.causal_images:
        for options in ({}, {"guidance": 1.0}, {"guidance": 1.0, "share": True}):
            assert torch.equal(draw(model, ["a red circle", ""], static=True, **options), draw(model, ["a red circle", ""], **options))


def test_static_steps_are_for_rows_of_one_kind():
    model, _ = from_pretrained(shipped("emu3-tiny"))
    drawn = model.layout.t2i("a", torch.zeros(0, dtype=torch.long), prompt=True)
    asked = model.layout.mmu(torch.zeros(36, dtype=torch.long), [("a", "")], open_ended=True)
    with pytest.raises(ValueError, match="rows of one task and rule; these are of 2"):
        Growing(model, [drawn, asked], 2, static=True)
