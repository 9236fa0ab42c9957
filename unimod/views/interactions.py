"""Figures of notebook 04: do the tasks fight?

    gradient_angles(pd.DataFrame(found.table("t2i and mmu")))           # analysis.interactions.GradientCosine, with a column model
    kept_shares(frame({"showo-tiny": [competition]}))                   # Competition.table
    kept_over_steps(frame({"showo-tiny": [competition]}, "steps"))
    joint_against_single(frame({"showo-tiny": [result]}))               # JointOrSingle.table
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from .style import DASH, MODALITY, OKABE_ITO, TASK, lines, paper, require, words


def gradient_angles(data: pd.DataFrame) -> go.Figure:
    """Cosine between gradients per layer, a line per pair of tasks, a panel per model; 0 is no shared direction."""
    data = require(data, "model", "pair", "layer", "cosine", "cosine_sd")
    models = list(data["model"].unique())
    fig = paper("Do the tasks pull the same way?", "layer", "cosine of the two gradients", models, shared_yaxes=True)
    for n, model in enumerate(models):
        for colour, (pair, part) in zip(OKABE_ITO, data[data["model"] == model].groupby("pair", sort=False)):
            lines(fig, part, "layer", "cosine", colour=colour, name=pair, sd="cosine_sd", panel=(1, n + 1), legend=n == 0)
    fig.add_hline(y=0, line={"color": "#7a7a7a", "width": 1})
    return fig.update_xaxes(dtick=1)


def kept_shares(data: pd.DataFrame) -> go.Figure:
    """Share of tokens kept under one router, per task and modality, mean over the routed layers and seeds; the dashed line is a fair share.

    Error bars reach from the smallest to the largest seed.
    """
    data = require(data, "model", "seed", "layer", "task", "modality", "kept", "capacity")
    models = list(data["model"].unique())
    fig = paper("Who keeps its tokens under one router?", "", "share of tokens kept", models, shared_yaxes=True)
    colours = {"all": "#009E73", **MODALITY}
    for n, model in enumerate(models):
        per_seed = data[data["model"] == model].groupby(["task", "modality", "seed"], sort=False)["kept"].mean()
        found = per_seed.groupby(["task", "modality"], sort=False).agg(["mean", "min", "max"]).reset_index()
        for modality, part in found.groupby("modality", sort=False):
            name = "all tokens of the task" if modality == "all" else modality
            fig.add_bar(
                x=[words(t) for t in part["task"]],
                y=part["mean"],
                error_y={"type": "data", "array": part["max"] - part["mean"], "arrayminus": part["mean"] - part["min"], "thickness": 1},
                name=name,
                legendgroup=name,
                showlegend=n == 0,
                marker={"color": colours[modality], "line": {"width": 0}},
                hovertemplate=f"{name} of %{{x}}: %{{y:.2f}}<extra></extra>",
                row=1,
                col=n + 1,
            )
    fig.add_hline(y=float(data["capacity"].iloc[0]), line={"color": "#7a7a7a", "dash": "dash"})
    return fig.update_yaxes(range=[0, 1])


def kept_over_steps(data: pd.DataFrame) -> go.Figure:
    """Share of each task's tokens kept while the router learns, mean over the routed layers: a thin line per seed, a thick one for their mean."""
    data = require(data, "model", "seed", "step", "task", "kept")
    fig = paper("Who keeps its tokens while the router learns?", "step", "share of tokens kept")
    for (model, task), part in data.groupby(["model", "task"], sort=False):
        curves = [run for _, run in part.groupby("seed", sort=False)]
        name, mean = f"{model}: {words(task)}", part.groupby("step", as_index=False)["kept"].mean()
        for curve, width, opacity in [(c, 1, 0.4) for c in curves if len(curves) > 1] + [(mean, 2.5, 1)]:
            fig.add_scatter(
                x=curve["step"],
                y=curve["kept"].round(4),
                mode="lines" if len(curve) > 1 else "markers",
                name=name,
                legendgroup=name,
                showlegend=width > 1,
                opacity=opacity,
                line={"color": TASK[task], "dash": DASH.get(model, "solid"), "width": width},
                hovertemplate=f"{name}, step %{{x}}: %{{y:.2f}}<extra></extra>",
            )
    return fig.update_yaxes(range=[0, 1])


def joint_against_single(data: pd.DataFrame) -> go.Figure:
    """Held-out loss per task before, after training together, and after training alone: one dot per run, a bar for the mean."""
    data = require(data, "model", "task", "way", "run", "loss")
    names = {"before": "before", "joint": "both tasks", "single": "this task alone"}
    panels = list(data.groupby(["model", "task"], sort=False))
    fig = paper("Together or alone?", "", "held-out loss (nats)", [f"{model}: {words(task)}" for (model, task), _ in panels])
    for n, ((_, task), part) in enumerate(panels):
        means = part.groupby("way", sort=False)["loss"].mean()
        fig.add_bar(
            x=[names[w] for w in means.index],
            y=means,
            marker={"color": TASK[task], "opacity": 0.45, "line": {"width": 0}},
            showlegend=False,
            hovertemplate="%{x}: mean %{y:.4f}<extra></extra>",
            row=1,
            col=n + 1,
        )
        fig.add_scatter(
            x=part["way"].map(names),
            y=part["loss"],
            mode="markers",
            marker={"color": TASK[task], "size": 8},
            showlegend=False,
            hovertemplate="%{x}: %{y:.4f}<extra></extra>",
            row=1,
            col=n + 1,
        )
    return fig
