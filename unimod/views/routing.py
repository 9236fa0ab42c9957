"""Figures of plans, of what routers keep, and of how the tasks share one router (notebooks 00, 03, 04, 05 and 07).

    capacities(plan_frame(plan))                                        # layers x tasks
    kept_tokens(kept_frame(log, batch, row=0, grid=(6, 6)), picture)    # log: from layers.record_routing
    kept_by_modality(pd.DataFrame(kept(log, batch)))                    # analysis.routing
    tables = diagnose(model, batches)                                   # of several arms: with a column arm
    kept_positions(pd.DataFrame(tables["positions"]))
    overlaps(pd.DataFrame(tables["overlaps"]))
    score_histograms(pd.DataFrame(tables["histograms"]))
    kept_over_training(evaluation_frame(results))                       # views.runs
    kept_shares(frame({"showo-tiny": [competition]}))                   # analysis.tasks.Competition
    kept_over_steps(frame({"showo-tiny": [competition]}, "steps"))
    gradient_angles(pd.DataFrame(found.table("t2i and mmu")))           # GradientCosine, with a column model
    joint_against_single(frame({"showo-tiny": [result]}))               # JointOrSingle
    findings(frame({"showo-tiny": found}))                              # analysis.redundancy.Finding

A token is eligible where the plan has the layer choose among tokens of its kind; the others are always kept.
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
from .style import (
    CLEAR,
    COLOUR,
    DASH,
    INK,
    MODALITY,
    SHARE,
    TASK,
    VEIL,
    dashed,
    facets,
    heat_maps,
    legend_below,
    over_seeds,
    paper,
    put_picture,
    require,
    slider,
    with_reference,
    words,
)

BETWEEN = "t2i and mmu"
ZERO = {"line": {"color": INK, "width": 1}}
FAIR = {"line": {"color": INK, "dash": "dash"}}


def plan_frame(plan: CapacityPlan, name: str = "plan") -> pd.DataFrame:
    """One row per layer and task: capacity (share of the tokens kept), and the paper's name for the layer."""
    return pd.DataFrame([{"plan": name, "layer": i, "task": task, "capacity": c, "kind": plan.kind(i)}
                         for i in range(plan.layers) for task, c in plan.at(i).items()])


def capacities(data: pd.DataFrame) -> go.Figure:
    """Capacity of every layer, tasks below one another, a panel per plan. data: `plan_frame`, several may be
    concatenated."""
    data = require(data, "plan", "layer", "task", "capacity", "kind")
    cells = {}
    for plan, part in data.groupby("plan", sort=False):
        tasks = [task for task in TASK if task in set(part["task"])]
        grid = part.pivot(index="task", columns="layer", values="capacity").reindex(tasks)
        kinds = part.drop_duplicates("layer").set_index("layer")["kind"].reindex(grid.columns)
        cells[plan] = {"z": grid.to_numpy(np.float32), "x": list(grid.columns), "y": [words(t) for t in grid.index],
                       "customdata": [list(kinds)] * len(grid)}
    fig = heat_maps("Capacity of every layer", {"": list(cells.values())}, list(cells), x="layer", rows=len(cells),
                    height=190 + 110 * len(cells), hover="%{y}, layer %{x} (%{customdata}): keeps %{z:.0%}",
                    texttemplate="%{z:.2f}", xgap=2, ygap=2,
                    coloraxis={"colorscale": SHARE, "cmin": 0, "cmax": 1,
                               "colorbar": {"title": {"text": "share kept"}, "tickformat": ".0%"}})
    return fig.update_yaxes(autorange="reversed").update_xaxes(dtick=1).update_layout(margin={"l": 160})


def kept_frame(log: Mapping[int, Routing], batch: Batch, row: int, grid: tuple[int, int]) -> pd.DataFrame:
    """Which image tokens of a sequence every routed layer kept: layer, row, column, kept (0 or 1), score, and the
    task."""
    span = batch.rows()[row]
    where = span.start + (batch.modality[span] == Modality.IMAGE).nonzero()[:, 0]
    parts = []
    for layer, routing in log.items():
        index = pd.MultiIndex.from_product([range(grid[0]), range(grid[1])], names=["row", "column"])
        cells = index.to_frame(index=False)
        parts.append(cells.assign(layer=layer, kept=routing.kept[where].int().cpu().numpy(),
                                  score=routing.score.detach()[where].float().cpu().numpy()))
    return pd.concat(parts, ignore_index=True).assign(task=batch.tasks[row].name.lower())


