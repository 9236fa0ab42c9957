"""What all figures share: colours, words, axes, panels, heat maps, sliders, and the picture below a heat map.

Every function of `unimod.views` takes data (a frame, a record, tensors) and returns one plotly figure; it runs no model
and writes no file. Colours are Okabe and Ito's for categories (distinguishable without colour vision) and viridis or
cividis for amounts. Backgrounds are transparent and the ink is a grey that is legible on white and on black.
"""

from __future__ import annotations

import base64
import html
import io
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
COLOUR = {**ARM, **MODALITY, **TASK, **{TASK_WORDS[task]: colour for task, colour in TASK.items()}}
DASH = {"showo-tiny": "solid", "emu3-tiny": "dot"}
SYMBOL = {"showo-tiny": "circle", "emu3-tiny": "diamond"}
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
    """One long frame from analysis results per model: the rows of their `table()` (or another method's name), with a
    column `model` in front."""
    pairs = ((name, result) for name, found in results.items() for result in found)
    return pd.DataFrame([{"model": name, **row} for name, result in pairs
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
    """Colours of an ordered category, dark (first) to bright (last); the last tenth of viridis is too bright on
    white."""
    return sample_colorscale(AMOUNT, np.linspace(0, 0.9, count))


def on_paper(fig: go.Figure, title: str, height: int = 400) -> go.Figure:
    """Shared title, ink, grid and margins for any figure."""
    fig.update_layout(template="none", title={"text": title, "x": 0.02, "xanchor": "left"}, height=height,
                      font={"color": INK, "size": 13}, paper_bgcolor=CLEAR, plot_bgcolor=CLEAR,
                      margin={"l": 70, "r": 30, "t": 80, "b": 60}, legend={"bgcolor": CLEAR, "title": {"text": ""}},
                      hoverlabel={"font": {"size": 13}})
    fig.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, linecolor=INK, tickcolor=INK)
    return fig.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, linecolor=INK, tickcolor=INK)


