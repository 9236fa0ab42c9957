"""An overview is the record's own numbers, pooled; it survives a disk and names what is wrong with one."""

import dataclasses

import numpy as np
import pytest
import torch

from unimod.analysis.attention import Overview, capture_overview, overview, patterns
from unimod.attention_record import edges
from unimod.batch import Modality, Task, TokenSequence, pack
from unimod.capture import AttentionRecord, CaptureError, capture_batch
from unimod.layers import apply_mod, remove_mod
from unimod.plan import CapacityPlan


@pytest.fixture(scope="module", params=["showo-tiny", "emu3-tiny"])
def seen(request, world):
    """A record of a model routed in layer 6, and the overview of its second row."""
    model, batches = world[request.param]
    packed = batches.single_task(Task.MMU, "validation", 2)
    apply_mod(model, CapacityPlan({"mmu": [1.0] * 6 + [0.4, 1.0]}))
    try:
        picture = batches.samples("validation", 1, 1, seed=0)[0].image
        yield capture_batch(model, packed), capture_overview(model, packed, 1, picture), model.layout
    finally:
        remove_mod(model)


def test_it_is_what_the_record_says(seen):
    record, found, layout = seen
    again = overview(record, 1, layout.token, layout.grid)
    assert torch.equal(found.maps, again.maps) and torch.equal(found.kept, again.kept) and found.tokens == again.tokens
    for layer in (0, 6):
        span = record.span(1, layer)
        kept, modality = found.kept[layer], record.batch(layer).modality[span]
        assert kept.sum() == span.stop - span.start == (len(kept) if layer == 0 else kept.sum())
        text = record.map(1, layer)[:, modality == Modality.TEXT].mean(1)
        torch.testing.assert_close(found.attention_from(layer, 2, Modality.TEXT)[kept], text[2], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.attention_from(layer, None, Modality.TEXT)[kept], text.mean(0), atol=1e-3, rtol=1e-3)
        assert found.attention_from(layer, None, Modality.TEXT)[~kept].isnan().all()
        torch.testing.assert_close(found.modality_mass(layer, 1), patterns(record, Task.MMU).mass[layer, 1, 1], equal_nan=True)
        asked = int(kept.nonzero()[20])
        one = found.attention_from(layer, 1, asked)
        assert one[kept].sum().item() == pytest.approx(1, abs=1e-2)
        bins = edges(int(kept.sum()))
        mine = next(i for i in range(len(bins)) if bins[i] <= 20 < bins[i + 1])
        sums = torch.stack([one[kept][a:b].sum() for a, b in zip(bins, bins[1:])])
        torch.testing.assert_close(sums, record.tile(1, layer, head=1)[0, mine].cpu(), atol=1e-3, rtol=1e-2)
    assert not found.kept[6].all() and found.attention_from(6, 0, int((~found.kept[6]).nonzero()[0])).isnan().all()
    assert found.on_picture(found.kept[0]).shape == (6, 6)


def test_it_survives_a_disk(seen, tmp_path):
    _, found, _ = seen
    again = Overview.load(found.save(tmp_path / "row"))
    for field in dataclasses.fields(Overview):
        mine, theirs = getattr(found, field.name), getattr(again, field.name)
        if field.name == "patterns":
            for part in ("mass", "received", "even", "entropy", "evenness", "sink", "distance"):
                torch.testing.assert_close(getattr(mine, part), getattr(theirs, part), equal_nan=True)
        elif isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=0, atol=0)
        elif isinstance(mine, np.ndarray):
            assert np.array_equal(mine, theirs)
        else:
            assert mine == theirs, field.name
    assert sum(f.stat().st_size for f in (tmp_path / "row").iterdir()) < 200_000


def test_a_record_and_its_overview_may_share_a_folder(seen, tmp_path):
    record, found, _ = seen
    record.save(found.save(tmp_path / "row"))
    assert torch.equal(Overview.load(tmp_path / "row").maps, found.maps) and AttentionRecord.load(tmp_path / "row").whole.lengths == record.whole.lengths


@pytest.mark.parametrize(("pictures", "grid"), [(9, (3, 3)), (5, (1, 5)), (0, (0, 0)), (36, (4, 9))])
def test_the_grid_is_that_of_the_rows_own_picture_tokens(world, pictures, grid):
    """A vision tower's features are as many as it gives, a row of text has none."""
    model, _ = world["showo-tiny"]
    ids = torch.arange(pictures + 2)
    modality = torch.tensor([Modality.TEXT] + [Modality.IMAGE] * pictures + [Modality.TEXT])
    row = TokenSequence(Task.LM, ids, ids, modality, ids + 1, torch.full_like(ids, -100), ((len(ids), "topk"),))
    found = overview(capture_batch(model, pack([row])), 0, model.layout.token, (4, 9))
    assert found.grid == grid and found.on_picture(found.kept[0]).shape == grid


def test_what_is_not_there_is_named(seen, tmp_path):
    _, found, _ = seen
    for arguments, message in {(8, 0, 0): "layer 8 was not captured", (0, 4, 0): "head 4 .* 0 to 3", (0, 0, 10_000): "token 10000"}.items():
        with pytest.raises(CaptureError, match=message):
            found.attention_from(*arguments)
    with pytest.raises(CaptureError, match=r"holds no overview of attention: overview.safetensors missing"):
        Overview.load(tmp_path)
    folder = found.save(tmp_path / "row")
    (folder / "overview.safetensors").write_bytes((folder / "overview.safetensors").read_bytes()[:500])
    with pytest.raises(CaptureError, match="cannot be read as an overview"):
        Overview.load(folder)
    (tmp_path / "former").mkdir()
    (tmp_path / "former" / "maps.npz").touch()
    with pytest.raises(CaptureError, match=r"of an earlier version \(maps.npz\).* write it with Overview.save"):
        Overview.load(tmp_path / "former")
