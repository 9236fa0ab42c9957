"""The explorer: the attention of any token, layer and head, of one sequence or beside another task or model.

    explore(Gallery(sessions, also={"showo-tiny, routed": routed}), run, layer=4)

With `run.params.interactive` it is a widget; without, the same figures are written for the report with sliders over
layers that need no kernel. No input of a user ends in a traceback: the line under the controls gives the reason.
"""

from __future__ import annotations

import html
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ipywidgets as w
import plotly.graph_objects as go

from ..batch import Modality, Task
from ..capture import CaptureError
from ..config import ParameterError
from ..gallery import OWN, TASKS, Gallery, Side
from . import panels
from .attention import HEAD_VALUES
from .panels import COLUMNS, VIEWS, Selection, title
from .style import words

ONE = "one"
KINDS = {Modality.IMAGE: "image tokens", Modality.TEXT: "text tokens", Modality.SPECIAL: "special tokens"}
QUERIES = (("what the task predicts", OWN), *zip(KINDS.values(), KINDS), ("one token: click it", ONE))
HINT = "Click a patch of the picture or a word to select it as the query, and a square of layers and heads to go there."
CONTROLS = ("model task compare", "sample query value", "layer head play", "upload prompt show", "folder open")
"""The controls, line by line."""


def explore(gallery: Gallery, run, layer: int = 0, head: int | None = None) -> object:
    """The explorer of a gallery: shown as a widget, or written as figures of `run` (a run folder). Returns the
    `Explorer`, or the figures by name: T2I beside MMU, and dense beside routed where there is a routed model."""
    if run.params.interactive:
        from IPython.display import display

        explorer = Explorer(gallery, layer, head)
        display(explorer.root)
        return explorer
    first, *others = gallery.models
    shown = [("tasks", view, [gallery.side(first, task, 0) for task in TASKS]) for view in VIEWS]
    routed = next((name for name in others if gallery.models[name][0] is gallery.models[first][0]), None)
    if routed:
        sides = [gallery.side(name, Task.MMU, 0) for name in (first, routed)]
        shown += [("routed", view, sides) for view in (panels.picture, panels.heads)]
    figures = {}
    for pair, view, sides in shown:
        name, selection = f"{pair}_{view.name}", Selection(min(layer, sides[0].overview.layers[-1]), head)
        figures[name] = view.frames(sides, selection)
        run.figure(figures[name], name, caption=f"{' and '.join(map(title, sides))}: {view.caption}", alt=view.alt)
    return figures


def notes(sides: Sequence[Side], selection: Selection) -> list[str]:
    """What is shown, in words, and for every panel without data the reason."""
    layer, head = selection.layer, "mean over heads" if selection.head is None else f"head {selection.head}"
    lines = []
    for side in sides:
        query, found, name = side.query_from(sides[0], selection.query), side.overview, title(side)
        if not side.has(layer, selection.head):
            first, last = found.layers[0], found.layers[-1]
            gaps = len(found.layers) < last - first + 1
            layers = ", ".join(map(str, found.layers)) if gaps else f"{first} to {last}"
            lines.append(f"{name} has layers {layers} and {found.heads} heads: nothing to show at layer {layer}, "
                         f"{head}.")
            continue
        if query is None:
            wanted = sides[0].overview.tokens[selection.query]
            lines.append(f'{name} has no token that corresponds to "{wanted}" at place {selection.query}.')
            continue
        values, kept = side.attention(layer, selection.head, query), found.kept[found.layers.index(layer)]
        kind = isinstance(query, Modality)
        tokens = KINDS[query] if kind else f"{found.tokens[query]!r} (token {query})"
        line = f"{name}: {tokens}, layer {layer}, {head}"
        if values.isnan().all():
            line += ": no such token in this layer" if kind else ": the router skips this token here"
        elif not math.prod(found.grid):
            line += ": a sequence without a picture"
        elif not (values[found.modality == Modality.IMAGE] > 0).any():
            line += ": no attention to the picture (the mask hides it)"
        lines.append(line + (f"; {int(kept.sum())} of {len(kept)} tokens go through" if not kept.all() else ""))
    return lines