def paper(title: str, x: str = "", y: str = "", panels: Sequence[str] = ("",), rows: int = 1, height: int = 400,
          **options: object) -> go.Figure:
    """An empty figure of `rows` lines of panels, with axis titles at the left and at the bottom; options: of
    `make_subplots`."""
    fig = make_subplots(rows=rows, cols=-(-len(panels) // rows), subplot_titles=panels if any(panels) else None,
                        **options)
    return on_paper(fig, title, height).update_xaxes(title_text=x, row=rows).update_yaxes(title_text=y, col=1)


def facets(plot: Callable, data: pd.DataFrame, x: str, y: str, *, title: str, color: str,
           labels: Mapping[str, str] = {}, panel: str | None = None, across: int = 0, each: int = 0, low: str = "",
           high: str = "", sd: str = "", free: bool = False, palette: Sequence[str] = OKABE_ITO,
           colours: Mapping[str, str] = COLOUR, **options: object) -> go.Figure:
    """A figure by plotly.express: a panel per value of the column `panel` (if there is one), a colour per value of
    `color`.

    plot: px.line, px.bar or px.scatter; options: its own. labels: words for axes and hover by column. across: panels in
    a line (0: all), each `each` pixels high; free: each with its own range of y. low and high: columns with the ends of
    an interval around y, or sd: its standard deviation, drawn as error bars. Values that `colours` lacks take the
    palette's.
    """
    panel = panel if panel in data else None
    rows = -(-data[panel].nunique() // across) if panel and across else 1
    if low:
        options |= {"error_y": data[high] - data[y], "error_y_minus": data[y] - data[low]}
    elif sd:
        options |= {"error_y": sd}
    if plot is not px.bar:
        options |= {"render_mode": "svg"}               # a page has few WebGL contexts, and a report many figures
    if panel:
        options |= {"facet_col": panel, "facet_col_wrap": across, "facet_col_spacing": 0.08 if free else 0.04,
                    "facet_row_spacing": 0.35 / max(2, rows)}
    chosen = {name: colours.get(name, palette[n % len(palette)]) for n, name in enumerate(data[color].unique())}
    labels = {name: name.replace("_", " ") for name in data.columns} | dict(labels)
    options = {"hover_data": {y: ":.4g"}} | options
    fig = plot(data, x=x, y=y, color=color, color_discrete_map=chosen, labels=labels, template="none", **options)
    fig.for_each_annotation(lambda note: note.update(text=plain(note.text.partition("=")[2])))
    fig.update_traces(error_y={"thickness": 1, "width": 3}, selector=lambda trace: "error_y" in trace)
    fig.update_xaxes(matches=None, showticklabels=True)
    if free:
        fig.update_yaxes(matches=None, showticklabels=True)
    return on_paper(fig, title, max(400, 140 + each * rows))


def with_reference(data: pd.DataFrame, value: str, reference: str, name: str, *errors: str) -> pd.DataFrame:
    """The rows twice, told apart by the column `line`: "measured", and `name` with `reference` in the place of `value`
    and no error bars."""
    compared = data.assign(line=name, **{value: data[reference]}, **dict.fromkeys(errors, np.nan))
    return pd.concat([data.assign(line="measured"), compared])


def dashed(fig: go.Figure, legend: bool = True) -> go.Figure:
    """Dashed lines of reference without markers; without `legend` they are shown and hidden with the measured line of
    their colour."""
    fig.update_traces(mode="lines", selector={"line_dash": "dash"})
    if not legend:
        fig.update_traces(showlegend=False, line_width=1, selector={"line_dash": "dash"})
        fig.for_each_trace(lambda trace: trace.update(legendgroup=trace.line.color))
    return fig


def over_seeds(plot: Callable, data: pd.DataFrame, x: str, y: str, step: str, by: Sequence[str],
               **options: object) -> go.Figure:
    """A thin line per seed and a thick one for their mean at every `step`, for every combination of the columns `by`;
    options: of `facets`."""
    mean = data.groupby([*by, step], sort=False)[list({x, y} - {step})].mean().reset_index()
    mean = mean.sort_values(step, kind="stable").round({y: 5})    # further digits are below a pixel
    order = {"category_orders": {name: list(data[name].unique()) for name in by}}
    fig = facets(plot, mean, x, y, **order, **options).update_traces(line={"width": 2.5})
    several = data.groupby(list(by), sort=False)["seed"].transform("nunique") > 1
    if several.any():
        # the lines of single seeds stay, without values: otherwise a panel could be missing and the others move up
        thick, thin = fig.data, data.assign(**{y: data[y].round(5).where(several)})
        fig.add_traces(facets(plot, thin, x, y, line_group="seed", **order, **options).data)
        for trace in fig.data[len(thick):]:
            trace.update(showlegend=False, opacity=0.4, line={"width": 1})
        fig.data = (*fig.data[len(thick):], *thick)     # the means lie on top
    return fig.for_each_trace(lambda trace: trace.update(mode="lines+markers" if len(trace.x) == 1 else "lines"))


def legend_below(fig: go.Figure) -> go.Figure:
    """The legend under the panels, which keep their width."""
    below = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
    return fig.update_layout(legend=below, margin={"b": 130}, height=fig.layout.height + 70)


def heat_maps(title: str, frames: Mapping[object, Sequence[dict]], panels: Sequence[str], *, x: str = "", y: str = "",
              hover: str, rows: int = 1, height: int = 400, active: int = 0, play: bool = False, coloraxis: Mapping,
              subplots: Mapping = {}, **options: object) -> go.Figure:
    """A heat map per panel on one colour axis, with a slider over `frames` where there are several.

    frames: for every layer (the name of a slider's step) the properties of a plotly heat map per panel, z above all;
    options: those that all share. subplots: options of `make_subplots`. hover: template of the hover text, to which the
    panel's title is added.
    """
    fig = paper(title, x, y, panels, rows, height, **{"shared_yaxes": True, **subplots})
    across = -(-len(panels) // rows)
    shared = [{"coloraxis": "coloraxis", "hovertemplate": f"{hover}<extra>{panel}</extra>", **options}
              for panel in panels]
    traces = [[go.Heatmap(one | cell) for one, cell in zip(shared, cells)] for cells in frames.values()]
    for n, trace in enumerate(traces[active]):
        fig.add_trace(trace, row=n // across + 1, col=n % across + 1)
    bare = {"showgrid": False, "zeroline": False}
    fig.update_layout(coloraxis=coloraxis).update_xaxes(**bare).update_yaxes(**bare)
    moving = [go.Frame(name=str(name), data=one, traces=list(range(len(one)))) for name, one in zip(frames, traces)]
    return slider(fig, moving, "layer", active, play) if len(moving) > 1 else fig


def slider(fig: go.Figure, frames: Sequence[go.Frame], label: str, active: int = 0, play: bool = False) -> go.Figure:
    """A slider over frames that needs no kernel; the figure shows the frame `active` first. play: buttons that run
    through them."""
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"label": f.name, "method": "animate", "args": [[f.name], still]} for f in frames]
    fig.frames = frames
    for at, trace in zip(frames[active].traces, frames[active].data):
        fig.data[at].update(trace)
    bar = {"active": active, "steps": steps, "currentvalue": {"prefix": f"{label} "}, "pad": {"t": 72},
           "bordercolor": INK, "tickcolor": INK}
    fig.update_layout(sliders=[bar], height=(fig.layout.height or 400) + 110, margin={"b": 150})
    if play:
        moves = still | {"fromcurrent": True, "frame": {"duration": 700, "redraw": True}}
        buttons = [{"label": "▶", "method": "animate", "args": [None, moves]},
                   {"label": "■", "method": "animate", "args": [[None], still]}]
        fig.update_layout(updatemenus=[{"type": "buttons", "direction": "left", "buttons": buttons, "x": 0,
                                        "xanchor": "left", "y": 0, "yanchor": "top", "pad": {"t": 70, "r": 10},
                                        "showactive": False, "bordercolor": INK, "bgcolor": "rgba(128,128,128,0.15)"}])
        fig.layout.sliders[0].update(x=0.16, len=0.84)
    return fig


def thumb(picture: np.ndarray, side: int = 192) -> str:
    """A picture, uint8 [H, W, 3], as a data URL of about `side` pixels: a small one enlarged without smoothing, a
    photograph as JPEG."""
    times, image, buffer = side // max(picture.shape[:2]), Image.fromarray(picture), io.BytesIO()
    if times >= 2:
        image.resize((image.width * times, image.height * times),
                     Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((side, side))
        image.save(buffer, "JPEG", quality=85)
    return f"data:image/{'png' if times >= 2 else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def put_picture(fig: go.Figure, picture: np.ndarray, panels: Iterable[int], grid: tuple[int, int]) -> None:
    """Lay a picture under panels (numbered from 1, line by line) whose axes count tokens, rows from the top."""
    (h, w), source = grid, thumb(picture)
    square = {"showgrid": False, "zeroline": False, "constrain": "domain"}
    for n in panels:
        axis = "" if n == 1 else str(n)
        fig.add_layout_image(source=source, xref=f"x{axis}", yref=f"y{axis}", x=-0.5, y=-0.5, sizex=w, sizey=h,
                             sizing="stretch", layer="below")
        fig.layout[f"xaxis{axis}"].update(range=[-0.5, w - 0.5], dtick=max(1, w // 8), **square)
        fig.layout[f"yaxis{axis}"].update(range=[h - 0.5, -0.5], dtick=max(1, h // 8), scaleanchor=f"x{axis}", **square)


def bytes_of(values: np.ndarray, top: float) -> np.ndarray:
    """Amounts from 0 to `top` as uint8 on a square-root scale, which keeps small amounts visible; `root_ticks` labels
    the colour bar."""
    return np.nan_to_num(255 * np.sqrt(np.clip(values / top, 0, 1))).round().astype(np.uint8)


def root_ticks(top: float) -> dict[str, list]:
    """Colour bar ticks for `bytes_of`, in the original unit."""
    at = [0, 0.04, 0.16, 0.36, 0.64, 1]
    return {"tickvals": [255 * a**0.5 for a in at], "ticktext": [f"{a * top:.2g}" for a in at]}
