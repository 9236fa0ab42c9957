"""What all figures share: colours, paper, sliders, pooled maps, and data frames from analysis results.

    data = frame({"showo-tiny": [patterns_t2i, patterns_mmu]})          # a column `model` in front of every result's table()
    fig = paper("Entropy by layer", x="layer", y="entropy (nats)")

One view = one figure = one data frame: every function of `unimod.views` takes a frame and gives a plotly figure, and the frame is
what `run.table` saves. Colours are Okabe and Ito's for kinds and viridis or cividis for amounts; backgrounds are transparent and the
ink is a grey that reads on white and on black.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

INK = "#7a7a7a"
GRID = "rgba(128,128,128,0.25)"
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#999999")
TASK = {"t2i": "#0072B2", "mmu": "#E69F00", "lm": "#009E73"}
MODALITY = {"text": "#56B4E9", "image": "#D55E00", "special": "#999999"}
ARM = {"dense": "#999999", "mod": "#D55E00", "unimod": "#0072B2", "unimod-last-half": "#009E73"}
DASH = {"showo-tiny": "solid", "emu3-tiny": "dot"}
SYMBOL = {"showo-tiny": "circle", "emu3-tiny": "diamond"}
TASK_WORDS = {"t2i": "text to image", "mmu": "understanding", "lm": "plain text"}
AMOUNT, SHARE, DIFFERENCE = "Viridis", "Cividis", "RdBu"
OVERLAY = [[0, "rgba(68,1,84,0.30)"], [0.25, "rgba(59,82,139,0.45)"], [0.5, "rgba(33,145,140,0.62)"], [0.75, "rgba(94,201,98,0.8)"],
           [1, "rgba(253,231,37,0.95)"]]
"""Amounts over a picture: little attention leaves it visible."""
FIGURE_BYTES = 300_000
"""The largest figure, as JSON, that a run folder takes: a report stays light."""


class ViewError(ValueError):
    """A frame that cannot be drawn: the message names what it lacks."""


def frame(results: Mapping[str, Iterable], table: str = "table", **arguments: object) -> pd.DataFrame:
    """One long frame from analysis results per model: their `table()` (or another method's name) below one another."""
    rows = [{"model": name, **row} for name, found in results.items() for result in found for row in getattr(result, table)(**arguments)]
    return pd.DataFrame(rows)


def require(data: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The frame itself. Raises `ViewError` when it is empty or lacks a column."""
    missing = [name for name in columns if name not in data]
    if missing:
        raise ViewError(
            f"This frame has no column {', '.join(missing)}; it needs {', '.join(columns)} and has {', '.join(map(str, data.columns))}."
        )
    if data.empty:
        raise ViewError(f"This frame has no rows, so there is nothing to draw; it needs rows with {', '.join(columns)}.")
    return data


def paper(
    title: str, x: str = "", y: str = "", panels: Sequence[str] = ("",), height: int = 400, rows: int = 1, **options: object
) -> go.Figure:
    """An empty figure of `rows` x panels with shared ink; axis titles in words, y's at the left panels only."""
    columns = -(-len(panels) // rows)
    fig = make_subplots(rows=rows, cols=columns, subplot_titles=panels if any(panels) else None, **options)
    fig.update_layout(
        template="none",
        title={"text": title, "x": 0.02, "xanchor": "left"},
        height=height,
        font={"color": INK, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 70, "r": 30, "t": 80, "b": 60},
        legend={"bgcolor": "rgba(0,0,0,0)"},
        hoverlabel={"font": {"size": 13}},
    )
    fig.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, linecolor=INK, tickcolor=INK, title_text=x, row=rows)
    fig.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, linecolor=INK, tickcolor=INK)
    fig.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, linecolor=INK, tickcolor=INK)
    fig.update_yaxes(title_text=y, col=1)
    return fig


def lines(
    fig: go.Figure,
    data: pd.DataFrame,
    x: str,
    y: str,
    *,
    colour: str,
    name: str,
    group: str | None = None,
    low: str = "",
    high: str = "",
    sd: str = "",
    dash: str = "solid",
    panel: tuple[int, int] = (1, 1),
    legend: bool = True,
) -> None:
    """One line with markers; error bars from an interval (`low`, `high`) or a standard deviation column (`sd`)."""
    error = None
    if sd:
        error = {"type": "data", "array": data[sd].fillna(0), "thickness": 1, "width": 3}
    elif low:
        error = {"type": "data", "array": data[high] - data[y], "arrayminus": data[y] - data[low], "thickness": 1, "width": 3}
    fig.add_scatter(
        x=data[x],
        y=data[y],
        mode="lines+markers",
        name=name,
        legendgroup=group or name,
        showlegend=legend,
        error_y=error,
        line={"color": colour, "dash": dash},
        marker={"color": colour, "size": 7},
        row=panel[0],
        col=panel[1],
        hovertemplate=f"{name}<br>{x} %{{x}}: %{{y:.3g}}<extra></extra>",
    )


