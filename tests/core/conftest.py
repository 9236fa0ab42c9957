"""Small fresh models and sequences for the core's tests."""

import pytest
import torch

from unimod.models.checkpoint import build_model
from unimod.tokens import pack

WORDS = ("a", "red", "blue", "circle", "square", "is", "there", "yes", "no", "and")
CAPTIONS = ("", "a red circle", "a blue square and a red circle", "zebra")
TURNS = ([("is there a circle ?", "yes")], [("is there a red circle ?", "no"), ("is there a square ?", "yes")], [("circle ?", "")])


def make_rows(layout, seed=0):
    """Rows of every task and of different lengths, the last understanding row open-ended."""
    g = torch.Generator().manual_seed(seed)
    def codes():
        return torch.randint(layout.codebook_size, (layout.image_tokens,), generator=g)
    if layout.causal_images:
        rows = [layout.t2i(c, codes()) for c in CAPTIONS]
    else:
        rows = [layout.t2i(c, codes(), torch.rand(layout.image_tokens, generator=g) < 0.6) for c in CAPTIONS]
    rows += [layout.mmu(codes(), turns, open_ended=not turns[-1][1]) for turns in TURNS]
    return [*rows, layout.lm("a red circle is there")]


@pytest.fixture(params=["showo-tiny", "emu3-tiny"])
def model(request):
    """A fresh tiny model in eval mode, with weights large enough that attention is not uniform."""
    model = build_model(request.param, WORDS, codebook_size=16, grid=(3, 4), text_budget=24).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return model


@pytest.fixture
def rows(model):
    return make_rows(model.layout)


@pytest.fixture
def packed(rows):
    return pack(rows)
