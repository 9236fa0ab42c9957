"""The explorer: look at any token of any row of any head, alone or beside another task or model.

    explore(Gallery(sessions, also={"showo-tiny, routed": routed}), run, layer=4)

With `run.params.interactive` it is a widget (this module alone needs ipywidgets); without, the same figures are written for the report with sliders over
layers that need no kernel. Nothing that one can type or upload ends in a traceback: what cannot be shown is said in the line under the controls.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ipywidgets as w
import plotly.graph_objects as go

from ..batch import Modality, Task
from ..capture import CaptureError
from ..config import ParameterError
from . import drawings, looking
from .attention import HEAD_VALUES
from .drawings import DRAWINGS
from .gallery import TASKS, Gallery
from .looking import OWN, Place, Side, notes, same
from .style import words

ONE = "one"
ASKING = (("what the task asks", OWN), ("picture tokens", Modality.IMAGE), ("text tokens", Modality.TEXT), ("special tokens", Modality.SPECIAL),
          ("one token: click it", ONE))
HINT = "Click a patch of the picture or a word to ask with it, and a square of layers and heads to go there."


def explore(gallery: Gallery, run, layer: int = 0, head: int | None = None) -> object:
    """The explorer of a gallery: shown as a widget, or written as figures of `run`. Returns the `Explorer`, or the figures by name."""
    if run.params.interactive:
        from IPython.display import display

        explorer = Explorer(gallery, layer, head)
        display(explorer.root)
        return explorer
    return headless(gallery, run, layer, head)


def headless(gallery: Gallery, run, layer: int = 0, head: int | None = None) -> dict[str, go.Figure]:
    """The same figures with sliders over layers: drawing beside answering, and dense beside routed where there is a routed model."""
    names, figures = list(gallery.models), {}
    pairs = {"tasks": [gallery.side(names[0], task, 0) for task in TASKS]}
    other = next((n for n in names[1:] if gallery.models[n][0] is gallery.models[names[0]][0]), None)
    if other:
        pairs["routed"] = [gallery.side(n, Task.MMU, 0) for n in (names[0], other)]
    for name, sides in pairs.items():
        place = Place(min(layer, sides[0].overview.layers[-1]), head)
        for drawing in DRAWINGS if name == "tasks" else (drawings.picture, drawings.heads):
            fig = figures[f"{name}_{drawing.name}"] = drawing.frames(sides, place)
            run.figure(fig, f"{name}_{drawing.name}", caption=f"{' and '.join(s.title for s in sides)}: {drawing.caption}", alt=drawing.alt)
    return figures


class Explorer:
    """The widget. `root` is what to display; `place` and `sides` say what is shown.

    What the controls tell arrives late and in any order: JupyterLab holds a control's news back while older news of it are on their way, and may deliver the
    news of two controls on two threads. So one thing is done at a time, and what has arrived of one's own picture and prompt is said.
    """

    def __init__(self, gallery: Gallery, layer: int = 0, head: int | None = None) -> None:
        self.gallery, self.chosen, self.quiet, self.lock = gallery, 0, False, threading.RLock()
        self.sides: list[Side] = []
        self.figures: dict[str, go.FigureWidget] = {}
        self.sent: dict[str, tuple[list[dict], dict]] = {}
        names = list(gallery.models)
        first = gallery.side(names[0], Task.T2I, 0).overview
        layer, head = min(layer, first.layers[-1]), "mean" if head is None else min(head, first.heads - 1)
        style = {"style": {"description_width": "5.5em"}, "layout": {"width": "21em"}}
        self.model = w.Dropdown(options=names, description="model", **style)
        self.task = w.Dropdown(options=[(words(t.name.lower()), t) for t in TASKS], description="task", **style)
        self.compare = w.Dropdown(options=self._others(), description="beside", **style)
        self.sample = w.IntSlider(0, 0, gallery.samples - 1, description="sample", continuous_update=False, **style)
        self.layer = w.SelectionSlider(options=first.layers, value=layer, description="layer", **style)
        self.head = w.SelectionSlider(options=["mean", *range(first.heads)], value=head, description="head", **style)
        self.query = w.Dropdown(options=ASKING, description="asking", **style)
        self.value = w.Dropdown(options=[(text, key) for key, text in HEAD_VALUES.items()], description="per head", **style)
        self.play = w.Play(min=0, max=len(first.layers) - 1, interval=900, description="through the layers")
        self.upload = w.FileUpload(accept="image/*", description="your picture")
        self.prompt = w.Text(placeholder="a caption, or a question", description="prompt", continuous_update=False, **style)
        self.look = w.Button(description="Look at it")
        self.folder = w.Text(placeholder="folder of a saved overview or record", description="saved", continuous_update=False, **style)
        self.open = w.Button(description="Open")
        self.message = w.HTML()
        self.boxes = {d.name: w.VBox() for d in DRAWINGS}
        for name in ("model", "task", "compare", "sample", "layer", "head", "query", "value", "upload", "prompt", "look", "folder", "open", "message"):
            getattr(self, name).add_class(f"unimod-{name}")
        for name, box in self.boxes.items():
            box.add_class(f"unimod-{name}")
        rows = [(self.model, self.task, self.compare), (self.sample, self.query, self.value), (self.layer, self.head, self.play),
                (self.upload, self.prompt, self.look), (self.folder, self.open)]
        self.root = w.VBox([*(w.HBox(row, layout={"flex_flow": "row wrap"}) for row in rows), self.message, *self.boxes.values()])
        self.root.add_class("unimod-explorer")
        for control in (self.model, self.task, self.compare, self.sample):
            control.observe(self._heard(self._new_sides), "value")
        for control in (self.layer, self.head, self.query, self.value):
            control.observe(self._heard(self._moved), "value")
        for control in (self.upload, self.prompt, self.folder):
            control.observe(self._heard(self._arrived), "value")
        self.play.observe(lambda change: setattr(self.layer, "index", min(change["new"], len(self.layer.options) - 1)), "value")
        self.look.on_click(lambda _: self._own())
        self.open.on_click(lambda _: self._open())
        self._new_sides()

    @property
    def place(self) -> Place:
        """Where the controls stand."""
        query = self.chosen if self.query.value == ONE else self.query.value
        return Place(self.layer.value, None if self.head.value == "mean" else self.head.value, query, self.value.value)

    def _others(self) -> list[tuple[str, tuple]]:
        """What side A can be laid beside."""
        both = [(f"{name}, {words(task.name.lower())}", (name, task)) for name in self.gallery.models for task in TASKS]
        return [("nothing", ()), *both, *((name, (name, Task.MMU)) for name in self.gallery.saved)]

    def _heard(self, action: Callable[[], None]) -> Callable[[object], None]:
        """What to do at a control's news, unless it was set here."""
        def heard(_: object) -> None:
            with self.lock:
                if not self.quiet:
                    action()
        return heard

    def _new_sides(self) -> None:
        """Another row: make its sides and fresh figures."""
        with self._said():
            sample, beside = self.sample.value, self.compare.value
            before, self.sides = self.sides, [self.gallery.side(*name, sample) for name in ((self.model.value, self.task.value), beside) if name]
            found = self.sides[0].overview
            same = looking.asked(self.sides[0], before[0], self.chosen) if before and self.query.value == ONE else None
            with self._silent():
                self.chosen, self.query.value = (0, OWN if self.query.value == ONE else self.query.value) if same is None else (same, ONE)
                self.layer.options, self.layer.value = found.layers, min(self.layer.value, found.layers[-1])
                head = self.head.value
                self.head.options = ["mean", *range(found.heads)]
                self.head.value = head if head == "mean" or head < found.heads else "mean"
                self.play.max = len(found.layers) - 1
            for drawing in DRAWINGS:
                old, filled = self.figures.get(drawing.name), drawing.fill(self.sides, self.place)
                fig = go.FigureWidget(drawing.figure(self.sides, self.place, filled).update_layout(autosize=True))
                self.figures[drawing.name], self.boxes[drawing.name].children, self.sent[drawing.name] = fig, [fig], filled
                if old is not None:
                    old.close()
            self._clickable()

    def _moved(self) -> None:
        """Another place in the same rows: of the figures' data only what changes is sent."""
        with self._said():
            for drawing in DRAWINGS:
                fig, (data, layout), (had, looked) = self.figures[drawing.name], drawing.fill(self.sides, self.place), self.sent[drawing.name]
                new = [{key: value for key, value in part.items() if not same(value, old[key])} for part, old in zip(data, had)]
                if any(new) or layout != looked:
                    with fig.batch_update():
                        for trace, part in zip(fig.data, new, strict=True):
                            trace.update(part)
                        fig.update_layout({key: value for key, value in layout.items() if value != looked.get(key)})
                self.sent[drawing.name] = data, layout

    def _clickable(self) -> None:
        """A click on a patch or a word asks with it; one on the layers and heads goes there."""
        for n, trace in enumerate(t for t in self.figures["picture"].data if t.type == "heatmap" and t.coloraxis):
            trace.on_click(lambda _, points, __, n=n: points.xs and self._ask_cell(min(n, len(self.sides) - 1), int(points.ys[0]), int(points.xs[0])))
        for n, trace in enumerate(self.figures["text"].data[::2]):
            trace.on_click(lambda _, points, __, n=n: points.xs and self._ask_word(n, int(points.ys[0]), int(points.xs[0])))
        for trace in self.figures["heads"].data[::2]:
            trace.on_click(lambda _, points, __: points.xs and self._go(int(points.ys[0]), int(points.xs[0])))

    def _ask_cell(self, n: int, row: int, column: int) -> None:
        found = self.sides[n].overview
        self._ask(n, int((found.modality == Modality.IMAGE).nonzero()[row * found.grid[1] + column]))

    def _ask_word(self, n: int, line: int, column: int) -> None:
        places, at = drawings.text_places(self.sides[n]), line * drawings.COLUMNS + column
        if at < len(places):
            self._ask(n, places[at])

    def _ask(self, n: int, token: int) -> None:
        """Ask with a token of side n, or with the one of side A that answers to it."""
        mine = token if n == 0 else looking.asked(self.sides[0], self.sides[n], token)
        if mine is None:
            self._say(f'{self.sides[0].title} has no token that answers to "{self.sides[n].overview.tokens[token]}": choose one on its own side.', wrong=True)
            return
        self.chosen = mine
        with self._silent():
            self.query.value = ONE
        self._moved()

    def _go(self, layer: int, head: int) -> None:
        with self._silent():
            if layer in self.layer.options:
                self.layer.value = layer
            if head in self.head.options:
                self.head.value = head
        self._moved()

    def _arrived(self) -> None:
        """Say what the two buttons would take."""
        picture = self.upload.value[0]["name"] if self.upload.value else "no picture yet"
        prompt, folder = (text if len(text) <= 200 else f"{text[:200]} ..." for text in (self.prompt.value.strip(), self.folder.value.strip()))
        lines = [f"""Your own: {picture}, {f'"{prompt}"' if prompt else 'no prompt yet'}. Press "{self.look.description}" when both are here."""]
        if folder:
            lines.append(f'Saved: {folder}. Press "{self.open.description}".')
        self._say("<br>".join(map(html.escape, lines)))

    def _own(self) -> None:
        """Look at one's own picture and prompt."""
        with self._said(said=False):
            uploaded = self.upload.value
            sample = self.gallery.add(bytes(uploaded[0]["content"]) if uploaded else b"", self.prompt.value)
            with self._silent():
                self.sample.max = self.sample.value = sample
            self._new_sides()

    def _open(self) -> None:
        """Lay something saved beside."""
        with self._said(said=False):
            name = self.gallery.open(self.folder.value)
            with self._silent():
                self.compare.options = self._others()
                self.compare.value = next(value for title, value in self.compare.options if title == name)
            self._new_sides()

    @contextmanager
    def _silent(self) -> Iterator[None]:
        """Set controls without being told."""
        with self.lock:
            before, self.quiet = self.quiet, True
            try:
                yield
            finally:
                self.quiet = before

    @contextmanager
    def _said(self, said: bool = True) -> Iterator[None]:
        """Say what is shown, or what is wrong."""
        with self.lock:
            try:
                yield
                if said:
                    lines = notes(self.sides, self.place) if self.sides else []
                    self._say("<br>".join(map(html.escape, [self.gallery.about(self.sample.value), *lines, HINT])))
            except (CaptureError, ParameterError, ValueError, OSError) as error:
                self._say(str(error), wrong=True)
            except Exception as error:                          # JupyterLab shows a traceback from here in its log alone
                self._say(f"This could not be shown, by a mistake of the explorer's own ({type(error).__name__}: {error}); JupyterLab's log says where.",
                          wrong=True)
                raise

    def _say(self, text: str, wrong: bool = False) -> None:
        self.message.value = f'<div role="status"><b>{html.escape(text)}</b></div>' if wrong else f'<div role="status">{text}</div>'
