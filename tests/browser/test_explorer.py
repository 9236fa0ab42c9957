"""The explorer of notebook 01, used as a reader uses it: sliders by keyboard, tokens by mouse, a wrong file, an empty
prompt."""

import re
import statistics

import pytest
from lab import Lab
from PIL import Image
from plots import changed, click_cell, drawn, traces, values, wait_until
from views.test_panels import made

PLOTLY = "application/vnd.plotly.v1+json"
FIGURES = ("picture", "text", "heads", "row", "blocks")
SCALE = """(plot, trace) => {
  const axis = plot._fullLayout[plot._fullData[trace].coloraxis];
  return [axis.cmin, axis.cmax];
}"""
PANELS = "plot => (plot._fullData || []).flatMap((t, i) => t.type === 'heatmap' && t.coloraxis ? [i] : [])"


class Explorer:
    """The explorer on a page; `part` gives one control or figure by its class without the prefix."""

    def __init__(self, page):
        self.page, self.root = page, page.locator(".jp-Notebook .unimod-explorer")
        self.drawn()

    def drawn(self):
        """Scroll to it and wait until all its figures are drawn."""
        self.root.scroll_into_view_if_needed()
        for plot in map(self.plot, FIGURES):
            wait_until(self.page, lambda plot=plot: drawn(plot), "the figure is drawn")

    def part(self, name):
        return self.root.locator(f".unimod-{name}")

    def plot(self, name):
        return self.part(name).locator(".js-plotly-plot")

    def says(self, words):
        """Wait until the message matches; gives what it says."""
        message = self.part("message")
        wait_until(self.page, lambda: re.search(words, message.inner_text(), re.I),
                   lambda: f"the message, {message.inner_text()!r}, says {words!r}")
        return message.inner_text()

    def panels(self):
        """Numbers of the heat maps over the picture: A, or A, B and A - B (not the veils on dropped patches)."""
        return self.plot("picture").evaluate(PANELS)

    def overlay(self):
        """What all panels over the picture draw."""
        return [values(self.plot("picture"), panel) for panel in self.panels()]

    def row(self):
        """The bars over the row."""
        return [values(self.plot("row"), trace, "y") for trace in traces(self.plot("row"), "bar")]

    def words(self):
        """The tiles of the text."""
        return values(self.plot("text"), key="text")

    def slide(self, name, key="ArrowRight"):
        """Press a key on a slider's handle; gives what it then shows."""
        shown = self.part(name).locator(".widget-readout")
        before = shown.inner_text()
        self.part(name).locator(".noUi-handle").press(key)
        return wait_until(self.page, lambda: (now := shown.inner_text()) != before and now, f"the slider {name} moves")

    def choose(self, name, label):
        self.part(name).locator("select").select_option(index=self.choices(name).index(label))

    def choices(self, name):
        """The labels of a dropdown (ipywidgets writes them with hard spaces)."""
        return [text.replace("\xa0", " ") for text in self.part(name).locator("select option").all_text_contents()]

    def chosen(self, name):
        return self.choices(name)[self.part(name).locator("select").evaluate("select => select.selectedIndex")]

    def ask(self, prompt, file=None):
        """Upload a file, fill in the prompt, wait until both are said to have arrived, press the button."""
        if file:
            with self.page.expect_file_chooser() as chooser:
                self.part("upload").click()
            chooser.value.set_files(file)
            self.says(f"your own: {re.escape(file.name)}, ")
        field = self.part("prompt").locator("input")
        if field.input_value() != prompt:
            field.fill(prompt)
            field.press("Tab")
            self.says(f'your own: .*, "{re.escape(prompt)}"' if prompt else "no prompt yet")
        self.part("show").click()


@pytest.fixture(scope="module")
def opened(server, pages):
    """Notebook 01, run once for all tests of this file; gives JupyterLab and the explorer."""
    with pages() as browse:
        lab = Lab(browse(), *server)
        lab.open("01_attention_patterns", samples=2)
        lab.run_all()
        explorer = Explorer(lab.page)
        assert len(lab.figures()) == len(lab.outputs(PLOTLY)) + len(FIGURES) > len(FIGURES)
        yield lab, explorer
        lab.shut_down()


@pytest.fixture
def explorer(opened):
    """The explorer; at the end of each test no cell holds a traceback and the console no error."""
    lab, explorer = opened
    yield explorer
    assert not lab.outputs("error") and not lab.page.watch.errors()


def test_a_moved_layer_and_a_moved_head_change_the_overlay(explorer):
    for name in ("layer", "head"):
        overlay, row = explorer.overlay(), explorer.row()
        now = explorer.slide(name)
        changed(explorer.page, explorer.overlay, overlay)
        changed(explorer.page, explorer.row, row)
        explorer.says(rf"{name} {now}\b")


def test_a_clicked_token_becomes_the_query(explorer):
    row = explorer.row()
    click_cell(explorer.plot("picture"), 2, 3, explorer.panels()[0])
    row = changed(explorer.page, explorer.row, row)
    asked = explorer.says(r"\(token \d+\)")
    words = explorer.words()
    line, place = next((r, c) for r, cells in enumerate(words) for c, word in enumerate(cells)
                       if re.fullmatch(r"[a-z]{3,6}", word))
    click_cell(explorer.plot("text"), line, place)
    changed(explorer.page, explorer.row, row)
    assert explorer.says(rf"'{words[line][place]}' \(token \d+\)") != asked


