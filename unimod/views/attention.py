"""Figures of notebook 01: from which tokens attention comes and to which it goes.

    modality_mass(frame({"showo-tiny": [t2i, mmu]}, "flows"))           # t2i, mmu: analysis.attention.Patterns
    heads(frame({"showo-tiny": [t2i, mmu]}), "sink")
    head_maps(record, row=0, head=1, name=layout.token)                 # one head, slider over layers

Both tasks always share one colour range.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..attention_record import edges
from ..batch import Modality
from ..capture import AttentionRecord
from .style import (
    AMOUNT,
    DASH,
    DIFFERENCE,
    MODALITY,
    bytes_of,
    dashed,
    facets,
    heat_maps,
    legend_below,
    plain,
    require,
    root_ticks,
    with_reference,
    words,
)

HEAD_VALUES = {
    "to_image": "attention to image tokens",
    "to_text": "attention to text tokens",
    "evenness": "evenness of attention",
    "entropy": "entropy (nats)",
    "sink": "attention to the first token",
    "distance": "mean distance (tokens)",
}


def modality_mass(data: pd.DataFrame) -> go.Figure:
    """Share of attention that goes to text and to image tokens, per layer; a panel per model and task, the even share
    dashed.

    data: `Patterns.flows` of several models.
    """
    data = require(data, "model", "task", "layer", "query", "key", "mass", "mass_sd", "even")
    data = data[(data["query"] == "any") & (data["key"] != "special")]
    data = data.assign(panel=data["model"] + ": " + data["task"].map(words), to="to " + data["key"])
    shown = with_reference(data, "mass", "even", "if spread evenly", "mass_sd")
    fig = facets(px.line, shown, "layer", "mass", panel="panel", across=2, each=300, color="to", line_dash="line",
                 sd="mass_sd", markers=True,
                 colours={f"to {key}": colour for key, colour in MODALITY.items()}, range_y=[0, 1],
                 line_dash_map={"measured": "solid", "if spread evenly": "dash"}, title="Where attention goes",
                 labels={"mass": "share of attention"})
    return dashed(fig)


def modality_flows(data: pd.DataFrame) -> go.Figure:
    """Attention between the modalities: a map per task with a slider over layers, one colour range. data:
    `Patterns.flows` of one model."""
    data = require(data, "task", "layer", "query", "key", "mass")
    tasks, names = data["task"].unique(), list(MODALITY)
    maps = {}
    for layer, part in data[data["query"] != "any"].groupby("layer"):
        grids = (part[part["task"] == task].pivot(index="query", columns="key", values="mass") for task in tasks)
        grids = (grid.reindex(index=names, columns=names).values.astype(np.float32) for grid in grids)
        maps[layer] = [{"z": grid, "x": names, "y": names} for grid in grids]
    return heat_maps("Attention from one modality to another", maps, [words(t) for t in tasks], x="to (keys)",
                     y="from (queries)", hover="from %{y} to %{x}: %{z:.3f}", texttemplate="%{z:.2f}",
                     coloraxis={"colorscale": AMOUNT, "cmin": 0, "cmax": 1, "colorbar": {"title": {"text": "share"}}})


def heads(data: pd.DataFrame, value: str) -> go.Figure:
    """Every layer and head of one model for one value, a map per task and, for two tasks, their difference around 0.

    data: `Patterns.table` of one model. value: one of HEAD_VALUES.
    """
    data = require(data, "task", "layer", "head", value)
    tasks = list(data["task"].unique())
    grids = [data[data["task"] == t].pivot(index="layer", columns="head", values=value) for t in tasks]
    cells = [{"z": grid.values.astype(np.float32), "x": list(grid.columns), "y": list(grid.index)} for grid in grids]
    titles = [words(t) for t in tasks]
    if len(tasks) == 2:
        cells.append(cells[0] | {"z": cells[0]["z"] - cells[1]["z"], "coloraxis": "coloraxis2"})
        titles.append("difference")
    unit = "share" if value.startswith("to_") or value == "sink" else value
    fig = heat_maps(f"Every head: {HEAD_VALUES.get(value, value)}", {"": cells}, titles, x="head", y="layer",
                    hover="layer %{y}, head %{x}: %{z:.3g}",
                    coloraxis={"colorscale": AMOUNT, "colorbar": {"x": 1.02, "title": {"text": unit}}})
    if len(tasks) == 2:
        largest = float(np.nanmax(np.abs(cells[2]["z"]))) or 1.0
        fig.update_layout(margin={"r": 150}, coloraxis2={"colorscale": DIFFERENCE, "cmin": -largest, "cmax": largest,
                                                         "colorbar": {"title": {"text": "difference"}, "x": 1.14}})
    return fig.update_xaxes(dtick=1).update_yaxes(dtick=1, autorange="reversed")


def spread_and_sink(data: pd.DataFrame) -> go.Figure:
    """Evenness, sink and distance per layer, mean over heads and their spread, a line per task and model. data:
    `Patterns.table`."""
    names = {"evenness": "evenness", "sink": "share on the first token", "distance": "mean distance (tokens)"}
    data = require(data, "model", "task", "layer", *names).melt(["model", "task", "layer"], list(names), "value",
                                                                "found")
    shown = data.groupby(["value", "model", "task", "layer"], sort=False)["found"].agg(["mean", "std"]).reset_index()
    shown = shown.assign(panel=shown["value"].map(names), task=shown["task"].map(words))
    fig = facets(px.line, shown, "layer", "mean", panel="panel", color="task", line_dash="model", line_dash_map=DASH,
                 sd="std", markers=True, free=True, title="How attention is spread", labels={"mean": ""})
    return legend_below(fig)


def head_maps(record: AttentionRecord, row: int, head: int, name: Callable[[int], str], active: int = 0) -> go.Figure:
    """One head's map of one row, pooled to at most 32 x 32 bins, with a slider over layers; the hover names the tokens
    of a bin.

    name: from a token's id to its text. active: the layer shown first (its number among those of the record). Colours
    are on a square root.
    """
    maps, labels = {}, {}
    for layer in record.layers:
        batch, span = record.batch(layer), record.span(row, layer)
        tokens = [name(i) for i in batch.ids[span].tolist()]
        kinds = [Modality(m).name.lower() for m in batch.modality[span].tolist()]
        bins = itertools.pairwise(edges(len(tokens)).tolist())
        labels[layer] = [plain(f"{a} [{kinds[a]}] {' '.join(tokens[a:b])}") for a, b in bins]
        maps[layer] = record.tile(row, layer, head=head)[0].cpu().numpy()
    top = max(float(grid.max()) for grid in maps.values())
    frames = {layer: [{"z": bytes_of(grid, top), "x": labels[layer], "y": labels[layer]}]
              for layer, grid in maps.items()}
    fig = heat_maps(f"Attention of head {head}", frames, [""], x="key", y="query", height=560,
                    active=min(active, len(frames) - 1), hover="query: %{y}<br>key: %{x}",
                    coloraxis={"colorscale": AMOUNT, "cmin": 0, "cmax": 255,
                               "colorbar": {"title": {"text": "share"}, **root_ticks(top)}})
    return fig.update_xaxes(showticklabels=False).update_yaxes(showticklabels=False, autorange="reversed")
