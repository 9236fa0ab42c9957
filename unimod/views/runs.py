"""Figures and tables of trained arms (notebooks 07 and 08), and bars for any table.

    results = read_arms([folder])
    training_curves(evaluation_frame(results), "loss_t2i", x="flops")   # one row per model, arm, seed and step
    final = final_frame(results)                                        # one row per model, arm and seed
    quality_against_flops(final, "questions/all")
    summary(final)                                                      # one row per model and arm
    bars(data, "gate", "loss", group="task", title="Loss right after the routers are put in", unit="nats per target")
"""

from __future__ import annotations

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from .style import ARM, INK, OKABE_ITO, facets, over_seeds, require, words

AXES = {"step": "step", "flops": "training FLOPs so far", "seconds": "seconds so far", "tokens": "tokens so far"}
POINTS = 400
FIGURES = {"questions/all": "questions right", "pictures/all": "pictures right", "losses/t2i": "loss t2i",
           "losses/mmu": "loss mmu"}
"""The quality figures of an arm and their short names."""
ARM_KEYS = ["model", "arm", "seed"]


def bars(data: pd.DataFrame, label: str, value: str, *, group: str, title: str, unit: str, low: str = "",
         high: str = "") -> go.Figure:
    """A panel per model (if `data` has that column), a bar per label and group; low, high: columns with the ends of a
    range."""
    data = require(data, label, value, group, *filter(None, (low, high)))
    return facets(px.bar, data.assign(**{group: data[group].map(words)}), label, value, panel="model", color=group,
                  low=low, high=high, barmode="group", title=title,
                  labels={value: f"{value.replace('_', ' ')} ({unit})"})


def training_curves(data: pd.DataFrame, value: str, x: str = "step", smooth: int = 1) -> go.Figure:
    """One value over training, a thin line per seed and a thick one for their mean, a colour per arm, a panel per
    model.

    data: arm, seed, step, the value, for x other than step that column per step (FLOPs, seconds, tokens; summed up
    here), and model if there are several. smooth: steps of a running mean. At most POINTS per line are drawn.
    """
    data = _with_model(require(data, "arm", "seed", "step", value, x)).sort_values("step", kind="stable")
    runs = data.groupby(ARM_KEYS, sort=False)
    data = data.assign(at=data["step"] if x == "step" else runs[x].cumsum(), shown=data[value])
    # steps without the value are left out, but a run that has none keeps a row: its panel, its colour
    none = (runs[value].transform("count") == 0) & ~data.duplicated(ARM_KEYS)
    data = data[data["shown"].notna() | none]
    data["shown"] = data.groupby(ARM_KEYS, sort=False)["shown"].transform(
        lambda y: y.rolling(smooth, min_periods=1).mean())
    place = data.groupby(ARM_KEYS[:2], sort=False)["step"].rank("dense") - 1
    every = place.groupby([data["model"], data["arm"]]).transform("max") // POINTS + 1
    return over_seeds(data[place % every == 0], "at", "shown", "step", ARM_KEYS[:2], panel="model", color="arm",
                      colours=_colours(data), title=f"Training: {value.replace('_', ' ')}",
                      labels={"at": AXES.get(x, x), "shown": value.replace("_", " ")})


def quality_against_flops(data: pd.DataFrame, value: str, cost: str = "flops", dense: str = "dense") -> go.Figure:
    """Quality against cost, a small mark per seed and a large one for each arm's mean with its spread; the dense arm's
    mean as a line. data: arm, seed, the value, the cost, and model if there are several."""
    data, name = _with_model(require(data, "arm", "seed", value, cost)), value.replace("/", ", ").replace("_", " ")
    options = {"panel": "model", "color": "arm", "colours": _colours(data), "title": f"Quality against cost: {name}"}
    shown = data.groupby(ARM_KEYS[:2], sort=False).agg(cost=(cost, "mean"), mean=(value, "mean"), sd=(value, "std"),
                                                       seeds=("seed", "nunique")).reset_index()
    fig = facets(px.scatter, shown, "cost", "mean", sd="sd", hover_data={"seeds": True, "mean": ":.3f"},
                 labels={"cost": cost.replace("_", " "), "mean": name}, **options).update_traces(marker_size=14)
    seeds = facets(px.scatter, data, cost, value, hover_data={"seed": True, value: ":.3f"}, **options)
    fig.add_traces(seeds.update_traces(marker={"size": 6, "opacity": 0.5}, showlegend=False).data)
    for n, model in enumerate(data["model"].unique(), 1):
        level = data[(data["model"] == model) & (data["arm"] == dense)][value]
        if len(level):
            fig.add_hline(y=level.mean(), line={"color": INK, "dash": "dash"}, annotation_text=dense, row=1, col=n)
    return fig


