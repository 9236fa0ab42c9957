"""Figures of notebook 01: from which tokens attention comes and to which it goes.

    modality_mass(frame({"showo-tiny": [t2i, mmu]}, "flows"))           # t2i, mmu: analysis.attention.Patterns
    modality_flows(frame({"showo-tiny": [t2i, mmu]}, "flows"))          # of one model, like heads
    heads(frame({"showo-tiny": [t2i, mmu]}), "sink")
    spread_and_sink(frame({"showo-tiny": [t2i, mmu]}))
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
from .style import DIFFERENCE, MODALITY, facets, heat_maps, legend_below, plain, require, words

HEAD_VALUES = {
    "to_image": "attention to image tokens",
    "to_text": "attention to text tokens",
    "evenness": "evenness of attention",
    "entropy": "entropy (nats)",
    "sink": "attention to the first token",
    "distance": "mean distance (tokens)",
}


def modality_mass(data: pd.DataFrame) -> go.Figure:
    """Share of attention that goes to text and to image tokens, per layer; dashed: the even share."""
    data = require(data, "model", "task", "layer", "query", "key", "mass", "mass_sd", "even")
    data = data[(data["query"] == "any") & (data["key"] != "special")]
    return facets(px.line, data.assign(to="to " + data["key"]), "layer", "mass", panel=("model", "task"), color="to",
                  reference="even", meaning="if spread evenly", sd="mass_sd", markers=True, range_y=[0, 1],
                  colours={f"to {key}": colour for key, colour in MODALITY.items()}, title="Where attention goes",
                  labels={"mass": "share of attention"})


def modality_flows(data: pd.DataFrame) -> go.Figure:
    """Attention between the modalities: a map per task with a slider over layers."""
    data = require(data, "task", "layer", "query", "key", "mass")
    tasks, names, maps = data["task"].unique(), list(MODALITY), {}
    for layer, part in data[data["query"] != "any"].groupby("layer"):
        grids = part.set_index(["task", "query", "key"])["mass"].unstack()
        maps[layer] = [{"z": grids.loc[task].reindex(index=names, columns=names).values.astype(np.float32),
                        "x": names, "y": names} for task in tasks]
    return heat_maps("Attention from one modality to another", maps, [words(t) for t in tasks], x="to (keys)",
                     y="from (queries)", hover="from %{y} to %{x}: %{z:.3f}", texttemplate="%{z:.2f}")


def heads(data: pd.DataFrame, value: str) -> go.Figure:
    """Every layer and head for one of HEAD_VALUES, a map per task and, for two tasks, their difference around 0."""
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
                    hover="layer %{y}, head %{x}: %{z:.3g}", limits=(None, None), bar={"title_text": unit})
    if len(tasks) == 2:
        fig.update_layout(margin_r=150, coloraxis2={"colorscale": DIFFERENCE, "cmid": 0,
                                                    "colorbar": {"title_text": "difference", "x": 1.14}})
    return fig.update_xaxes(dtick=1).update_yaxes(dtick=1, autorange="reversed")


def spread_and_sink(data: pd.DataFrame) -> go.Figure:
    """Evenness, sink and distance per layer, mean over heads and their spread, a line per task and model."""
    names = {"evenness": "evenness", "sink": "share on the first token", "distance": "mean distance (tokens)"}
    data = require(data, "model", "task", "layer", *names).melt(["model", "task", "layer"], list(names))
    shown = data.groupby(["variable", "model", "task", "layer"], sort=False)["value"].agg(["mean", "std"]).reset_index()
    shown["variable"] = shown["variable"].map(names)
    return legend_below(facets(px.line, shown, "layer", "mean", panel="variable", color="task", line_dash="model",
                               sd="std", markers=True, free=True, labels={"mean": ""}, title="How attention is spread"))


def head_maps(record: AttentionRecord, row: int, head: int, name: Callable[[int], str], active: int = 0) -> go.Figure:
    """One head's map of one sequence, pooled to at most 32 x 32 bins; the hover names the tokens of a bin.

    name: from a token's id to its text. active: the layer shown first (its number among those of the record).
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
    # bytes of the square root: small amounts stay visible, and 24 layers below 300 kB
    frames = {layer: [{"z": np.nan_to_num(255 * np.sqrt(grid / top)).round().astype(np.uint8), "x": labels[layer],
                       "y": labels[layer]}] for layer, grid in maps.items()}
    ticks = np.linspace(0, 1, 6)
    fig = heat_maps(f"Attention of head {head}", frames, [""], x="key", y="query", height=560, limits=(0, 255),
                    active=min(active, len(frames) - 1), hover="query: %{y}<br>key: %{x}",
                    bar={"tickvals": 255 * ticks, "ticktext": [f"{tick**2 * top:.2g}" for tick in ticks]})
    return fig.update_xaxes(showticklabels=False).update_yaxes(showticklabels=False, autorange="reversed")