def test_a_clicked_head_is_gone_to(explorer):
    row = explorer.row()                       # not the overlay: a word of the caption does not see the picture
    click_cell(explorer.plot("heads"), 1, 2)
    changed(explorer.page, explorer.row, row)
    explorer.says("layer 1, head 2")


def test_another_task_shows_its_own_row(explorer):
    overlay, words, task = explorer.overlay(), explorer.words(), explorer.chosen("task")
    other = next(choice for choice in explorer.choices("task") if choice != task)
    explorer.choose("task", other)
    changed(explorer.page, explorer.words, words)
    changed(explorer.page, explorer.overlay, overlay)
    explorer.says(re.escape(other))


def test_two_tasks_and_their_difference_on_one_scale(explorer):
    nothing, *others = explorer.choices("compare")
    model, task = explorer.chosen("model"), explorer.chosen("task")
    explorer.choose("compare", next(choice for choice in others if choice.startswith(f"{model}, ")
                                    and task not in choice))
    wait_until(explorer.page, lambda: len(explorer.panels()) == 3, "there are panels A, B and A - B")
    scale = lambda panel: explorer.plot("picture").evaluate(SCALE, panel)  # noqa: E731
    for move in (lambda: None, lambda: explorer.slide("layer")):
        before = explorer.overlay()
        if move():
            changed(explorer.page, explorer.overlay, before)
        (a, b, difference), panels = explorer.overlay(), explorer.panels()
        for line_a, line_b, line in zip(a, b, difference):
            assert [x - y for x, y in zip(line_a, line_b)] == pytest.approx(line, abs=1e-4)
        low, high = scale(panels[2])
        assert scale(panels[0]) == scale(panels[1]) and low == pytest.approx(-high) and high > 0
    explorer.choose("compare", nothing)
    wait_until(explorer.page, lambda: len(explorer.panels()) == 1, "there is one panel again")


def test_what_is_wrong_is_said_in_a_sentence(explorer, tmp_path):
    before, wrong = explorer.overlay(), tmp_path / "holiday.png"
    wrong.write_text("this is not a picture")
    for words, prompt, file in (("prompt is empty", "", None), ("not a picture", "a red circle", wrong)):
        explorer.ask(prompt, file)
        assert "Traceback" not in explorer.says(words) and explorer.overlay() == before


def test_an_own_picture_and_prompt_are_shown(explorer, tmp_path):
    words, overlay, file = explorer.words(), explorer.overlay(), tmp_path / "own.png"
    Image.new("RGB", (60, 50), (200, 40, 40)).save(file)
    explorer.ask("is there a red square?", file)
    changed(explorer.page, explorer.words, words)
    changed(explorer.page, explorer.overlay, overlay)
    explorer.says("is there a red square")


WATCH = """() => {                         // milliseconds from a key to every figure drawn, as the browser sees it
  document.addEventListener('keydown', () => { window.pressed = performance.now(); }, true);
  for (const plot of document.querySelectorAll('.jp-Notebook .unimod-explorer .js-plotly-plot'))
    plot.on('plotly_afterplot', () => window.took.push(performance.now() - window.pressed));
}"""


def test_how_long_a_moved_slider_takes(explorer, capsys, tmp_path):
    """Measured and printed, not asserted: other work on the machine would decide."""
    explorer.choose("compare", explorer.choices("compare")[0])
    for what in ("the tiny model", "a side of 1,155 tokens, 24 layers and 32 heads beside it"):
        if "1,155" in what:
            big = made(L=24, H=32, grid=(32, 32), words=130).overview.save(tmp_path / "big")
            explorer.part("folder").locator("input").fill(str(big))
            explorer.part("folder").locator("input").press("Enter")
            explorer.says("Saved: .*big")
            explorer.part("open").click()
            wait_until(explorer.page, lambda: len(explorer.panels()) == 2,
                       "there are panels A and B, whose pictures of two sizes have no difference")
        explorer.drawn()
        explorer.page.wait_for_timeout(1500)
        explorer.page.evaluate(WATCH)
        took = []
        for key in ["ArrowLeft", "ArrowRight"] * 4:
            explorer.page.evaluate("() => { window.took = []; }")
            explorer.part("layer").locator(".noUi-handle").press(key)
            wait_until(explorer.page, lambda: explorer.page.evaluate("() => window.took.length"),
                       "a figure is drawn anew")
            explorer.page.wait_for_timeout(600)
            took.append(explorer.page.evaluate("() => [window.took[0], window.took[window.took.length - 1]]"))
        with capsys.disabled():
            (first, slowest), (last, longest) = ((statistics.median(times), max(times)) for times in zip(*took))
            print(f"\n{what}: from a key on the layer slider to the picture {first:.0f} ms (longest {slowest:.0f}), "
                  f"to the last figure {last:.0f} ms (longest {longest:.0f})")
    explorer.choose("compare", explorer.choices("compare")[0])


def test_light_and_dark(opened, shoot):
    lab, explorer = opened
    lab.page.set_viewport_size({"width": 1500, "height": 2800})
    for dark in (False, True):
        lab.theme(dark)
        explorer.drawn()
        shoot(explorer.root, f"explorer-{'dark' if dark else 'light'}")
