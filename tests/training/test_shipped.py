"""The checkpoints in the package: small, loadable, lossless in their pictures and good on held-out scenes."""

import json

import pytest
import torch

from unimod.config import MODELS
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.evaluate import detect, evaluate, matches
from unimod.models.checkpoint import from_pretrained, shipped

DATA = open_data("scenes")


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    return request.param, *from_pretrained(shipped(request.param))


def test_files_are_small_and_the_card_meets_the_bar(loaded):
    folder = shipped(loaded[0])
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 8_000_000
    quality = json.loads((folder / "card.json").read_text())["quality"]
    assert quality["questions"]["all"] >= 0.95 and quality["pictures"]["all"] >= 0.85


def test_the_card_is_true_on_a_fresh_sample(loaded):
    _, model, image_tokenizer = loaded
    quality = evaluate(model, image_tokenizer, DATA, "test", 48, seed=5, start=5000)
    assert quality.questions["all"] >= 0.88 and quality.pictures["all"] >= 0.75, quality
    assert quality.counts["pictures/all"] == 48 and quality.counts["questions/all"] == 96


@torch.no_grad()
def test_the_picture_tokenizer_is_lossless_on_held_out_scenes(loaded):
    _, model, image_tokenizer = loaded
    samples = Batches(DATA, image_tokenizer, model.layout).samples("test", 0, 100)
    codes = Batches(DATA, image_tokenizer, model.layout).codes(samples).view(-1, *model.layout.grid)
    for sample, picture in zip(samples, image_tokenizer.decode(codes).permute(0, 2, 3, 1).numpy()):
        assert (picture == sample.image).all() and matches(detect(picture), sample)
