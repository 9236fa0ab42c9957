"""Data frames and the summary table of trained arms, for notebooks 07 and 08.

    results = read_arms([folder])
    evaluation_frame(results)          # one row per model, arm, seed and evaluation
    final = final_frame(results)       # one row per model, arm and seed
    summary(final)                     # one row per model and arm: mean and range over seeds
"""

from __future__ import annotations

import pandas as pd

from .style import require

FIGURES = {"questions/all": "questions right", "pictures/all": "pictures right", "losses/t2i": "loss t2i", "losses/mmu": "loss mmu"}
"""The quality figures of an arm and their short names."""


def evaluation_frame(results: list[dict]) -> pd.DataFrame:
    """Every evaluation; `flops` are those spent since the one before, so that they add up along a run."""
    rows = []
    for r in results:
        spent = 0.0
        for e in r["evaluations"]:
            rows.append({**{k: r[k] for k in ("model", "arm", "seed")}, **e, "flops": e["flops"] - spent})
            spent = e["flops"]
    return pd.DataFrame(rows)


def final_frame(results: list[dict]) -> pd.DataFrame:
    """The last evaluation of every arm with its counted costs; FLOPs of a step relative to the dense one of the same batch."""
    return pd.DataFrame(
        [
            {
                **{k: r[k] for k in ("model", "arm", "seed", "data", "steps", "train_flops", "eval_samples")},
                "step_flops": r["flops_per_step"] / r["dense_flops_per_step"],
                "stack_saved": r["saved"],
                "tokens_saved": r["saved_paper"],
                "tokens_per_step": r["tokens_per_step"],
                **{name: r["evaluations"][-1].get(name) for name in FIGURES},
                **{f"start {name}": r["evaluations"][0].get(name) for name in FIGURES},
            }
            for r in results
        ]
    )


def summary(final: pd.DataFrame, timing: pd.DataFrame | None = None) -> pd.DataFrame:
    """Mean over seeds with the smallest and largest value, per model and arm; `timing` adds the measured time of a step.

    tokens: token-layer computations relative to dense (the paper's counting); step FLOPs: everything, head included.

    timing: model, arm, ms, ratio (to dense, same batch, interleaved).
    """
    rows = []
    for (model, arm), part in require(final, "model", "arm", "seed", *FIGURES).groupby(["model", "arm"], sort=False):
        row = {
            "model": model,
            "arm": arm,
            "seeds": len(part),
            "steps": int(part["steps"].iloc[0]),
            "tokens": f"{1 - part['tokens_saved'].mean():.2f}",
            "step FLOPs": f"{part['step_flops'].mean():.2f}",
        }
        if timing is not None:
            t = timing[(timing["model"] == model) & (timing["arm"] == arm)]
            row["step time"] = f"{t['ratio'].mean():.2f} ({t['ms'].mean():.0f} ms)" if len(t) else ""
        for name, short in FIGURES.items():
            values = part[name].dropna()
            row[short] = f"{values.mean():.3f} [{values.min():.3f}, {values.max():.3f}]" if len(values) else ""
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown, for the README and the report."""
    lines = [table.columns, ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def table_of_record(record: dict) -> str:
    """The summary table of a record that notebook 08 wrote, as Markdown: what the README quotes."""
    return markdown(summary(pd.DataFrame(record["rows"]), pd.DataFrame(record["timing"])))
