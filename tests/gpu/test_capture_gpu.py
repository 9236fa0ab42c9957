"""Captures on a GPU: the kernels' statistics, maps, tiles and overviews are those of the CPU."""

import pytest
import torch

from unimod.analysis.attention import capture_overview, capture_patterns, overview, patterns
from unimod.attention_record import places
from unimod.batch import Modality, Task
from unimod.capture import capture_batch, capture_summary
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.layers import apply_mod
from unimod.models.checkpoint import from_pretrained, shipped
from unimod.plan import last_half

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=[False, True], ids=["dense", "routed"])
def both(request):
    """The same model and batch on the CPU and on the GPU."""
    model, tokenizer = from_pretrained(shipped("emu3-tiny"))
    batches = Batches(open_data("scenes"), tokenizer, model.layout)
    if request.param:
        torch.manual_seed(0)
        apply_mod(model, last_half(8, 0.2))
    batch = batches.single_task(Task.MMU, "validation", 3)
    record = capture_batch(model, batch)
    return record, capture_batch(model.to("cuda"), batch), model, batch


def test_maps_tiles_and_patterns(both):
    here, there, model, batch = both
    for layer in (0, 5):
        if not torch.equal(*(places(r.whole, r.batch(layer)).cpu() for r in both[:2])):
            continue                                            # a tie at a router's edge may fall otherwise
        torch.testing.assert_close(there.map(1, layer).cpu(), here.map(1, layer), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(there.tile(1, layer).cpu(), here.tile(1, layer), atol=1e-4, rtol=1e-3)
        asked = here.batch(layer).modality[here.span(1, layer)] == Modality.TEXT
        mine, theirs = (record.layer(layer).received(record.span(1, layer), asked) for record in (here, there))
        torch.testing.assert_close(theirs.cpu(), mine, atol=1e-4, rtol=1e-3)
    mine, theirs = patterns(here, Task.MMU), capture_patterns(model, [batch], Task.MMU)
    torch.testing.assert_close(theirs.received[0], mine.received[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(theirs.entropy[0], mine.entropy[0], atol=1e-3, rtol=1e-3)


def test_an_overview_is_made_where_the_model_is_and_lies_on_the_cpu(both):
    here, there, model, batch = both
    a, b = overview(here, 1, model.layout.token, model.layout.grid), capture_overview(model, batch, 1)
    assert b.maps.device.type == b.received.device.type == b.kept.device.type == b.patterns.mass.device.type == "cpu"
    torch.testing.assert_close(a.maps[0], b.maps[0], atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(a.received[0], b.received[0], atol=1e-3, rtol=1e-2, equal_nan=True)
    assert len(capture_summary(model, batch, lambda layer: layer.q.device.type)) == 8 and there.layer(0).q.is_cuda
