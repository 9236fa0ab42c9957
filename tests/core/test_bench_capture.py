"""What capturing attention takes: every way is measured by itself, and rows that are scaled or not measured have a
note. No time is asserted.
"""

import json
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from unimod.__main__ import main
from unimod.bench import capture as module
from unimod.bench.capture import WAYS, capture
from unimod.bench.jobs import Job
from unimod.bench.record import run_jobs, table
from unimod.presets import CAPTURE_SIZES

JOB = Job("capture", CAPTURE_SIZES["showo-tiny"][0], 5, ("reference",), "sdpa")


@pytest.fixture
def here(monkeypatch):
    """Every way in this process; no BertViz."""
    def apart(job, way):
        sent = []
        module._child(job, way, SimpleNamespace(send=sent.append))
        return sent[0]

    monkeypatch.setattr(module, "_in_own_process", apart)
    monkeypatch.setitem(sys.modules, "bertviz", None)


def test_a_row_per_way(here):
    pytest.importorskip("pyarrow", reason="what a record takes on disk needs pyarrow, of the extra notebooks")
    rows = list(capture(JOB))
    assert [row["way"] for row in rows] == list(WAYS) and {row["tokens"] for row in rows} == {100}
    assert {row["layers"] for row in rows} == {8}
    plain, look, patterns, observed, maps, *pages = rows
    assert [row["note"] for row in pages] == ["not measured: bertviz is not installed"] * 2 and "ms" not in pages[0]
    assert all(
        row["ms"] > 0 and row["rounds"] == 5 and row["measured_share"] == 1 and row["note"] == "" for row in rows[:5]
    )
    model, _ = module.stack(JOB)
    assert maps["kept"] == 4 * 8 * 4 * 100**2 and observed["kept"] == 4 * 8 * 2 * 100 * model.width
    assert plain["kept"] is plain["disk"] is patterns["disk"] is maps["disk"] is None
    assert 0 < patterns["kept"] < look["kept"] < observed["kept"] < maps["kept"]
    assert 0 < look["disk"] < observed["disk"]
    shown = table({"rows": rows})
    assert "| plain forward " in shown and "KiB" in shown and "bertviz is not installed" in shown


def test_its_own_process_and_what_becomes_of_one_that_is_ended(monkeypatch, capsys, tmp_path):
    pytest.importorskip("pyarrow", reason="what a record takes on disk needs pyarrow, of the extra notebooks")
    monkeypatch.setattr(module, "WAYS", {"look": WAYS["look"]})
    assert (
        main(
            ["bench", "capture", "--preset", "emu3-tiny", "--rounds", "5", "--json", "--out", str(tmp_path / "r.json")]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    row, = found["rows"]
    assert found["command"].endswith("bench capture --preset emu3-tiny --rounds 5") and row["disk"] > 0
    assert row["memory"] > 0 and row["preset"] == "emu3-tiny"

    class Ended:
        def __reduce__(self):
            return os._exit, (1,)

    assert module._in_own_process(JOB, Ended()) == ({}, "out of memory: the system ended it")


def test_the_peak_is_what_was_there_at_most():
    before = module._peak("cpu", reset=True)
    torch.ones(2**24)
    assert module._peak("cpu") - before > 0.9 * 2**26
    assert module._peak("cpu", reset=True) - before < 2**25, "what was freed does not count any longer"


def test_maps_that_do_not_fit_are_scaled(monkeypatch):
    model, packed = module.built(JOB)
    one = 4 * 8 * 100**2                                        # of one head, all layers
    monkeypatch.setattr(module, "_free", lambda device: math.ceil(one * 2.5 / module.SHARE))
    with torch.no_grad():
        run, share, note = WAYS["full maps"](model, packed)
        assert run()[0] == 2 * one and share == 0.5 and note == "scaled from 2 of 4 heads, which fit the memory"
    monkeypatch.setattr(module, "_free", lambda device: one // 2)
    with pytest.raises(MemoryError, match="the maps of one head take"):
        WAYS["full maps"](model, packed)
    row, = run_jobs([JOB], {"capture": capture})
    assert "GiB of weights, 0.0 GiB of memory free" in row["note"] and row["realised"] is None


@pytest.mark.parametrize(
    ("entries", "shape", "share", "what"),
    [(2**22, (4, 100, 100), 1 / 8, "4 of 32 maps"), (3000, (1, 54, 54), 54**2 / 320_000, "54 x 54 of one map")],
)
def test_bertviz_is_given_what_it_can_hold(monkeypatch, entries, shape, share, what):
    given = {}

    def view(attention, tokens, html_action):
        given.update(a=attention[0], tokens=tokens, action=html_action)
        return SimpleNamespace(data="x" * 1000)

    monkeypatch.setitem(sys.modules, "bertviz", SimpleNamespace(model_view=view))
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "1.2.3")
    monkeypatch.setattr(module, "ENTRIES", entries)
    with torch.no_grad():
        run, found, note = WAYS["bertviz model_view"](*module.built(JOB))
    assert run()[0] == 1000 and found == share and note == f"scaled from {what}; bertviz 1.2.3"
    assert given["action"] == "return"
    assert given["a"].shape == (1, *shape) and len(given["tokens"]) == shape[1]
    assert given["a"].sum(-1).allclose(torch.ones(1, *shape[:2]))
