"""Static decoding steps: all rows take every step, and what is said and drawn stays the same."""

import gc
import weakref

import pytest
import torch

from unimod.batch import Modality, pack
from unimod.config import ParameterError, RouterConfig
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.decode import Choice, DecodeSession, Replayed, sample
from unimod.generate import answer, calibrate, draw
from unimod.layers import apply_mod
from unimod.maskgit import MaskedDrawing
from unimod.models.cache import KVCache
from unimod.models.checkpoint import from_pretrained, shipped
from unimod.plan import last_half
from unimod.recording import record

DATA = open_data("scenes")


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_static_steps_say_and_draw_the_same(name):
    model, tokenizer = from_pretrained(shipped(name))
    batches = Batches(DATA, tokenizer, model.layout, (2, 2, 1))
    calibrate(apply_mod(model, last_half(8, 0.2), RouterConfig(std=0.02)), batches.held_out("train", 8))
    samples = batches.samples("test", 0, 5)
    asked = [model.layout.mmu(c, [(s.questions[0].text, "")], open_ended=True) for s,
             c in zip(samples, batches.codes(samples))]
    assert answer(model, asked, static=True) == answer(model, asked)
    drawn = {"top_k": 0, "temperature": 2.0, "max_new": 12, "seed": 1}
    assert answer(model, asked, static=True, **drawn) == answer(model, asked, **drawn)
    if model.layout.causal_images:
        for options in ({}, {"guidance": 1.0}, {"guidance": 1.0, "share": True}):
            assert torch.equal(draw(model, ["a red circle", ""], static=True, **options),
                               draw(model, ["a red circle", ""], **options))


def test_static_steps_are_for_rows_of_one_kind():
    model, _ = from_pretrained(shipped("emu3-tiny"))
    drawn = model.layout.t2i("a", torch.zeros(0, dtype=torch.long), prompt=True)
    asked = model.layout.mmu(torch.zeros(36, dtype=torch.long), [("a", "")], open_ended=True)
    with pytest.raises(ValueError, match="rows of one task and rule; these are of 2"):
        DecodeSession(model, [drawn, asked], 2, static=True)


def test_the_end_of_a_row_is_noticed_a_block_later_and_changes_nothing(monkeypatch):
    """Rows of different lengths: what a row that has ended still chooses is cut off."""
    model, _ = from_pretrained(shipped("showo-tiny"))
    layout, stop = model.layout, model.layout.stop
    asked = [layout.mmu(torch.full((36,), i), [("a" * i, "")], open_ended=True) for i in range(4)]
    script = torch.tensor([[5, 6, stop, 7], [stop, 6, 8, 7], [9, 6, stop, stop], [5, stop, 3, 4], [5, 6, 7, 8]])
    monkeypatch.setattr(type(layout.text), "decode", lambda self, ids: list(ids))
    for block in (1, 2, 8):
        monkeypatch.setattr("unimod.generate.BLOCK", block)
        told = iter(script)
        monkeypatch.setattr(Choice, "__call__", lambda self, hidden, told=told: next(told))
        assert answer(model, asked, max_new=5, static=True) == [[5], [6, 6, 6], [], [7, 7]]


def test_samples_are_those_of_multinomial():
    p, (a, b) = torch.rand(50, 200).softmax(-1), (torch.Generator().manual_seed(3) for _ in range(2))
    assert torch.equal(sample(p, a), torch.multinomial(p, 1, generator=b)[:, 0])
    assert torch.equal(a.get_state(), b.get_state())


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_a_temperature_of_zero_is_greedy_and_one_below_is_refused(name):
    model, _ = from_pretrained(shipped(name))
    asked = [model.layout.mmu(torch.zeros(36, dtype=torch.long), [("a", "")], open_ended=True)]
    assert answer(model, asked, top_k=0, temperature=0.0) == answer(model, asked)
    with pytest.raises(ParameterError, match=r"temperature=-0.5 is not a temperature; allowed: 0 .* Give 1.0"):
        answer(model, asked, temperature=-0.5)
    if model.layout.causal_images:
        assert torch.equal(draw(model, ["a"], temperature=0), draw(model, ["a"], top_k=1))
        with pytest.raises(ParameterError, match="temperature=-1 is not a temperature"):
            draw(model, ["a"], temperature=-1)


