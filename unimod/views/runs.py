"""Figures of notebooks 07 and 08: training curves, and quality against cost.

    training_curves(data, "loss_t2i", x="flops")        # one row per arm, seed and step
    quality_against_flops(data, "questions/all")        # one row per arm and seed
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from .style import ARM, INK, OKABE_ITO, SYMBOL, paper, require

AXES = {"step": "step", "flops": "training FLOPs so far", "seconds": "seconds so far", "tokens": "tokens so far"}
POINTS = 400


def training_curves(data: pd.DataFrame, value: str, x: str = "step", smooth: int = 1) -> go.Figure:
    """One value over training, a thin line per seed and a thick one for their mean, a colour per arm, a panel per model.

    data: arm, seed, step, the value, for x other than step that column per step (FLOPs, seconds, tokens; summed up here), and
    model if there are several. smooth: steps of a running mean. At most 400 points per line are drawn.
    """
    data = require(data, "arm", "seed", "step", value, x)
    data = data if "model" in data else data.assign(model="")
    models = list(data["model"].unique())
    fig = paper(f"Training: {value.replace('_', ' ')}", AXES.get(x, x), value.replace("_", " "), models, shared_yaxes=True)
    shown: set[str] = set()
    for (model, arm), part in data.groupby(["model", "arm"], sort=False):
        colour, curves = _colour(arm, data), []
        for seed, run in part.groupby("seed", sort=False):
            run = run.dropna(subset=[value]).sort_values("step")
            at = run[x] if x == "step" else part[part["seed"] == seed].sort_values("step")[x].cumsum().loc[run.index]
            curves.append(pd.DataFrame({"step": run["step"], "x": at, "y": run[value].rolling(smooth, min_periods=1).mean()}))
        mean = pd.concat(curves).groupby("step", sort=True).mean()
        for curve, width, opacity in [(c, 1, 0.4) for c in curves if len(curves) > 1] + [(mean, 2.5, 1)]:
            curve = curve.iloc[:: max(1, -(-len(curve) // POINTS))]
            fig.add_scatter(
                x=curve["x"],
                y=curve["y"].round(5),
                mode="lines" if len(curve) > 1 else "markers",
                name=arm,
                legendgroup=arm,
                showlegend=width > 1 and arm not in shown,
                opacity=opacity,
                line={"color": colour, "width": width},
                hovertemplate=f"{arm}: %{{y:.4g}} at %{{x:.3g}}<extra></extra>",
                row=1,
                col=models.index(model) + 1,
            )
        shown.add(arm)
    return fig


def quality_against_flops(data: pd.DataFrame, value: str, cost: str = "flops", dense: str = "dense") -> go.Figure:
    """Quality against cost, a small mark per seed and a large one for each arm's mean with its spread; the dense arm's mean as a line.

    data: arm, seed, the value, the cost, and model if there are several.
    """
    data = require(data, "arm", "seed", value, cost)
    data = data if "model" in data else data.assign(model="")
    models = list(data["model"].unique())
    fig = paper(
        f"Quality against cost: {value.replace('/', ', ').replace('_', ' ')}",
        cost.replace("_", " "),
        value.replace("/", ", "),
        models,
        shared_yaxes=True,
    )
    for n, model in enumerate(models):
        here = data[data["model"] == model]
        for arm, part in here.groupby("arm", sort=False):
            colour = _colour(arm, data)
            fig.add_scatter(
                x=part[cost],
                y=part[value],
                mode="markers",
                marker={"color": colour, "size": 6, "opacity": 0.5},
                customdata=part["seed"],
                name=arm,
                legendgroup=arm,
                showlegend=False,
                row=1,
                col=n + 1,
                hovertemplate=f"{arm}, seed %{{customdata}}: %{{y:.3f}}<extra></extra>",
            )
            spread = part[value].std() if len(part) > 1 else 0
            fig.add_scatter(
                x=[part[cost].mean()],
                y=[part[value].mean()],
                mode="markers",
                name=arm,
                legendgroup=arm,
                showlegend=n == 0,
                row=1,
                col=n + 1,
                error_y={"type": "data", "array": [spread], "color": colour},
                marker={"color": colour, "size": 14, "symbol": SYMBOL.get(model, "circle")},
                hovertemplate=f"{arm}, mean of {len(part)}: %{{y:.3f}}<extra></extra>",
            )
        level = here[here["arm"] == dense][value]
        if len(level):
            fig.add_hline(y=level.mean(), line={"color": INK, "dash": "dash"}, annotation_text=dense, row=1, col=n + 1)
    return fig


def _colour(arm: str, data: pd.DataFrame) -> str:
    others = [a for a in data["arm"].unique() if a not in ARM]
    return ARM.get(arm) or OKABE_ITO[(others.index(arm) + 2) % len(OKABE_ITO)]
