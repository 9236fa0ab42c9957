"""What all figures share: colours, words, axes, panels, heat maps, sliders, and the picture below a heat map.

Colours are Okabe and Ito's for categories (distinguishable without colour vision) and viridis or cividis for amounts.
Backgrounds are transparent and the ink is a grey that is legible on white and on black.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from PIL import Image
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

FIGURE_BYTES = 300_000
"""Largest JSON of one figure: a report of 30 figures stays below 10 MB."""
INK, GRID, CLEAR = "#7a7a7a", "rgba(128,128,128,0.25)", "rgba(0,0,0,0)"
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#999999")
TASK_WORDS = {"t2i": "text-to-image (T2I)", "mmu": "understanding (MMU)", "lm": "plain text (LM)"}
TASK = {"t2i": "#0072B2", "mmu": "#E69F00", "lm": "#009E73"}
MODALITY = {"text": "#56B4E9", "image": "#D55E00", "special": "#999999"}
ARM = {"dense": "#999999", "mod": "#D55E00", "unimod": "#0072B2", "unimod-last-half": "#009E73"}
OUTCOME = {"yes": "#009E73", "undecided": "#999999", "no": "#D55E00"}
COLOUR = {**ARM, **MODALITY, **OUTCOME, **TASK, **{TASK_WORDS[task]: colour for task, colour in TASK.items()}}
DASH = {"showo-tiny": "solid", "emu3-tiny": "dot"}
AMOUNT, SHARE, DIFFERENCE = "Viridis", "Cividis", "RdBu"
OVERLAY = [[0, "rgba(68,1,84,0.30)"], [0.25, "rgba(59,82,139,0.45)"], [0.5, "rgba(33,145,140,0.62)"],
           [0.75, "rgba(94,201,98,0.8)"], [1, "rgba(253,231,37,0.95)"]]
"""Viridis whose small amounts let the picture below show through."""
VEIL = [[0, CLEAR], [1, "rgba(60,60,70,0.86)"]]
"""Covers skipped patches (1) of a picture."""
POWERS = {"type": "log", "dtick": 1, "exponentformat": "power"}


class ViewError(ValueError):
    """A frame that cannot be drawn: the message names what it lacks."""


def frame(results: Mapping[str, Iterable], table: str = "table", **arguments: object) -> pd.DataFrame:
    """The rows of every result's `table()` (or another method) in one frame, with a column `model` in front."""
    return pd.DataFrame([{"model": name, **row} for name, found in results.items() for result in found
                         for row in getattr(result, table)(**arguments)])


