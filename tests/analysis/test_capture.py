"""A capture does not change the output, and its maps are those of dense attention."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import unimod.capture
from unimod.attention_record import places
from unimod.batch import Modality, Task
from unimod.capture import AttentionRecord, CaptureError, capture, capture_batch, capture_summary
from unimod.generate import answer
from unimod.layers import apply_mod, record_routing, remove_mod
from unimod.models.unified import without
from unimod.plan import last_half

MODELS = ("showo-tiny", "emu3-tiny")


def question(model, batches):
    """An open-ended sequence about the first test picture."""
    codes = batches.codes(batches.samples("test", 0, 1))[0]
    return model.layout.mmu(codes, [("what is it?", "")], open_ended=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("routed", (False, True))
def test_logits_are_bit_equal(world, name, routed):
    model, batches = world[name]
    batch = batches.held_out("validation", 3)
    if routed:
        apply_mod(model, last_half(8))
    try:
        with torch.no_grad():
            plain = model.head(model(batch))
            with capture(model) as record:
                captured = model.head(model(batch))
            again = model.head(model(batch))
    finally:
        remove_mod(model)
    assert torch.equal(plain, captured) and torch.equal(plain, again)
    assert record.layers == tuple(range(8)) and record.heads == 4 and record.nbytes > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", (Task.T2I, Task.MMU))
def test_maps_equal_dense_attention(world, dense_maps, name, task):
    model, batches = world[name]
    batch = batches.single_task(task, "validation", 3)
    record = capture_batch(model, batch)
    for layer, rows in enumerate(dense_maps(model, batch)):
        for row, want in enumerate(rows):
            got = torch.stack([record.map(row, layer, head) for head in range(record.heads)])
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(record.map(row, layer), want, atol=2e-5, rtol=1e-4)
            for query in (-1, 2):
                weights = record.row_weights(row, layer, 1, query)
                torch.testing.assert_close(weights, want[1, query], atol=2e-5, rtol=1e-4)


def test_a_routed_layer_records_its_kept_tokens(world):
    model, batches = world["showo-tiny"]
    batch = batches.held_out("validation", 3)
    apply_mod(model, last_half(8, 0.3))
    try:
        with record_routing() as log:
            record = capture_batch(model, batch)
    finally:
        remove_mod(model)
    for layer, routing in log.items():
        assert torch.equal(places(record.whole, record.batch(layer)), routing.index)
        assert record.batch(layer).lengths == batch.take(routing.index, routing.segments).lengths
        one = record.map(1, layer, 0)
        assert len(one) < batch.lengths[1]
        torch.testing.assert_close(one.sum(1), torch.ones(len(one)))
    assert record.batch(0).lengths == batch.lengths == record.whole.lengths


def test_what_a_record_does_not_hold_is_named(world):
    model, batches = world["emu3-tiny"]
    with capture(model) as record:
        pass
    for method in (lambda: record.map(0, 0, 0), lambda: record.layers, lambda: record.rows(Task.MMU)):
        with pytest.raises(CaptureError, match="No layer was captured"):
            method()
    record = capture_batch(model, batches.single_task(Task.MMU, "validation", 2))
    wrong = {(0, 8, 0): "holds layers 0, 1", (2, 0, 0): "row 2 .* 0 to 1", (0, 0, 4): "head 4 .* 0 to 3",
             (-1, 0, 0): "row -1"}
    for arguments, message in wrong.items():
        with pytest.raises(CaptureError, match=message):
            record.map(*arguments)
    with pytest.raises(CaptureError, match="query"):
        record.row_weights(0, 0, 0, 10_000)
    with pytest.raises(CaptureError, match="no t2i row; its batch holds mmu"):
        record.rows(Task.T2I)
    with pytest.raises(CaptureError, match="Linear: for a transformers model use capture_stock"):
        capture_batch(torch.nn.Linear(2, 2), record.whole)


def test_the_last_forward_counts(world):
    model, batches = world["showo-tiny"]
    with torch.no_grad(), capture(model) as record:
        model(batches.single_task(Task.MMU, "validation", 4))
        with without(model, 3):
            model(batches.single_task(Task.T2I, "validation", 2))
    assert len(record.whole.lengths) == 2 and record.layers == (0, 1, 2, 4, 5, 6, 7)


def test_blocks_may_be_nested_and_other_models_run_inside(world):
    (model, batches), (other, others) = world["showo-tiny"], world["emu3-tiny"]
    batch, foreign = (b.single_task(Task.MMU, "validation", n) for b, n in ((batches, 2), (others, 1)))
    with torch.no_grad(), capture(model) as outer, capture(other) as beside:
        other(foreign)
        with capture(model) as inner:
            model(batch)
    want = capture_batch(model, batch)
    for record in (outer, inner):
        assert record.layers == want.layers
        assert all(torch.equal(record.layer(i).q, want.layer(i).q) for i in want.layers)
    assert beside.whole is foreign
    assert torch.equal(beside.map(0, 7, 3), capture_batch(other, foreign).map(0, 7, 3))


def test_what_the_model_does_on_another_thread_is_not_recorded(world):
    """A widget captures with the model while a cell uses it."""
    model, batches = world["showo-tiny"]
    batch, row = batches.single_task(Task.MMU, "validation", 2), question(model, batches)
    with torch.no_grad(), capture(model) as record, ThreadPoolExecutor(1) as other:
        model(batch)
        first, second = (other.submit(answer, model, [row]).result() for _ in range(2))     # cached steps, not refused
        assert first == second
        their_batch = batches.single_task(Task.T2I, "validation", 1)
        assert other.submit(capture_batch, model, their_batch).result().layers == record.layers
    assert record.whole is batch and torch.equal(record.map(1, 7, 3), capture_batch(model, batch).map(1, 7, 3))


def test_a_step_after_cached_tokens_is_refused(world):
    model, batches = world["showo-tiny"]
    message = "after cached ones cannot be recorded: run the whole sequence at once"
    with pytest.raises(CaptureError, match=message), capture(model):
        answer(model, [question(model, batches)])


def test_tiles_and_received_weights_are_those_of_the_maps(world, monkeypatch):
    monkeypatch.setattr("unimod.ops.attention.ENTRIES", 4 * 90 * 7)        # several blocks
    model, batches = world["showo-tiny"]
    record = capture_batch(model, batches.held_out("validation", 2))
    whole = record.map(2, 3)
    n = whole.shape[-1]
    torch.testing.assert_close(record.tile(2, 3, bins=n), whole)
    small = record.tile(2, 3, queries=slice(5, 25), keys=slice(-30, None), bins=10)
    want = whole[:, 5:25, n - 30:].unflatten(1, (10, 2)).mean(2).unflatten(2, (10, 3)).sum(3)
    torch.testing.assert_close(small, want)
    torch.testing.assert_close(record.tile(2, 3).sum(-1), torch.ones(4, 32))
    torch.testing.assert_close(record.tile(2, 3, bins=7, head=1), record.tile(2, 3, bins=7)[1:2])
    layer, span = record.layer(3), record.span(2, 3)
    asked = layer.batch.modality[span] == Modality.TEXT
    torch.testing.assert_close(layer.received(span, asked), whole[:, asked].mean(1))
    assert layer.received(span, torch.zeros(n, dtype=torch.bool)).isnan().all()
    with pytest.raises(CaptureError, match="none of the"):
        record.tile(2, 3, queries=slice(500, 600))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_saved_record_is_the_same_record(world, tmp_path, dtype):
    model, batches = world["showo-tiny"]
    model = copy.deepcopy(model).to(dtype)
    apply_mod(model, last_half(8, 0.3))
    record = capture_batch(model, batches.held_out("validation", 2))
    again = AttentionRecord.load(record.save(tmp_path / "all"))
    assert again.layers == record.layers and again.about == {"model": "showo"}
    assert again.whole.tasks == record.whole.tasks and again.whole.mask.kinds == record.whole.mask.kinds
    for number in record.layers:
        mine, loaded = record.layer(number), again.layer(number)
        assert loaded.q.dtype == dtype and torch.equal(loaded.q, mine.q) and torch.equal(loaded.k, mine.k)
        assert torch.equal(again.map(1, number, 2), record.map(1, number, 2))
        kept = [places(found.whole, found.batch(number)) for found in (record, again)]
        assert torch.equal(*kept) and loaded.batch.lengths == mine.batch.lengths
    some = AttentionRecord.load(record.save(tmp_path / "some", layers=(6,)))
    with pytest.raises(CaptureError, match="layer 0 was not captured; this record holds layers 6"):
        some.map(0, 0, 0)


def test_a_folder_that_is_no_record_is_named(world, tmp_path):
    model, batches = world["emu3-tiny"]
    with pytest.raises(CaptureError, match="holds no attention record: attention.safetensors missing"):
        AttentionRecord.load(tmp_path / "nowhere")
    folder = capture_batch(model, batches.single_task(Task.MMU, "validation", 1)).save(tmp_path / "r")
    file = folder / "attention.safetensors"
    whole = file.read_bytes()
    damages = (b"", b"not a file of tensors", whole[: len(whole) // 2], whole.replace(b"segments", b"segmente"))
    for damage in damages:
        file.write_bytes(damage)
        with pytest.raises(CaptureError, match="cannot be read as an attention record"):
            AttentionRecord.load(folder)
    file.rename(folder / "attention.npz")
    with pytest.raises(CaptureError, match="of an earlier version .attention.npz.* write it with AttentionRecord.save"):
        AttentionRecord.load(folder)


def test_former_names_work_with_a_notice():
    for name, now in {"observe": capture_batch, "reduced": capture_summary}.items():
        with pytest.warns(FutureWarning, match=f"unimod.capture.{name} is now {now.__name__}"):
            assert getattr(unimod.capture, name) is now
    assert not hasattr(unimod.capture, "look")


def test_a_summary_is_made_of_what_a_record_holds(world):
    model, batches = world["emu3-tiny"]
    batch = batches.held_out("validation", 2)
    record = capture_batch(model, batch)
    found = capture_summary(model, batch, lambda layer: layer.k.sum())
    assert found == {i: record.layer(i).k.sum() for i in record.layers}


def test_maps_of_half_precision_are_those_of_kernels_that_sum_in_float32(world):
    model, batches = world["showo-tiny"]
    record = capture_batch(copy.deepcopy(model).bfloat16(), batches.single_task(Task.T2I, "validation", 2))
    for number in (0, 5):
        layer, span = record.layer(number), record.span(1, number)
        q, k = (x[:, span].double() for x in (layer.q, layer.k))
        visible = torch.arange(len(q[0])) < (layer.batch.mask.hi[span] - span.start)[:, None]
        want = (q @ k.mT * layer.scale).masked_fill(~visible, -torch.inf).softmax(-1)
        torch.testing.assert_close(record.map(1, number).double(), want, atol=1e-6, rtol=1e-5)
        mass = layer.mass(layer.batch.modality, 3)[0][:, span, Modality.IMAGE].double()
        images = layer.batch.modality[span] == Modality.IMAGE
        torch.testing.assert_close(mass, want[..., images].sum(-1), atol=1e-6, rtol=1e-5)