def slider(fig: go.Figure, frames: Sequence[go.Frame], label: str, active: int = 0, play: bool = False) -> go.Figure:
    """A slider over frames that needs no kernel; the figure shows the frame `active` first. play: buttons that run through them."""
    steps = [
        {
            "label": f.name,
            "method": "animate",
            "args": [[f.name], {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}],
        }
        for f in frames
    ]
    fig.frames = frames
    for at, trace in zip(frames[active].traces, frames[active].data):
        fig.data[at].update(trace)
    fig.update_layout(
        sliders=[{"active": active, "steps": steps, "currentvalue": {"prefix": f"{label} "}, "pad": {"t": 72}, "bordercolor": INK,
                  "tickcolor": INK}],
        height=(fig.layout.height or 400) + 110,
        margin={"b": 150},
    )
    if play:
        still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}}
        moves = {"mode": "immediate", "fromcurrent": True, "frame": {"duration": 700, "redraw": True}, "transition": {"duration": 0}}
        buttons = [{"label": "▶", "method": "animate", "args": [None, moves]}, {"label": "■", "method": "animate", "args": [[None], still]}]
        fig.update_layout(updatemenus=[{"type": "buttons", "direction": "left", "buttons": buttons, "x": 0, "xanchor": "left", "y": 0, "yanchor": "top",
                                        "pad": {"t": 70, "r": 10}, "showactive": False, "bordercolor": INK, "bgcolor": "rgba(128,128,128,0.15)"}])
        fig.layout.sliders[0].update(x=0.16, len=0.84)
    return fig


def thumb(picture: np.ndarray, side: int = 192) -> str:
    """A picture, uint8 [H, W, 3], as a data address of about `side` pixels: a small one enlarged without smoothing, a photograph as JPEG."""
    times, image, buffer = side // max(picture.shape[:2]), Image.fromarray(picture), io.BytesIO()
    if times >= 2:
        image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((side, side))
        image.save(buffer, "JPEG", quality=85)
    return f"data:image/{'png' if times >= 2 else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def put_picture(fig: go.Figure, picture: np.ndarray, panels: Iterable[int], grid: tuple[int, int]) -> None:
    """Lay a picture under panels (numbered from 1, row by row) whose axes count tokens, rows from the top."""
    (h, w), source = grid, thumb(picture)
    plain = {"showgrid": False, "zeroline": False, "constrain": "domain"}
    for n in panels:
        axis = "" if n == 1 else str(n)
        fig.add_layout_image(source=source, xref=f"x{axis}", yref=f"y{axis}", x=-0.5, y=-0.5, sizex=w, sizey=h, sizing="stretch", layer="below")
        fig.layout[f"xaxis{axis}"].update(range=[-0.5, w - 0.5], dtick=max(1, w // 8), **plain)
        fig.layout[f"yaxis{axis}"].update(range=[h - 0.5, -0.5], dtick=max(1, h // 8), scaleanchor=f"x{axis}", **plain)


def bytes_of(values: np.ndarray, top: float) -> np.ndarray:
    """Amounts from 0 to `top` as uint8 on a square-root scale, which keeps small amounts visible; `root_ticks` labels the bar."""
    return np.nan_to_num(255 * np.sqrt(np.clip(values / top, 0, 1))).round().astype(np.uint8)


def root_ticks(top: float) -> dict[str, list]:
    """Colour bar ticks for `bytes_of`, in the original unit."""
    at = [0, 0.04, 0.16, 0.36, 0.64, 1]
    return {"tickvals": [255 * a**0.5 for a in at], "ticktext": [f"{a * top:.2g}" for a in at]}


def words(task: str) -> str:
    """A task in words."""
    return TASK_WORDS.get(task, task)


def plain(text: str) -> str:
    """Text that a figure shows as it is: `<s>` and the like are markup to plotly."""
    return html.escape(text, quote=False)