def require(data: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The frame itself. Raises `ViewError` when it is empty or lacks a column."""
    missing, needed = [name for name in columns if name not in data], ", ".join(columns)
    if missing:
        raise ViewError(f"This frame has no column {', '.join(missing)}; it needs {needed} and has "
                        f"{', '.join(map(str, data.columns))}.")
    if data.empty:
        raise ViewError(f"This frame has no rows, so there is nothing to draw; it needs rows with {needed}.")
    return data


def words(name: object) -> str:
    """A task in words; anything else as it is."""
    return TASK_WORDS.get(name, str(name))


def plain(text: str) -> str:
    """Text that a figure shows as it is: `<s>` and the like are markup to plotly."""
    return html.escape(text, quote=False)


def shades(count: int) -> list[str]:
    """Colours of an ordered category, dark (first) to bright (last)."""
    return sample_colorscale(AMOUNT, np.linspace(0, 0.9, count))        # viridis' last tenth is too bright on white


def paper(title: str, x: str = "", y: str = "", panels: Sequence[str] = ("",), rows: int = 1, height: int = 0,
          **options: object) -> go.Figure:
    """An empty figure of panels, axes named at the left and at the bottom; options: of `make_subplots`."""
    options = {"vertical_spacing": 0.3 / rows} | options
    fig = make_subplots(rows, -(-len(panels) // rows), subplot_titles=panels if any(panels) else None, **options)
    return on_paper(fig, title, rows, height).update_xaxes(title_text=x, row=rows).update_yaxes(title_text=y, col=1)


def on_paper(fig: go.Figure, title: str, rows: int = 1, height: int = 0) -> go.Figure:
    """Shared title, ink, grid and margins; without a height the figure gets one for its lines of panels."""
    fig.update_layout(template="none", title={"text": title, "x": 0.02, "xanchor": "left"}, font_color=INK,
                      height=height or max(400, 140 + 230 * rows), paper_bgcolor=CLEAR, plot_bgcolor=CLEAR,
                      margin={"l": 70, "r": 30, "t": 80, "b": 60}, legend={"bgcolor": CLEAR, "title": {"text": ""}})
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": INK, "tickcolor": INK, "automargin": True}
    return fig.update_xaxes(**axis).update_yaxes(**axis)


def in_panels(data: pd.DataFrame, *columns: str) -> tuple[pd.DataFrame, list[str], int]:
    """The frame with a column `panel` that joins the values of columns ("unimod: plain text (LM)").

    Also all panels in order, and how many stand side by side: all of one column, of two those of the second. Columns
    that the frame lacks are left out.
    """
    found = [data[name].map(words).astype(str) for name in columns if name in data]
    if not found:
        return data, [""], 1
    panel = found[0] if len(found) == 1 else found[0] + ": " + found[1]
    names = [": ".join(pair) for pair in itertools.product(*(column.unique() for column in found))]
    return data.assign(panel=panel), names, found[-1].nunique()


def facets(plot: Callable, data: pd.DataFrame, x: str, y: str, *, title: str, color: str,
           panel: str | Sequence[str] = (), labels: Mapping[str, str] = {}, low: str = "", high: str = "",
           sd: str = "", reference: str = "", meaning: str = "", free: bool = False,
           colours: Mapping[str, str] = COLOUR, **options: object) -> go.Figure:
    """A figure by plotly.express, with a panel per value of `panel` (see `in_panels`), a colour per value of `color`.

    plot: px.line, px.bar or px.scatter; options: its own. labels: words for axes and hover by column. free: panels have
    their own ranges of y. Error bars: low and high are columns with the ends of an interval, sd one with a standard
    deviation. reference: a column drawn dashed in the place of y, with its `meaning` in words. A layer as colour is
    dark (first) to bright (last); other values that `colours` lacks take the palette's.
    """
    columns = [name for name in ([panel] if isinstance(panel, str) else panel) if name in data]
    data, panels, across = in_panels(data, *columns)
    rows, palette = -(-len(panels) // across), OKABE_ITO
    if color == "layer":
        palette, data = shades(data["layer"].nunique()), data.assign(layer=data["layer"].map("layer {}".format))
    if "task" in data:
        data = data.assign(task=data["task"].map(words))
    if low:
        options |= {"error_y": data[high] - data[y], "error_y_minus": data[y] - data[low]}
    elif sd:
        options |= {"error_y": sd}
    if reference:
        level = data.assign(line=meaning, **{y: data[reference]}, **({sd: np.nan} if sd else {}))
        data, title = pd.concat([data.assign(line="measured"), level]), f"{title} (dashed: {meaning})"
        options |= {"line_dash": "line", "line_dash_map": {"measured": "solid", meaning: "dash"}}
    if options.get("line_dash") == "model":
        options |= {"line_dash_map": DASH}
    if plot is not px.bar:
        options |= {"render_mode": "svg"}               # a page has few WebGL contexts, and a report many figures
    if "panel" in data:
        options |= {"facet_col": "panel", "facet_col_wrap": across, "facet_col_spacing": 0.08 if free else 0.04,
                    "facet_row_spacing": 0.35 / max(2, rows),
                    "category_orders": {"panel": panels, **options.get("category_orders", {})}}
    chosen = {name: colours.get(name, palette[n % len(palette)]) for n, name in enumerate(data[color].unique())}
    labels = {name: name.replace("_", " ") for name in data.columns} | {"panel": ", ".join(columns)} | dict(labels)
    options = {"hover_data": {y: ":.4g"}} | options
    fig = plot(data, x=x, y=y, color=color, color_discrete_map=chosen, labels=labels, template="none", **options)
    fig.for_each_annotation(lambda note: note.update(text=plain(note.text.partition("=")[2])))
    fig.update_traces(error_y={"thickness": 1, "width": 3}, selector=lambda trace: "error_y" in trace)
    if options.get("line_dash") == "line":              # references have no marks
        fig.update_traces(mode="lines", selector={"line_dash": "dash"})
    if reference:                                       # shown and hidden with the measured line of its colour
        fig.for_each_trace(lambda trace: trace.update(legendgroup=trace.line.color,
                                                      name=trace.name.removesuffix(", measured")))
        fig.update_traces(showlegend=False, line_width=1, selector={"line_dash": "dash"})
    fig.update_xaxes(matches=None, showticklabels=True)
    if x == "layer":
        fig.update_xaxes(dtick=1 + data["layer"].nunique() // 16)
    if free:
        fig.update_yaxes(matches=None, showticklabels=True)
    return on_paper(fig, title, rows)


def over_seeds(data: pd.DataFrame, x: str, y: str, step: str, by: Sequence[str], **options: object) -> go.Figure:
    """A thin line per seed and a thick one for their mean at every `step`, for every combination of the columns `by`;
    options: of `facets`."""
    data = data.assign(**{name: pd.Categorical(data[name], data[name].unique()) for name in by})
    mean = data.groupby([*by, step], observed=True)[list({x, y} - {step})].mean().reset_index()
    fig = facets(px.line, mean.round({y: 5}), x, y, **options).update_traces(line_width=2.5)
    several = data.groupby(list(by), observed=True)["seed"].transform("nunique") > 1
    if several.any():
        # the lines of single seeds stay, without values: otherwise a panel could be missing and the others move up
        single = data.assign(**{y: data[y].round(5).where(several)})
        thin = facets(px.line, single, x, y, line_group="seed", **options)
        thin.update_traces(showlegend=False, opacity=0.4, line_width=1)
        thick = fig.data
        fig.add_traces(thin.data)
        fig.data = (*fig.data[len(thick):], *thick)     # the means lie on top
    return fig.for_each_trace(lambda trace: trace.update(mode="lines+markers" if len(trace.x) == 1 else "lines"))


def legend_below(fig: go.Figure) -> go.Figure:
    """The legend under the panels, which keep their width."""
    below = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
    return fig.update_layout(legend=below, margin_b=130, height=fig.layout.height + 70)


def heat_maps(title: str, frames: Mapping[object, Sequence[dict]], panels: Sequence[str], *, hover: str, x: str = "",
              y: str = "", rows: int = 1, height: int = 0, scale: str | list = AMOUNT, limits: tuple = (0, 1),
              bar: Mapping = {}, grid: tuple[int, int] | None = None, active: int = 0,
              **options: object) -> go.Figure:
    """A heat map per panel on one colour axis, with a slider where there are several layers.

    frames: per layer the properties of a plotly heat map for every panel, z above all; options: those that all share.
    limits: of the colour axis; bar: its colour bar. grid: patches of a picture, [H, W], which the cells are. hover:
    template of the hover text, to which the panel's title is added.
    """
    fig = paper(title, x, y, panels, rows, height, shared_yaxes=grid is None)
    shared = [{"coloraxis": "coloraxis", "hovertemplate": f"{hover}<extra>{panel}</extra>", "xaxis": f"x{n}",
               "yaxis": f"y{n}", **options} for n, panel in enumerate(panels, 1)]
    fig.update_layout(coloraxis={"colorscale": scale, "cmin": limits[0], "cmax": limits[1],
                                 "colorbar": {"title_text": "share", **bar}})
    fig.update_xaxes(showgrid=False, zeroline=False).update_yaxes(showgrid=False, zeroline=False)
    if grid is not None:
        squares(fig, range(1, len(panels) + 1), grid)
    moving = [go.Frame(name=str(layer), data=[go.Heatmap(one | cell) for one, cell in zip(shared, cells)])
              for layer, cells in frames.items()]
    return slider(fig.add_traces(moving[active].data), moving, active)


def slider(fig: go.Figure, frames: Sequence[go.Frame], active: int = 0) -> go.Figure:
    """A slider over layers, where there are several, and buttons that run through them; both need no kernel. The figure
    shows the frame `active` already; a frame that names no traces has all of them."""
    if len(frames) < 2:
        return fig
    for one in frames:
        one.traces = one.traces or list(range(len(one.data)))
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    moving = still | {"fromcurrent": True, "frame": {"duration": 700, "redraw": True}}
    steps = [{"label": one.name, "method": "animate", "args": [[one.name], still]} for one in frames]
    buttons = [{"label": "▶", "method": "animate", "args": [None, moving]},
               {"label": "■", "method": "animate", "args": [[None], still]}]
    fig.update(frames=frames)
    return fig.update_layout(
        height=fig.layout.height + 110, margin_b=150,
        sliders=[{"active": active, "steps": steps, "currentvalue": {"prefix": "layer "}, "pad": {"t": 72}, "x": 0.16,
                  "len": 0.84, "bordercolor": INK, "tickcolor": INK}],
        updatemenus=[{"type": "buttons", "direction": "left", "buttons": buttons, "x": 0, "xanchor": "left", "y": 0,
                      "yanchor": "top", "pad": {"t": 70}, "showactive": False, "bordercolor": INK,
                      "bgcolor": "rgba(128,128,128,0.15)"}])


def squares(fig: go.Figure, panels: Iterable[int], grid: tuple[int, int]) -> None:
    """Axes that count the patches of a picture, from the top, in panels (numbered from 1, line by line)."""
    for n in panels:
        for axis, count, ends in (("x", grid[1], (-0.5, grid[1] - 0.5)), ("y", grid[0], (grid[0] - 0.5, -0.5))):
            fig.layout[f"{axis}axis{n}"].update(range=ends, dtick=max(1, count // 8), constrain="domain",
                                                showgrid=False, zeroline=False)
        fig.layout[f"yaxis{n}"].scaleanchor = f"x{n}"


def put_picture(fig: go.Figure, picture: np.ndarray, panels: Iterable[int], grid: tuple[int, int]) -> None:
    """Lay a picture, uint8 [H, W, 3], under panels of `squares`: a small one enlarged without smoothing, a photograph
    as JPEG."""
    squares(fig, panels, grid)
    image, buffer, times = Image.fromarray(picture), io.BytesIO(), 192 // max(picture.shape[:2])
    kind = "png" if times >= 2 else "jpeg"              # a photograph of 192 pixels: 10 kB as JPEG, 100 as PNG
    if times >= 2:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    image.thumbnail((192, 192))
    image.save(buffer, kind, optimize=True, quality=85)
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    for n in panels:
        fig.add_layout_image(source=source, xref=f"x{n}", yref=f"y{n}", x=-0.5, y=-0.5, sizex=grid[1], sizey=grid[0],
                             sizing="stretch", layer="below")