class Explorer:
    """The widget. `root` is what to display; `selection` and `sides` are what is shown.

    A front end may deliver the changes of two controls late, in any order, and on two threads. So one is handled at a
    time, and what has arrived of a user's own picture and prompt is confirmed before the button is pressed.
    """

    def __init__(self, gallery: Gallery, layer: int = 0, head: int | None = None) -> None:
        self.gallery, self.token, self.quiet, self.lock = gallery, 0, False, threading.RLock()
        self.sides: list[Side] = []
        self.figures: dict[str, go.FigureWidget] = {}
        names = list(gallery.models)
        first = gallery.side(names[0], Task.T2I, 0).overview
        layer, head = min(layer, first.layers[-1]), "mean" if head is None else min(head, first.heads - 1)
        style = {"style": {"description_width": "5.5em"}, "layout": {"width": "21em"}}
        typed = style | {"continuous_update": False}
        self.model = w.Dropdown(options=names, description="model", **style)
        self.task = w.Dropdown(options=[(words(t.name.lower()), t) for t in TASKS], description="task", **style)
        self.compare = w.Dropdown(options=self._others(), description="compare", **style)
        self.sample = w.IntSlider(0, 0, gallery.samples - 1, description="sample", **typed)
        self.query = w.Dropdown(options=QUERIES, description="query", **style)
        self.value = w.Dropdown(options=[(text, key) for key, text in HEAD_VALUES.items()], description="per head",
                                **style)
        self.layer = w.SelectionSlider(options=first.layers, value=layer, description="layer", **style)
        self.head = w.SelectionSlider(options=["mean", *range(first.heads)], value=head, description="head", **style)
        self.play = w.Play(min=0, max=len(first.layers) - 1, interval=900, description="through the layers")
        self.upload = w.FileUpload(accept="image/*", description="your picture")
        self.prompt = w.Text(placeholder="a caption, or a question", description="prompt", **typed)
        self.show = w.Button(description="Show it")
        self.folder = w.Text(placeholder="folder of a saved overview or record", description="saved", **typed)
        self.open = w.Button(description="Open")
        self.message = w.HTML()
        self.boxes = {view.name: w.VBox() for view in VIEWS}
        self.root = w.VBox()
        self.root.add_class("unimod-explorer")
        for line in CONTROLS:
            controls = [getattr(self, name) for name in line.split()]
            self.root.children += (w.HBox(controls, layout={"flex_flow": "row wrap"}),)
            for name, control in zip(line.split(), controls):
                control.add_class(f"unimod-{name}")
        for name, box in ({"message": self.message} | self.boxes).items():
            box.add_class(f"unimod-{name}")
            self.root.children += (box,)
        handlers = {self._new_sides: (self.model, self.task, self.compare, self.sample),
                    self._confirm: (self.upload, self.prompt, self.folder),
                    self._moved: (self.layer, self.head, self.query, self.value)}
        for action, controls in handlers.items():
            for control in controls:
                control.observe(self._handler(action), "value")
        self.play.observe(lambda change: setattr(self.layer, "index", min(change["new"], len(self.layer.options) - 1)),
                          "value")
        self.show.on_click(self._handler(self._own))
        self.open.on_click(self._handler(self._open))
        self._handler(self._new_sides)()

    @property
    def selection(self) -> Selection:
        """Where the controls stand."""
        query = self.token if self.query.value == ONE else self.query.value
        return Selection(self.layer.value, None if self.head.value == "mean" else self.head.value, query,
                         self.value.value)

    def _others(self) -> list[tuple[str, tuple]]:
        """What side A can be compared with."""
        both = [(f"{name}, {words(task.name.lower())}", (name, task)) for name in self.gallery.models for task in TASKS]
        return [("nothing", ()), *both, *((name, (name, Task.MMU)) for name in self.gallery.saved)]

    def _handler(self, action: Callable[..., None]) -> Callable[..., None]:
        """A callback that runs `action` alone, unless this class made the change, and says what goes wrong."""
        def handler(*_: object) -> None:
            with self.lock:
                if self.quiet:
                    return
                try:
                    action()
                except (CaptureError, ParameterError, ValueError, OSError) as error:
                    self._say(str(error), wrong=True)
                except Exception as error:      # JupyterLab shows a traceback of a callback in its log alone
                    self._say(f"This could not be shown: an error of the explorer itself ({type(error).__name__}: "
                              f"{error}); JupyterLab's log has the traceback.", wrong=True)
                    raise
        return handler

    @contextmanager
    def _silent(self) -> Iterator[None]:
        """Set controls without handling their changes."""
        with self.lock:
            before, self.quiet = self.quiet, True
            try:
                yield
            finally:
                self.quiet = before

    def _new_sides(self) -> None:
        """Another sequence: compute its sides and make new figures."""
        pairs, before = ((self.model.value, self.task.value), self.compare.value), self.sides
        self.sides = [self.gallery.side(*pair, self.sample.value) for pair in pairs if pair]
        found = self.sides[0].overview
        token = self.sides[0].query_from(before[0], self.token) if before and self.query.value == ONE else None
        with self._silent():
            self.token = 0 if token is None else token
            if self.query.value == ONE and token is None:
                self.query.value = OWN
            self.layer.options, self.layer.value = found.layers, min(self.layer.value, found.layers[-1])
            head = self.head.value
            self.head.options = ["mean", *range(found.heads)]
            self.head.value = head if head == "mean" or head < found.heads else "mean"
            self.play.max = len(found.layers) - 1
        for view in VIEWS:
            old = self.figures.get(view.name)
            fig = go.FigureWidget(view.figure(self.sides, self.selection).update_layout(autosize=True))
            self.figures[view.name], self.boxes[view.name].children = fig, [fig]
            if old is not None:
                old.close()
        self._make_clickable()
        self._describe()

    def _moved(self) -> None:
        """Another place in the same sequences: plotly sends of the figures' data only what changes."""
        for view in VIEWS:
            fig, (data, layout) = self.figures[view.name], view.fill(self.sides, self.selection)
            with fig.batch_update():
                for trace, part in zip(fig.data, data, strict=True):
                    trace.update({key: part[key] for key in ("x", "y", "z") if key in part})
                fig.update_layout(layout)
        self._describe()

    def _make_clickable(self) -> None:
        """A click on a patch or a word selects it as the query; one on the layers and heads goes there."""
        def clickable(traces, action) -> None:
            for n, trace in enumerate(traces):
                trace.on_click(lambda _, at, __, n=n: at.xs and self._handler(
                    lambda: action(n, int(at.ys[0]), int(at.xs[0])))())

        clickable([t for t in self.figures["picture"].data if t.type == "heatmap" and t.coloraxis], self._click_patch)
        clickable(self.figures["text"].data[::2], self._click_word)
        clickable(self.figures["heads"].data[::2], lambda _, layer, head: self._go(layer, head))

    def _click_patch(self, n: int, line: int, column: int) -> None:
        n = min(n, len(self.sides) - 1)                         # the panel A - B has side B's patches
        found = self.sides[n].overview
        self._select(n, int((found.modality == Modality.IMAGE).nonzero()[line * found.grid[1] + column]))

    def _click_word(self, n: int, line: int, column: int) -> None:
        places, at = self.sides[n].text_places, line * COLUMNS + column
        if at < len(places):
            self._select(n, places[at])

    def _select(self, n: int, token: int) -> None:
        """Query with a token of side n, or with the one of side A that corresponds to it."""
        mine = token if n == 0 else self.sides[0].query_from(self.sides[n], token)
        if mine is None:
            name = self.sides[n].overview.tokens[token]
            self._say(f'{title(self.sides[0])} has no token that corresponds to "{name}": choose one on its own side.',
                      wrong=True)
            return
        self.token = mine
        with self._silent():
            self.query.value = ONE
        self._moved()

    def _go(self, layer: int, head: int) -> None:
        with self._silent():
            for control, value in ((self.layer, layer), (self.head, head)):
                if value in control.options:
                    control.value = value
        self._moved()

    def _confirm(self) -> None:
        """Say what the two buttons would take."""
        picture = self.upload.value[0]["name"] if self.upload.value else "no picture yet"
        prompt, folder = (text if len(text) <= 200 else f"{text[:200]} ..."
                          for text in (self.prompt.value.strip(), self.folder.value.strip()))
        prompt = f'"{prompt}"' if prompt else "no prompt yet"
        lines = [f'Your own: {picture}, {prompt}. Press "{self.show.description}" when both are here.']
        if folder:
            lines.append(f'Saved: {folder}. Press "{self.open.description}".')
        self._say("<br>".join(map(html.escape, lines)))

    def _own(self) -> None:
        """Show the user's own picture and prompt."""
        uploaded = self.upload.value
        sample = self.gallery.add(bytes(uploaded[0]["content"]) if uploaded else b"", self.prompt.value)
        with self._silent():
            self.sample.max = self.sample.value = sample
        self._new_sides()

    def _open(self) -> None:
        """Compare with something saved."""
        name = self.gallery.open(self.folder.value)
        with self._silent():
            self.compare.options = self._others()
            self.compare.value = dict(self.compare.options)[name]
        self._new_sides()

    def _describe(self) -> None:
        lines = [self.gallery.about(self.sample.value), *notes(self.sides, self.selection), HINT]
        self._say("<br>".join(map(html.escape, lines)))

    def _say(self, text: str, wrong: bool = False) -> None:
        """Write a line under the controls."""
        text = f"<b>{html.escape(text)}</b>" if wrong else text
        self.message.value = f'<div role="status">{text}</div>'
