"""Figures of notebooks 02, 03 and 07: which layers can be skipped, how much of a map is new, and what training changed
of it.

    skip_one_layer(frame({"showo-tiny": [t2i, mmu]}))                   # analysis.layers.Importance; proxy, too
    right_without(frame({"showo-tiny": [questions, pictures]}))         # the same, metric: a share of right answers
    arank_by_layer(frame({"showo-tiny": [t2i, mmu]}))                   # analysis.redundancy.ARank
    spectra_by_layer(frame({"showo-tiny": [spectra_t2i, spectra_mmu]}))     # of one model, like layer_order
    sensitivity(frame({"showo-tiny": [...]}, "sensitivity", samples=(2, 4, 8)))     # Spectra; layer_order, too
    by_reading(pd.DataFrame(readings(record, task)))                    # with a column model
    drift_by_layer(pd.DataFrame(drift(before, after)))                  # with columns model and arm
"""

from __future__ import annotations

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from .runs import bars
from .style import COLOUR, INK, POWERS, facets, require, words

FLOOR = 1e-4
"""Smallest rise of a loss (nats) that a log axis shows."""


def skip_one_layer(data: pd.DataFrame) -> go.Figure:
    """Rise of each task's loss when one layer is left out, on a log scale, a panel per model.

    A log axis cannot show a loss that falls or hardly rises: such points are open marks on its floor, and the hover has
    the number.
    """
    data = require(data, "model", "task", "layer", "damage", "damage_sd")
    spread = data["damage_sd"].fillna(0)
    data = data.assign(shown=data["damage"], low=data["damage"] - spread, high=data["damage"] + spread)
    data[["shown", "low", "high"]] = data[["shown", "low", "high"]].clip(lower=FLOOR)
    fig = facets(px.line, data, "layer", "shown", panel="model", color="task", low="low", high="high", markers=True,
                 title="What each layer is worth", custom_data=["damage"],
                 labels={"layer": "layer left out", "shown": "rise of the loss (nats per target)"},
                 hover_data={"shown": False, "damage": ":+.4f"})
    for trace in fig.data:
        trace.marker.symbol = ["circle" if damage > FLOOR else "circle-open" for damage in trace.customdata[:, 0]]
    return fig.update_yaxes(**POWERS)


def right_without(data: pd.DataFrame) -> go.Figure:
    """Share of right answers without each layer, a line per metric and a panel per model; dashed: with all layers."""
    data = require(data, "model", "task", "metric", "layer", "base", "value", "value_sd")
    data = data.assign(metric=data["metric"] + ": " + data["task"].map(words))
    colours = {metric: COLOUR[task] for task, metric in zip(data["task"], data["metric"])}
    return facets(px.line, data, "layer", "value", panel="model", color="metric", reference="base",
                  meaning="all layers", sd="value_sd", markers=True, range_y=[-0.03, 1.08], colours=colours,
                  title="What is still right without a layer?",
                  labels={"layer": "layer left out", "value": "share right"})


def proxy(data: pd.DataFrame) -> go.Figure:
    """Cheap proxy (1 - cosine of a layer's input and output) against what skipping it costs, a mark per layer."""
    data = require(data, "model", "task", "layer", "damage", "cosine")
    data = data.assign(distance=1 - data["cosine"], damage=data["damage"].clip(lower=FLOOR))
    fig = facets(px.scatter, data, "distance", "damage", color="task", symbol="model", text="layer",
                 title="Does the cheap proxy tell?",
                 labels={"distance": "1 - cosine between a layer's input and output",
                         "damage": "rise of the loss without it (nats)"})
    fig.update_traces(textposition="top center", marker_size=9)
    return fig.update_xaxes(type="log", dtick="D1").update_yaxes(**POWERS)


