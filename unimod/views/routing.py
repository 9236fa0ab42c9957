"""Figures of plans, of what routers keep, and of how the tasks share one router (notebooks 00, 03, 04, 05 and 07).

    capacities(plan_frame(plan))                                        # several plans may be concatenated
    kept_tokens(kept_frame(log, batch, row=0, grid=(6, 6)), picture)    # log: from layers.record_routing
    kept_by_modality(pd.DataFrame(kept(log, batch)))                    # analysis.routing
    tables = diagnose(model, batches)                                   # of several arms: with a column arm
    kept_positions(pd.DataFrame(tables["positions"]))
    overlaps(pd.DataFrame(tables["overlaps"]))
    score_histograms(pd.DataFrame(tables["histograms"]))
    kept_over_training(evaluation_frame(results))                       # views.runs
    kept_shares(frame({"showo-tiny": [competition]}))                   # analysis.tasks.Competition; kept_by_layer, too
    kept_over_steps(frame({"showo-tiny": [competition]}, "steps"))
    gradient_angles(pd.DataFrame(found.table("t2i and mmu")))           # GradientCosine, with a column model
    joint_against_single(frame({"showo-tiny": [result]}))               # JointOrSingle
    findings(frame({"showo-tiny": found}))                              # analysis.redundancy.Finding

A token is eligible where the plan has the layer choose among tokens of its kind; the others are always kept. Figures of
arms have a line of panels per arm.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..batch import Batch, Modality
from ..plan import CapacityPlan
from ..routing import Routing
from . import style
from .style import COLOUR, INK, MODALITY, facets, heat_maps, in_panels, legend_below, over_seeds, require, words

BETWEEN = "t2i and mmu"
FAIR = {"line": {"color": INK, "dash": "dash"}}


def plan_frame(plan: CapacityPlan, name: str = "plan") -> pd.DataFrame:
    """One row per layer and task: capacity (share of the tokens kept), and the paper's name for the layer."""
    return pd.DataFrame([{"plan": name, "layer": i, "task": task, "capacity": c, "kind": plan.kind(i)}
                         for i in range(plan.layers) for task, c in plan.at(i).items()])


def capacities(data: pd.DataFrame) -> go.Figure:
    """Capacity of every layer, tasks below one another, a panel per plan."""
    data, cells = require(data, "plan", "layer", "task", "capacity", "kind"), {}
    for plan, part in data.groupby("plan", sort=False):
        tasks = [task for task in style.TASK if task in set(part["task"])]
        grid, kinds = (part.pivot(index="task", columns="layer", values=v).reindex(tasks) for v in ("capacity", "kind"))
        cells[plan] = {"z": grid.to_numpy(np.float32), "x": list(grid.columns), "y": [words(t) for t in tasks],
                       "customdata": kinds.to_numpy()}
    fig = heat_maps("Capacity of every layer", {"": list(cells.values())}, list(cells), x="layer", rows=len(cells),
                    height=190 + 110 * len(cells), hover="%{y}, layer %{x} (%{customdata}): keeps %{z:.0%}",
                    scale=style.SHARE, bar={"title_text": "share kept", "tickformat": ".0%"}, texttemplate="%{z:.2f}",
                    xgap=2, ygap=2)
    return fig.update_yaxes(autorange="reversed").update_xaxes(dtick=1)


def kept_frame(log: Mapping[int, Routing], batch: Batch, row: int, grid: tuple[int, int]) -> pd.DataFrame:
    """Which image tokens of a sequence every routed layer kept: layer, row, column, kept (0 or 1), score, and the
    task."""
    span = batch.rows()[row]
    where = span.start + (batch.modality[span] == Modality.IMAGE).nonzero()[:, 0]
    y, x = np.indices(grid).reshape(2, -1)
    parts = [pd.DataFrame({"row": y, "column": x, "layer": layer, "kept": routing.kept[where].int().cpu().numpy(),
                           "score": routing.score.detach()[where].float().cpu().numpy()})
             for layer, routing in log.items()]
    return pd.concat(parts, ignore_index=True).assign(task=batch.tasks[row].name.lower())


