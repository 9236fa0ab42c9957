"""The five figures of the explorer: the picture, the text, layers and heads, the row, and the blocks from kind to kind.

    from unimod.views.drawings import DRAWINGS, picture
    picture.frames([a, b], Place(layer=3))              # a, b: views.looking.Side

Each is a `Drawing`: panels A, B and A - B where there are two sides, else one. A and B share one colour range; A - B diverges around 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import torch

from ..analysis.attention import NAMES
from ..batch import Modality
from .attention import HEAD_VALUES
from .looking import Drawing, Place, Side, asked, known, token
from .style import AMOUNT, DIFFERENCE, MODALITY, OVERLAY, paper, plain, put_picture

VEIL = [[0, "rgba(0,0,0,0)"], [1, "rgba(60,60,70,0.86)"]]
COLUMNS = 12
"""Text tokens in a line."""


def _titles(sides: Sequence[Side]) -> list[str]:
    return [plain(sides[0].title)] if len(sides) == 1 else ["A", "B", "A - B"]


def _paper(title: str, sides: Sequence[Side], x: str = "", y: str = "", panels: Sequence[str] = (), **options: object) -> go.Figure:
    """An empty figure; two sides are named below the title, their panels are called A and B."""
    fig = paper(title, x, y, panels, **options)
    if len(sides) == 2:
        named = " &nbsp; ".join(f"{letter}: {plain(side.title)}" for letter, side in zip("AB", sides))
        fig.update_layout(title_subtitle={"text": named, "font": {"size": 13}}, margin_t=105)
    return fig


def _with_difference(values: list[np.ndarray | None]) -> list[np.ndarray | None]:
    """Both, and their difference where they have one shape."""
    if len(values) == 1:
        return values
    a, b = values
    return [a, b, a - b if a is not None and b is not None and a.shape == b.shape else None]


def _ranges(values: list[np.ndarray | None], low: float | None = 0.0) -> dict:
    """One colour range for A and B; the difference's own, around 0."""
    both = [v for v in values[:2] if v is not None and np.isfinite(v).any()]
    top = max((float(np.nanmax(v)) for v in both), default=1.0) or 1.0
    bottom = min((float(np.nanmin(v)) for v in both), default=0.0) if low is None else low
    layout = {"coloraxis": {"cmin": bottom, "cmax": top}}
    if len(values) == 3:
        reach = float(np.nanmax(np.abs(values[2]))) if values[2] is not None and np.isfinite(values[2]).any() else 1.0
        layout["coloraxis2"] = {"cmin": -(reach or 1.0), "cmax": reach or 1.0}
    return layout


def _coloured(fig: go.Figure, unit: str, two: bool, scale: str | list = AMOUNT) -> go.Figure:
    """Colour axes: amounts for A and B, differences for A - B."""
    fig.update_layout(coloraxis={"colorscale": scale, "colorbar": {"title": {"text": unit}, "x": 1.0, "thickness": 14}}, margin={"r": 170 if two else 90})
    if two:
        fig.update_layout(coloraxis2={"colorscale": DIFFERENCE, "colorbar": {"title": {"text": "A - B"}, "x": 1.12, "thickness": 14}})
    return fig