def arank_by_layer(data: pd.DataFrame, mask: pd.DataFrame | None = None) -> go.Figure:
    """ARank over sequence length per layer with its 95 % interval, a panel per model; dotted: effective rank; dashed:
    what the mask alone gives, by `mask_arank` (one row per model and task)."""
    data = require(data, "model", "task", "layer", "share", "low", "high", "effective", "effective_low",
                   "effective_high")
    columns = {"effective": "share", "effective_low": "low", "effective_high": "high"}
    parts = [data.assign(line="ARank"), data.drop(columns=columns.values()).rename(columns=columns)
             .assign(line="effective rank")]
    if mask is not None:
        level = data[["model", "task", "layer"]].merge(mask[["model", "task", "share"]], on=["model", "task"])
        parts.append(level.assign(line="mask alone"))
    return facets(px.line, pd.concat(parts), "layer", "share", panel="model", color="task", line_dash="line",
                  low="low", high="high", markers=True, range_y=[0, 1.02],
                  line_dash_map={"ARank": "solid", "effective rank": "dot", "mask alone": "dash"},
                  title=f"New directions per token (tolerance {data['tolerance'].iloc[0]:g})",
                  labels={"share": "ARank / tokens"})


def spectra_by_layer(data: pd.DataFrame) -> go.Figure:
    """Mean singular values over the largest, a line per layer and a panel per task."""
    data = require(data, "task", "layer", "place", "value")
    data = data.assign(place=data["place"].round(3), value=data["value"].clip(lower=1e-7))
    fig = facets(px.line, data, "place", "value", panel="task", color="layer", title="Spectra of the attention maps",
                 labels={"place": "place in the spectrum (0 = largest, 1 = last)", "value": "singular value / largest"},
                 hover_data={"value": ":.1e"})
    return fig.update_yaxes(**POWERS)


def sensitivity(data: pd.DataFrame) -> go.Figure:
    """ARank / tokens averaged over layers: left against tolerance, right against the number of samples (mean 95 %
    interval of a layer)."""
    data = require(data, "model", "task", "layer", "tolerance", "samples", "share", "low", "high", "varied")
    by_tolerance = data["varied"] == "tolerance"
    data = data.assign(at=data["tolerance"].where(by_tolerance, data["samples"]),
                       varied=data["varied"].map({"tolerance": "tolerance", "samples": "samples per task"}))
    data.loc[by_tolerance, ["low", "high"]] = float("nan")      # the interval is over samples: no bars on the left
    data = data.sort_values("varied", ascending=False, kind="stable")
    found = data.groupby(["varied", "model", "task", "at"], sort=False)[["share", "low", "high"]].mean().reset_index()
    fig = facets(px.line, found, "at", "share", panel="varied", color="task", line_dash="model",
                 low="low", high="high", markers=True, title="How far the number depends on choices",
                 labels={"at": "samples", "share": "ARank / tokens, mean over layers"})
    return fig.update_xaxes(title_text="share of the largest value that still counts", **POWERS, col=1)


def by_reading(data: pd.DataFrame) -> go.Figure:
    """ARank / tokens, mean over layers, under every reading of the map, with the mean 95 % interval of a layer."""
    data = require(data, "model", "task", "varied", "share", "low", "high")
    found = data.groupby(["model", "task", "varied"], sort=False)[["share", "low", "high"]].mean().reset_index()
    fig = bars(found.rename(columns={"varied": "what_counts", "share": "ARank"}), "what_counts", "ARank", group="task",
               low="low", high="high", title="The same maps, read in other ways", unit="directions per query")
    return fig.update_yaxes(range=[0, 1.02])


def drift_by_layer(data: pd.DataFrame) -> go.Figure:
    """Change of ARank / tokens against the model before training, a line per arm with its 95 % interval."""
    data = require(data, "model", "arm", "task", "layer", "change", "low", "high")
    fig = facets(px.line, data, "layer", "change", panel=("model", "task"), color="arm", low="low", high="high",
                 markers=True, colours={}, title="Did training change how much is new?",
                 labels={"change": "change of ARank / tokens"})
    return fig.add_hline(y=0, line={"color": INK, "width": 1})


def layer_order(data: pd.DataFrame) -> go.Figure:
    """Place of the layers by ARank (1 is the lowest) at every tolerance: crossing lines mean that the plan depends on
    it."""
    data = require(data, "task", "layer", "tolerance", "share", "varied")
    data = data[data["varied"] == "tolerance"].sort_values("tolerance", kind="stable")
    data = data.assign(place=data.groupby(["task", "tolerance"])["share"].rank())
    fig = facets(px.line, data, "tolerance", "place", panel="task", color="layer", markers=True,
                 title="Would another tolerance choose other layers?", labels={"place": "place by ARank (1 = lowest)"})
    return fig.update_xaxes(**POWERS).update_yaxes(dtick=1)
