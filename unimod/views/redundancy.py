"""Figures of notebooks 02, 03 and 07: which layers can be skipped, how much of a map is new, and what training changed of it.

    skip_one_layer(frame({"showo-tiny": [t2i, mmu]}))                   # analysis.importance.Importance
    right_without(frame({"showo-tiny": [questions, pictures]}))         # the same with a share of right answers as the metric
    arank_by_layer(frame({"showo-tiny": [t2i, mmu]}))                   # analysis.redundancy.ARank
    spectra_by_layer(frame({"showo-tiny": [spectra_t2i, spectra_mmu]}))
    sensitivity(frame({"showo-tiny": [...]}, "sensitivity", samples=(2, 4, 8)))
    by_reading(pd.DataFrame(readings(record, task)))                    # with a column model
    drift_by_layer(pd.DataFrame(drift(before, after)))                  # with columns model and arm
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from .bars import bars
from .style import AMOUNT, DASH, OKABE_ITO, SYMBOL, TASK, lines, paper, require, words

FLOOR = 1e-4
"""Smallest rise of a loss (nats) that a log axis shows."""


def skip_one_layer(data: pd.DataFrame) -> go.Figure:
    """Rise of each task's loss when one layer is left out, on a log scale, a panel per model. data: `Importance.table`.

    A log axis cannot show a loss that falls or hardly rises: such points sit open on its floor, and the hover has the number.
    """
    data = require(data, "model", "task", "layer", "damage", "damage_sd")
    spread = data["damage_sd"].fillna(0)
    data = data.assign(shown=data["damage"], low=data["damage"] - spread, high=data["damage"] + spread)
    data[["shown", "low", "high"]] = data[["shown", "low", "high"]].clip(lower=FLOOR)
    models = list(data["model"].unique())
    fig = paper("What each layer is worth", "layer left out", "rise of the loss (nats per target)", models, shared_yaxes=True)
    for n, model in enumerate(models):
        for task, part in data[data["model"] == model].groupby("task", sort=False):
            lines(fig, part, "layer", "shown", colour=TASK[task], name=words(task), low="low", high="high", panel=(1, n + 1), legend=n == 0)
            fig.data[-1].update(
                marker={"symbol": ["circle" if d > FLOOR else "circle-open" for d in part["damage"]]},
                customdata=part["damage"],
                hovertemplate=f"{words(task)}<br>without layer %{{x}}: %{{customdata:+.4f}} nats<extra></extra>",
            )
    return fig.update_yaxes(type="log", dtick=1, exponentformat="power").update_xaxes(dtick=1)


def right_without(data: pd.DataFrame) -> go.Figure:
    """Share of right answers without each layer, a line per metric and a panel per model; dashed: with all layers. data: `Importance.table`."""
    data = require(data, "model", "task", "metric", "layer", "base", "value", "value_sd")
    models = list(data["model"].unique())
    fig = paper("What is still right without a layer?", "layer left out", "share right", models, shared_yaxes=True)
    for n, model in enumerate(models):
        for (task, metric), part in data[data["model"] == model].groupby(["task", "metric"], sort=False):
            lines(fig, part, "layer", "value", colour=TASK[task], name=metric, sd="value_sd", panel=(1, n + 1), legend=n == 0)
            fig.add_scatter(x=[part["layer"].min(), part["layer"].max()], y=[part["base"].iloc[0]] * 2, mode="lines", legendgroup=metric, showlegend=False,
                            line={"color": TASK[task], "dash": "dash", "width": 1}, hovertemplate=f"{metric}, all layers: %{{y:.2f}}<extra></extra>",
                            row=1, col=n + 1)
    return fig.update_yaxes(range=[-0.03, 1.08]).update_xaxes(dtick=1)


def proxy(data: pd.DataFrame) -> go.Figure:
    """Cheap proxy (1 - cosine of a layer's input and output) against what skipping it costs, a mark per layer. data: `Importance.table`."""
    data = require(data, "model", "task", "layer", "damage", "cosine")
    fig = paper("Does the cheap proxy tell?", "1 - cosine between a layer's input and output", "rise of the loss without it (nats)")
    for (model, task), part in data.groupby(["model", "task"], sort=False):
        fig.add_scatter(
            x=1 - part["cosine"],
            y=part["damage"].clip(lower=FLOOR),
            mode="markers+text",
            text=part["layer"],
            textposition="top center",
            name=f"{model}: {words(task)}",
            marker={"color": TASK[task], "size": 9, "symbol": SYMBOL.get(model, "circle")},
            hovertemplate="layer %{text}: proxy %{x:.3f}, rise %{y:.4f}<extra></extra>",
        )
    return fig.update_xaxes(type="log", dtick="D1").update_yaxes(type="log", dtick=1, exponentformat="power")


def arank_by_layer(data: pd.DataFrame, mask: pd.DataFrame | None = None) -> go.Figure:
    """ARank over sequence length per layer with its 95 % interval, a panel per model; dashed: what the mask alone gives; dotted: effective rank.

    data: `ARank.table`; mask: the same of `mask_arank` (one row per model and task).
    """
    data = require(data, "model", "task", "layer", "share", "low", "high", "effective", "effective_low", "effective_high")
    models = list(data["model"].unique())
    fig = paper(f"New directions per token (tolerance {data['tolerance'].iloc[0]:g})", "layer", "ARank / tokens", models, shared_yaxes=True)
    for n, model in enumerate(models):
        for task, part in data[data["model"] == model].groupby("task", sort=False):
            lines(fig, part, "layer", "share", colour=TASK[task], name=words(task), low="low", high="high", panel=(1, n + 1), legend=n == 0)
            lines(fig, part, "layer", "effective", colour=TASK[task], name=f"{words(task)}: effective rank", low="effective_low", high="effective_high",
                  dash="dot", panel=(1, n + 1), legend=n == 0)
            if mask is not None:
                level = float(mask[(mask["model"] == model) & (mask["task"] == task)]["share"].iloc[0])
                fig.add_scatter(
                    x=[part["layer"].min(), part["layer"].max()],
                    y=[level] * 2,
                    mode="lines",
                    name=f"{words(task)}: mask alone",
                    legendgroup=f"{task} mask",
                    showlegend=n == 0,
                    line={"color": TASK[task], "dash": "dash", "width": 1},
                    hovertemplate="mask alone: %{y:.2f}<extra></extra>",
                    row=1,
                    col=n + 1,
                )
    return fig.update_yaxes(range=[0, 1.02]).update_xaxes(dtick=1)


def spectra_by_layer(data: pd.DataFrame) -> go.Figure:
    """Mean singular values over the largest: one line per layer, dark (first) to bright (last), and a panel per task.

    data: `Spectra.table` of one model.
    """
    data = require(data, "task", "layer", "place", "value")
    tasks, layers = list(data["task"].unique()), sorted(data["layer"].unique())
    colours = sample_colorscale(AMOUNT, np.linspace(0, 0.9, len(layers)))
    fig = paper(
        "Spectra of the attention maps",
        "place in the spectrum (0 = largest, 1 = last)",
        "singular value / largest",
        [words(t) for t in tasks],
        shared_yaxes=True,
    )
    for n, task in enumerate(tasks):
        for layer, colour in zip(layers, colours):
            part = data[(data["task"] == task) & (data["layer"] == layer)]
            fig.add_scatter(
                x=part["place"].round(3),
                y=part["value"].clip(lower=1e-7),
                mode="lines",
                name=f"layer {layer}",
                legendgroup=str(layer),
                showlegend=n == 0,
                line={"color": colour},
                hovertemplate=f"layer {layer}, place %{{x:.2f}}: %{{y:.1e}}<extra></extra>",
                row=1,
                col=n + 1,
            )
    return fig.update_yaxes(type="log", dtick=1, exponentformat="power")


def sensitivity(data: pd.DataFrame) -> go.Figure:
    """ARank / tokens averaged over layers: left against tolerance, right against the number of samples (mean 95 % interval of a layer).

    data: `Spectra.sensitivity`.
    """
    data = require(data, "model", "task", "layer", "tolerance", "samples", "share", "low", "high", "varied")
    fig = paper(
        "How far the number depends on choices",
        "",
        "ARank / tokens, mean over layers",
        ["tolerance", "samples per task"],
        shared_yaxes=True,
    )
    for n, varied in enumerate(("tolerance", "samples")):
        found = data[data["varied"] == varied].groupby(["model", "task", varied], sort=False)[["share", "low", "high"]].mean().reset_index()
        for (model, task), part in found.groupby(["model", "task"], sort=False):
            bars = {"low": "low", "high": "high"} if varied == "samples" else {}
            lines(
                fig,
                part,
                varied,
                "share",
                colour=TASK[task],
                dash=DASH.get(model, "solid"),
                name=f"{model}: {words(task)}",
                panel=(1, n + 1),
                legend=n == 0,
                **bars,
            )
    fig.update_xaxes(type="log", title_text="share of the largest value that still counts", exponentformat="power", dtick=1, row=1, col=1)
    return fig.update_xaxes(title_text="samples", row=1, col=2)


def by_reading(data: pd.DataFrame) -> go.Figure:
    """ARank / tokens, mean over layers, under every reading of the map: a group of bars per reading, a panel per model, the mean 95 % interval of a layer.

    data: `analysis.redundancy.readings`.
    """
    data = require(data, "model", "task", "varied", "share", "low", "high")
    found = data.groupby(["model", "task", "varied"], sort=False)[["share", "low", "high"]].mean().reset_index()
    fig = bars(found.rename(columns={"varied": "what_counts", "share": "ARank"}), "what_counts", "ARank", group="task", low="low", high="high",
               title="The same maps, read in other ways", unit="directions per query")
    return fig.update_yaxes(range=[0, 1.02])


def drift_by_layer(data: pd.DataFrame) -> go.Figure:
    """Change of ARank / tokens against the model before training, a line per arm with its 95 % interval, a panel per model and task. data: `drift`."""
    data = require(data, "model", "arm", "task", "layer", "change", "low", "high")
    panels = list(data.groupby(["model", "task"], sort=False))
    fig = paper("Did training change how much is new?", "layer", "change of ARank / tokens", [f"{model}: {words(task)}" for (model, task), _ in panels],
                rows=data["model"].nunique(), height=330 * data["model"].nunique(), shared_yaxes=True)
    arms, across = list(data["arm"].unique()), -(-len(panels) // data["model"].nunique())
    for n, (_, panel) in enumerate(panels):
        for arm, part in panel.groupby("arm", sort=False):
            lines(fig, part, "layer", "change", colour=OKABE_ITO[arms.index(arm) % len(OKABE_ITO)], name=arm, low="low", high="high",
                  panel=(n // across + 1, n % across + 1), legend=n == 0)
    return fig.add_hline(y=0, line={"color": "#7a7a7a", "width": 1}).update_xaxes(dtick=1)


def layer_order(data: pd.DataFrame) -> go.Figure:
    """Rank order of the layers by ARank at every tolerance: crossing lines mean that the plan depends on the tolerance.

    data: `Spectra.sensitivity` of one model; place 1 is the lowest ARank.
    """
    data = require(data, "task", "layer", "tolerance", "share", "varied")
    data = data[data["varied"] == "tolerance"]
    data = data.assign(place=data.groupby(["task", "tolerance"])["share"].rank())
    tasks, layers = list(data["task"].unique()), sorted(data["layer"].unique())
    colours = sample_colorscale(AMOUNT, np.linspace(0, 0.9, len(layers)))
    fig = paper(
        "Would another tolerance choose other layers?",
        "tolerance",
        "place by ARank (1 = lowest)",
        [words(t) for t in tasks],
        shared_yaxes=True,
    )
    for n, task in enumerate(tasks):
        for layer, colour in zip(layers, colours):
            part = data[(data["task"] == task) & (data["layer"] == layer)].sort_values("tolerance")
            lines(fig, part, "tolerance", "place", colour=colour, name=f"layer {layer}", panel=(1, n + 1), legend=n == 0)
    return fig.update_xaxes(type="log", exponentformat="power", dtick=1).update_yaxes(dtick=1)
