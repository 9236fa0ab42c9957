"""Every view, on small made-up results: traces that hold data, below 300 KB, legible anywhere, and errors that name
what lacks."""

import json
import textwrap
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from unimod import views
from unimod.analysis.attention import Patterns
from unimod.analysis.layers import Importance
from unimod.analysis.redundancy import Finding, Spectra, drift
from unimod.analysis.tasks import Competition, GradientCosine, JointOrSingle
from unimod.batch import Modality, Task, TokenSequence, pack
from unimod.capture import AttentionRecord, LayerAttention
from unimod.mask import prefix_hi
from unimod.plan import last_half
from unimod.routing import Routing
from unimod.views import attention, redundancy, routing, runs, style
from unimod.workbook.run_folder import drawable

BOTH = (Task.T2I, Task.MMU)
MODELS = ("showo-tiny", "emu3-tiny")
PICTURE = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
L, N, H = 24, 4, 16


def rand(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def made_patterns(task):
    one, shares = rand(L, N, H), rand(L, N, H, 3).softmax(-1)
    return Patterns(task, tuple(range(L)), rand(L, N, H, 3, 3).softmax(-1), shares, shares[:, :, 0], one, one, one, one)


def made_spectra(task):
    return Spectra(task, tuple(range(L)), rand(L, N, H, 40).sort(descending=True).values, torch.full((L, N), 40.0))


def made_angles():
    found = GradientCosine(rand(L, 3) - 0.5, rand(L, 3), rand(L, 3))
    return pd.DataFrame(found.table("t2i and mmu")).assign(model="one")


def made_drift():
    found = {task: made_spectra(task).arank() for task in BOTH}
    return pd.concat([pd.DataFrame(drift(a, replace(a, rank=a.rank / 2))).assign(model=name) for name in MODELS
                      for a in found.values()])


def made_record(n=200, layers=24):
    ids = torch.arange(n)
    modality = torch.full((n,), int(Modality.TEXT))
    modality[4:40] = Modality.IMAGE
    packed = pack([TokenSequence(Task.MMU, ids, ids, modality, prefix_hi(41, n), ids, ((n, "topk"),))])
    return AttentionRecord({i: LayerAttention(3 * rand(2, n, 8) - 1, 3 * rand(2, n, 8) - 1, 1.0, packed)
                            for i in range(layers)}, packed)


def made_kept(task):
    record = made_record()
    index = torch.arange(0, 200, 2)
    log = {i: Routing(index, torch.ones(100), rand(200), (), index[-1:], torch.ones(200, dtype=torch.bool))
           for i in range(12, 24)}
    return routing.kept_frame(log, record.whole, 0, (6, 6)).assign(task=task)


def of_arms(rows):
    """A table of three arms; the second routes every other layer only."""
    data = pd.DataFrame(rows)
    return pd.concat([data.assign(arm="unimod"), data[data["layer"] % 2 == 1].assign(arm="mod"),
                      data.assign(arm="third")])


def made_shares(side=32):
    kept = [{"layer": i, "task": t, "modality": m, "kept": float("nan") if (t, m) == ("mmu", "text") else 0.4,
             "processed": 0.6} for i in range(12, 24) for t in ("t2i", "mmu") for m in ("text", "image", "special")]
    cells = [{"layer": i, "task": t, "row": y, "column": x, "kept": (x * y + i) % 7 / 7} for i in range(12, 24)
             for t in ("t2i", "mmu") for y in range(side) for x in range(side)]
    return of_arms(kept), of_arms(cells)


def made_overlaps():
    return of_arms([{"layer": i, "task": t, "overlap": 0.5 + i / 50, "chance": 0.4} for i in range(12, 23)
                    for t in ("t2i", "mmu", "t2i and mmu")])


def made_histograms():
    return of_arms([{"layer": i, "task": t, "value": v, "low": b / 24, "high": (b + 1) / 24, "share": 1 / 24}
                    for i in range(12, 24) for t in ("t2i", "mmu") for v in ("score", "gate") for b in range(24)])


def made_evaluations():
    return pd.DataFrame([{"model": m, "arm": a, "seed": s, "step": n, "routing/kept_t2i_image": None if a == "dense"
                          else 0.3 + 0.1 * n + 0.01 * s, "routing/kept_mmu_text": None if a != "mod" else 0.5}
                         for m in MODELS for a in ("dense", "mod", "unimod") for s in range(2) for n in range(3)])


def curves():
    return pd.DataFrame([{"model": m, "arm": a, "seed": s, "step": i + 1, "loss_t2i": 1 / (i + 1 + s), "flops": 1e9}
                         for m in MODELS for a in ("dense", "mod", "unimod") for s in range(3) for i in range(2000)])


def final():
    return pd.DataFrame([{"model": m, "arm": a, "seed": s, "questions/all": 0.9 + 0.01 * s, "flops": f} for m in MODELS
                         for a, f in (("dense", 2e12), ("mod", 1e12), ("unimod", 1e12), ("random", 1e12))
                         for s in range(3)])


def made_competition(seed=0):
    return Competition((12, 13), 0.5, rand(40 + seed, 2)[:40], rand(2 + seed, 2)[:2], rand(2, 2, 3), rand(3, 2), seed)


def made_importance(task):
    return Importance(task, rand(N), rand(L, N), rand(L, N))


def made_finding(n):
    return Finding(f"{n}. something", (True, False, None)[n], 1.0, 0.0, 0.1, 0.2, 5, "seeds", "one 1.0, other 0.0")


def made_joint():
    return JointOrSingle(rand(2, 2), rand(2, 2), rand(2, 2))


def made(make, table="table", models=MODELS, **arguments):
    """The frame of one result per task and model."""
    return style.frame({name: [make(task) for task in BOTH] for name in models}, table, **arguments)


def of_models(results, table="table"):
    return style.frame(dict.fromkeys(MODELS, results), table)


def made_ranks():
    return made(lambda task: made_spectra(task).arank())


def made_plans():
    return pd.concat([routing.plan_frame(last_half(24)), routing.plan_frame(last_half(24, 0.4), "other")])


VIEWS = {"modality_mass": lambda: attention.modality_mass(made(made_patterns, "flows")),
         "modality_flows": lambda: attention.modality_flows(made(made_patterns, "flows", ["one"])),
         "heads": lambda: attention.heads(made(made_patterns, models=["one"]), "sink"),
         "spread_and_sink": lambda: attention.spread_and_sink(made(made_patterns)),
         "head_maps": lambda: attention.head_maps(made_record(), 0, 1, str, active=5),
         "skip_one_layer": lambda: redundancy.skip_one_layer(made(made_importance)),
         "right_without": lambda: redundancy.right_without(made(made_importance)),
         "proxy": lambda: redundancy.proxy(made(made_importance)),
         "arank_by_layer": lambda: redundancy.arank_by_layer(made_ranks()),
         "spectra_by_layer": lambda: redundancy.spectra_by_layer(made(made_spectra, models=["one"])),
         "sensitivity": lambda: redundancy.sensitivity(made(made_spectra, "sensitivity", samples=(2, 4))),
         "by_reading": lambda: redundancy.by_reading(pd.concat([made_ranks().assign(varied=v)
                                                                for v in ("as used", "causal")])),
         "drift_by_layer": lambda: redundancy.drift_by_layer(of_arms(made_drift())),
         "layer_order": lambda: redundancy.layer_order(made(made_spectra, "sensitivity", ["one"])),
         "gradient_angles": lambda: routing.gradient_angles(made_angles()),
         "kept_shares": lambda: routing.kept_shares(of_models([made_competition()])),
         "kept_by_layer": lambda: routing.kept_by_layer(of_models([made_competition()])),
         "findings": lambda: routing.findings(of_models([made_finding(n) for n in range(3)])),
         "kept_over_steps": lambda: routing.kept_over_steps(of_models([made_competition()], "steps")),
         "joint_against_single": lambda: routing.joint_against_single(of_models([made_joint()])),
         "capacities": lambda: routing.capacities(made_plans()),
         "kept_tokens": lambda: routing.kept_tokens(pd.concat([made_kept("t2i"), made_kept("mmu")]), PICTURE),
         "kept_by_modality": lambda: routing.kept_by_modality(made_shares()[0]),
         "kept_positions": lambda: routing.kept_positions(made_shares()[1]),
         "overlaps": lambda: routing.overlaps(made_overlaps()),
         "score_histograms": lambda: routing.score_histograms(made_histograms()),
         "kept_over_training": lambda: routing.kept_over_training(made_evaluations()),
         "training_curves": lambda: runs.training_curves(curves(), "loss_t2i", x="flops", smooth=10),
         "quality_against_flops": lambda: runs.quality_against_flops(final(), "questions/all"),}


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_draws(name):
    fig = VIEWS[name]()
    text = fig.to_json()
    assert drawable(json.loads(text)), "blank"
    assert len(text) < 300_000, f"{len(text)} bytes"
    assert fig.layout.title.text and fig.layout.paper_bgcolor == "rgba(0,0,0,0)" and fig.layout.font.color == style.INK
    for f in fig.frames:
        assert drawable({"data": json.loads(f.to_json())["data"]})
    fig.for_each_yaxis(lambda axis: pytest.fail(f"{axis.plotly_name}: plotly cannot honour both")
                       if axis.scaleanchor and axis.matches else None)


def test_the_recipe_for_a_further_figure_works_as_written():
    recipe = textwrap.dedent("\n".join(line for line in views.__doc__.splitlines() if line.startswith("    ")))
    assert recipe.count("\n") < 20
    names = {}
    exec(recipe, names)
    fig = names["entropy_by_layer"](made(made_patterns))
    assert drawable(json.loads(fig.to_json())) and fig.layout.font.color == style.INK and len(fig.data) == 4
    with pytest.raises(style.ViewError, match="no column entropy"):
        names["entropy_by_layer"](made_ranks().drop(columns="effective"))


def test_a_slider_shows_the_frame_it_stands_on():
    fig = VIEWS["head_maps"]()
    assert fig.layout.sliders[0].active == 5 and len(fig.frames) == 24
    assert np.array_equal(fig.data[0].z, fig.frames[5].data[0].z)
    assert fig.data[0].z.dtype == np.uint8 and max(fig.data[0].z.shape) <= 32


def test_both_tasks_share_one_range_and_differences_sit_around_zero():
    fig = VIEWS["heads"]()
    assert fig.data[0].coloraxis == fig.data[1].coloraxis == "coloraxis"
    assert fig.data[2].coloraxis == "coloraxis2" and fig.layout.coloraxis2.cmid == 0


def test_training_curves_add_cost_up_and_thin_long_runs():
    fig = VIEWS["training_curves"]()
    dense = next(t for t in fig.data if t.name == "dense" and t.line.width > 1)
    assert len(dense.x) <= runs.POINTS and dense.x[0] == pytest.approx(1e9) and dense.x[-1] > 1.9e12


def test_a_model_without_the_value_keeps_its_panel_and_the_others_their_colours():
    """As when runs on data sets with different figures are compared."""
    data = pd.concat([curves().assign(model="with"), curves().assign(model="without", loss_t2i=np.nan)])
    both, one = (runs.training_curves(x, "loss_t2i") for x in (data, data[data["model"] == "with"]))
    assert [a.text for a in both.layout.annotations] == ["with", "without"]
    first = {t.name: t.line.color for t in one.data}
    assert all(t.line.color == first[t.name] for t in both.data if t.name in first)


def test_the_competition_shows_its_seeds():
    three = {m: [made_competition(seed) for seed in range(3)] for m in MODELS}
    fig = routing.kept_over_steps(style.frame(three, "steps"))
    assert sum(t.line.width > 1 for t in fig.data) == 4 and len(fig.data) == 4 * (1 + 3)
    assert len(VIEWS["kept_over_steps"]().data) == 4
    bars = routing.kept_shares(style.frame(three)).data[0]
    means = [float(c.kept[:, 0].mean()) for c in three["showo-tiny"]]
    low, high = bars.y[0] - bars.error_y.arrayminus[0], bars.y[0] + bars.error_y.array[0]
    assert (low, bars.y[0], high) == pytest.approx((min(means), np.mean(means), max(means))) and high > low


def test_a_layer_that_an_arm_leaves_dense_is_empty_and_places_share_one_range():
    fig = VIEWS["kept_positions"]()
    assert {trace.coloraxis for trace in fig.data} == {"coloraxis"}
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 100)
    even, odd = (next(f for f in fig.frames if f.name == name) for name in ("12", "13"))
    assert [bool(np.isnan(trace.z).all()) for trace in even.data] == [False, False, True, True, False, False]
    assert not any(np.isnan(trace.z).any() for trace in odd.data)


