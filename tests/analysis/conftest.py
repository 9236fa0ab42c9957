"""Two small models with fresh weights, batches of both tasks, and the slow truth about their attention."""

import copy

import numpy as np
import pytest
import torch

from unimod.batch import Modality, Task
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.models.checkpoint import build_model
from unimod.models.image_tokenizer import build_image_tokenizer


@pytest.fixture(scope="session")
def world():
    """name -> (model, batches); the queries and keys are scaled up so that fresh maps are not all flat."""
    torch.set_num_threads(1)
    data = open_data("scenes")
    pictures = torch.from_numpy(np.stack([data.sample("train", i).image for i in range(200)])).permute(0, 3, 1, 2)
    tokenizer = build_image_tokenizer("dictionary")
    tokenizer.fit(pictures)
    found = {}
    for name in ("showo-tiny", "emu3-tiny"):
        model = build_model(name, data.words()).eval()
        for layer in model.layers:
            layer.self_attn.q_proj.weight.data *= 8
            layer.self_attn.k_proj.weight.data *= 8
        found[name] = (model, Batches(data, tokenizer, model.layout))
    return found


@pytest.fixture
def untouched(world):
    """Fails the test when a model's weights or layers changed."""
    before = {name: copy.deepcopy(model.state_dict()) for name, (model, _) in world.items()}
    yield world
    for name, (model, _) in world.items():
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before[name].items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def _dense_maps(model, batch):
    """[L][row] -> [H, n, n] from transformers' own eager attention, under masks written down task by task, not from
    intervals."""
    lm = copy.deepcopy(model.lm)
    lm.set_attn_implementation("eager")
    out = []
    for span, task in zip(batch.rows(), batch.tasks):
        ids, position, image = batch.ids[span], batch.position[span], batch.modality[span] == Modality.IMAGE
        n = len(ids)
        allow = torch.ones(n, n).tril().bool()
        if model.layout.kind == "showo" and task == Task.T2I:
            first = int(image.nonzero()[0]) - 1                     # soi and everything behind it
            allow[first:] = True
        if model.layout.kind == "showo" and task == Task.MMU:
            allow[:, : int(image.nonzero()[-1]) + 2] = True         # the prefix up to and with eoi
        mask = torch.zeros(n, n).masked_fill(~allow, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            found = lm(input_ids=ids[None], position_ids=position[None], attention_mask=mask, output_attentions=True,
                       use_cache=False)
        out.append([a[0] for a in found.attentions])
    return [[row[layer] for row in out] for layer in range(len(model.layers))]


@pytest.fixture(scope="session")
def dense_maps():
    """The function above."""
    return _dense_maps