@pytest.mark.parametrize("always", [(), ("labelled",)])
def test_a_masked_step_is_given_what_packing_would_write(always):
    """Ids, targets and what a router keeps, after steps that changed what is masked."""
    model, _ = from_pretrained(shipped("showo-tiny"))
    apply_mod(model, last_half(8, 0.3), RouterConfig(std=0.02, always_keep=always))
    captions, seen = ["a red circle", "a"], []
    drawing = MaskedDrawing(model, model.layout, captions, torch.Generator().manual_seed(0), 4, 1.0)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        drawing.step()
        codes, unknown = drawing.codes.clone(), drawing.unknown.clone()
        drawing.step()
    written = pack([model.layout.t2i(text, codes[i % 2], unknown[i % 2]) for i, text in enumerate([*captions, "", ""])])
    given, image = seen[-1], written.modality == Modality.IMAGE
    assert 0 < int(unknown.sum()) < unknown.numel() and torch.equal(given.ids, written.ids)
    assert torch.equal(given.target[image], written.target[image]) == bool(always), "only such routers read it"


def test_a_step_goes_on_as_it_is_where_nothing_is_recorded():
    ran = []
    step = Replayed(torch.device("cpu"))
    for _ in range(5):
        step(lambda: ran.append(1))
    assert len(ran) == 5 and step.graph is None


def test_what_has_been_decoded_is_freed_without_the_garbage_collector(monkeypatch):
    """Else the next 64 rows find the memory of a GPU taken by the cache of the last ones."""
    made = []

    def note(kind):
        start = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *a, **k: (made.append(weakref.ref(self)),
                                                                     start(self, *a, **k))[1])
    note(KVCache)
    note(MaskedDrawing)
    showo, emu3 = (from_pretrained(shipped(name))[0] for name in ("showo-tiny", "emu3-tiny"))
    asked = [showo.layout.mmu(torch.zeros(36, dtype=torch.long), [("a", "")], open_ended=True)]
    gc.disable()
    try:
        answer(showo, asked, static=True)
        answer(showo, asked, static=True, top_k=0)
        draw(emu3, ["a"], static=True, grid=(2, 2))
        draw(showo, ["a"], steps=2)
        assert [x() for x in made] == [None] * 4
    finally:
        gc.enable()


def test_a_step_that_draws_by_a_generator_of_the_cpu_is_not_recorded_on_a_gpu():
    # a recording that fails leaves torch's own generator of that device unusable
    assert not Replayed(torch.device("cuda"), torch.Generator()).replays and Replayed(torch.device("cuda")).replays


@pytest.mark.parametrize("given, words", [
    ({"steps": 0}, "steps=0 is not allowed; give a whole number of at least 1"),
    ({"steps": 1.5}, "steps=1.5 is not allowed"),
    ({"grid": (-1, -4)}, "grid=-1 is not allowed"),
    ({"guidance": -1.0}, "guidance=-1.0 is not a weight; allowed: 0"),
    ({"guidance": float("nan")}, "guidance=nan is not a weight"),
    ({"captions": "a"}, r"captions='a' is one text; give a list: \['a'\]"),
])
def test_what_cannot_be_drawn_is_refused_in_words(given, words):
    model, _ = from_pretrained(shipped("showo-tiny"))
    with pytest.raises(ParameterError, match=words):
        draw(model, **{"captions": ["a"]} | given)


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_negative_counts_are_refused_and_nothing_asked_is_nothing_made(name):
    model, _ = from_pretrained(shipped(name))
    asked = [model.layout.mmu(torch.zeros(36, dtype=torch.long), [("a", "")], open_ended=True)]
    for option in ({"max_new": -3}, {"top_k": -1}):
        with pytest.raises(ParameterError, match="is not allowed; give a whole number of at least 0"):
            answer(model, asked, **option)
    assert answer(model, []) == [] and answer(model, asked, max_new=0) == [""]
    assert draw(model, []).shape == (0, 36)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (2, 5)])
def test_the_cache_has_room_for_the_picture_and_for_no_more(grid, static, monkeypatch):
    model, _ = from_pretrained(shipped("emu3-tiny"))
    made, start = [], KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *a: (made.append(self), start(self, *a))[1])
    draw(model, ["a red circle", "a"], grid=grid, static=static)
    used = max(int(used.max()) for used in made[0].used.values())
    assert used + static == made[0].room, "a static step needs one place more, for a token that is dropped"


class Capture:
    """`torch.cuda.graph` without a GPU: it complains at the block's end where the block failed, as CUDA does."""

    def __init__(self, graph, pool=None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")


@pytest.mark.parametrize("error, words", [(RuntimeError("not permitted\nmore"), "not permitted"),
                                          (NotImplementedError(), "NotImplementedError")])
def test_a_step_that_cannot_be_recorded_says_the_first_reason(error, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    for name in ("current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: "stream")
    assert record(lambda: 3) == ("graph", 3)

    def fails():
        raise error
    with pytest.raises(RuntimeError, match=f"^{words}$"):
        record(fails)