def evaluation_frame(results: list[dict]) -> pd.DataFrame:
    """Every evaluation; `flops` are those spent since the one before, so that they add up along a run."""
    rows = []
    for r in results:
        spent = 0.0
        for e in r["evaluations"]:
            rows.append({**{k: r[k] for k in ARM_KEYS}, **e, "flops": e["flops"] - spent})
            spent = e["flops"]
    return pd.DataFrame(rows)


def final_frame(results: list[dict]) -> pd.DataFrame:
    """The last evaluation of every arm with its counted costs; FLOPs of a step relative to the dense one of the same
    batch."""
    return pd.DataFrame([{
        **{k: r[k] for k in (*ARM_KEYS, "data", "steps", "train_flops", "eval_samples")},
        "step_flops": r["flops_per_step"] / r["dense_flops_per_step"],
        "stack_saved": r["saved"],
        "tokens_saved": r["saved_paper"],
        "tokens_per_step": r["tokens_per_step"],
        **{name: r["evaluations"][-1].get(name) for name in FIGURES},
        **{f"start {name}": r["evaluations"][0].get(name) for name in FIGURES},
    } for r in results])


def summary(final: pd.DataFrame, timing: pd.DataFrame | None = None) -> pd.DataFrame:
    """Mean over seeds with the smallest and largest value, per model and arm.

    tokens: token-layer computations relative to dense (the paper's counting); step FLOPs: everything, head included.
    timing: a step's measured time: model, arm, ms, ratio (to dense, same batch, interleaved).
    """
    rows = []
    for (model, arm), part in require(final, *ARM_KEYS, *FIGURES).groupby(["model", "arm"], sort=False):
        row = {"model": model, "arm": arm, "seeds": len(part), "steps": int(part["steps"].iloc[0]),
               "tokens": f"{1 - part['tokens_saved'].mean():.2f}", "step FLOPs": f"{part['step_flops'].mean():.2f}"}
        if timing is not None:
            t = timing[(timing["model"] == model) & (timing["arm"] == arm)]
            row["step time"] = f"{t['ratio'].mean():.2f} ({t['ms'].mean():.0f} ms)" if len(t) else ""
        for name, short in FIGURES.items():
            values = part[name].dropna()
            row[short] = f"{values.mean():.3f} [{values.min():.3f}, {values.max():.3f}]" if len(values) else ""
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def table_of_record(record: dict) -> str:
    """The summary table of a record that notebook 08 wrote, as Markdown."""
    return markdown(summary(pd.DataFrame(record["rows"]), pd.DataFrame(record["timing"])))


def table_of_findings(record: dict) -> str:
    """The findings of a record that notebook 04 wrote, as Markdown."""
    found = pd.DataFrame(record["rows"])
    cell = lambda f: f"**{f.outcome}**: {f.sentence} [{f.low:.3f}, {f.high:.3f}], {f.n} {f.over}"  # noqa: E731
    found["cell"] = [cell(f) for f in found.itertuples()]
    table = found.pivot(index="finding", columns="model", values="cell")
    return markdown(table.loc[found["finding"].unique(), found["model"].unique()].reset_index())


def _with_model(data: pd.DataFrame) -> pd.DataFrame:
    return data if "model" in data else data.assign(model="")


def _colours(data: pd.DataFrame) -> dict[str, str]:
    """A colour per arm; those without one of their own take the palette's in order."""
    others = [arm for arm in data["arm"].unique() if arm not in ARM]
    return ARM | {arm: OKABE_ITO[(n + 2) % len(OKABE_ITO)] for n, arm in enumerate(others)}
