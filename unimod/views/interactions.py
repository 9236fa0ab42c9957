"""Figures of notebook 04: do the tasks fight?

    gradient_angles(pd.DataFrame(found.table("t2i and mmu")))           # analysis.interactions.GradientCosine, with a column model
    kept_shares(frame({"showo-tiny": [competition]}))                   # Competition.table
    kept_over_steps(frame({"showo-tiny": [competition]}, "steps"))
    kept_by_layer(frame({"showo-tiny": [competition]}))                 # the same, layer by layer
    joint_against_single(frame({"showo-tiny": [result]}))               # JointOrSingle.table
    findings(frame({"showo-tiny": found}))                              # analysis.findings.Finding.table
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from .arms import markdown
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


def kept_by_layer(data: pd.DataFrame) -> go.Figure:
    """Share of each task's tokens kept under one router, layer by layer, mean over seeds; error bars reach from the smallest to the largest seed.

    data: `Competition.table`; a panel per model, the dashed line is a fair share.
    """
    data = require(data, "model", "seed", "layer", "task", "modality", "kept", "capacity")
    found = data[data["modality"] == "all"].groupby(["model", "task", "layer"], sort=False)["kept"].agg(["mean", "min", "max"]).reset_index()
    models = list(found["model"].unique())
    fig = paper("In which layers does one task win?", "layer", "share of tokens kept", models, shared_yaxes=True)
    for n, model in enumerate(models):
        for task, part in found[found["model"] == model].groupby("task", sort=False):
            lines(fig, part, "layer", "mean", colour=TASK[task], name=words(task), low="min", high="max", panel=(1, n + 1), legend=n == 0)
    fig.add_hline(y=float(data["capacity"].iloc[0]), line={"color": "#7a7a7a", "dash": "dash"})
    return fig.update_yaxes(range=[0, 1]).update_xaxes(dtick=1)


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


OUTCOME = {"yes": "#009E73", "undecided": "#999999", "no": "#D55E00"}


def findings(data: pd.DataFrame) -> go.Figure:
    """Whether each of the paper's findings holds, a row per finding and a column per model: yes, no, undecided; the hover has the numbers.

    data: `Finding.table`.
    """
    data = require(data, "model", "finding", "outcome", "sentence", "low", "high", "n", "over")
    models, names = list(data["model"].unique()), list(data["finding"].unique())
    fig = paper("Do the paper's findings hold here?", height=120 + 34 * len(names))
    said = "%{y}<br>%{customdata[0]}<br>95 %: %{customdata[1]:.3f} to %{customdata[2]:.3f}, %{customdata[3]} %{customdata[4]}<extra></extra>"
    for outcome, part in data.groupby("outcome", sort=False):
        fig.add_scatter(x=part["model"], y=part["finding"], mode="markers+text", text=part["outcome"], textposition="middle right", name=outcome,
                        marker={"color": OUTCOME[outcome], "size": 15, "symbol": {"yes": "circle", "no": "x", "undecided": "circle-open"}[outcome]},
                        customdata=part[["sentence", "low", "high", "n", "over"]],
                        hovertemplate=said)
    fig.update_yaxes(automargin=True, categoryorder="array", categoryarray=names[::-1])
    fig.update_xaxes(side="top", categoryorder="array", categoryarray=models, range=[-0.3, len(models) - 0.3])
    return fig.update_layout(showlegend=False)


def table_of_findings(record: dict) -> str:
    """The findings of a record that notebook 04 wrote, as Markdown: what the README quotes."""
    found = pd.DataFrame(record["rows"])
    shown = {model: part.set_index("finding") for model, part in found.groupby("model", sort=False)}
    rows = [{"finding": name} | {model: f"**{part['outcome'][name]}**: {part['sentence'][name]} [{part['low'][name]:.3f}, {part['high'][name]:.3f}], "
                                        f"{part['n'][name]} {part['over'][name]}" for model, part in shown.items()} for name in found["finding"].unique()]
    return markdown(pd.DataFrame(rows))
