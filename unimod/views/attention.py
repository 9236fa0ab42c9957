"""Figures of notebook 01: who looks at whom.

    modality_mass(frame({"showo-tiny": [t2i, mmu]}, "flows"))           # t2i, mmu: analysis.attention.Patterns
    heads(frame({"showo-tiny": [t2i, mmu]}), "sink")
    head_maps(map_frame(record, row=0, head=1, name=layout.token))      # one head, slider over layers

Both tasks always share one colour range.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ..attention_record import edges
from ..batch import Batch, Modality
from ..capture import AttentionRecord
from .style import AMOUNT, DASH, DIFFERENCE, MODALITY, TASK, bytes_of, lines, paper, plain, require, root_ticks, slider, words

HEAD_VALUES = {
    "to_image": "attention that flows to the picture",
    "to_text": "attention that flows to text",
    "evenness": "evenness of attention",
    "entropy": "entropy (nats)",
    "sink": "attention on the first token",
    "distance": "mean distance (tokens)",
}


def token_labels(packed: Batch, span: slice, name: Callable[[int], str]) -> list[tuple[str, str]]:
    """(text, modality) of every token of a row."""
    return [(name(i), Modality(m).name.lower()) for i, m in zip(packed.ids[span].tolist(), packed.modality[span].tolist())]


def modality_mass(data: pd.DataFrame) -> go.Figure:
    """Share of attention that flows to text and to the picture, per layer; a panel per model and task, the even share dashed.

    data: `Patterns.flows` of several models.
    """
    data = require(data, "model", "task", "layer", "query", "key", "mass", "mass_sd", "even")
    data = data[(data["query"] == "any") & (data["key"] != "special")]
    panels = list(data.groupby(["model", "task"], sort=False))
    fig = paper(
        "Where attention flows",
        "layer",
        "share of attention",
        [f"{model}: {words(task)}" for (model, task), _ in panels],
        height=300 * -(-len(panels) // 2) + 80,
        rows=-(-len(panels) // 2),
        shared_yaxes="all",
    )
    for n, (_, part) in enumerate(panels):
        for key, line in part.groupby("key", sort=False):
            at = (n // 2 + 1, n % 2 + 1)
            lines(fig, line, "layer", "mass", colour=MODALITY[key], name=f"to {key}", sd="mass_sd", panel=at, legend=n == 0)
            lines(fig, line, "layer", "even", colour=MODALITY[key], name=f"to {key} if spread evenly", dash="dash", panel=at, legend=n == 0)
            fig.data[-1].mode = "lines"
    return fig.update_yaxes(range=[0, 1])


def modality_flows(data: pd.DataFrame) -> go.Figure:
    """From which modality to which: one small map per task with a slider over layers, same range. data: `Patterns.flows` of one model."""
    data = require(data, "task", "layer", "query", "key", "mass")
    data = data[data["query"] != "any"]
    tasks, layers, names = data["task"].unique(), sorted(data["layer"].unique()), list(MODALITY)
    fig = paper("Attention from one modality to another", "looked at", "looking", [words(t) for t in tasks], shared_yaxes=True)
    frames = []
    for layer in layers:
        grids = [
            part[part["layer"] == layer].pivot(index="query", columns="key", values="mass").reindex(index=names, columns=names)
            for part in (data[data["task"] == task] for task in tasks)
        ]
        traces = [
            go.Heatmap(
                z=grid.values.astype(np.float32),
                x=names,
                y=names,
                coloraxis="coloraxis",
                texttemplate="%{z:.2f}",
                hovertemplate="from %{y} to %{x}: %{z:.3f}<extra></extra>",
            )
            for grid in grids
        ]
        frames.append(go.Frame(name=str(layer), data=traces, traces=list(range(len(traces)))))
    for n, trace in enumerate(frames[0].data):
        fig.add_trace(trace, row=1, col=n + 1)
    fig.update_layout(coloraxis={"colorscale": AMOUNT, "cmin": 0, "cmax": 1, "colorbar": {"title": {"text": "share"}}})
    return slider(fig, frames, "layer")


def heads(data: pd.DataFrame, value: str) -> go.Figure:
    """Every layer and head of one model for one value, a map per task and, for two tasks, their difference around 0.

    data: `Patterns.table` of one model. value: one of HEAD_VALUES.
    """
    data = require(data, "task", "layer", "head", value)
    tasks = list(data["task"].unique())
    grids = [data[data["task"] == t].pivot(index="layer", columns="head", values=value) for t in tasks]
    titles = [words(t) for t in tasks] + [f"{words(tasks[0])} - {words(tasks[1])}"] * (len(tasks) == 2)
    fig = paper(f"Every head: {HEAD_VALUES.get(value, value)}", "head", "layer", titles, shared_yaxes=True)
    hover = "layer %{y}, head %{x}: %{z:.3g}<extra></extra>"
    for n, grid in enumerate(grids):
        fig.add_heatmap(
            z=grid.values.astype(np.float32),
            x=list(grid.columns),
            y=list(grid.index),
            coloraxis="coloraxis",
            hovertemplate=hover,
            row=1,
            col=n + 1,
        )
    if len(tasks) == 2:
        gap = (grids[0] - grids[1]).values.astype(np.float32)
        reach = float(np.nanmax(np.abs(gap))) or 1.0
        fig.add_heatmap(
            z=gap,
            x=list(grids[0].columns),
            y=list(grids[0].index),
            colorscale=DIFFERENCE,
            zmin=-reach,
            zmax=reach,
            row=1,
            col=3,
            hovertemplate=hover,
            colorbar={"title": {"text": "difference"}, "x": 1.14},
        )
    unit = "share" if value.startswith("to_") or value == "sink" else value
    fig.update_layout(coloraxis={"colorscale": AMOUNT, "colorbar": {"x": 1.02, "title": {"text": unit}}}, margin={"r": 150})
    return fig.update_xaxes(dtick=1).update_yaxes(dtick=1, autorange="reversed")


def spread_and_sink(data: pd.DataFrame) -> go.Figure:
    """Evenness, sink and distance per layer, mean over heads and their spread, a line per task and model. data: `Patterns.table`."""
    data = require(data, "model", "task", "layer", "evenness", "sink", "distance")
    values = {"evenness": "evenness (1 = spread evenly)", "sink": "share on the first token", "distance": "mean distance (tokens)"}
    fig = paper("How attention is spread", "layer", "", list(values.values()))
    for n, value in enumerate(values):
        found = data.groupby(["model", "task", "layer"], sort=False)[value].agg(["mean", "std"]).reset_index()
        for (model, task), part in found.groupby(["model", "task"], sort=False):
            lines(
                fig,
                part,
                "layer",
                "mean",
                sd="std",
                colour=TASK[task],
                dash=DASH.get(model, "solid"),
                name=f"{model}: {words(task)}",
                panel=(1, n + 1),
                legend=n == 0,
            )
    fig.update_layout(legend={"orientation": "h", "y": -0.25})
    return fig


def map_frame(record: AttentionRecord, row: int, head: int, name: Callable[[int], str]) -> pd.DataFrame:
    """One head's map of one row in every layer, pooled to at most 32 x 32: layer, query and key (with their tokens), share."""
    parts = []
    for layer in record.layers:
        packed = record.batch(layer)
        tokens = token_labels(packed, record.span(row, layer), name)
        spans = [slice(a, b) for a, b in itertools.pairwise(edges(len(tokens)).tolist())]
        values = record.tile(row, layer, head=head)[0].cpu().numpy()
        labels = [f"{s.start} [{tokens[s.start][1]}] " + " ".join(t for t, _ in tokens[s]) for s in spans]
        grid = pd.DataFrame(values, index=labels, columns=labels).rename_axis(index="query", columns="key").stack(future_stack=True)
        parts.append(grid.rename("share").reset_index().assign(layer=layer, head=head))
    return pd.concat(parts, ignore_index=True)