def kept_tokens(data: pd.DataFrame, picture: np.ndarray) -> go.Figure:
    """The picture, uint8 [H, W, 3], as each routed layer receives it: skipped tokens are veiled; a slider over layers,
    a panel per task."""
    data = require(data, "task", "layer", "row", "column", "kept", "score")
    tasks, grid, maps = list(data["task"].unique()), (data["row"].max() + 1, data["column"].max() + 1), {}
    for layer, part in data.groupby("layer"):
        maps[layer] = [{"z": np.ones(grid, np.uint8), "hoverinfo": "skip", "hovertemplate": None}]
        for task in tasks:
            kept, score = (part[part["task"] == task].pivot(index="row", columns="column", values=name).to_numpy()
                           for name in ("kept", "score"))
            maps[layer].append({"z": kept.astype(np.uint8), "customdata": score.round(4)})
    fig = heat_maps("Image tokens that go through the layer", maps, ["the picture", *map(words, tasks)], grid=grid,
                    hover="picture row %{y}, column %{x}<br>kept (1) or skipped (0): %{z}<br>score %{customdata}",
                    scale=style.VEIL, xgap=1, ygap=1)
    style.put_picture(fig, picture, range(1, len(tasks) + 2), grid)
    return fig.update_coloraxes(reversescale=True, showscale=False)


def kept_by_modality(data: pd.DataFrame) -> go.Figure:
    """Which kinds of token each routed layer keeps, a panel per task. Filled: of the eligible tokens; outlined: of all
    tokens, those always kept included."""
    data = require(data, "layer", "task", "modality", "kept", "processed").round({"kept": 4, "processed": 4})
    options = {"title": "What kinds of token are kept", "panel": ("arm", "task"), "color": "modality",
               "barmode": "group", "range_y": [0, 1]}
    fig = facets(px.bar, data, "layer", "processed", labels={"processed": "share kept", "kept": "of the eligible"},
                 **options)
    fig.update_traces(showlegend=False, marker_color=style.CLEAR)
    fig.add_traces(facets(px.bar, data, "layer", "kept", labels={"kept": "share kept of the eligible tokens"},
                          **options).data)
    return fig.for_each_trace(lambda bar: bar.update(marker_line={"width": 1, "color": MODALITY[bar.name]}))


def kept_positions(data: pd.DataFrame) -> go.Figure:
    """How often each place of the picture is kept: a slider over layers, the tasks side by side. A panel is empty where
    no token of the task was eligible."""
    data, panels, across = in_panels(require(data, "layer", "task", "row", "column", "kept"), "arm", "task")
    grid, maps = (data["row"].max() + 1, data["column"].max() + 1), {}
    for layer, part in data.groupby("layer"):
        maps[layer] = []
        for panel in panels:
            cells = part[part["panel"] == panel].pivot(index="row", columns="column", values="kept")
            cells = cells.reindex(index=range(grid[0]), columns=range(grid[1])).to_numpy(np.float32)
            percent = (100 * cells).round()
            maps[layer].append({"z": percent if np.isnan(percent).any() else percent.astype(np.uint8)})
    return heat_maps("Which places of the picture are kept", maps, panels, x="picture column", y="picture row",
                     rows=len(panels) // across, active=_fullest(data), grid=grid, xgap=1, ygap=1, scale=style.SHARE,
                     hover="picture row %{y}, column %{x}: kept in %{z} % of the sequences", limits=(0, 100),
                     bar={"title_text": "share of sequences", "ticksuffix": " %"})


def overlaps(data: pd.DataFrame) -> go.Figure:
    """How much the same tokens are kept by a layer and the next routed one, per task, and by the two tasks in one
    layer; dashed: by chance."""
    data = require(data, "layer", "task", "overlap", "chance")
    names = {task: "the two tasks, image tokens" if task == BETWEEN else f"{words(task)}: with the next routed layer"
             for task in data["task"].unique()}
    colours = {name: "#CC79A7" if task == BETWEEN else COLOUR[task] for task, name in names.items()}
    return legend_below(facets(px.line, data.assign(what=data["task"].map(names)), "layer", "overlap", panel="arm",
                               color="what", reference="chance", meaning="by chance", markers=True, colours=colours,
                               range_y=[0, 1.02], title="Are the same tokens kept?",
                               labels={"overlap": "share of the smaller choice"}))


