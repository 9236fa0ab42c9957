"""The explorer's five figures of one sequence, or of two and their difference, at one place of the model.

    a, b = gallery.side("showo-tiny", Task.T2I, 0), gallery.side("showo-tiny", Task.MMU, 0)
    selection = Selection(layer=3, head=None, query=OWN)
    picture.figure([a, b], selection)           # the figure at this layer and head
    picture.frames([a, b], selection)           # with a slider over layers that needs no kernel
    picture.fill([a, b], selection)             # what depends on the selection: the widget updates its figure with it

There are panels A, B and A - B for two sides, else one. A and B share one colour range; A - B is centred at 0. A panel
without data is blank, and `explore.notes` gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import plotly.graph_objects as go
import torch

from ..analysis.attention import NAMES
from ..batch import Modality
from ..gallery import OWN, Side
from .attention import HEAD_VALUES
from .style import AMOUNT, DIFFERENCE, FIGURE_BYTES, MODALITY, OVERLAY, VEIL, paper, plain, put_picture, slider, words

COLUMNS = 12
"""Text tokens in a line of tiles."""
Filled = tuple[list[dict], dict]


@dataclass(frozen=True)
class Selection:
    """A place of the model. head None: mean over heads. query: OWN, a kind of tokens, or one token (its index in side
    A's sequence)."""

    layer: int
    head: int | None = None
    query: str | Modality | int = OWN
    value: str = "to_image"


@dataclass(frozen=True)
class View:
    """One of the explorer's figures. `caption` says what to see, `alt` what is drawn."""

    name: str
    axes: Callable[[Sequence[Side]], go.Figure]
    """The figure without traces."""
    fill: Callable[[Sequence[Side], Selection], Filled]
    """All properties of every trace, and the layout that depends on the selection."""
    caption: str
    alt: str

    def figure(self, sides: Sequence[Side], selection: Selection, filled: Filled | None = None) -> go.Figure:
        """The figure at one selection; `filled`: the result of `fill` for it, where that is known."""
        data, layout = filled or self.fill(sides, selection)
        return self.axes(sides).add_traces(data).update_layout(layout)

    def frames(self, sides: Sequence[Side], selection: Selection) -> go.Figure:
        """The figure with a slider over layers, where they change it. Colour ranges follow the layer.

        Above `FIGURE_BYTES` its colours become bytes; while that is not enough, every second layer is left out.
        """
        layers, every, coarse = sides[0].overview.layers, 1, False
        while True:
            some = [layer for n, layer in enumerate(layers) if n % every == 0 or layer == selection.layer]
            fig = self._frames(sides, selection, some, coarse)
            if len(fig.to_json().encode()) <= FIGURE_BYTES or every >= len(layers):
                return fig
            every, coarse = 2 * every if coarse else 1, True

    def _frames(self, sides: Sequence[Side], selection: Selection, layers: Sequence[int], coarse: bool) -> go.Figure:
        filled = {layer: self.fill(sides, replace(selection, layer=layer)) for layer in layers}
        if coarse:
            filled = {layer: as_bytes(*one) for layer, one in filled.items()}
        shown = filled[selection.layer]
        moving = [{key for key in part if not all(same(data[n][key], part[key]) for data, _ in filled.values())}
                  for n, part in enumerate(shown[0])]
        at = [n for n, keys in enumerate(moving) if keys]
        fig = self.figure(sides, selection, shown)
        if not at:
            return fig
        frames = [go.Frame(name=str(layer), traces=at, layout=layout,
                           data=[{key: data[n][key] for key in ("type", *moving[n])} for n in at])
                  for layer, (data, layout) in filled.items()]
        return slider(fig, frames, layers.index(selection.layer))


def title(side: Side) -> str:
    """A side in words."""
    return f"{side.model}, {words(side.overview.task.name.lower())}"


def same(a: object, b: object) -> bool:
    """Whether two properties of a trace are equal; nan equals nan."""
    return np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b


def as_bytes(data: list[dict], layout: dict) -> Filled:
    """Heat maps on a colour axis as uint8 from its lower to its upper end; an unknown value becomes no attention, or no
    difference."""
    coarse, axes, ticks = [], {}, np.array([0, 0.5, 1])
    for part in data:
        if "coloraxis" in part:
            low, high = layout[part["coloraxis"]].values()
            z = (np.nan_to_num(part["z"], nan=max(low, 0.0)) - low) / ((high - low) or 1.0)
            hover = part["hovertemplate"].partition(": %{z")[0] + "<extra></extra>"     # a byte is no share
            part = part | {"z": (255 * np.clip(z, 0, 1)).round().astype(np.uint8), "hovertemplate": hover}
            labels = [f"{value:.2g}" for value in low + ticks * (high - low)]
            bar = {"tickvals": 255 * ticks, "ticktext": labels}
            axes[part["coloraxis"]] = {"cmin": 0, "cmax": 255, "colorbar": bar}
        coarse.append(part)
    return coarse, layout | axes


def _paper(heading: str, sides: Sequence[Side], x: str = "", y: str = "", stacked: bool = False, more: tuple = (),
           rows: int = 1, unit: str = "share", scale: str | list = AMOUNT, **options: object) -> go.Figure:
    """Axes and colour axes. stacked: A above B and no A - B. Two sides are named below the title."""
    panels = names = [plain(title(side)) for side in sides]
    if len(sides) == 2:
        panels = ["A", "B"] if stacked else ["A", "B", "A - B"]
    fig = paper(heading, x, y, [*panels, *more], len(sides) if stacked else rows, **options)
    for axis, colours, text, at in (("coloraxis", scale, unit, 1), ("coloraxis2", DIFFERENCE, "A - B", 1.12)):
        fig.layout[axis] = {"colorscale": colours, "colorbar": {"title_text": text, "x": at, "thickness": 14}}
    fig.update_layout(margin_r=170 if len(panels) == 3 else 90)
    if len(sides) == 2:
        fig.update_layout(title_subtitle_text=f"A: {names[0]} &nbsp; B: {names[1]}", margin_t=105)
    return fig


def _query(side: Side, sides: Sequence[Side], selection: Selection) -> Modality | int | None:
    """The query on this side; None where it has no such layer, head or query."""
    known = side.has(selection.layer, selection.head)
    return side.query_from(sides[0], selection.query) if known else None


def _attention(sides: Sequence[Side], selection: Selection) -> list[np.ndarray]:
    """Attention to every token of each side, float32 [n]; nan where it is unknown."""
    found = []
    for side in sides:
        query = _query(side, sides, selection)
        found.append(np.full(len(side.overview.modality), np.nan, np.float32) if query is None
                     else side.attention(selection.layer, selection.head, query).numpy())
    return found


def _with_difference(maps: list[np.ndarray]) -> list[np.ndarray]:
    """One or two maps, and the difference of two, nan unless they have one shape."""
    if len(maps) == 1:
        return maps
    a, b = maps
    return [a, b, a - b if a.shape == b.shape else np.full(a.shape, np.nan, np.float32)]


def _ranges(maps: list[np.ndarray], from_zero: bool = True) -> dict:
    """One colour range for A and B, from 0 or from the smallest value; the difference's own, symmetric around 0."""
    both = np.concatenate([np.ravel(one) for one in maps[:2]])
    both = both[np.isfinite(both)]
    bottom = 0.0 if from_zero or not len(both) else float(both.min())
    layout = {"coloraxis": {"cmin": bottom, "cmax": float(both.max(initial=0)) or 1.0}}
    for difference in maps[2:]:
        largest = float(np.nan_to_num(np.abs(difference)).max(initial=0)) or 1.0
        layout["coloraxis2"] = {"cmin": -largest, "cmax": largest}
    return layout


def _axes(n: int) -> dict:
    """The axes of panel n (from 0, line by line)."""
    return {"xaxis": f"x{n + 1}", "yaxis": f"y{n + 1}"}


def _heat(n: int, values: np.ndarray, hover: str, axis: str = "", **options: object) -> dict:
    return {"type": "heatmap", "z": values.astype(np.float32).round(5), "coloraxis": f"coloraxis{axis}",
            "hovertemplate": f"{hover}<extra></extra>", **_axes(n), **options}


def _mark(n: int, x: int | None, y: int | None) -> dict:
    """An open square on what is selected."""
    marker = {"symbol": "square-open", "size": 20, "color": "#ff2d9b", "line": {"width": 3}}
    return {"type": "scatter", "mode": "markers", "x": [x], "y": [y], "marker": marker, "hoverinfo": "skip",
            "showlegend": False, **_axes(n)}


def _picture_axes(sides: Sequence[Side]) -> go.Figure:
    fig = _paper("Attention to the picture", sides, more=("the picture",), scale=OVERLAY, rows=len(sides),
                 height=110 + 310 * len(sides))
    for n, side in enumerate([*sides, *[sides[0]] * len(sides)], 1):
        found = side.overview
        known = found.picture is not None and found.grid[0]
        put_picture(fig, found.picture if known else np.full((1, 1, 3), 200, np.uint8), [n], found.grid)
    return fig


def _picture_fill(sides: Sequence[Side], selection: Selection) -> Filled:
    data, hover = [], "picture row %{y}, column %{x}: %{z:.4f}"
    maps = _with_difference([side.overview.on_picture(torch.from_numpy(values)).numpy()
                             for side, values in zip(sides, _attention(sides, selection))])
    for n, values in enumerate(maps):
        veil, x, y = np.zeros(values.shape, np.uint8), None, None
        if n < len(sides):
            found, query = sides[n].overview, _query(sides[n], sides, selection)
            image = found.modality == Modality.IMAGE
            if query is not None:
                veil = (~found.on_picture(found.kept[found.layers.index(selection.layer)])).numpy().astype(np.uint8)
            if query is not None and not isinstance(query, Modality) and image[query]:
                y, x = divmod(int(image[:query].sum()), found.grid[1])
        data += [_heat(n, values, hover) if n < 2 else _heat(n, values, hover, "2", opacity=0.75),
                 {"type": "heatmap", "z": veil, "colorscale": VEIL, "zmin": 0, "zmax": 1, "showscale": False,
                  "hoverinfo": "skip", **_axes(n)}, _mark(n, x, y)]
    # the picture alone: plotly draws no axes without a trace
    return [*data, _mark(len(maps), 0, 0) | {"opacity": 0}], _ranges(maps)


def _tiles(side: Side) -> np.ndarray:
    """The indices of the text tokens in lines of COLUMNS, the last one filled up with -1."""
    places = side.text_places
    return np.pad(places, (0, -len(places) % COLUMNS), constant_values=-1).reshape(-1, COLUMNS)


def _short(token: str) -> str:
    token = token.removeprefix("<|").removesuffix("|>").strip(":")
    return plain(token if len(token) <= 8 else token[:7] + "…")


def _text_axes(sides: Sequence[Side]) -> go.Figure:
    count = [len(_tiles(side)) for side in sides]
    fig = _paper("Attention to the text", sides, stacked=True, row_heights=count,
                 height=130 + sum(50 + 32 * max(n, 2) for n in count))
    fig.update_xaxes(range=[-0.5, COLUMNS - 0.5], visible=False)
    for n, lines in enumerate(count, 1):
        fig.update_yaxes(range=[lines - 0.5, -0.5], visible=False, row=n)
    return fig


def _text_fill(sides: Sequence[Side], selection: Selection) -> Filled:
    data, grids = [], []
    for n, (side, values) in enumerate(zip(sides, _attention(sides, selection))):
        tiles, query = _tiles(side), _query(side, sides, selection)
        grid = np.where(tiles < 0, np.nan, values[tiles])
        names = [["" if i < 0 else _short(side.overview.tokens[i]) for i in line] for line in tiles]
        one = not isinstance(query, Modality) and query in side.text_places
        y, x = divmod(side.text_places.index(query), COLUMNS) if one else (None, None)
        data += [_heat(n, grid, "%{text} (token %{customdata}): %{z:.4f}", text=names, customdata=tiles,
                       texttemplate="%{text}", textfont={"size": 11}, xgap=2, ygap=2), _mark(n, x, y)]
        grids.append(grid)
    return data, _ranges(grids)


def _heads_axes(sides: Sequence[Side]) -> go.Figure:
    fig = _paper("", sides, "head", "layer", unit="")
    for n, side in enumerate([*sides, sides[0]][: 3 if len(sides) == 2 else 1], 1):
        layers, heads = side.overview.layers, side.overview.heads
        fig.update_yaxes(range=[layers[-1] + 0.5, layers[0] - 0.5], dtick=1 + len(layers) // 12, col=n)
        fig.update_xaxes(range=[-0.5, heads - 0.5], dtick=1 + heads // 12, col=n)
    return fig.update_xaxes(showgrid=False, zeroline=False).update_yaxes(showgrid=False, zeroline=False)


def _heads_fill(sides: Sequence[Side], selection: Selection) -> Filled:
    data, maps = [], _with_difference([side.head_values(selection.value) for side in sides])
    for n, (values, side) in enumerate(zip(maps, [*sides, sides[0]])):
        data += [_heat(n, values, "layer %{y}, head %{x}: %{z:.3g}", "2" if n == 2 else "",
                       x=list(range(side.overview.heads)), y=list(side.overview.layers)),
                 _mark(n, selection.head, None if selection.head is None else selection.layer)]
    return data, {"title_text": f"Every head: {HEAD_VALUES[selection.value]}", **_ranges(maps, from_zero=False)}


def _sequence_fill(sides: Sequence[Side], selection: Selection) -> Filled:
    data = []
    for n, (side, values) in enumerate(zip(sides, _attention(sides, selection))):
        found = side.overview
        for kind, name in zip(Modality, NAMES):
            at = (found.modality == kind).nonzero()[:, 0].tolist()
            data.append({"type": "bar", "x": at, "y": values[at].round(5), "name": name, "legendgroup": name,
                         "showlegend": n == 0, "marker": {"color": MODALITY[name], "line": {"width": 0}}, **_axes(n),
                         "customdata": [plain(found.tokens[i]) for i in at],
                         "hovertemplate": f"%{{customdata}} [{name}], place %{{x}}: %{{y:.4f}}<extra></extra>"})
    return data, {}


def _blocks_axes(sides: Sequence[Side]) -> go.Figure:
    fig = _paper("Attention between the modalities", sides, "to (keys)", "from (queries)", shared_yaxes=True)
    return fig.update_yaxes(autorange="reversed")


def _blocks_fill(sides: Sequence[Side], selection: Selection) -> Filled:
    at = selection.layer, selection.head
    maps = _with_difference([side.overview.modality_mass(*at).numpy() if side.has(*at)
                             else np.full((3, 3), np.nan, np.float32) for side in sides])
    data = [_heat(n, values, "from %{y} to %{x}: %{z:.3f}", "2" if n == 2 else "", x=NAMES, y=NAMES,
                  texttemplate="%{z:.2f}") for n, values in enumerate(maps)]
    return data, {**_ranges(maps), "coloraxis": {"cmin": 0.0, "cmax": 1.0}}


picture = View(
    "picture", _picture_axes, _picture_fill, "bright patches get most attention, on one scale for both; a veiled patch "
    "skips the layer. Play it through the layers.",
    "The picture under a heat map of attention, for both sides and their difference, with a slider over layers.")
text = View(
    "text", _text_axes, _text_fill,
    "the words and marks of each sequence, coloured by the attention to them; blank ones skip the layer.",
    "The tokens of both sequences as coloured tiles, with a slider over layers.")
heads = View(
    "heads", _heads_axes, _heads_fill,
    "how much of each head's attention goes to image tokens; the third panel is the difference, around 0.",
    "Layers against heads, coloured by the share of attention to image tokens, for both sides and their difference.")
sequence = View(
    "row", partial(_paper, "Attention over the sequence", x="place in the sequence", y="share", stacked=True),
    _sequence_fill, "every bar is a token of the sequence; its height is the share of attention "
    "that it gets. Colours are kinds of tokens.",
    "Bars over the places of both sequences, coloured by kind of token, with a slider over layers.")
blocks = View(
    "blocks", _blocks_axes, _blocks_fill,
    "each line sums to 1. An empty one has no such query; a zero may be the mask.",
    "Maps of attention between text, image and special tokens, for both sides and their difference.")
VIEWS = (picture, text, heads, sequence, blocks)
