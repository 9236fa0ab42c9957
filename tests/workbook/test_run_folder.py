"""`Run`: what a notebook may write, and that a run is done only when it says so."""

import json
import os

import numpy as np
import pandas
import plotly.graph_objects as go
import pytest

from unimod.params import Params
from unimod.workbook import run_folder as module
from unimod.workbook.run_folder import Run, RunError, drawable, latest, progress

BAR = go.Figure(go.Bar(y=[1, 2]))


@pytest.fixture
def run(tmp_path):
    return Run.open("03_token_redundancy", Params(run_dir=str(tmp_path / "run"), interactive=False))


def test_everything_it_writes(run):
    run.result("rank", np.float32(2.5), unit="directions", n=4, seed=0)
    run.result("rank", 3, seed=1)
    run.result("unmeasured", None)
    assert run.figure(BAR, "bars", "Two bars.", "A low and a high bar.") is BAR
    frame = pandas.DataFrame({"a": [1]})
    assert run.table(frame, "small") is frame
    run.path("plans/plan.yaml").write_text("x")
    assert not (run.dir / "done.json").exists()
    run.finish()
    done = json.loads((run.dir / "done.json").read_text())
    assert {key: done[key] for key in ("results", "figures", "tables", "files")} == {
        "results": 3, "figures": ["bars"], "tables": ["small"], "files": ["plans/plan.yaml"]}
    saved = json.loads((run.dir / "figures" / "bars.json").read_text())
    assert saved["caption"] == "Two bars." and saved["alt"] == "A low and a high bar."
    assert saved["figure"]["data"][0]["type"] == "bar"
    first = {"name": "rank", "value": 2.5, "unit": "directions", "n": 4, "seed": 0}
    assert json.loads((run.dir / "results.json").read_text())[0] == first
    assert pandas.read_parquet(run.dir / "tables" / "small.parquet").equals(frame)
    assert not list(run.dir.rglob("*.part"))


def test_opening_again_takes_the_mark_away(run):
    run.result("a", 1)
    run.finish()
    Run.open(run.notebook, run.params)
    assert not (run.dir / "done.json").exists() and json.loads((run.dir / "results.json").read_text()) == []


@pytest.mark.parametrize(("write", "words"), [
    (lambda run: run.result("loss", float("nan")), ["'loss' is nan", "None"]),
    (lambda run: run.result("loss", [1, 2]), ["'loss'", "one number"]),
    (lambda run: [run.result("loss", 1), run.result("loss", 2)], ["'loss' is written twice"]),
    (lambda run: run.figure(BAR, "", "c", "a"), ["rank_by_layer"]),
    (lambda run: run.figure(BAR, "a/../b", "c", "a"), ["'a/../b'"]),
    (lambda run: run.figure(BAR, "bars", " ", "a"), ["no caption"]),
    (lambda run: run.figure(BAR, "bars", "c", ""), ["no alt"]),
    (lambda run: [run.figure(BAR, "bars", "c", "a") for _ in range(2)], ["figure 'bars' is written twice"]),
    (lambda run: run.figure(go.Figure(go.Heatmap(z=np.ones((300, 300)))), "map", "c", "a"),
     ["'map' is", " KB; ", "300 KB", "32 bins"]),
    (lambda run: run.figure(go.Figure(), "bars", "c", "a"), ["would be blank"]),
    (lambda run: run.path("results.json"), ["cannot be a file of a run"]),
    (lambda run: run.path("../outside"), ["cannot be a file of a run"]),
    (lambda run: run.finish(), ["has written nothing"]),
    (lambda run: [run.path("plan.yaml"), run.finish()], ["plan.yaml", "wrote nothing there"]),
])
def test_refusals(run, write, words):
    with pytest.raises(RunError) as error:
        write(run)
    assert all(word in str(error.value) for word in words), error.value
    assert not (run.dir / "done.json").exists()


@pytest.mark.parametrize(("trace", "shown"), [
    (go.Scatter(y=[1, 2]), True),
    (go.Scatter(x=[1, 2], y=[]), False),
    (go.Scatter(x=[1, 2], y=[None, None]), False),
    (go.Scatter(y=np.array([np.nan, np.nan])), False),
    (go.Heatmap(z=np.zeros((2, 2), np.uint8)), True),
    (go.Scatter(y=[1], visible="legendonly"), False),
    (go.Table(cells={"values": [["a"]]}), True),
    (go.Image(source="data:image/png;base64,AA=="), True),
])
def test_what_counts_as_drawn(trace, shown):
    assert drawable(json.loads(go.Figure(trace).to_json())) is shown


def test_cells_run_again_in_a_notebook_replace(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")  # where JupyterLab works
    run = Run.open("00_start_here", Params())
    assert run.dir == tmp_path / "runs" / "00_start_here" / "interactive"
    for value in (1, 2):
        run.result("a", value)
        run.figure(BAR, "bars", "c", "a")
    run.finish()
    assert [row["value"] for row in json.loads((run.dir / "results.json").read_text())] == [2]
    monkeypatch.chdir(tmp_path)
    assert latest("runs", "00_start_here") == run.dir


def test_latest_is_the_last_to_finish(tmp_path):
    with pytest.raises(RunError, match="python -m unimod run 07_training"):
        latest(tmp_path, "07_training")
    for name in ("b", "a"):
        run = Run.open("07_training", Params(run_dir=str(tmp_path / "07_training" / name)))
        run.result("x", 1)
        run.finish()
    Run.open("07_training", Params(run_dir=str(tmp_path / "07_training" / "half"))).result("x", 1)
    os.utime(tmp_path / "07_training" / "b" / "done.json")
    assert latest(tmp_path, "07_training").name == "a"


def test_progress_says_a_plain_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    assert list(progress(range(10), "steps")) == list(range(10))
    assert capsys.readouterr().out.splitlines() == [
        "steps: 5 of 10, about 5 s left", "steps: 10 in 11 s"]
    assert list(progress(iter([]), "none")) == []
