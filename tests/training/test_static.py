"""Static decoding steps: all rows take every step, and what is said and drawn stays the same."""

import pytest
import torch

from unimod.config import RouterConfig
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.generate import DecodeSession, answer, calibrate, draw
from unimod.layers import apply_mod
from unimod.models.checkpoint import from_pretrained, shipped
from unimod.plan import last_half

DATA = open_data("scenes")


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_static_steps_say_and_draw_the_same(name):
    model, tokenizer = from_pretrained(shipped(name))
    batches = Batches(DATA, tokenizer, model.layout, (2, 2, 1))
    calibrate(apply_mod(model, last_half(8, 0.2), RouterConfig(std=0.02)), batches.held_out("train", 8))
    samples = batches.samples("test", 0, 5)
    asked = [model.layout.mmu(c, [(s.questions[0].text, "")], open_ended=True) for s,
             c in zip(samples, batches.codes(samples))]
    assert answer(model, asked, static=True) == answer(model, asked)
    if model.layout.causal_images:
        for options in ({}, {"guidance": 1.0}, {"guidance": 1.0, "share": True}):
            assert torch.equal(draw(model, ["a red circle", ""], static=True, **options),
                               draw(model, ["a red circle", ""], **options))


def test_static_steps_are_for_rows_of_one_kind():
    model, _ = from_pretrained(shipped("emu3-tiny"))
    drawn = model.layout.t2i("a", torch.zeros(0, dtype=torch.long), prompt=True)
    asked = model.layout.mmu(torch.zeros(36, dtype=torch.long), [("a", "")], open_ended=True)
    with pytest.raises(ValueError, match="rows of one task and rule; these are of 2"):
        DecodeSession(model, [drawn, asked], 2, static=True)