def score_histograms(data: pd.DataFrame) -> go.Figure:
    """Scores of the eligible tokens, and the gate of those kept: a slider over layers, a colour per task.

    The axes follow the layer; a task's bins span its own values, so that a narrow curve is a narrow distribution.
    """
    data, panels, across = in_panels(require(data, "layer", "task", "value", "low", "high", "share"), "arm", "value")
    fig, frames = style.paper("Scores and gates", "", "share of tokens", panels, len(panels) // across), []
    for layer, part in data.groupby("layer"):
        traces, axes = [], {}
        for n, panel in enumerate(panels, 1):
            here = part[part["panel"] == panel]
            if len(here):
                axes[f"xaxis{n}"] = {"range": [here["low"].min(), here["high"].max()]}
                axes[f"yaxis{n}"] = {"range": [0, 1.05 * here["share"].max()]}
            for task in data["task"].unique():
                bins, name = here[here["task"] == task], words(task)
                edges = [*bins["low"].round(4), *bins["high"].tail(1).round(4)]
                shares = [*bins["share"].round(4), *bins["share"].tail(1).round(4)]
                traces.append(go.Scatter(
                    x=edges or [None], y=shares or [None], xaxis=f"x{n}", yaxis=f"y{n}", name=name, legendgroup=task,
                    showlegend=n == 1, line={"shape": "hv", "color": COLOUR.get(task, INK)}, mode="lines",
                    fill="tozeroy",     # a missing point keeps the legend
                    hovertemplate=f"{name}, {panel} from %{{x:.3g}}: %{{y:.1%}} of the tokens<extra></extra>"))
        frames.append(go.Frame(name=str(layer), data=traces, layout=axes))
    shown = frames[_fullest(data)]
    return style.slider(fig.add_traces(shown.data).update_layout(shown.layout), frames, frames.index(shown))


def kept_over_training(data: pd.DataFrame) -> go.Figure:
    """Share of the eligible tokens that are kept, at every evaluation, mean over layers and seeds; a panel per model
    and routed arm. data: with the columns routing/kept_<task>_<modality>; arms without them are left out."""
    columns = [c for c in data if c.startswith("routing/kept_")]
    data = require(data, "model", "arm", "step", *(columns or ["routing/kept_t2i_image"]))
    shown = data.melt(["model", "arm", "step"], columns, "what", "kept").dropna(subset="kept")
    shown = shown.groupby(["what", "model", "arm", "step"], sort=False)["kept"].mean().reset_index()
    shown[["task", "modality"]] = shown["what"].str.removeprefix("routing/kept_").str.split("_", expand=True)
    return legend_below(facets(px.line, shown, "step", "kept", panel=("model", "arm"), color="modality",
                               line_dash="task", markers=True, range_y=[0, 1.02], labels={"kept": "share kept"},
                               line_dash_map={words("t2i"): "solid", words("mmu"): "dot", words("lm"): "dashdot"},
                               title="Tokens kept while the model trains"))


def gradient_angles(data: pd.DataFrame) -> go.Figure:
    """Cosine between gradients per layer, a line per pair of tasks; 0 is no shared direction."""
    data = require(data, "model", "pair", "layer", "cosine", "cosine_sd")
    fig = facets(px.line, data, "layer", "cosine", panel="model", color="pair", sd="cosine_sd", markers=True,
                 title="Do the tasks pull the same way?", labels={"cosine": "cosine of the two gradients"})
    return fig.add_hline(y=0, line={"color": INK, "width": 1})


def kept_shares(data: pd.DataFrame) -> go.Figure:
    """Share of tokens kept under one router, per task and modality, mean over the routed layers and seeds; dashed: a
    fair share. Error bars reach from the smallest to the largest seed."""
    data = _over_layers_and_seeds(data, "modality").replace({"modality": {"all": "all tokens of the task"}})
    fig = facets(px.bar, data, "task", "mean", panel="model", color="modality", low="min", high="max", barmode="group",
                 range_y=[0, 1], colours={"all tokens of the task": "#009E73", **MODALITY},
                 title="Which tokens does one router keep?", labels={"mean": "share of tokens kept", "task": ""})
    return fig.add_hline(y=data["capacity"].iloc[0], **FAIR)


def kept_by_layer(data: pd.DataFrame) -> go.Figure:
    """The same of each task's tokens, layer by layer."""
    data = _over_layers_and_seeds(data, "modality", "layer").query("modality == 'all'")
    fig = facets(px.line, data, "layer", "mean", panel="model", color="task", low="min", high="max", markers=True,
                 range_y=[0, 1], title="In which layers does one task win?", labels={"mean": "share of tokens kept"})
    return fig.add_hline(y=data["capacity"].iloc[0], **FAIR)


def kept_over_steps(data: pd.DataFrame) -> go.Figure:
    """Share of each task's tokens kept while the router learns, mean over the routed layers: a thin line per seed, a
    thick one for their mean."""
    data = require(data, "model", "seed", "step", "task", "kept")
    return over_seeds(data, "step", "kept", "step", ["model", "task"], color="task", line_dash="model",
                      range_y=[0, 1], labels={"kept": "share of tokens kept"},
                      title="Which task keeps its tokens while the router learns?")


def joint_against_single(data: pd.DataFrame) -> go.Figure:
    """Held-out loss per task before, after training together, and after training alone: one dot per run, a bar for the
    mean."""
    data = require(data, "model", "task", "way", "run", "loss")
    data = data.assign(way=data["way"].map({"before": "before", "joint": "both tasks", "single": "this task alone"}))
    options = {"panel": ("model", "task"), "color": "task", "free": True, "title": "Together or alone?",
               "labels": {"way": "", "loss": "held-out loss (nats)"}}
    means = data.groupby(["model", "task", "way"], sort=False)["loss"].mean().reset_index()
    fig = facets(px.bar, means, "way", "loss", **options).update_traces(marker={"opacity": 0.45, "line": {"width": 0}})
    fig.add_traces(facets(px.scatter, data, "way", "loss", **options).update_traces(marker_size=8).data)
    return fig.update_layout(showlegend=False)


def findings(data: pd.DataFrame) -> go.Figure:
    """Whether each of the paper's findings holds: yes, no, undecided; the hover has the numbers."""
    data = require(data, "model", "finding", "outcome", "sentence", "low", "high", "n", "over")
    models, names = data["model"].unique(), data["finding"].unique()
    fig = facets(px.scatter, data, "model", "finding", color="outcome", symbol="outcome", text="outcome",
                 symbol_map={"yes": "circle", "undecided": "circle-open", "no": "x"},
                 category_orders={"model": models, "finding": names}, labels={"model": "", "finding": ""},
                 title="Do the paper's findings hold here?", hover_data=["sentence", "low", "high", "n", "over"])
    fig.update_traces(textposition="middle right", marker_size=15,
                      hovertemplate="%{y}<br>%{customdata[0]}<br>95 %: %{customdata[1]:.3f} to %{customdata[2]:.3f}, "
                                    "%{customdata[3]} %{customdata[4]}<extra></extra>")
    fig.update_xaxes(side="top", range=[-0.3, len(models) - 0.3])
    return fig.update_layout(showlegend=False, height=120 + 34 * len(names))


def _fullest(data: pd.DataFrame) -> int:
    """The first layer, counted from 0, in which most panels and tasks have data."""
    return int(data.drop_duplicates(["layer", "panel", "task"]).groupby("layer").size().argmax())


def _over_layers_and_seeds(data: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Kept share under one router: mean over layers (unless by them), then mean, min and max over seeds."""
    data = require(data, "model", "seed", "layer", "task", "modality", "kept", "capacity")
    keys = ["model", "task", *by, "capacity"]
    found = data.groupby([*keys, "seed"], sort=False)["kept"].mean()
    return found.groupby(keys, sort=False).agg(["mean", "min", "max"]).reset_index()