def head_maps(data: pd.DataFrame, active: int = 0) -> go.Figure:
    """One head's map with a slider over layers. data: `map_frame`. Hover names the tokens; the colour scale is a square root."""
    data = require(data, "layer", "head", "query", "key", "share")
    top = float(data["share"].max())
    frames = []
    for layer, part in data.groupby("layer"):
        labels = [plain(label) for label in dict.fromkeys(part["query"])]
        z = bytes_of(part["share"].to_numpy().reshape(len(labels), -1), top)
        frames.append(
            go.Frame(
                name=str(layer),
                traces=[0],
                data=[
                    go.Heatmap(
                        z=z, x=labels, y=labels, coloraxis="coloraxis", hovertemplate="looking: %{y}<br>looked at: %{x}<extra></extra>"
                    )
                ],
            )
        )
    fig = paper(f"What head {data['head'].iloc[0]} looks at", "token looked at", "token looking", height=560)
    fig.add_trace(frames[0].data[0])
    fig.update_layout(coloraxis={"colorscale": AMOUNT, "cmin": 0, "cmax": 255, "colorbar": {"title": {"text": "share"}, **root_ticks(top)}})
    fig.update_xaxes(showticklabels=False, showgrid=False).update_yaxes(showticklabels=False, showgrid=False, autorange="reversed")
    return slider(fig, frames, "layer", min(active, len(frames) - 1))
