"""An overview holds the record's own numbers, pooled; it survives a disk and names what is wrong with a folder."""

import dataclasses

import numpy as np
import pytest
import torch

from unimod.analysis.attention import STATISTICS, Overview, capture_overview, overview, patterns
from unimod.attention_record import edges
from unimod.batch import Modality, Task, TokenSequence, pack
from unimod.capture import AttentionRecord, CaptureError, capture_batch
from unimod.layers import apply_mod, remove_mod
from unimod.plan import CapacityPlan


@pytest.fixture(scope="module", params=["showo-tiny", "emu3-tiny"])
def captured(request, world):
    """A record of a model routed in layer 6, the overview of its second row, and the layout."""
    model, batches = world[request.param]
    batch = batches.single_task(Task.MMU, "validation", 2)
    apply_mod(model, CapacityPlan({"mmu": [1.0] * 6 + [0.4, 1.0]}))
    try:
        picture = batches.samples("validation", 1, 1, seed=0)[0].image
        yield capture_batch(model, batch), capture_overview(model, batch, 1, picture), model.layout
    finally:
        remove_mod(model)


def test_it_holds_the_numbers_of_the_record(captured):
    record, found, layout = captured
    again = overview(record, 1, layout.token, layout.grid)
    assert torch.equal(found.maps, again.maps) and torch.equal(found.kept, again.kept) and found.tokens == again.tokens
    close = {"atol": 1e-3, "rtol": 1e-3}                        # an overview is float16
    for layer in (0, 6):
        span = record.span(1, layer)
        kept, modality = found.kept[layer], record.batch(layer).modality[span]
        assert kept.sum() == span.stop - span.start and (layer == 6 or kept.all())
        text = record.map(1, layer)[:, modality == Modality.TEXT].mean(1)
        mean = found.attention_from(layer, None, Modality.TEXT)
        torch.testing.assert_close(found.attention_from(layer, 2, Modality.TEXT)[kept], text[2], **close)
        torch.testing.assert_close(mean[kept], text.mean(0), **close)
        assert mean[~kept].isnan().all()
        mass = patterns(record, Task.MMU).mass[layer, 1, 1]
        torch.testing.assert_close(found.modality_mass(layer, 1), mass, equal_nan=True)
        one = found.attention_from(layer, 1, int(kept.nonzero()[20]))[kept]
        assert one.sum().item() == pytest.approx(1, abs=1e-2)
        bins = edges(int(kept.sum()))
        own = next(i for i in range(len(bins)) if bins[i] <= 20 < bins[i + 1])
        sums = torch.stack([one[a:b].sum() for a, b in zip(bins, bins[1:])])
        torch.testing.assert_close(sums, record.tile(1, layer, head=1)[0, own].cpu(), atol=1e-3, rtol=1e-2)
    dropped = (~found.kept[6]).nonzero()
    assert len(dropped) and found.attention_from(6, 0, int(dropped[0])).isnan().all()
    assert found.on_picture(found.kept[0]).shape == (6, 6)


def test_it_survives_a_disk(captured, tmp_path):
    record, found, _ = captured
    again = Overview.load(found.save(tmp_path / "row"))
    assert sum(f.stat().st_size for f in (tmp_path / "row").iterdir()) < 200_000
    for field in dataclasses.fields(Overview):
        mine, loaded = getattr(found, field.name), getattr(again, field.name)
        if field.name == "patterns":
            for name in STATISTICS:
                torch.testing.assert_close(getattr(mine, name), getattr(loaded, name), equal_nan=True, rtol=0, atol=0)
        elif isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, loaded, equal_nan=True, rtol=0, atol=0)
        elif isinstance(mine, np.ndarray):
            assert np.array_equal(mine, loaded)
        else:
            assert mine == loaded, field.name
    record.save(tmp_path / "row")                               # a record and its overview may share a folder
    assert torch.equal(Overview.load(tmp_path / "row").maps, found.maps)
    assert AttentionRecord.load(tmp_path / "row").whole.lengths == record.whole.lengths


@pytest.mark.parametrize(("images", "grid"), [(9, (3, 3)), (5, (1, 5)), (0, (0, 0)), (36, (4, 9))])
def test_the_grid_is_that_of_the_rows_own_image_tokens(world, images, grid):
    """A vision tower gives its own number of features, a row of text has none."""
    model, _ = world["showo-tiny"]
    ids = torch.arange(images + 2)
    modality = torch.tensor([Modality.TEXT] + [Modality.IMAGE] * images + [Modality.TEXT])
    row = TokenSequence(Task.LM, ids, ids, modality, ids + 1, torch.full_like(ids, -100), ((len(ids), "topk"),))
    found = overview(capture_batch(model, pack([row])), 0, model.layout.token, (4, 9))
    assert found.grid == grid and found.on_picture(found.kept[0]).shape == grid


def test_what_is_not_there_is_named(captured, tmp_path):
    _, found, _ = captured
    wrong = {(8, 0, 0): "layer 8 was not captured", (0, 4, 0): "head 4 .* 0 to 3", (0, 0, 10_000): "token 10000"}
    for arguments, message in wrong.items():
        with pytest.raises(CaptureError, match=message):
            found.attention_from(*arguments)
    with pytest.raises(CaptureError, match=r"holds no overview of attention: overview.safetensors missing"):
        Overview.load(tmp_path)
    file = found.save(tmp_path / "row") / "overview.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CaptureError, match="cannot be read as an overview"):
        Overview.load(tmp_path / "row")
    (tmp_path / "former").mkdir()
    (tmp_path / "former" / "maps.npz").touch()
    with pytest.raises(CaptureError, match=r"of an earlier version \(maps.npz\).* write it with Overview.save"):
        Overview.load(tmp_path / "former")