def kept_tokens(data: pd.DataFrame, picture: np.ndarray) -> go.Figure:
    """The picture as each routed layer receives it: skipped tokens are veiled; a slider over layers that also plays, a
    panel per task.

    data: `kept_frame`, of one or several tasks; picture: uint8 [H, W, 3].
    """
    data = require(data, "task", "layer", "row", "column", "kept", "score")
    tasks, h, w = list(data["task"].unique()), data["row"].max() + 1, data["column"].max() + 1
    bare = {"z": np.ones((h, w), np.uint8), "hoverinfo": "skip", "hovertemplate": None}
    maps = {}
    for layer, part in data.groupby("layer"):
        maps[layer] = [bare]
        for task in tasks:
            z, score = (part[part["task"] == task].pivot(index="row", columns="column", values=v).to_numpy()
                        for v in ("kept", "score"))
            maps[layer].append({"z": z.astype(np.uint8), "customdata": score.round(4)})
    fig = heat_maps("Image tokens that go through the layer", maps, ["the picture", *map(words, tasks)], height=380,
                    play=True, xgap=1, ygap=1, subplots={"shared_yaxes": False},      # squares need axes of their own
                    hover="picture row %{y}, column %{x}<br>kept (1) or skipped (0): %{z}<br>score %{customdata}",
                    coloraxis={"colorscale": VEIL, "reversescale": True, "cmin": 0, "cmax": 1, "showscale": False})
    put_picture(fig, picture, range(1, len(tasks) + 2), (h, w))
    return fig


def kept_by_modality(data: pd.DataFrame) -> go.Figure:
    """Which kinds of token each routed layer keeps: a line of panels per arm, a panel per task.

    Filled: of the eligible tokens; outlined: of all tokens, those always kept included. data: `kept`.
    """
    data, panels, across = _panels(require(data, "layer", "task", "modality", "kept", "processed"), "task")
    data = data.assign(kept=data["kept"].round(4), processed=data["processed"].round(4))
    options = {"title": "What kinds of token are kept", "panel": "panel", "across": across, "each": 180,
               "color": "modality", "barmode": "group", "range_y": [0, 1], "category_orders": {"panel": panels}}
    fig = facets(px.bar, data, "layer", "processed", labels={"processed": "share kept", "kept": "of the eligible"},
                 **options)
    fig.update_traces(showlegend=False, marker_color=CLEAR)
    fig.add_traces(facets(px.bar, data, "layer", "kept", labels={"kept": "share kept of the eligible tokens"},
                          **options).data)
    fig.for_each_trace(lambda bar: bar.update(marker_line={"width": 1, "color": MODALITY[bar.name]}))
    return fig.update_xaxes(dtick=1)


def kept_positions(data: pd.DataFrame) -> go.Figure:
    """How often each place of the picture is kept: slider over layers, a line of panels per arm, the tasks side by
    side, one colour range.

    A panel is empty where no token of the task was eligible. data: rows "positions" of `diagnose`.
    """
    data, panels, across = _panels(require(data, "layer", "task", "row", "column", "kept"), "task")
    rows, shape = len(panels) // across, (data["row"].max() + 1, data["column"].max() + 1)
    maps, filled = {}, []
    for layer, part in data.groupby("layer"):
        found = {panel: cells.pivot(index="row", columns="column", values="kept")
                 for panel, cells in part.groupby("panel")}
        maps[layer] = [{"z": _percent(found.get(panel), shape)} for panel in panels]
        filled.append(len(found))
    fig = heat_maps("Which places of the picture are kept", maps, panels, x="picture column", y="picture row",
                    rows=rows, height=max(400, 140 + 230 * rows), active=filled.index(max(filled)), xgap=1, ygap=1,
                    subplots={"shared_yaxes": False, "vertical_spacing": 0.35 / max(2, rows)},
                    hover="picture row %{y}, column %{x}: kept in %{z} % of the sequences",
                    coloraxis={"colorscale": SHARE, "cmin": 0, "cmax": 100,
                               "colorbar": {"title": {"text": "share of sequences"}, "ticksuffix": " %"}})
    for n in range(len(panels)):
        fig.layout[f"yaxis{n + 1 if n else ''}"].scaleanchor = f"x{n + 1 if n else ''}"
    fig.update_xaxes(range=[-0.5, shape[1] - 0.5], constrain="domain")
    return fig.update_yaxes(range=[shape[0] - 0.5, -0.5], constrain="domain")


