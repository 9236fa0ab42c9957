"""The report: everything is on the page, escaped, self-contained (tests/browser draws it)."""

import json
import re
import shutil

import pandas
import plotly.graph_objects as go
import pytest

from unimod.params import Params
from unimod.workbook.report import write_page
from unimod.workbook.run_folder import Run

EVIL = "</script><script>alert(1)</script><b>&"
FIGURES = {
    "bars": go.Figure(go.Bar(y=[1, 2])),
    "lines": go.Figure(go.Scatter(y=[1, 3, 2], name=EVIL), layout={"title": {"text": EVIL}}),
    "slider": go.Figure(go.Heatmap(z=[[1, 2], [3, 4]]),
                        frames=[go.Frame(name="1", data=[go.Heatmap(z=[[4, 3], [2, 1]])])],
                        layout={"sliders": [{"steps": [{"label": "1", "method": "animate", "args": [["1"]]}]}]}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two finished runs."""
    made = []
    for name in ("00_first", "01_second"):
        folder = tmp_path_factory.getbasetemp() / "runs" / name / "abc"
        run = Run.open(name, Params(run_dir=str(folder), interactive=False))
        for key, fig in FIGURES.items():
            run.figure(fig, key, f"Caption of {key} {EVIL}", f"Alt of {key} {EVIL}")
        run.result(f"accuracy {EVIL}", 0.51234, n=3)
        run.table(pandas.DataFrame({EVIL: [EVIL, "plain"], "steps": [1, 2]}), "answers")
        run.finish()
        (folder / "params.yaml").write_text(json.dumps({"folder": EVIL}))
        intro = f"# A title\nProse with **weight**, {EVIL} and [a link](https://example.org)."
        cells = [{"cell_type": "markdown", "source": intro, "metadata": {}}]
        (folder / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def page(folders):
    return write_page(folders, folders[0].parents[1] / "report" / "index.html")


def test_everything_is_on_the_page(page):
    text = page.read_text()
    for name in FIGURES:
        assert text.count(f"Caption of {name} ") == text.count(f"Alt of {name} ") == 2
    assert text.count("0.5123") == 2 and text.count("plain") == 2 and "<strong>weight</strong>" in text
    assert (page.parent / "plotly.min.js").stat().st_size > 1e6 and sorted(p.name for p in page.parent.iterdir()) == [
        "index.html", "plotly.min.js"]


def test_what_comes_from_a_run_is_escaped(page):
    text = page.read_text()
    assert "alert(1)</script>" not in text and text.count("</script>") == 3
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", text)
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])
    assert [fig["layout"]["title"]["text"] for fig in figures if "title" in fig["layout"]] == [EVIL] * 2


def test_a_blank_figure_is_an_error(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "run")
    path = tmp_path / "run" / "figures" / "lines.json"
    saved = json.loads(path.read_text())
    saved["figure"]["data"] = [{"type": "scatter", "y": []}]
    path.write_text(json.dumps(saved))
    with pytest.raises(match="'lines' of 00_first would be blank"):
        write_page([tmp_path / "run"], tmp_path / "run" / "report.html")
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_report_of_one_run_lies_in_its_folder(folders):
    page = write_page(folders[:1], folders[0] / "report.html")
    assert 'href="results.json"' in page.read_text() and (folders[0] / "plotly.min.js").exists()
