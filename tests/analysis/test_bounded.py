"""No map of a long row is held: the largest tensor of a capture does not grow with the square of the row."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unimod.analysis.attention import STATISTICS, capture_overview, capture_patterns, overview, patterns
from unimod.batch import Modality, pack
from unimod.capture import capture_batch, capture_summary
from unimod.ops import attention
from unimod.presets import materialise, preset

ENTRIES = 2**17


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operator returned."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.entries = max(self.entries, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0)
        return out


def long_row(name, side, layers=2):
    """A tiny model with random weights, grouped heads for Emu3, and a row of about side x side tokens."""
    model, _ = preset(name)
    model.decoder.layers = model.decoder.layers[:layers]
    model = materialise(model, "cpu", torch.float32).eval()
    part = model.layout.resized((side, side))
    codes = torch.zeros(part.image_tokens, dtype=torch.long)
    return model, pack([part.mmu(codes, [("x" * 4, "x" * 4)])]), part


def largest(function):
    with torch.no_grad(), Largest() as seen:
        function()
    return seen.entries


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "ENTRIES", ENTRIES)


WAYS = {
    "patterns": lambda model, batch: capture_patterns(model, [batch], batch.tasks[0]),
    "overview": lambda model, batch: capture_overview(model, batch),
    "mass": lambda model, batch: capture_summary(model, batch, lambda a: a.mass(a.batch.modality, 3)),
    "tile": lambda model, batch: capture_summary(model, batch, lambda a: a.tile(a.batch.rows()[0])),
    "received": lambda model, batch: capture_summary(
        model, batch, lambda a: a.received(a.batch.rows()[0], a.batch.modality == Modality.TEXT)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ("showo-tiny", "emu3-tiny"))
def test_a_capture_makes_nothing_larger_than_the_forward_or_a_block(name, way):
    model, batch, _ = long_row(name, 44)
    n, heads = len(batch), model.decoder.config.num_attention_heads
    forward = largest(lambda: model(batch))                    # with Show-o's mask, bool [n, n]
    assert n > 1900
    assert largest(lambda: WAYS[way](model, batch)) <= max(forward, ENTRIES, heads * n * 64) < n * n * heads / 2


@pytest.mark.parametrize("way", WAYS)
def test_the_largest_tensor_of_a_reducer_grows_with_the_row_and_not_with_its_square(way):
    sizes = []
    for side in (31, 44):                                       # twice as many tokens
        model, batch, _ = long_row("emu3-tiny", side)
        sizes.append((len(batch), largest(lambda model=model, batch=batch: WAYS[way](model, batch))))
    (short, small), (long, big) = sizes
    assert 1.9 < long / short < 2.1 and big <= 1.1 * small * long / short


def test_small_blocks_say_the_same(monkeypatch):
    model, batch, part = long_row("emu3-tiny", 12)
    found, seen = capture_batch(model, batch), []
    for entries in (ENTRIES // 64, 2**23):
        monkeypatch.setattr(attention, "ENTRIES", entries)
        pooled = overview(found, 0, str, part.grid)
        statistics = patterns(found, batch.tasks[0])
        seen.append([pooled.maps, pooled.received, *(getattr(statistics, name) for name in STATISTICS)])
    for one, other in zip(*seen):
        torch.testing.assert_close(one, other, equal_nan=True, atol=1e-3, rtol=1e-3)


def test_a_full_map_would_be_noticed():
    model, batch, _ = long_row("emu3-tiny", 44)
    n = len(batch)
    assert largest(lambda: capture_summary(model, batch, lambda a: a.weights(slice(0, n)).mean())) == 4 * n * n