def overlaps(data: pd.DataFrame) -> go.Figure:
    """How much the same tokens are kept by a layer and the next routed one, per task, and by the two tasks in one
    layer; dashed: by chance.

    data: rows of `neighbours` and of `tasks`, which have the task "t2i and mmu"; a panel per arm.
    """
    data = require(data, "layer", "task", "overlap", "chance")
    names = {task: "the two tasks, image tokens" if task == BETWEEN else f"{words(task)}: with the next routed layer"
             for task in data["task"].unique()}
    colours = {name: "#CC79A7" if task == BETWEEN else COLOUR[task] for task, name in names.items()}
    shown = with_reference(data.assign(what=data["task"].map(names)), "overlap", "chance", "by chance")
    fig = facets(px.line, shown, "layer", "overlap", panel="arm", color="what", line_dash="line", markers=True,
                 colours=colours, line_dash_map={"measured": "solid", "by chance": "dash"}, range_y=[0, 1.02],
                 title="Are the same tokens kept?", labels={"overlap": "share of the smaller choice"})
    return legend_below(dashed(fig, legend=False).update_xaxes(dtick=1))


def score_histograms(data: pd.DataFrame) -> go.Figure:
    """Scores of the eligible tokens, and the gate of those kept: slider over layers, a line of panels per arm, a colour
    per task.

    data: `histograms`. The axes follow the layer; a task's bins span its own values, so that a narrow curve is a narrow
    distribution.
    """
    data, panels, across = _panels(require(data, "layer", "task", "value", "low", "high", "share"), "value")
    tasks, rows = list(data["task"].unique()), len(panels) // across
    fig = paper("Scores and gates", "", "share of tokens", panels, rows, max(400, 140 + 180 * rows),
                vertical_spacing=0.35 / max(2, rows))
    frames, filled = [], []
    for layer, part in data.groupby("layer"):
        found = dict(iter(part.groupby(["panel", "task"])))
        traces = [_steps(found.get((panel, task)), panel, task, legend=panel == panels[0])
                  for panel in panels for task in tasks]
        layout = {}
        for n, panel in enumerate(panels, 1):
            here = part[part["panel"] == panel]
            if len(here):
                layout[f"xaxis{n}"] = {"range": [here["low"].min(), here["high"].max()]}
                layout[f"yaxis{n}"] = {"range": [0, 1.05 * here["share"].max()]}
        frames.append(go.Frame(name=str(layer), data=traces, traces=list(range(len(traces))), layout=layout))
        filled.append(len(found))
    active = filled.index(max(filled))
    for n, trace in enumerate(frames[active].data):
        fig.add_trace(trace, row=n // len(tasks) // across + 1, col=n // len(tasks) % across + 1)
    return slider(fig.update_layout(frames[active].layout), frames, "layer", active)


def kept_over_training(data: pd.DataFrame) -> go.Figure:
    """Share of the eligible tokens that are kept, at every evaluation, mean over layers and seeds: a line of panels per
    model, a panel per routed arm.

    data: `views.runs.evaluation_frame` with the columns routing/kept_<task>_<modality>; arms without them are left out.
    """
    columns = [c for c in data if c.startswith("routing/kept_")]
    data = require(data, "model", "arm", "step", *(columns or ["routing/kept_t2i_image"]))
    shown = data.melt(["model", "arm", "step"], columns, "what", "kept").dropna(subset="kept")
    shown = shown.groupby(["what", "model", "arm", "step"], sort=False)["kept"].mean().reset_index()
    parts = shown["what"].str.removeprefix("routing/kept_").str.split("_")
    order = [f"{model}: {arm}" for model in shown["model"].unique() for arm in shown["arm"].unique()]
    shown = shown.assign(panel=shown["model"] + ": " + shown["arm"], task=parts.str[0].map(words),
                         modality=parts.str[1])
    fig = facets(px.line, shown, "step", "kept", panel="panel", across=shown["arm"].nunique(), each=180,
                 color="modality", line_dash="task", markers=True,
                 line_dash_map={words("t2i"): "solid", words("mmu"): "dot", words("lm"): "dash"},
                 category_orders={"panel": order}, range_y=[0, 1.02], title="Tokens kept while the model trains",
                 labels={"kept": "share kept"})
    return legend_below(fig)


def gradient_angles(data: pd.DataFrame) -> go.Figure:
    """Cosine between gradients per layer, a line per pair of tasks, a panel per model; 0 is no shared direction."""
    data = require(data, "model", "pair", "layer", "cosine", "cosine_sd")
    fig = facets(px.line, data, "layer", "cosine", panel="model", color="pair", sd="cosine_sd", markers=True,
                 title="Do the tasks pull the same way?", labels={"cosine": "cosine of the two gradients"})
    return fig.add_hline(y=0, **ZERO).update_xaxes(dtick=1)


def kept_shares(data: pd.DataFrame) -> go.Figure:
    """Share of tokens kept under one router, per task and modality, mean over the routed layers and seeds; the dashed
    line is a fair share.

    Error bars reach from the smallest to the largest seed.
    """
    data = require(data, "model", "seed", "layer", "task", "modality", "kept", "capacity")
    found = data.groupby(["model", "task", "modality", "seed"], sort=False)["kept"].mean()
    found = found.groupby(["model", "task", "modality"], sort=False).agg(["mean", "min", "max"]).reset_index()
    found = found.assign(task=found["task"].map(words),
                         modality=found["modality"].replace("all", "all tokens of the task"))
    fig = facets(px.bar, found, "task", "mean", panel="model", color="modality", low="min", high="max", barmode="group",
                 range_y=[0, 1], colours={"all tokens of the task": "#009E73", **MODALITY},
                 title="Which tokens does one router keep?", labels={"mean": "share of tokens kept", "task": ""})
    return fig.add_hline(y=float(data["capacity"].iloc[0]), **FAIR)


def kept_by_layer(data: pd.DataFrame) -> go.Figure:
    """Share of each task's tokens kept under one router, layer by layer, mean over seeds; error bars reach from the
    smallest to the largest seed.

    data: `Competition.table`; a panel per model, the dashed line is a fair share.
    """
    data = require(data, "model", "seed", "layer", "task", "modality", "kept", "capacity")
    found = data[data["modality"] == "all"].groupby(["model", "task", "layer"],
                                                    sort=False)["kept"].agg(["mean", "min", "max"]).reset_index()
    fig = facets(px.line, found.assign(task=found["task"].map(words)), "layer", "mean", panel="model", color="task",
                 low="min", high="max", markers=True, range_y=[0, 1], title="In which layers does one task win?",
                 labels={"mean": "share of tokens kept"})
    return fig.add_hline(y=float(data["capacity"].iloc[0]), **FAIR).update_xaxes(dtick=1)


def kept_over_steps(data: pd.DataFrame) -> go.Figure:
    """Share of each task's tokens kept while the router learns, mean over the routed layers: a thin line per seed, a
    thick one for their mean."""
    data = require(data, "model", "seed", "step", "task", "kept")
    data = data.assign(task=data["task"].map(words))
    return over_seeds(px.line, data, "step", "kept", "step", ["model", "task"], color="task", line_dash="model",
                      line_dash_map=DASH, range_y=[0, 1], title="Which task keeps its tokens while the router learns?",
                      labels={"kept": "share of tokens kept"})


def joint_against_single(data: pd.DataFrame) -> go.Figure:
    """Held-out loss per task before, after training together, and after training alone: one dot per run, a bar for the
    mean."""
    data = require(data, "model", "task", "way", "run", "loss")
    names = {"before": "before", "joint": "both tasks", "single": "this task alone"}
    data = data.assign(way=data["way"].map(names), task=data["task"].map(words))
    data = data.assign(panel=data["model"] + ": " + data["task"])
    options = {"panel": "panel", "across": 2, "each": 250, "color": "task", "free": True, "title": "Together or alone?",
               "labels": {"way": "", "loss": "held-out loss (nats)"}}
    means = data.groupby(["panel", "task", "way"], sort=False)["loss"].mean().reset_index()
    fig = facets(px.bar, means, "way", "loss", **options).update_traces(marker={"opacity": 0.45, "line": {"width": 0}})
    fig.add_traces(facets(px.scatter, data, "way", "loss", **options).update_traces(marker_size=8).data)
    return fig.update_layout(showlegend=False)


OUTCOME = {"yes": ("#009E73", "circle"), "undecided": ("#999999", "circle-open"), "no": ("#D55E00", "x")}


def findings(data: pd.DataFrame) -> go.Figure:
    """Whether each of the paper's findings holds, a line per finding and a column per model: yes, no, undecided; the
    hover has the numbers.

    data: `Finding.table`.
    """
    data = require(data, "model", "finding", "outcome", "sentence", "low", "high", "n", "over")
    models, names = list(data["model"].unique()), list(data["finding"].unique())
    fig = facets(px.scatter, data, "model", "finding", color="outcome", symbol="outcome", text="outcome",
                 labels={"model": "", "finding": ""},
                 colours={name: colour for name, (colour, _) in OUTCOME.items()},
                 title="Do the paper's findings hold here?",
                 symbol_map={name: symbol for name, (_, symbol) in OUTCOME.items()},
                 hover_data=["sentence", "low", "high", "n", "over"])
    fig.update_traces(textposition="middle right", marker_size=15,
                      hovertemplate="%{y}<br>%{customdata[0]}<br>95 %: %{customdata[1]:.3f} to %{customdata[2]:.3f}, "
                                    "%{customdata[3]} %{customdata[4]}<extra></extra>")
    fig.update_yaxes(automargin=True, categoryorder="array", categoryarray=names[::-1])
    fig.update_xaxes(side="top", categoryorder="array", categoryarray=models, range=[-0.3, len(models) - 0.3])
    return fig.update_layout(showlegend=False, height=120 + 34 * len(names))


def _panels(data: pd.DataFrame, column: str) -> tuple[pd.DataFrame, list[str], int]:
    """A column `panel` of "arm: value of the column" (without an arm the value), all such panels line by line, and
    their number in a line."""
    arms = list(data["arm"].unique()) if "arm" in data else []
    label = data[column].map(words)
    names = [f"{arm}: {value}" for arm in arms for value in label.unique()] or list(label.unique())
    return data.assign(panel=data["arm"] + ": " + label if arms else label), names, label.nunique()


def _percent(share: pd.DataFrame | None, shape: tuple[int, int]) -> np.ndarray:
    """Whole per cent, a byte a cell where all cells are known."""
    whole = np.full(shape, np.nan, np.float32) if share is None else (100 * share.to_numpy(np.float32)).round()
    return whole if np.isnan(whole).any() else whole.astype(np.uint8)


def _steps(part: pd.DataFrame | None, panel: str, task: str, legend: bool) -> go.Scatter:
    """A histogram as a stepped outline, filled lightly. Without bins there is one missing point, which keeps the
    legend."""
    x, y = [None], [None]
    if part is not None:
        edges, shares = [*part["low"], part["high"].iloc[-1]], [*part["share"], part["share"].iloc[-1]]
        x, y = np.round(edges, 4), np.round(shares, 4)
    return go.Scatter(x=x, y=y, mode="lines", line={"shape": "hv", "color": COLOUR.get(task, INK), "width": 2},
                      fill="tozeroy", opacity=0.9, name=words(task), legendgroup=task, showlegend=legend,
                      hovertemplate=f"{words(task)}, {panel} from %{{x:.3g}}: %{{y:.1%}} of the tokens<extra></extra>")
