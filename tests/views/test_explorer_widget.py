"""The explorer without a browser: every control moves what it should, and whatever one types or uploads is answered in
a sentence."""

import copy
import datetime
import io
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from unimod.batch import Modality, Task, pack
from unimod.capture import capture_batch
from unimod.config import ParameterError
from unimod.experiment import load
from unimod.gallery import Gallery
from unimod.layers import apply_mod
from unimod.models.checkpoint import build_model
from unimod.params import Params
from unimod.plan import last_half
from unimod.views import attention, panels
from unimod.views.explore import ONE, Explorer, explore
from unimod.workbook.run_folder import Run


@pytest.fixture(scope="module")
def sessions():
    torch.set_num_threads(1)
    return {name: load(Params(), name) for name in ("showo-tiny", "emu3-tiny")}


@pytest.fixture
def gallery(sessions):
    torch.manual_seed(0)
    routed = apply_mod(copy.deepcopy(sessions["showo-tiny"].model), last_half(8, 0.3))
    return Gallery(sessions, {"showo-tiny, routed": routed}, samples=3)


@pytest.fixture
def explorer(gallery):
    return Explorer(gallery, layer=4)


def shown(explorer, name="picture"):
    """The numbers of a figure's heat maps."""
    return [np.array(t.z, dtype=float) for t in explorer.figures[name].data if t.type == "heatmap" and t.coloraxis]


def choose(control, label):
    control.value = next(value for text, value in control.options if text == label)


