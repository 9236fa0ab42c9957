"""A capture changes nothing, and its maps are the ones that dense attention makes."""

import pytest
import torch

from unimod.capture import CaptureError, capture, observe
from unimod.layers import apply_mod, record_routing, remove_mod
from unimod.models.backbone import without
from unimod.plan import last_half
from unimod.tokens import Task

MODELS = ("showo-tiny", "emu3-tiny")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("routed", (False, True))
def test_logits_are_bit_equal(world, name, routed):
    model, batches = world[name]
    packed = batches.held_out("validation", 3)
    if routed:
        apply_mod(model, last_half(8))
    try:
        with torch.no_grad():
            plain = model.head(model(packed))
            with capture(model) as record:
                watched = model.head(model(packed))
            again = model.head(model(packed))
    finally:
        remove_mod(model)
    assert torch.equal(plain, watched) and torch.equal(plain, again)
    assert record.layers == tuple(range(8)) and record.heads == 4 and record.nbytes > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", (Task.T2I, Task.MMU))
def test_maps_equal_dense_attention(world, dense_maps, name, task):
    model, batches = world[name]
    packed = batches.single_task(task, "validation", 3)
    record = observe(model, packed)
    for layer, rows in enumerate(dense_maps(model, packed)):
        for row, want in enumerate(rows):
            got = torch.stack([record.map(row, layer, head) for head in range(record.heads)])
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(record.row_weights(row, layer, 1, -1), want[1, -1], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(record.row_weights(row, layer, 1, 2), want[1, 2], atol=2e-5, rtol=1e-4)


def test_a_routed_layer_records_its_kept_tokens(world):
    model, batches = world["showo-tiny"]
    packed = batches.held_out("validation", 3)
    apply_mod(model, last_half(8, 0.3))
    try:
        with record_routing() as log:
            record = observe(model, packed)
    finally:
        remove_mod(model)
    for layer, routing in log.items():
        assert torch.equal(record.index(layer), routing.index)
        assert record.packed(layer).lengths == packed.take(routing.index, routing.segments).lengths
        one = record.map(1, layer, 0)
        assert len(one) < packed.lengths[1]
        torch.testing.assert_close(one.sum(1), torch.ones(len(one)))
    assert record.packed(0).lengths == packed.lengths == record.whole.lengths


def test_it_names_what_it_does_not_hold(world):
    model, batches = world["emu3-tiny"]
    with capture(model) as record:
        pass
    with pytest.raises(CaptureError, match="No layer was seen"):
        record.map(0, 0, 0)
    record = observe(model, batches.single_task(Task.MMU, "validation", 2))
    wrong = {(0, 8, 0): "holds layers 0, 1", (2, 0, 0): "row 2 .* 0 to 1", (0, 0, 4): "head 4 .* 0 to 3", (-1, 0, 0): "row -1"}
    for arguments, message in wrong.items():
        with pytest.raises(CaptureError, match=message):
            record.map(*arguments)
    with pytest.raises(CaptureError, match="query"):
        record.row_weights(0, 0, 0, 10_000)
    with pytest.raises(CaptureError, match="different lengths"):
        observe(model, batches.held_out("validation", 2)).maps([0, 3], 0)
    with pytest.raises(CaptureError, match="no t2i row; its batch holds mmu"):
        record.rows(Task.T2I)


def test_the_last_forward_counts(world):
    model, batches = world["showo-tiny"]
    with torch.no_grad(), capture(model) as record:
        model(batches.single_task(Task.MMU, "validation", 4))
        with without(model, 3):
            model(batches.single_task(Task.T2I, "validation", 2))
    assert len(record.whole.lengths) == 2 and record.layers == (0, 1, 2, 4, 5, 6, 7)
