"""The explorer's figures: right numbers, one scale, light at released sizes, and a reason for every blank panel."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from unimod.analysis.attention import Overview, Patterns
from unimod.batch import Modality, Task
from unimod.gallery import OWN, Side
from unimod.views import panels, style
from unimod.views.explore import notes
from unimod.views.panels import VIEWS, Selection
from unimod.workbook.run_folder import drawable


def made(task=Task.MMU, L=8, H=4, grid=(6, 6), words=20, skip=()):
    """A side of random attention: a mark, the picture, then words; layers in `skip` drop every second token."""
    g = torch.Generator().manual_seed(L + H + words)
    n = 1 + grid[0] * grid[1] + words
    modality = torch.full((n,), int(Modality.TEXT))
    modality[0], modality[1: 1 + grid[0] * grid[1]] = Modality.SPECIAL, Modality.IMAGE
    kept = torch.ones(L, n, dtype=torch.bool)
    kept[list(skip), ::2] = False
    received = torch.rand(L, H, 3, n, generator=g).softmax(-1).masked_fill(~kept[:, None, None], torch.nan)
    one = torch.rand(L, 1, H, generator=g)
    patterns = Patterns(task, tuple(range(L)), torch.rand(L, 1, H, 3, 3, generator=g).softmax(-1),
                        torch.rand(L, 1, H, 3, generator=g).softmax(-1), torch.ones(L, 1, 3) / 3, one, one, one, one)
    picture = np.random.default_rng(0).integers(0, 255, (grid[0] * 8, grid[1] * 8, 3), dtype=np.uint8)
    tokens = ("<|mmu|>", *(f"code {i}" for i in range(grid[0] * grid[1])), *(f"word{i}" for i in range(words)))
    maps = torch.rand(L, H, 32, 32, generator=g).softmax(-1).half()
    return Side(task.name.lower(), Overview({}, task, tokens, modality, grid, picture, tuple(range(L)), kept, maps,
                                            received.half(), patterns))


BIG = [made(task, L=24, H=32, grid=(32, 32), words=130) for task in (Task.T2I, Task.MMU)]


@pytest.mark.parametrize("view", VIEWS, ids=lambda d: d.name)
@pytest.mark.parametrize("count", (1, 2))
def test_figures_draw_and_stay_light(view, count):
    small = [made(Task.T2I), made(skip=(5, 6))][:count]
    fig = view.frames(small, Selection(3, 1, 4))
    assert drawable(json.loads(fig.to_json())) and fig.layout.sliders[0].active == 3 and len(fig.frames) == 8
    if view.name == "heads":
        assert not view.frames(small, Selection(3)).frames, "without a head to mark, layers change nothing"
    assert fig.layout.updatemenus[0].buttons[0].label == "▶"
    assert fig.layout.font.color == style.INK and view.caption and view.alt
    big = view.frames(BIG[:count], Selection(3, 1)) if count == 2 else fig
    shown = big.layout.sliders[0]
    assert len(big.to_json()) < 300_000 and len(big.frames) >= 8 and shown.steps[shown.active].label == "3"


def test_the_picture_shows_the_numbers_and_their_difference():
    a, b = made(Task.T2I), made(skip=(5,))
    data, layout = panels.picture.fill([a, b], Selection(5, 2))
    mine = a.overview.received[5, 2, Modality.IMAGE, 1:37].view(6, 6)
    theirs = b.overview.received[5, 2, Modality.TEXT, 1:37].view(6, 6)
    assert np.allclose(data[0]["z"], mine, atol=1e-5) and np.allclose(data[3]["z"], theirs, atol=1e-5, equal_nan=True)
    assert np.allclose(data[6]["z"], mine.float() - theirs.float(), atol=1e-4, equal_nan=True)
    assert data[4]["z"].sum() == 18 and data[1]["z"].sum() == 0, "the veil lies on what the layer skips"
    top = max(float(mine.max()), float(theirs.nan_to_num().max()))
    assert layout["coloraxis"] == {"cmin": 0.0, "cmax": pytest.approx(top)}
    assert layout["coloraxis2"]["cmin"] == -layout["coloraxis2"]["cmax"]


def test_one_token_is_marked_and_found_on_the_other_side():
    a, b = made(Task.T2I), made(words=30)
    assert b.query_from(a, 9) == 9 and b.query_from(a, 40) == 40, "the same cell; the same word at the same place"
    data, _ = panels.picture.fill([a, b], Selection(0, None, 9))
    assert data[2]["x"] == [2] and data[2]["y"] == [1] and (data[5]["x"], data[5]["y"]) == ([2], [1])
    assert made(grid=(3, 3), words=60).query_from(a, 40) is None and made(grid=(3, 3)).query_from(a, 9) is None
    text, _ = panels.text.fill([a, b], Selection(0, None, 40))
    assert (text[1]["x"], text[1]["y"]) == ([4], [0]), "the mark and words 0 to 2 lie before it"


def test_every_blank_panel_has_its_reason():
    a, small = made(Task.T2I), made(L=4, H=2, grid=(3, 3))
    assert "has layers 0 to 3 and 2 heads: nothing to show at layer 6" in notes([a, small], Selection(6))[1]
    assert "nothing to show at layer 1, head 3" in notes([a, small], Selection(1, 3))[1]
    assert "has no token that corresponds to 'code 8'" in notes([a, small], Selection(1, 0, 9))[1].replace('"', "'")
    data, _ = panels.picture.fill([a, small], Selection(1))
    assert np.isnan(data[6]["z"]).all(), "pictures of two sizes have no difference"
    skipping = made(skip=(2,))
    assert "the router skips this token here" in notes([skipping], Selection(2, 0, 4))[0]
    assert "28 of 57 tokens go through" in notes([skipping], Selection(2))[0]
    for view in VIEWS:
        assert len(view.figure([a, small], Selection(6)).data) == len(view.fill([a, small], Selection(6))[0])


def test_a_row_without_a_picture_has_blank_panels_and_some_layers_are_named():
    a, b = made(Task.T2I), made(Task.LM, grid=(0, 0))
    some = replace(b, overview=replace(b.overview, layers=(0, 1, 2, 3, 4, 5, 6, 9)))
    assert "a sequence without a picture" in notes([a, b], Selection(3))[1]
    assert "has layers 0, 1, 2, 3, 4, 5, 6, 9 and 4 heads" in notes([a, some], Selection(8))[1]
    for view in VIEWS:
        for sides in ([a, b], [b, a], [b]):
            assert drawable(json.loads(view.frames(sides, Selection(3, 1)).to_json()))
    assert b.query_from(a, 9) is None


def test_names_of_tokens_are_no_markup():
    a = made()
    named = replace(a, model="saved: <b>",
                    overview=replace(a.overview, tokens=("<s>", *a.overview.tokens[1:-1], "<i>long one</i>")))
    text, sequence = (view.figure([named], Selection(0)) for view in (panels.text, panels.sequence))
    assert text.data[0].text[0][0] == "&lt;s&gt;" and text.data[0].text[-1][8] == "&lt;i&gt;long…"
    assert text.layout.annotations[0].text.startswith("saved: &lt;b&gt;")
    assert sequence.data[2].customdata[0] == "&lt;s&gt;"
    assert sequence.data[0].customdata[-1] == "&lt;i&gt;long one&lt;/i&gt;"


def test_a_layers_frame_is_the_figure_at_that_layer():
    sides = [made(Task.T2I), made(skip=(6,))]
    for view in VIEWS:
        fig, there = view.frames(sides, Selection(0, 2, OWN)), view.figure(sides, Selection(6, 2, OWN))
        frame = fig.frames[6]
        shown = {**dict(enumerate(fig.data)), **dict(zip(frame.traces, frame.data))}
        for n, still in enumerate(there.data):
            for name in {"z", "x", "y"} & set(still.to_plotly_json()):
                now = shown[n][name] if shown[n][name] is not None else fig.data[n][name]
                assert panels.same(now, still[name]), (view.name, n, name)
        assert not set(frame.layout.to_plotly_json()) or frame.layout.coloraxis.cmax == there.layout.coloraxis.cmax


def test_bytes_keep_the_colours():
    data, layout = panels.heads.fill([made(), made(Task.T2I)], Selection(0))
    coarse, there = panels.as_bytes(data, layout)
    for part, small in zip(data, coarse):
        if axis := part.get("coloraxis"):
            low, high = layout[axis]["cmin"], layout[axis]["cmax"]
            assert small["z"].dtype == np.uint8 and np.abs(small["z"] / 255 * (high - low)
                                                           + low - part["z"]).max() <= (high - low) / 255
    assert there["coloraxis2"]["colorbar"]["ticktext"][1] == "0"
