"""Figures of what routers do, from the tables of `unimod.analysis.routing`.

    kept_by_modality(pd.DataFrame(kept(log, packed)))
    tables = diagnose(model, batches)                   # of several arms: rows concatenated, with a column arm
    kept_positions(pd.DataFrame(tables["positions"]))
    overlaps(pd.DataFrame(tables["overlaps"]))
    score_histograms(pd.DataFrame(tables["histograms"]))
    kept_over_training(evaluation_frame(results))       # views.arms
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .style import INK, MODALITY, SHARE, TASK, lines, paper, require, slider, words

BETWEEN = "t2i and mmu"
COLOUR = {**TASK, BETWEEN: "#CC79A7"}


def kept_by_modality(data: pd.DataFrame) -> go.Figure:
    """Which kinds of token each routed layer keeps: a row of panels per arm, a panel per task.

    Filled: of the tokens that were up for choice; outlined: of all tokens, those kept by rule included. data: `kept`.
    """
    data = _arms(require(data, "layer", "task", "modality", "kept", "processed"))
    arms, tasks = list(data["arm"].unique()), list(data["task"].unique())
    fig = _grid("What kinds of token are kept", "layer", "share kept", arms, [words(t) for t in tasks])
    shown: set[str] = set()
    for (arm, task, modality), part in data.groupby(["arm", "task", "modality"], sort=False):
        for value, fill, what in (("processed", "rgba(0,0,0,0)", "of all tokens"), ("kept", MODALITY[modality], "of those up for choice")):
            fig.add_bar(
                x=part["layer"],
                y=part[value].round(4),
                name=modality,
                legendgroup=modality,
                offsetgroup=modality,
                showlegend=value == "kept" and modality not in shown,
                marker={"color": fill, "line": {"width": 1, "color": MODALITY[modality]}},
                hovertemplate=f"{modality}, layer %{{x}}: %{{y:.2f}} {what}<extra>{arm}</extra>",
                row=arms.index(arm) + 1,
                col=tasks.index(task) + 1,
            )
        shown.add(modality)
    return fig.update_yaxes(range=[0, 1]).update_xaxes(dtick=1)


def kept_positions(data: pd.DataFrame) -> go.Figure:
    """How often each place of the picture is kept: slider over layers, a row of panels per arm, the tasks side by side, one colour range.

    A panel is empty where no token of the task was up for choice. data: rows "positions" of `diagnose`.
    """
    data = _arms(require(data, "layer", "task", "row", "column", "kept"))
    arms, tasks = list(data["arm"].unique()), list(data["task"].unique())
    fig = _grid("Which places of the picture are kept", "picture column", "picture row", arms, [words(t) for t in tasks], each=230)
    empty = np.full((data["row"].max() + 1, data["column"].max() + 1), np.nan, np.float32)
    panels = [(arm, task) for arm in arms for task in tasks]
    frames, filled = [], []
    for layer, part in data.groupby("layer"):
        maps = {key: rows.pivot(index="row", columns="column", values="kept") for key, rows in part.groupby(["arm", "task"])}
        traces = [_map(maps[key].to_numpy(np.float32) if key in maps else empty, *key) for key in panels]
        frames.append(go.Frame(name=str(layer), data=traces, traces=list(range(len(panels)))))
        filled.append(len(maps))
    active = filled.index(max(filled))
    for n, trace in enumerate(frames[active].data):
        row, col = n // len(tasks) + 1, n % len(tasks) + 1
        fig.add_trace(trace, row=row, col=col)
        fig.update_yaxes(range=[len(empty) - 0.5, -0.5], scaleanchor=f"x{n + 1 if n else ''}", row=row, col=col)
    fig.update_layout(coloraxis={"colorscale": SHARE, "cmin": 0, "cmax": 100, "colorbar": {"title": {"text": "share of rows"}, "ticksuffix": " %"}})
    fig.update_xaxes(range=[-0.5, empty.shape[1] - 0.5], showgrid=False, zeroline=False, constrain="domain")
    fig.update_yaxes(showgrid=False, zeroline=False, constrain="domain")
    return slider(fig, frames, "layer", active)


def overlaps(data: pd.DataFrame) -> go.Figure:
    """How much the same tokens are kept by a layer and the next routed one, per task, and by the two tasks in one layer; dashed: by chance.

    data: rows of `neighbours` and of `tasks`, which have the task "t2i and mmu"; a panel per arm.
    """
    data = _arms(require(data, "layer", "task", "overlap", "chance"))
    arms = list(data["arm"].unique())
    fig = paper("Are the same tokens kept?", "layer", "share of the smaller choice", arms, shared_yaxes=True)
    shown: set[str] = set()
    for (arm, task), part in data.groupby(["arm", "task"], sort=False):
        name = "the two tasks, picture tokens" if task == BETWEEN else f"{words(task)}: with the next routed layer"
        at = (1, arms.index(arm) + 1)
        lines(fig, part, "layer", "overlap", colour=COLOUR[task], name=name, panel=at, legend=name not in shown)
        lines(fig, part, "layer", "chance", colour=COLOUR[task], name=f"{name}, by chance", group=name, dash="dash", panel=at, legend=False)
        shown.add(name)
    return _below(fig.update_yaxes(range=[0, 1.02]).update_xaxes(dtick=1))


def score_histograms(data: pd.DataFrame) -> go.Figure:
    """Scores of the tokens up for choice, and the gate of those kept: slider over layers, a row of panels per arm, a colour per task.

    data: `histograms`. The axes follow the layer; a task's bins span its own values, so that a narrow curve is a narrow distribution.
    """
    data = _arms(require(data, "layer", "task", "value", "low", "high", "share"))
    arms, tasks, values = (list(data[c].unique()) for c in ("arm", "task", "value"))
    fig = _grid("Scores and gates", "", "share of tokens", arms, values)
    panels = [(arm, value) for arm in arms for value in values]
    frames, filled = [], []
    for layer, part in data.groupby("layer"):
        found = dict(iter(part.groupby(["arm", "value", "task"])))
        traces = [_steps(found.get((*panel, task), part.iloc[:0]), panel, task, legend=panel == panels[0]) for panel in panels for task in tasks]
        layout = {}
        for n, (arm, value) in enumerate(panels, 1):
            here = part[(part["arm"] == arm) & (part["value"] == value)]
            if len(here):
                layout[f"xaxis{n}"] = {"range": [here["low"].min(), here["high"].max()]}
                layout[f"yaxis{n}"] = {"range": [0, 1.05 * here["share"].max()]}
        frames.append(go.Frame(name=str(layer), data=traces, traces=list(range(len(traces))), layout=layout))
        filled.append(len(found))
    active = filled.index(max(filled))
    for n, trace in enumerate(frames[active].data):
        fig.add_trace(trace, row=n // len(tasks) // len(values) + 1, col=n // len(tasks) % len(values) + 1)
    return slider(fig.update_layout(frames[active].layout), frames, "layer", active)


def kept_over_training(data: pd.DataFrame) -> go.Figure:
    """Share of the tokens up for choice that are kept, at every evaluation, mean over layers and seeds: a row per model, a panel per routed arm.

    data: `views.arms.evaluation_frame` with the columns routing/kept_<task>_<modality>; arms without them are left out.
    """
    columns = [c for c in data if c.startswith("routing/kept_")]
    data = require(data, "model", "arm", "step", *(columns or ["routing/kept_t2i_image"])).dropna(subset=columns, how="all")
    models, arms = list(data["model"].unique()), list(data["arm"].unique())
    fig = _grid("Who is kept while the model trains", "step", "share kept", models, arms)
    shown: set[str] = set()
    for (model, arm), part in data.groupby(["model", "arm"], sort=False):
        mean = part.groupby("step")[columns].mean().reset_index()
        for column in columns:
            _, task, modality = column.split("_")
            name, some = f"{words(task)}: {modality}", mean.dropna(subset=[column])
            if len(some):
                lines(fig, some, "step", column, colour=MODALITY[modality], dash="solid" if task == "t2i" else "dot", name=name,
                      panel=(models.index(model) + 1, arms.index(arm) + 1), legend=name not in shown)
                shown.add(name)
    return _below(fig.update_yaxes(range=[0, 1.02]))


def _arms(data: pd.DataFrame) -> pd.DataFrame:
    return data if "arm" in data else data.assign(arm="")


def _grid(title: str, x: str, y: str, rows: Sequence[str], columns: Sequence[str], each: int = 180) -> go.Figure:
    """Panels under the title "row: column"."""
    names = [f"{row}: {column}" if row else column for row in rows for column in columns]
    return paper(title, x, y, names, height=max(400, 140 + each * len(rows)), rows=len(rows), vertical_spacing=0.35 / max(2, len(rows)))


def _below(fig: go.Figure) -> go.Figure:
    """The legend under the panels, which keep their width."""
    return fig.update_layout(legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}, margin={"b": 130}, height=fig.layout.height + 70)


def _map(share: np.ndarray, arm: str, task: str) -> go.Heatmap:
    """Whole per cent, a byte a cell where all cells are known."""
    percent = (100 * share).round()
    return go.Heatmap(z=percent if np.isnan(percent).any() else percent.astype(np.uint8), coloraxis="coloraxis", xgap=1, ygap=1,
                      hovertemplate=f"{arm} {words(task)}<br>picture row %{{y}}, column %{{x}}: kept in %{{z}} % of the rows<extra></extra>")


def _steps(part: pd.DataFrame, panel: tuple[str, str], task: str, legend: bool) -> go.Scatter:
    """A histogram as a stepped outline, filled lightly; its tasks lie over one another. No bins give one missing point, which keeps the legend."""
    edges, shares = part["low"].round(4).tolist(), part["share"].round(4).tolist()
    x, y = ([*edges, part["high"].round(4).iloc[-1]], [*shares, shares[-1]]) if edges else ([None], [None])
    return go.Scatter(x=x, y=y, mode="lines", line={"shape": "hv", "color": COLOUR.get(task, INK), "width": 2}, fill="tozeroy", opacity=0.9,
                      name=words(task), legendgroup=task, showlegend=legend,
                      hovertemplate=f"{words(task)}, {panel[1]} from %{{x:.3g}}: %{{y:.1%}} of the tokens<extra></extra>")