def _z(values: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """Data for a heat map; a blank one where there is none."""
    return np.full(shape, np.nan, np.float32) if values is None else values.astype(np.float32).round(5)


def _heat(n: int, **options: object) -> go.Heatmap:
    return go.Heatmap(coloraxis="coloraxis" if n < 2 else "coloraxis2", **options)


def _mark() -> go.Scatter:
    """An open square on what is chosen."""
    marker = {"symbol": "square-open", "size": 20, "color": "#ff2d9b", "line": {"width": 3}}
    return go.Scatter(mode="markers", marker=marker, hoverinfo="skip", showlegend=False)


def _picture_lay(sides: Sequence[Side], place: Place) -> go.Figure:
    titles = _titles(sides)
    count = len(sides)
    fig = _paper("Where on the picture", sides, panels=[*titles, "the picture"], height=110 + 310 * count, rows=count, vertical_spacing=0.12)
    for n, side in enumerate([*sides, *[sides[0]] * count]):
        h, w = side.overview.grid
        picture = side.overview.picture if h and side.overview.picture is not None else np.full((max(h, 1), max(w, 1), 3), 200, np.uint8)
        put_picture(fig, picture, [n + 1], (h, w))
        if n == len(titles):                                    # the picture alone; axes without any trace have no size
            fig.add_scatter(x=[0], y=[0], mode="markers", marker={"opacity": 0}, hoverinfo="skip", showlegend=False, row=n // 2 + 1, col=n % 2 + 1)
            continue
        hover = "picture row %{y}, column %{x}: %{z:.4f}<extra></extra>"
        for trace in (_heat(n, z=np.zeros((h, w)), opacity=1 if n < 2 else 0.75, hovertemplate=hover),
                      go.Heatmap(z=np.zeros((h, w)), colorscale=VEIL, zmin=0, zmax=1, showscale=False, hoverinfo="skip", hovertemplate=""), _mark()):
            fig.add_trace(trace, row=n // 2 + 1, col=n % 2 + 1)
    return _coloured(fig, "share", len(sides) == 2, OVERLAY)


def _picture_fill(sides: Sequence[Side], place: Place) -> tuple[list[dict], dict]:
    values, veils, marks = [], [], []
    for side in sides:
        who, found = asked(side, sides[0], place.query), side.overview
        there = known(side, place) and who is not None
        values.append(found.on_picture(side.looks(place, who)).numpy() if there else None)
        veils.append((~found.on_picture(found.kept[found.layers.index(place.layer)])).numpy().astype(np.uint8) if there else np.zeros(found.grid, np.uint8))
        one = token(who)
        cell = None if one is None or found.modality[one] != Modality.IMAGE else int((found.modality[:one] == Modality.IMAGE).sum())
        marks.append({"x": [None], "y": [None]} if cell is None else {"x": [cell % found.grid[1]], "y": [cell // found.grid[1]]})
    values = _with_difference(values)
    veils.append(np.zeros(sides[0].overview.grid, np.uint8))
    marks.append({"x": [None], "y": [None]})
    grids = [s.overview.grid for s in [*sides, sides[0]]]
    data = [part for v, veil, mark, grid in zip(values, veils, marks, grids) for part in ({"z": _z(v, grid)}, {"z": veil}, mark)]
    return [*data, {}], _ranges(values)


def text_places(side: Side) -> list[int]:
    """The tokens of a row that are not the picture's."""
    return (side.overview.modality != Modality.IMAGE).nonzero()[:, 0].tolist()


def _lines(places: list[int], columns: int = COLUMNS) -> list[list[int | None]]:
    return [places[i: i + columns] + [None] * (columns - len(places[i: i + columns])) for i in range(0, len(places), columns)]


def _text_lay(sides: Sequence[Side], place: Place) -> go.Figure:
    count = [len(_lines(text_places(s))) for s in sides]
    fig = _paper("Where in the text", sides, panels=_titles(sides)[: len(sides)], rows=len(sides), height=130 + sum(50 + 32 * max(n, 2) for n in count),
                row_heights=count, vertical_spacing=0.28 / len(sides))
    for n, side in enumerate(sides):
        lines = _lines(text_places(side))
        words = [["" if i is None else _short(side.overview.tokens[i]) for i in line] for line in lines]
        places = [[-1 if i is None else i for i in line] for line in lines]
        fig.add_trace(_heat(0, z=np.zeros((len(lines), COLUMNS)), text=words, customdata=places, texttemplate="%{text}", textfont={"size": 11}, xgap=2, ygap=2,
                            hovertemplate="%{text} (token %{customdata}): %{z:.4f}<extra></extra>"), row=n + 1, col=1)
        fig.add_trace(_mark(), row=n + 1, col=1)
        fig.update_xaxes(range=[-0.5, COLUMNS - 0.5], row=n + 1, col=1)
        fig.update_yaxes(range=[len(lines) - 0.5, -0.5], row=n + 1, col=1)
    bare = {"showticklabels": False, "showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    return _coloured(fig.update_xaxes(**bare).update_yaxes(**bare), "share", False)


def _text_fill(sides: Sequence[Side], place: Place) -> tuple[list[dict], dict]:
    data, values = [], []
    for side in sides:
        who = asked(side, sides[0], place.query)
        places, lines = text_places(side), _lines(text_places(side))
        row = side.looks(place, who).numpy() if known(side, place) and who is not None else np.full(len(side.overview.tokens), np.nan)
        grid = np.array([[np.nan if i is None else row[i] for i in line] for line in lines])
        values.append(grid)
        at = places.index(token(who)) if token(who) in places else None
        data += [{"z": _z(grid, grid.shape)}, {"x": [None], "y": [None]} if at is None else {"x": [at % COLUMNS], "y": [at // COLUMNS]}]
    return data, _ranges(values)


def _short(token: str) -> str:
    token = token.removeprefix("<|").removesuffix("|>").strip(":")
    return plain(token if len(token) <= 8 else token[:7] + "…")


def _heads_lay(sides: Sequence[Side], place: Place) -> go.Figure:
    titles = _titles(sides)
    fig = _paper(f"Every head: {HEAD_VALUES[place.value]}", sides, "head", "layer", titles, height=420)
    for n, side in enumerate([*sides, *sides[:1]][: len(titles)]):
        found = side.overview
        fig.add_trace(_heat(n, z=np.zeros((len(found.layers), found.heads)), x=list(range(found.heads)), y=list(found.layers),
                            hovertemplate="layer %{y}, head %{x}: %{z:.3g}<extra></extra>"), row=1, col=n + 1)
        fig.add_trace(_mark(), row=1, col=n + 1)
        fig.update_yaxes(range=[found.layers[-1] + 0.5, found.layers[0] - 0.5], tick0=0, dtick=1 + len(found.layers) // 12, row=1, col=n + 1)
        fig.update_xaxes(range=[-0.5, found.heads - 0.5], tick0=0, dtick=1 + found.heads // 12, row=1, col=n + 1)
    return _coloured(fig.update_xaxes(showgrid=False, zeroline=False).update_yaxes(showgrid=False, zeroline=False), "", len(sides) == 2)


def _heads_fill(sides: Sequence[Side], place: Place) -> tuple[list[dict], dict]:
    values = _with_difference([side.head_values(place.value) for side in sides])
    mark = {"x": [None], "y": [None]} if place.head is None else {"x": [place.head], "y": [place.layer]}
    shapes = [s.head_values(place.value).shape for s in [*sides, sides[0]]]
    return [part for v, shape in zip(values, shapes) for part in ({"z": _z(v, shape)}, mark)], {
        "title_text": f"Every head: {HEAD_VALUES[place.value]}", **_ranges(values, None)}


def _row_lay(sides: Sequence[Side], place: Place) -> go.Figure:
    fig = _paper("Over the row", sides, "place in the row", "share", _titles(sides)[: len(sides)], rows=len(sides), height=160 + 170 * len(sides))
    for n, side in enumerate(sides):
        found = side.overview
        for kind, name in zip(Modality, NAMES):
            at = (found.modality == kind).nonzero()[:, 0].tolist()
            hover = f"%{{customdata}} [{name}], place %{{x}}: %{{y:.4f}}<extra></extra>"
            fig.add_bar(x=at, y=[0.0] * len(at), name=name, legendgroup=name, showlegend=n == 0, marker={"color": MODALITY[name], "line": {"width": 0}},
                        customdata=[plain(found.tokens[i]) for i in at], hovertemplate=hover, row=n + 1, col=1)
    return fig.update_layout(bargap=0.1)


def _row_fill(sides: Sequence[Side], place: Place) -> tuple[list[dict], dict]:
    data = []
    for side in sides:
        who = asked(side, sides[0], place.query)
        row = side.looks(place, who) if known(side, place) and who is not None else torch.full((len(side.overview.tokens),), torch.nan)
        data += [{"y": row[side.overview.modality == kind].numpy().round(5)} for kind in Modality]
    return data, {}


def _blocks_lay(sides: Sequence[Side], place: Place) -> go.Figure:
    titles = _titles(sides)
    fig = _paper("From kind to kind", sides, "looked at", "looking", titles, height=380, shared_yaxes=True)
    for n in range(len(titles)):
        fig.add_trace(_heat(n, z=np.zeros((3, 3)), x=NAMES, y=NAMES, texttemplate="%{z:.2f}", hovertemplate="from %{y} to %{x}: %{z:.3f}<extra></extra>"),
                      row=1, col=n + 1)
    return _coloured(fig.update_yaxes(autorange="reversed"), "share", len(sides) == 2)


def _blocks_fill(sides: Sequence[Side], place: Place) -> tuple[list[dict], dict]:
    values = _with_difference([side.overview.modality_mass(place.layer, place.head).numpy() if known(side, place) else None for side in sides])
    return [{"z": _z(v, (3, 3))} for v in values], {**_ranges(values), "coloraxis": {"cmin": 0.0, "cmax": 1.0}}


picture = Drawing("picture", _picture_lay, _picture_fill,
                  "bright patches are looked at most, on one scale for both; a veiled patch skips the layer. Play it through the layers.",
                  "The picture under a heat map of attention, for both sides and their difference, with a slider over layers.")
text = Drawing("text", _text_lay, _text_fill, "the words and marks of each row, coloured by how much they are looked at; blank ones skip the layer.",
               "The tokens of both rows as coloured tiles, with a slider over layers.")
heads = Drawing("heads", _heads_lay, _heads_fill, "how much of each head's attention flows to the picture; the third panel is the difference, around 0.",
                "Layers against heads, coloured by the share of attention on the picture, for both sides and their difference.")
row = Drawing("row", _row_lay, _row_fill, "every bar is a token of the row; its height is the share of attention that it gets. Colours are kinds of tokens.",
              "Bars over the places of both rows, coloured by text, picture and special tokens, with a slider over layers.")
blocks = Drawing("blocks", _blocks_lay, _blocks_fill, "each row sums to 1. An empty one has no such query; a zero may be the mask.",
                 "Three by three maps of attention between text, picture and special tokens, for both sides and their difference.")
DRAWINGS = (picture, text, heads, row, blocks)