def test_axes_of_histograms_follow_the_slider():
    data = made_histograms()
    data.loc[data["layer"] == 14, ["low", "high"]] *= 10
    fig = routing.score_histograms(data)
    ranges = {f.name: f.layout.xaxis2.range for f in fig.frames}
    assert fig.layout.sliders[0].active == 1, "starts where all arms choose"
    assert fig.layout.xaxis2.range == ranges["13"] == (0, 1) and ranges["14"] == (0, 10)


def test_what_rules_keep_is_outlined_around_what_the_router_keeps():
    fig = routing.kept_by_modality(made_shares()[0].query("arm == 'unimod'").drop(columns="arm"))
    outline, filled = (t for t in fig.data if t.offsetgroup == "image" and t.xaxis == "x")
    assert (outline.y[0], filled.y[0], outline.marker.color,
            filled.marker.color) == (0.6, 0.4, "rgba(0,0,0,0)", style.MODALITY["image"])
    assert [a.text for a in fig.layout.annotations] == ["text-to-image (T2I)", "understanding (MMU)"]


def test_routers_over_training_are_means_over_seeds_and_leave_dense_out():
    fig = VIEWS["kept_over_training"]()
    assert {a.text for a in fig.layout.annotations} == {f"{m}: {a}" for m in MODELS
                                                        for a in ("mod", "unimod")} and len(fig.data) == 2 * (2 + 1)
    assert fig.data[0].y[2] == pytest.approx(0.505) and sum(t.showlegend for t in fig.data) == 2
    with pytest.raises(style.ViewError, match="no column routing/kept_t2i_image"):
        routing.kept_over_training(made_evaluations()[["model", "arm", "step"]])


