"""Small fresh models and sequences for the core's tests."""

import pytest
import torch
from tiny_rows import WORDS, make_rows

from unimod.batch import pack
from unimod.models.checkpoint import build_model


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
