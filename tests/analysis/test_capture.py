"""A capture changes nothing, and its maps are the ones that dense attention makes."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import unimod.capture
from unimod.batch import Modality, Task
from unimod.capture import AttentionRecord, CaptureError, capture, capture_batch, capture_summary
from unimod.generate import answer
from unimod.layers import apply_mod, record_routing, remove_mod
from unimod.models.unified import without
from unimod.plan import last_half

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
    record = capture_batch(model, packed)
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
            record = capture_batch(model, packed)
    finally:
        remove_mod(model)
    for layer, routing in log.items():
        assert torch.equal(record.index(layer), routing.index)
        assert record.batch(layer).lengths == packed.take(routing.index, routing.segments).lengths
        one = record.map(1, layer, 0)
        assert len(one) < packed.lengths[1]
        torch.testing.assert_close(one.sum(1), torch.ones(len(one)))
    assert record.batch(0).lengths == packed.lengths == record.whole.lengths


def test_it_names_what_it_does_not_hold(world):
    model, batches = world["emu3-tiny"]
    with capture(model) as record:
        pass
    with pytest.raises(CaptureError, match="No layer was captured"):
        record.map(0, 0, 0)
    record = capture_batch(model, batches.single_task(Task.MMU, "validation", 2))
    wrong = {(0, 8, 0): "holds layers 0, 1", (2, 0, 0): "row 2 .* 0 to 1", (0, 0, 4): "head 4 .* 0 to 3", (-1, 0, 0): "row -1"}
    for arguments, message in wrong.items():
        with pytest.raises(CaptureError, match=message):
            record.map(*arguments)
    with pytest.raises(CaptureError, match="query"):
        record.row_weights(0, 0, 0, 10_000)
    with pytest.raises(CaptureError, match="no t2i row; its batch holds mmu"):
        record.rows(Task.T2I)


def test_the_last_forward_counts(world):
    model, batches = world["showo-tiny"]
    with torch.no_grad(), capture(model) as record:
        model(batches.single_task(Task.MMU, "validation", 4))
        with without(model, 3):
            model(batches.single_task(Task.T2I, "validation", 2))
    assert len(record.whole.lengths) == 2 and record.layers == (0, 1, 2, 4, 5, 6, 7)


def test_blocks_may_be_nested_and_other_models_run_inside(world):
    (model, batches), (other, theirs) = world["showo-tiny"], world["emu3-tiny"]
    packed, foreign = batches.single_task(Task.MMU, "validation", 2), theirs.single_task(Task.MMU, "validation", 1)
    with torch.no_grad(), capture(model) as outer, capture(other) as beside:
        other(foreign)
        with capture(model) as inner:
            model(packed=packed)
    want = capture_batch(model, packed)
    for record in (outer, inner):
        assert record.layers == want.layers and all(torch.equal(record.layer(i).q, want.layer(i).q) for i in want.layers)
    assert beside.whole is foreign and torch.equal(beside.map(0, 7, 3), capture_batch(other, foreign).map(0, 7, 3))


def test_what_the_model_does_on_another_thread_is_not_recorded(world):
    """A widget looks at the model while a cell uses it."""
    model, batches = world["showo-tiny"]
    packed = batches.single_task(Task.MMU, "validation", 2)
    row = model.layout.mmu(batches.codes(batches.samples("test", 0, 1))[0], [("what is it?", "")], open_ended=True)
    with torch.no_grad(), capture(model) as record, ThreadPoolExecutor(1) as other:
        model(packed)
        assert other.submit(answer, model, [row]).result() == other.submit(answer, model, [row]).result()      # steps after cached tokens, not refused
        assert other.submit(capture_batch, model, batches.single_task(Task.T2I, "validation", 1)).result().layers == record.layers
    assert record.whole is packed and torch.equal(record.map(1, 7, 3), capture_batch(model, packed).map(1, 7, 3))


def test_a_step_after_cached_tokens_is_refused(world):
    model, batches = world["showo-tiny"]
    row = model.layout.mmu(batches.codes(batches.samples("test", 0, 1))[0], [("what is it?", "")], open_ended=True)
    with pytest.raises(CaptureError, match="after cached ones cannot be recorded: run the whole sequence at once"), capture(model):
        answer(model, [row])


def test_a_tile_and_what_is_received_are_the_maps_own(world, monkeypatch):
    monkeypatch.setattr("unimod.attention_record.ENTRIES", 4 * 90 * 7)        # several blocks
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
    asked = record.batch(3).modality[record.span(2, 3)] == Modality.TEXT
    layer, span = record.layer(3), record.span(2, 3)
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
    assert again.layers == record.layers and again.about == {"model": "showo"} and again.whole.tasks == record.whole.tasks
    for layer in record.layers:
        assert again.layer(layer).q.dtype == dtype and torch.equal(again.map(1, layer, 2), record.map(1, layer, 2))
        assert torch.equal(again.index(layer), record.index(layer)) and again.batch(layer).lengths == record.batch(layer).lengths
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
    for damage in (b"", b"not a file of tensors", whole[: len(whole) // 2], whole.replace(b"segments", b"segmente")):
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
    with pytest.raises(AttributeError, match="no attribute 'look'"):
        unimod.capture.look  # noqa: B018


def test_a_reducer_sees_what_a_record_holds(world):
    model, batches = world["emu3-tiny"]
    packed = batches.held_out("validation", 2)
    record = capture_batch(model, packed)
    found = capture_summary(model, packed, lambda layer: layer.k.sum())
    assert found == {i: record.layer(i).k.sum() for i in record.layers}
    with pytest.raises(CaptureError, match="Linear: for a transformers model use capture_stock"), capture(torch.nn.Linear(2, 2)):
        pass


def test_maps_of_half_precision_are_those_of_kernels_that_sum_in_float32(world):
    model, batches = world["showo-tiny"]
    record = capture_batch(copy.deepcopy(model).bfloat16(), batches.single_task(Task.T2I, "validation", 2))
    for layer in (0, 5):
        attention, span = record.layer(layer), record.span(1, layer)
        q, k = (x[:, span].double() for x in (attention.q, attention.k))
        seen = (torch.arange(len(q[0])) < (attention.batch.hi[span] - span.start)[:, None])
        want = (q @ k.mT * attention.scale).masked_fill(~seen, -torch.inf).softmax(-1)
        torch.testing.assert_close(record.map(1, layer).double(), want, atol=1e-6, rtol=1e-5)
        mass, _, _ = attention.mass(attention.batch.modality, 3)
        pictures = attention.batch.modality[span] == Modality.IMAGE
        torch.testing.assert_close(mass[:, span, Modality.IMAGE].double(), want[..., pictures].sum(-1), atol=1e-6, rtol=1e-5)
