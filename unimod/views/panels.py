"""The explorer's five figures of one sequence, or of two and their difference, at one place of the model.

    a, b = gallery.side("showo-tiny", Task.T2I, 0), gallery.side("showo-tiny", Task.MMU, 0)
    selection = Selection(layer=3, head=None, query=OWN)
    picture.figure([a, b], selection)           # the figure at this layer and head
    picture.frames([a, b], selection)           # with a slider over layers that needs no kernel
    picture.fill([a, b], selection)             # its traces and layout as dictionaries: the widget is sent what changes

There are panels A, B and A - B for two sides, else one. A and B share one colour range; A - B is centred at 0. A panel
without data is blank, and `explore.notes` gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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
NOWHERE = {"x": [None], "y": [None]}
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
    axes: Callable[[Sequence[Side], Selection], go.Figure]
    """The figure without traces."""
    fill: Callable[[Sequence[Side], Selection], Filled]
    """All properties of every trace, and the layout that depends on the selection."""
    caption: str
    alt: str

    def figure(self, sides: Sequence[Side], selection: Selection, filled: Filled | None = None) -> go.Figure:
        """The figure at one selection; `filled`: the result of `fill` for it, where that is known."""
        data, layout = filled or self.fill(sides, selection)
        return self.axes(sides, selection).add_traces(data).update_layout(layout)

    def frames(self, sides: Sequence[Side], selection: Selection) -> go.Figure:
        """The figure with a slider over layers (where they change it), which also plays. Colour ranges follow the
        layer.

        Above `FIGURE_BYTES` its colours become bytes; while that is not enough, every second layer is left out.
        """
        layers = sides[0].overview.layers
        fig = self._frames(sides, selection, layers, coarse=False)
        if _size(fig) > FIGURE_BYTES:
            fig = self._frames(sides, selection, layers, coarse=True)
        while _size(fig) > FIGURE_BYTES and len(fewer := tuple(sorted({*layers[::2], selection.layer}))) < len(layers):
            layers, fig = fewer, self._frames(sides, selection, fewer, coarse=True)
        return fig

    def _frames(self, sides: Sequence[Side], selection: Selection, layers: Sequence[int], coarse: bool) -> go.Figure:
        filled = {layer: self.fill(sides, replace(selection, layer=layer)) for layer in layers}
        if coarse:
            filled = {layer: as_bytes(*one) for layer, one in filled.items()}
        fig = self.figure(sides, selection, filled[selection.layer])
        moving = [{key for key in part if not all(same(one[n][key], part[key]) for one, _ in filled.values())}
                  for n, part in enumerate(filled[selection.layer][0])]
        at = [n for n, keys in enumerate(moving) if keys]
        if not at:
            return fig
        frames = [go.Frame(name=str(layer),
                           data=[{"type": parts[n]["type"], **{key: parts[n][key] for key in moving[n]}} for n in at],
                           traces=at, layout=layout) for layer, (parts, layout) in filled.items()]
        return slider(fig, frames, "layer", list(layers).index(selection.layer), play=True)


def title(side: Side) -> str:
    """A side in words."""
    return f"{side.model}, {words(side.overview.task.name.lower())}"


def same(a: object, b: object) -> bool:
    """Whether two properties of a trace are equal; nan equals nan."""
    return np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b


def as_bytes(data: list[dict], layout: dict) -> Filled:
    """Heat maps on a colour axis as uint8 from its lower to its upper end; an unknown value becomes no attention, or no
    difference."""
    axes = [axis for axis in ("coloraxis", "coloraxis2") if axis in layout]
    coarse, ends = [], {axis: (layout[axis]["cmin"], layout[axis]["cmax"]) for axis in axes}
    for part in data:
        if part.get("coloraxis") in ends:
            low, high = ends[part["coloraxis"]]
            z = (np.nan_to_num(part["z"], nan=max(low, 0.0)) - low) / ((high - low) or 1.0)
            hover = part["hovertemplate"].partition(": %{z")[0] + "<extra></extra>"     # a byte is no share
            part = part | {"z": (255 * np.clip(z, 0, 1)).round().astype(np.uint8), "hovertemplate": hover}
        coarse.append(part)
    bars = {axis: {"tickvals": [0, 127.5, 255], "ticktext": [f"{low + f * (high - low):.2g}" for f in (0, 0.5, 1)]}
            for axis, (low, high) in ends.items()}
    return coarse, layout | {axis: {"cmin": 0, "cmax": 255, "colorbar": bar} for axis, bar in bars.items()}


def _size(fig: go.Figure) -> int:
    return len(fig.to_json().encode())


def _token(query: Modality | int | None) -> int | None:
    return None if isinstance(query, Modality) else query


def _panels(sides: Sequence[Side]) -> list[str]:
    return [plain(title(sides[0]))] if len(sides) == 1 else ["A", "B", "A - B"]


def _paper(heading: str, sides: Sequence[Side], x: str = "", y: str = "", panels: Sequence[str] = (),
           unit: str | None = "share", scale: str | list = AMOUNT, **options: object) -> go.Figure:
    """Axes and colour axes; two sides are named below the title. unit: of the first colour bar, None for a figure
    without one."""
    fig, two = paper(heading, x, y, panels, **options), len(sides) == 2
    if two:
        named = " &nbsp; ".join(f"{letter}: {plain(title(side))}" for letter, side in zip("AB", sides))
        fig.update_layout(title_subtitle={"text": named, "font": {"size": 13}}, margin_t=105)
    if unit is not None:
        bar = {"title": {"text": unit}, "x": 1.0, "thickness": 14}
        fig.update_layout(coloraxis={"colorscale": scale, "colorbar": bar},
                          margin={"r": 170 if two and len(panels) > 2 else 90})
    if unit is not None and two and len(panels) > 2:
        fig.update_layout(coloraxis2={"colorscale": DIFFERENCE,
                                      "colorbar": {"title": {"text": "A - B"}, "x": 1.12, "thickness": 14}})
    return fig


def _values(sides: Sequence[Side], selection: Selection) -> Iterator[np.ndarray | None]:
    """Attention to every token of each side, float32 [n]; None where it has no such layer, head or query."""
    for side in sides:
        query = side.query_from(sides[0], selection.query)
        known = query is not None and side.has(selection.layer, selection.head)
        yield side.attention(selection.layer, selection.head, query).numpy() if known else None


def _with_difference(values: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
    """One or two maps, and the difference of two, None unless they have one shape."""
    if len(values) == 1:
        return list(values)
    a, b = values
    return [a, b, a - b if a is not None and b is not None and a.shape == b.shape else None]


def _ranges(values: Sequence[np.ndarray | None], low: float | None = 0.0) -> dict:
    """One colour range for A and B, from `low` or (None) from the smallest value; the difference's own, symmetric
    around 0."""
    both = [v for v in values[:2] if v is not None and np.isfinite(v).any()]
    top = max((float(np.nanmax(v)) for v in both), default=1.0) or 1.0
    bottom = min((float(np.nanmin(v)) for v in both), default=0.0) if low is None else low
    layout = {"coloraxis": {"cmin": bottom, "cmax": top}}
    if len(values) == 3:
        known = values[2] is not None and np.isfinite(values[2]).any()
        largest = (float(np.nanmax(np.abs(values[2]))) if known else 1.0) or 1.0
        layout["coloraxis2"] = {"cmin": -largest, "cmax": largest}
    return layout


def _axes(n: int) -> dict:
    """The axes of panel n (from 0); panels are numbered line by line."""
    return {"xaxis": f"x{n + 1 if n else ''}", "yaxis": f"y{n + 1 if n else ''}"}


def _heat(n: int, values: np.ndarray | None, shape: tuple[int, int], hover: str, **options: object) -> dict:
    """The heat map of panel n; blank where there are no values."""
    z = np.full(shape, np.nan, np.float32) if values is None else values.astype(np.float32)
    axis = "coloraxis" if n < 2 else "coloraxis2"
    return {"type": "heatmap", "z": z.round(5), "coloraxis": axis, "hovertemplate": f"{hover}<extra></extra>",
            **_axes(n), **options}


def _mark(n: int, x: int | None, y: int | None) -> dict:
    """An open square in panel n on what is selected."""
    marker = {"symbol": "square-open", "size": 20, "color": "#ff2d9b", "line": {"width": 3}}
    return {"type": "scatter", "mode": "markers", "x": [x], "y": [y], "marker": marker, "hoverinfo": "skip",
            "showlegend": False, **_axes(n)}


def _picture_axes(sides: Sequence[Side], selection: Selection) -> go.Figure:
    count, panels = len(sides), [*_panels(sides), "the picture"]
    fig = _paper("Attention to the picture", sides, panels=panels, height=110 + 310 * count, rows=count,
                 vertical_spacing=0.12, scale=OVERLAY)
    for n, side in enumerate([*sides, *[sides[0]] * count], 1):
        h, w = side.overview.grid
        grey = np.full((max(h, 1), max(w, 1), 3), 200, np.uint8)
        put_picture(fig, grey if side.overview.picture is None or not h else side.overview.picture, [n], (h, w))
    return fig


def _picture_fill(sides: Sequence[Side], selection: Selection) -> Filled:
    maps = [None if values is None else side.overview.on_picture(torch.from_numpy(values)).numpy()
            for side, values in zip(sides, _values(sides, selection))]
    hover, data = "picture row %{y}, column %{x}: %{z:.4f}", []
    for n, values in enumerate(_with_difference(maps)):
        side = sides[n] if n < len(sides) else sides[0]
        found, (h, w) = side.overview, side.overview.grid
        veil, x, y = np.zeros((h, w), np.uint8), None, None
        if n < len(sides) and values is not None:
            veil = (~found.on_picture(found.kept[found.layers.index(selection.layer)])).numpy().astype(np.uint8)
        one = _token(side.query_from(sides[0], selection.query)) if n < len(sides) else None
        if one is not None and found.modality[one] == Modality.IMAGE:
            y, x = divmod(int((found.modality[:one] == Modality.IMAGE).sum()), w)
        data += [_heat(n, values, (h, w), hover, opacity=1 if n < 2 else 0.75),
                 {"type": "heatmap", "z": veil, "colorscale": VEIL, "zmin": 0, "zmax": 1, "showscale": False,
                  "hoverinfo": "skip", **_axes(n)}, _mark(n, x, y)]
    # the picture alone: plotly draws no axes without a trace
    data.append(_mark(len(data) // 3, 0, 0) | {"marker": {"opacity": 0}})
    return data, _ranges(_with_difference(maps))


def _tiles(side: Side) -> list[list[int | None]]:
    """The indices of the text tokens in lines of COLUMNS, the last one filled up with None."""
    places = side.text_places
    places += [None] * (-len(places) % COLUMNS)
    return [places[i: i + COLUMNS] for i in range(0, len(places), COLUMNS)]


def _short(token: str) -> str:
    token = token.removeprefix("<|").removesuffix("|>").strip(":")
    return plain(token if len(token) <= 8 else token[:7] + "…")


def _text_axes(sides: Sequence[Side], selection: Selection) -> go.Figure:
    count = [len(_tiles(side)) for side in sides]
    fig = _paper("Attention to the text", sides, panels=_panels(sides)[: len(sides)], rows=len(sides),
                 row_heights=count, height=130 + sum(50 + 32 * max(n, 2) for n in count),
                 vertical_spacing=0.28 / len(sides))
    bare = {"showticklabels": False, "showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    fig.update_xaxes(range=[-0.5, COLUMNS - 0.5], **bare).update_yaxes(**bare)
    for n, lines in enumerate(count, 1):
        fig.update_yaxes(range=[lines - 0.5, -0.5], row=n)
    return fig


def _text_fill(sides: Sequence[Side], selection: Selection) -> Filled:
    data, grids = [], []
    for n, (side, values) in enumerate(zip(sides, _values(sides, selection))):
        tiles, one = _tiles(side), _token(side.query_from(sides[0], selection.query))
        grid = np.array([[np.nan if i is None or values is None else values[i] for i in line] for line in tiles])
        names = [["" if i is None else _short(side.overview.tokens[i]) for i in line] for line in tiles]
        places = [[-1 if i is None else i for i in line] for line in tiles]
        y, x = divmod(side.text_places.index(one), COLUMNS) if one in side.text_places else (None, None)
        data += [_heat(n, grid, grid.shape, "%{text} (token %{customdata}): %{z:.4f}", text=names, customdata=places,
                       texttemplate="%{text}", textfont={"size": 11}, xgap=2, ygap=2), _mark(n, x, y)]
        grids.append(grid)
    return data, _ranges(grids)


def _heads_axes(sides: Sequence[Side], selection: Selection) -> go.Figure:
    fig = _paper("", sides, "head", "layer", _panels(sides), unit="", height=420)
    for n, side in enumerate([*sides, *sides[:1]][: len(_panels(sides))], 1):
        layers, heads = side.overview.layers, side.overview.heads
        fig.update_yaxes(range=[layers[-1] + 0.5, layers[0] - 0.5], tick0=0, dtick=1 + len(layers) // 12, row=1, col=n)
        fig.update_xaxes(range=[-0.5, heads - 0.5], tick0=0, dtick=1 + heads // 12, row=1, col=n)
    return fig.update_xaxes(showgrid=False, zeroline=False).update_yaxes(showgrid=False, zeroline=False)


def _heads_fill(sides: Sequence[Side], selection: Selection) -> Filled:
    data, maps = [], _with_difference([side.head_values(selection.value) for side in sides])
    for n, values in enumerate(maps):
        found = (sides[n] if n < len(sides) else sides[0]).overview
        data += [_heat(n, values, (len(found.layers), found.heads), "layer %{y}, head %{x}: %{z:.3g}",
                       x=list(range(found.heads)), y=list(found.layers)),
                 _mark(n, selection.head, None if selection.head is None else selection.layer)]
    return data, {"title_text": f"Every head: {HEAD_VALUES[selection.value]}", **_ranges(maps, None)}


def _row_axes(sides: Sequence[Side], selection: Selection) -> go.Figure:
    fig = _paper("Attention over the sequence", sides, "place in the sequence", "share", _panels(sides)[: len(sides)],
                 unit=None, rows=len(sides), height=160 + 170 * len(sides))
    return fig.update_layout(bargap=0.1)


def _row_fill(sides: Sequence[Side], selection: Selection) -> Filled:
    data = []
    for n, (side, values) in enumerate(zip(sides, _values(sides, selection))):
        found = side.overview
        for kind, name in zip(Modality, NAMES):
            at = (found.modality == kind).nonzero()[:, 0].tolist()
            data.append({"type": "bar", "x": at, "y": np.full(len(at), np.nan) if values is None
                         else values[at].round(5), "name": name, "legendgroup": name, "showlegend": n == 0,
                         "marker": {"color": MODALITY[name], "line": {"width": 0}},
                         "customdata": [plain(found.tokens[i]) for i in at], **_axes(n),
                         "hovertemplate": f"%{{customdata}} [{name}], place %{{x}}: %{{y:.4f}}<extra></extra>"})
    return data, {}


def _blocks_axes(sides: Sequence[Side], selection: Selection) -> go.Figure:
    fig = _paper("Attention between the modalities", sides, "to (keys)", "from (queries)", _panels(sides), height=380,
                 shared_yaxes=True)
    return fig.update_yaxes(autorange="reversed")


def _blocks_fill(sides: Sequence[Side], selection: Selection) -> Filled:
    layer, head = selection.layer, selection.head
    maps = _with_difference([s.overview.modality_mass(layer, head).numpy() if s.has(layer, head) else None
                             for s in sides])
    data = [_heat(n, values, (3, 3), "from %{y} to %{x}: %{z:.3f}", x=NAMES, y=NAMES, texttemplate="%{z:.2f}")
            for n, values in enumerate(maps)]
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
row = View("row", _row_axes, _row_fill,
           "every bar is a token of the sequence; its height is the share of attention that it gets. "
           "Colours are kinds of tokens.",
           "Bars over the places of both sequences, coloured by kind of token, with a slider over layers.")
blocks = View("blocks", _blocks_axes, _blocks_fill,
              "each line sums to 1. An empty one has no such query; a zero may be the mask.",
              "Maps of attention between text, image and special tokens, for both sides and their difference.")
VIEWS = (picture, text, heads, row, blocks)
