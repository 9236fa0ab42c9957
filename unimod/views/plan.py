"""Figures of plans, and of the tokens of one picture that routers kept (`views.routing` has those of whole batches).

    capacities(plan_frame(plan))                                # layers x tasks
    kept_tokens(kept_frame(log, packed, row=0, grid=(6, 6)), picture)   # log: what layers.record_routing gave
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ..batch import Batch, Modality
from ..plan import CapacityPlan
from ..router import Routing
from .style import SHARE, paper, put_picture, require, slider, words


def plan_frame(plan: CapacityPlan, name: str = "plan") -> pd.DataFrame:
    """One row per layer and task: share kept, and the paper's name for the layer."""
    return pd.DataFrame(
        [
            {"plan": name, "layer": i, "task": task, "capacity": c, "kind": plan.kind(i)}
            for i in range(plan.layers)
            for task, c in plan.at(i).items()
        ]
    )


def capacities(data: pd.DataFrame) -> go.Figure:
    """Share of tokens every layer keeps, tasks below one another, a panel per plan. data: `plan_frame`, several may be concatenated."""
    data = require(data, "plan", "layer", "task", "capacity", "kind")
    plans = list(data["plan"].unique())
    fig = paper("What the plan keeps", "layer", "", plans, height=190 + 110 * len(plans), rows=len(plans))
    for n, plan in enumerate(plans):
        part = data[data["plan"] == plan]
        grid = part.pivot(index="task", columns="layer", values="capacity").reindex(
            [t for t in ("t2i", "mmu", "lm") if t in set(part["task"])]
        )
        kinds = part.drop_duplicates("layer").set_index("layer")["kind"].reindex(grid.columns)
        fig.add_heatmap(
            z=grid.to_numpy(np.float32),
            x=list(grid.columns),
            y=[words(t) for t in grid.index],
            customdata=[list(kinds)] * len(grid),
            coloraxis="coloraxis",
            texttemplate="%{z:.2f}",
            hovertemplate="%{y}, layer %{x} (%{customdata}): keeps %{z:.0%}<extra></extra>",
            xgap=2,
            ygap=2,
            row=n + 1,
            col=1,
        )
    fig.update_layout(
        coloraxis={"colorscale": SHARE, "cmin": 0, "cmax": 1, "colorbar": {"title": {"text": "share kept"}, "tickformat": ".0%"}},
        margin={"l": 120},
    )
    return fig.update_yaxes(autorange="reversed", showgrid=False).update_xaxes(dtick=1, showgrid=False)


def kept_frame(log: Mapping[int, Routing], packed: Batch, row: int, grid: tuple[int, int]) -> pd.DataFrame:
    """Which picture tokens of a row every routed layer kept: layer, row, column, kept (0 or 1), score, and the task."""
    span = packed.rows()[row]
    where = span.start + (packed.modality[span] == Modality.IMAGE).nonzero()[:, 0]
    parts = []
    for layer, routing in log.items():
        kept = routing.stays[where]
        cells = pd.MultiIndex.from_product([range(grid[0]), range(grid[1])], names=["row", "column"]).to_frame(index=False)
        parts.append(cells.assign(layer=layer, kept=kept.int().cpu().numpy(), score=routing.score.detach()[where].float().cpu().numpy()))
    return pd.concat(parts, ignore_index=True).assign(task=packed.tasks[row].name.lower())


def kept_tokens(data: pd.DataFrame, picture: np.ndarray) -> go.Figure:
    """The picture as each routed layer sees it: skipped tokens are veiled; a slider over layers that also plays, a panel per task.

    data: `kept_frame`, of one or several tasks; picture: uint8 [H, W, 3].
    """
    data = require(data, "task", "layer", "row", "column", "kept", "score")
    tasks, h, w = list(data["task"].unique()), data["row"].max() + 1, data["column"].max() + 1
    fig = paper("Which picture tokens go through the layer", panels=["the picture", *(words(t) for t in tasks)], height=380)
    veil = [[0, "rgba(60,60,70,0.86)"], [1, "rgba(0,0,0,0)"]]
    frames = []
    for layer, part in data.groupby("layer"):
        traces = []
        for task in tasks:
            mine = part[part["task"] == task]
            z, score = (mine.pivot(index="row", columns="column", values=v).to_numpy() for v in ("kept", "score"))
            traces.append(
                go.Heatmap(
                    z=z.astype(np.uint8),
                    customdata=score.round(4),
                    colorscale=veil,
                    zmin=0,
                    zmax=1,
                    showscale=False,
                    xgap=1,
                    ygap=1,
                    hovertemplate="picture row %{y}, column %{x}<br>kept (1) or skipped (0): %{z}<br>score %{customdata}<extra></extra>",
                )
            )
        frames.append(go.Frame(name=str(layer), data=traces, traces=list(range(len(tasks)))))
    for n, trace in enumerate(frames[0].data):
        fig.add_trace(trace, row=1, col=n + 2)
    fig.add_scatter(x=[0], y=[0], mode="markers", marker={"opacity": 0}, hoverinfo="skip", showlegend=False, row=1, col=1)
    put_picture(fig, picture, range(1, len(tasks) + 2), (h, w))
    return slider(fig, frames, "layer", play=True)
