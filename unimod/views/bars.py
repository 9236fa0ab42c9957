"""Bars: one value per label, grouped by a second column, with an optional range.

    bars(data, "gate", "loss", group="task", title="Loss right after the routers are put in", unit="nats per target")
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from .style import ARM, OKABE_ITO, TASK, paper, require, words


def bars(data: pd.DataFrame, label: str, value: str, *, group: str, title: str, unit: str, low: str = "", high: str = "") -> go.Figure:
    """A panel per model (if `data` has that column), a bar per label and group. `low` and `high` name columns of a range's ends."""
    data = require(data, label, value, group, *filter(None, (low, high)))
    data = data if "model" in data else data.assign(model="")
    models, groups = list(data["model"].unique()), list(data[group].unique())
    fig = paper(title, label.replace("_", " "), f"{value.replace('_', ' ')} ({unit})", models, shared_yaxes=True)
    for n, model in enumerate(models):
        for g, name in enumerate(groups):
            part = data[(data["model"] == model) & (data[group] == name)]
            error = (
                {"type": "data", "symmetric": False, "array": part[high] - part[value], "arrayminus": part[value] - part[low]}
                if low
                else None
            )
            fig.add_bar(
                x=part[label],
                y=part[value].round(5),
                name=words(str(name)),
                legendgroup=str(name),
                showlegend=n == 0,
                error_y=error,
                row=1,
                col=n + 1,
                marker={"color": {**ARM, **TASK}.get(str(name), OKABE_ITO[g % len(OKABE_ITO)])},
                hovertemplate=f"{words(str(name))}, %{{x}}: %{{y:.4g}} {unit}<extra></extra>",
            )
    return fig.update_layout(barmode="group")