def picture(size=(60, 40)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def upload(explorer, content, prompt):
    file = {"name": "a.png", "type": "image/png", "size": len(content), "content": memoryview(content),
            "last_modified": datetime.datetime.now()}
    explorer.upload.value = (file,)
    explorer.prompt.value = prompt
    explorer.show.click()


def test_layer_head_query_and_value_move_the_figures(explorer):
    side = explorer.sides[0]
    for head in ("mean", 2):
        for layer in (4, 7):
            explorer.layer.value, explorer.head.value = layer, head
            want = side.overview.on_picture(side.overview.attention_from(layer, None if head == "mean" else head,
                                                                Modality.IMAGE))
            assert np.allclose(shown(explorer)[0], want, atol=1e-5) and f"layer {layer}" in explorer.message.value
    choose(explorer.query, "special tokens")
    assert np.allclose(shown(explorer)[0],
                       side.overview.on_picture(side.overview.attention_from(7, 2, Modality.SPECIAL)), atol=1e-5)
    choose(explorer.value, attention.HEAD_VALUES["entropy"])
    assert np.allclose(shown(explorer, "heads")[0], side.overview.patterns.entropy[:, 0], atol=1e-4)
    assert "entropy" in explorer.figures["heads"].layout.title.text
    explorer.play.value = 1
    assert explorer.layer.value == 1


def test_a_click_asks_with_that_token_exactly(explorer):
    explorer.head.value = 1
    explorer._click_patch(0, 3, 4)
    side, token = explorer.sides[0], explorer.token
    record, at = side.record, explorer.selection
    assert token == int((side.overview.modality == Modality.IMAGE).nonzero()[3 * 6 + 4]) and explorer.query.value == ONE
    row = record.row_weights(0, 4, 1, token)
    assert np.allclose(shown(explorer)[0], side.overview.on_picture(row), atol=1e-5) and at.query == token
    bars = explorer.figures["row"].data
    assert sum(float(np.nansum(bar.y)) for bar in bars) == pytest.approx(1, abs=1e-3)
    explorer._click_word(0, 0, 3)
    assert side.overview.tokens[explorer.token] == "red" and "'red'" in explorer.message.value.replace("&#x27;", "'")
    explorer._click_word(0, 5, 11)                               # behind the end of the text: nothing is there
    assert side.overview.tokens[explorer.token] == "red"
    explorer._go(6, 3)
    assert (explorer.layer.value, explorer.head.value) == (6, 3)


def test_two_sides_and_what_cannot_be_compared(explorer, gallery):
    choose(explorer.compare, "showo-tiny, understanding (MMU)")
    a, b, difference = shown(explorer)
    assert np.allclose(a - b, difference, atol=1e-4) and len(shown(explorer, "heads")) == 3
    explorer._click_patch(1, 2, 2)
    assert explorer.token == int((explorer.sides[0].overview.modality == Modality.IMAGE).nonzero()[2 * 6 + 2])
    before = explorer.token
    explorer._click_word(1, 3, 0)
    assert "has no token that corresponds to" in explorer.message.value and explorer.token == before
    choose(explorer.compare, "showo-tiny, routed, understanding (MMU)")
    explorer.task.value = Task.MMU
    explorer.layer.value = 7
    assert "tokens go through" in explorer.message.value
    veil = next(np.array(t.z) for t in list(explorer.figures["picture"].data)[4:] if t.type == "heatmap"
                and not t.coloraxis)
    assert veil.sum() == (~explorer.sides[1].overview.on_picture(explorer.sides[1].overview.kept[7])).sum() > 0
    assert gallery.side("showo-tiny", Task.MMU, 0) is explorer.sides[0], "made once"


def test_an_own_picture_in_both_tasks_and_models(explorer):
    upload(explorer, picture(), "is there a red square?")
    assert "your own: is there a red square?" in explorer.message.value and explorer.sample.value == 3
    for model in ("emu3-tiny", "showo-tiny, routed"):
        explorer.model.value = model
        for task in (Task.MMU, Task.T2I):
            explorer.task.value = task
            assert "is" in explorer.sides[0].overview.tokens and explorer.sides[0].model == model
            assert explorer.sides[0].overview.picture.shape == (48, 48, 3)


@pytest.mark.parametrize(("content", "prompt", "words"),
                         [(picture(), " ", "prompt is empty"), (b"", "a circle", "no picture"),
                          (picture(), "a" * 1001, "has 1001 characters: shorten it"),
                          (b"not one", "a circle", "not a picture"), (picture()[:60], "a circle", "not a picture")])
def test_a_picture_that_is_none_and_a_prompt_of_nothing(explorer, content, prompt, words):
    before = shown(explorer)[0]
    upload(explorer, content, prompt)
    assert words in explorer.message.value and explorer.gallery.own == [] and np.array_equal(before, shown(explorer)[0])


def test_what_has_arrived_is_said_before_a_button_is_pressed(explorer):
    shown_before = shown(explorer)[0]
    explorer.prompt.value = "a <b>red</b> circle"
    assert "no picture yet, &quot;a &lt;b&gt;red&lt;/b&gt; circle&quot;" in explorer.message.value
    explorer.prompt.value = " ".join(["long"] * 300)
    assert len(explorer.message.value) < 400
    explorer.folder.value = "runs/first"
    assert "Saved: runs/first. Press &quot;Open&quot;" in explorer.message.value
    assert np.array_equal(shown_before, shown(explorer)[0])


def test_news_of_two_threads_are_heard_one_after_the_other(explorer):
    with explorer._silent():
        other = threading.Thread(target=setattr, args=(explorer.layer, "value", 6))
        other.start()
        other.join(0.2)
        assert other.is_alive() and "layer 4" in explorer.message.value, "it waits"
    other.join(60)
    assert not other.is_alive() and "layer 6" in explorer.message.value
    want = explorer.sides[0].overview
    assert np.allclose(shown(explorer)[0], want.on_picture(want.attention_from(6, None, Modality.IMAGE)), atol=1e-5)


def test_a_mistake_of_the_explorer_is_said_and_not_hidden(explorer, monkeypatch):
    monkeypatch.setattr(explorer.gallery, "about", lambda sample: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explorer.layer.value = 6
    assert "ZeroDivisionError" in explorer.message.value


def test_saved_ones_open_and_foreign_ones_are_refused(explorer, sessions, tmp_path):
    side = explorer.sides[0]
    side.overview.save(tmp_path / "overview")
    side.record.save(tmp_path / "record", layers=(2, 3))
    for name in ("overview", "record"):
        explorer.folder.value = str(tmp_path / name)
        explorer.open.click()
        assert explorer.sides[1].model == f"saved: {tmp_path.name}/{name}"
        assert (explorer.sides[1].overview.picture is None) == (name == "record")
        explorer.open.click()
    shutil.copytree(tmp_path / "record", tmp_path / "another" / "record")
    explorer.folder.value = str(tmp_path / "another" / "record")
    explorer.open.click()
    assert len(explorer.gallery.saved) == 3, "opened twice is one; another of the same name is another"
    explorer.layer.value = 6
    assert "nothing to show at layer 6" in explorer.message.value
    assert np.isnan(shown(explorer)[1]).all(), "the record holds layers 2 and 3"
    foreign = build_model("showo-tiny", sessions["showo-tiny"].data.words(), codebook_size=500, grid=(8, 8),
                          text_budget=120)
    capture_batch(foreign, _row(foreign)).save(tmp_path / "foreign")
    janus = capture_batch(foreign, _row(foreign))
    janus.about["model"] = "janus"
    janus.save(tmp_path / "janus")
    shutil.copytree(tmp_path / "overview", tmp_path / "broken")
    (tmp_path / "broken" / "overview.safetensors").write_bytes(b"nothing")
    for folder, words in {"foreign": "record of another showo model", "janus": "record of a janus model",
                          "broken": "cannot be read as an overview", "nowhere": "is not a folder",
                          "~nobody-of-this-name": "is not a folder", "": "is not a folder"}.items():
        explorer.folder.value = folder if not folder or folder.startswith("~") else str(tmp_path / folder)
        explorer.open.click()
        assert words in explorer.message.value and len(explorer.gallery.saved) == 3, folder


def _row(model):
    return pack([model.layout.mmu(torch.zeros(model.layout.image_tokens, dtype=torch.long), [("a red circle", "yes")])])


def test_making_a_side_leaves_the_random_numbers_alone(gallery):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    gallery.side("showo-tiny, routed", Task.MMU, 2)
    assert torch.equal(torch.rand(3), want)


def test_what_does_not_exist_is_named(gallery, sessions):
    wrong = {("nobody", Task.T2I, 0): "model 'nobody' is not here",
             ("emu3-tiny", Task.T2I, 3): "sample 3 does not exist; there are 0 to 2"}
    for arguments, words in wrong.items():
        with pytest.raises(ParameterError, match=words):
            gallery.side(*arguments)
    with pytest.raises(ParameterError, match="belongs to no session"):
        Gallery(sessions, {"routed": sessions["emu3-tiny"].model})
    with pytest.raises(ParameterError, match=r"is a emu3 model of .* is for showo"):
        Gallery(sessions, {"showo-tiny, routed": sessions["emu3-tiny"].model})
    assert Explorer(gallery, layer=99, head=99).selection == panels.Selection(7, 3)


def test_headless_the_same_figures_are_written(gallery, tmp_path):
    run = Run.open("01_attention_patterns", Params(run_dir=str(tmp_path), interactive=False))
    figures = explore(gallery, run, layer=3)
    assert list(figures) == [f"tasks_{d.name}" for d in panels.VIEWS] + ["routed_picture", "routed_heads"]
    for name, fig in figures.items():
        assert (tmp_path / "figures" / f"{name}.json").stat().st_size < 300_000
        assert name.endswith("heads") or (len(fig.frames) == 8 and fig.layout.sliders[0].active == 3)
    live = Explorer(gallery, layer=3)
    choose(live.compare, "showo-tiny, understanding (MMU)")
    for a, b in zip(shown(live), (t.z for t in figures["tasks_picture"].data if t.type == "heatmap" and t.coloraxis)):
        assert np.array_equal(a, np.array(b, dtype=float), equal_nan=True)