def test_colours_and_dashes_mean_the_same_in_every_figure():
    for name, reference in (("modality_mass", "if spread evenly"), ("overlaps", "by chance")):
        fig = VIEWS[name]()
        dashed = [t for t in fig.data if t.name.endswith(f", {reference}")]
        assert len(dashed) == len(fig.data) / 2 and f"(dashed: {reference})" in fig.layout.title.text
        assert all((t.line.dash == "dash") == (t in dashed) for t in fig.data)
    assert VIEWS["gradient_angles"]().data[0].line.color == style.OKABE_ITO[0], "the palette starts at its first colour"
    assert [t.line.color for t in VIEWS["layer_order"]().data if t.showlegend] == style.shades(24)
    assert {t.line.color for t in VIEWS["skip_one_layer"]().data} == {style.TASK["t2i"], style.TASK["mmu"]}


def test_a_model_with_one_seed_keeps_its_panel_and_shows_no_thin_line():
    data = curves().query("model == 'emu3-tiny' or seed == 0")
    fig = runs.training_curves(data, "loss_t2i")
    thin = [t for t in fig.data if t.line.width == 1 and not np.isnan(t.y).all()]
    assert [a.text for a in fig.layout.annotations] == list(MODELS)
    assert len(thin) == 3 * 3 and {t.xaxis for t in thin} == {"x2"}


def test_a_frame_that_cannot_be_drawn_says_why():
    with pytest.raises(style.ViewError, match="no column damage_sd; it needs model"):
        redundancy.skip_one_layer(pd.DataFrame({"model": ["a"], "task": ["t2i"], "layer": [0], "damage": [1.0]}))
    with pytest.raises(style.ViewError, match="no rows"):
        routing.capacities(pd.DataFrame(columns=["plan", "layer", "task", "capacity", "kind"]))
