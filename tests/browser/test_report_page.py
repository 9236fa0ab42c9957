"""The report in a browser without kernel or network: every figure is drawn and its slider moves, light and dark."""

import json
import shlex

import pandas
import plotly.graph_objects as go
import pytest
from background import unimod
from plots import changed, drag_slider, drawn, layout, traces, values, wait_until

from unimod.params import Params
from unimod.workbook.report import write_page, write_report
from unimod.workbook.run_folder import Run

EVIL = "</script><script>alert(1)</script><b>&"


def two_runs(work):
    """What 01 and 05 really write, on the smallest parameters."""
    words = ("-f", "params/smoke.yaml", "-p", "models=showo-tiny", "--runs", work)
    return ["sh", "-c", " && ".join(shlex.join(unimod("run", name, *words)) for name in ("01", "05"))]


@pytest.fixture(scope="module")
def runs(background):
    """A report of `two_runs`, moved away from where it was made."""
    made = background(two_runs).work
    write_report(made)
    return made.rename(made.with_name("moved"))


@pytest.fixture
def offline(browse):
    """A page without a network; options such as color_scheme are the context's."""
    return lambda **options: browse(offline=True, **options)


def look(page, path):
    """Open a report; gives its figures once the page says that all of them are drawn."""
    page.goto(path.as_uri())
    plots = page.locator(".plot")
    page.wait_for_function("n => document.documentElement.dataset.drawn === `${n} of ${n}`", arg=plots.count())
    assert page.locator(".plot.js-plotly-plot.drawn").count() == plots.count()
    assert all(drawn(plot) for plot in plots.all())
    assert "Share chart" not in page.content()  # plotly's button that uploads a figure
    return plots.all()


@pytest.mark.background.with_args(two_runs)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_reader_sees_every_figure_and_moves_every_slider(runs, offline, shoot, scheme):
    page = offline(color_scheme=scheme)
    figures = [json.loads(path.read_text()) for path in runs.glob("*/*/figures/*.json")]
    plots = look(page, runs / "report" / "index.html")
    assert len(plots) == len(figures) > 10
    shoot(page, f"report-{scheme}", full_page=True)
    heights = [plot.bounding_box()["height"] for plot in plots]
    page.set_viewport_size({"width": 800, "height": 1000})
    wait_until(page, lambda: all(layout(plot, "width") < 800 for plot in plots),
               "every figure follows the window's width")
    border = heights[0] - layout(plots[0], "height")
    assert [plot.bounding_box()["height"] for plot in plots] == heights
    assert heights == [layout(plot, "height") + border for plot in plots]
    assert all(plot.evaluate("plot => plot.scrollWidth <= plot.clientWidth") for plot in plots)
    moved = [move(page, plot) for plot in plots if plot.locator(".slider-rail-touch-rect").count()]
    assert len(moved) == sum("sliders" in figure["figure"]["layout"] for figure in figures) > 2
    paper, ink = page.evaluate("() => ['--paper', '--ink'].map(name => "
                               "getComputedStyle(document.documentElement).getPropertyValue(name).trim())")
    assert all(layout(plot, "font.color") == ink for plot in plots)
    assert (int(paper[1:3], 16) < 64) == (scheme == "dark") and not page.watch.said


def move(page, plot):
    """Drag a figure's slider to its last and to its first step: what is drawn must change."""
    last = layout(plot, "sliders.0.steps.length") - 1

    def shown():
        kinds = (("heatmap", "z"), ("bar", "y"))
        return [values(plot, trace, key) for kind, key in kinds for trace in traces(plot, kind)]

    for step in (0, last) if layout(plot, "sliders.0.active") else (last, 0):
        before = shown()
        drag_slider(plot, step)
        changed(page, shown, before)
        assert layout(plot, "sliders.0.active") == step
    return plot


@pytest.fixture
def evil(tmp_path):
    """A report of one run whose words are all hostile."""
    run = Run.open("00_first", Params(run_dir=str(tmp_path / "00_first" / "abc"), interactive=False))
    run.figure(go.Figure(go.Scatter(y=[1, 3, 2], name=EVIL), layout={"title": {"text": EVIL}}), "lines",
               f"Caption {EVIL}", f"Alt {EVIL}")
    run.result(f"accuracy {EVIL}", 0.5)
    run.table(pandas.DataFrame({EVIL: [EVIL, "plain"]}), "answers")
    run.finish()
    intro = {"cell_type": "markdown", "metadata": {},
             "source": f"# A title\nProse with {EVIL} and [a link](https://example.org)."}
    (run.dir / "00_first.ipynb").write_text(json.dumps({"cells": [intro]}))
    return write_page([run.dir], tmp_path / "report.html")


def test_hostile_words_stay_words(evil, offline):
    page = offline()
    page.on("dialog", lambda dialog: pytest.fail("a script of the data ran"))
    look(page, evil)
    assert all(EVIL in page.locator(part).inner_text()
               for part in ("figcaption", ".intro", "thead + tbody >> nth=0", "table >> nth=1"))
    assert not page.watch.said


def test_the_watch_sees_what_a_page_asks_for_and_says(tmp_path, browse):
    curious = tmp_path / "curious.html"
    curious.write_text('<img src="http://elsewhere.example/x.png"><script>new WebSocket("ws://elsewhere.example/y"); '
                       'console.error("said"); nothing()</script>')
    page = browse()
    page.goto(curious.as_uri())
    page.wait_for_timeout(300)
    assert {"http://elsewhere.example/x.png", "ws://elsewhere.example/y"} == set(page.watch.asked)
    assert [kind for kind, text in page.watch.errors() if "said" in text
            or "nothing is not defined" in text] == ["error", "uncaught"]
    page.watch.said.clear(), page.watch.asked.clear()
