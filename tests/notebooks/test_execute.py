"""Every notebook, executed as a user would, on the smallest parameters; checked are its results, not its cells."""

import html
import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from background import unimod
from PIL import Image

from unimod.plan import CapacityPlan

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("0*.ipynb"))
SMOKE = ("-f", "params/smoke.yaml")
TWO_ARMS = ("-p", "models=showo-tiny", "-p", "arms=dense,shared.last_half")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def everything(work):
    """All notebooks in one run."""
    return unimod("run", "all", *SMOKE, "--runs", work)


def two_seeds(work):
    return unimod("run", "04", *SMOKE, "-p", "models=showo-tiny", "-p", "seeds=0,3", "-p", "steps=3", "--runs", work)


def on_digits(work):
    return unimod("run", "07", *SMOKE, "-p", "data=digits", *TWO_ARMS, "--runs", work)


def on_a_folder(work):
    """A training on pictures of the user, one of them broken."""
    pictures, entries = work / "pictures", []
    pictures.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (60 + i, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 60)).save(pictures / f"{i}.png")
        entries.append({"image": f"{i}.png", "caption": f"noise number {i}",
                        "questions": [{"question": "is it noise?", "answer": "yes"}]})
    (pictures / "broken.png").write_bytes(b"not a picture")
    entries.append({**entries[0], "image": "broken.png", "caption": "broken"})
    (pictures / "data.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return unimod("run", "07", *SMOKE, "-p", "data=folder", "-p", f"folder={pictures}", *TWO_ARMS, "--runs", work)


executes_all = pytest.mark.background.with_args(everything)


@pytest.fixture
def smoke(background):
    """The run folder of every notebook by name, the report's, and what the runner printed."""
    outcome = background(everything)
    folders = {name: next((outcome.work / name).glob("*/done.json")).parent for name in NAMES}
    return folders | {"report": outcome.work / "report", "log": outcome.out}


def results(folder):
    return {row["name"]: row["value"] for row in json.loads((folder / "results.json").read_text())}


@executes_all
def test_all_notebooks_finish_and_the_report_holds_every_figure(smoke):
    page = html.unescape((smoke["report"] / "index.html").read_text())
    figures = [path for name in NAMES for path in (smoke[name] / "figures").glob("*.json")]
    assert len(figures) >= 25
    for path in figures:
        assert json.loads(path.read_text())["caption"][:40] in page, path
    assert "about" in smoke["log"] and str(smoke["report"]) in smoke["log"].splitlines()[-1]


@executes_all
def test_plans_and_runs_are_handed_on(smoke):
    asked = (smoke["07_training"] / "params.yaml").read_text()
    assert str(smoke["03_token_redundancy"] / "plan.yaml") in asked
    assert str(smoke["07_training"]) in (smoke["08_compare_runs"] / "params.yaml").read_text()


@executes_all
def test_the_plan_and_its_control_save_alike_on_other_layers(smoke):
    folder = smoke["03_token_redundancy"]
    plan, control = CapacityPlan.load(folder / "plan.yaml"), CapacityPlan.load(folder / "plan-highest.yaml")
    for task in plan.capacity:
        assert plan.saving(task) == pytest.approx(0.3, abs=1e-4) == control.saving(task), task
        routed = [{i for i, c in enumerate(p.capacity[task]) if c < 1} for p in (plan, control)]
        assert len(routed[0]) == len(routed[1]) == 4 and not routed[0] & routed[1], task


@pytest.mark.background.with_args(two_seeds)
def test_one_router_for_both_runs_once_per_seed(background):
    folder = next(background(two_seeds).work.glob("04_task_interactions/*/done.json")).parent
    rows = json.loads((folder / "results.json").read_text())
    kept = [row["seed"] for row in rows if row["name"] == "kept under one router, t2i, showo-tiny"]
    steps = pd.read_parquet(folder / "tables" / "kept_over_steps.parquet")
    assert kept == [0, 3] and steps.groupby("seed")["step"].max().to_dict() == {0: 3, 3: 3}


@executes_all
def test_router_design_measures_what_it_teaches(smoke):
    found = results(smoke["05_router_design"])
    ways = [found[f"distance from the dense layer: {way}"]
            for way in ("h + (1 + 0.2 tanh score) x update", "h + score x update", "score x (h + update)")]
    assert ways == sorted(ways) and ways[0] < 0.15
    assert found["error of renumbered positions"] > 0.1
    assert found["change of the first answer by a later turn"] < 1e-3
    assert abs(found["share kept by calibrated thresholds"] - 0.4) < 0.15
    assert found["loss at the start, t2i, tanh"] >= found["loss at the start, t2i, dense"]


@executes_all
def test_fast_layers_are_right_and_use_less_memory(smoke):
    found = results(smoke["06_fast_layers"])
    for model in ("showo-tiny", "emu3-tiny"):
        assert found[f"{model}: largest error of a logit"] < 1e-3
        assert found[f"{model}, unimod: kept for the backward"] < found[f"{model}, dense: kept for the backward"]
        assert 0.6 < found[f"{model}, unimod: FLOPs of a step"] < 0.9


@executes_all
def test_training_compares_arms_at_equal_flops(smoke):
    arms = [json.loads(p.read_text()) for p in (smoke["07_training"] / "arms").rglob("arm.json")]
    assert len(arms) == 6
    for model in ("showo-tiny", "emu3-tiny"):
        cost = {a["arm"]: a["flops_per_step"] / a["dense_flops_per_step"] for a in arms if a["model"] == model}
        assert cost["dense"] == 1 and abs(cost["mod"] - cost["unimod"]) < 0.01 and 0.6 < cost["unimod"] < 0.9
        figures = ("kept_by_modality", "kept_positions", "overlaps", "scores")
        shown = {f"{figure}_{model}.json" for figure in figures} | {"kept_over_training.json"}
        assert shown <= {p.name for p in (smoke["07_training"] / "figures").iterdir()}
    for arm in arms:
        assert (arm["arm"] != "dense") == ("routing/score" in arm["evaluations"][-1]) and isinstance(
            arm["collapsed"], list
        )
    assert {"summary.md", "record.json"} <= {p.name for p in smoke["08_compare_runs"].iterdir()}
    assert (smoke["08_compare_runs"] / "summary.md").read_text().count("unimod") == 2


@pytest.mark.parametrize(("data", "command"), [
    pytest.param("digits", on_digits, marks=pytest.mark.background.with_args(on_digits)),
    pytest.param("folder", on_a_folder, marks=pytest.mark.background.with_args(on_a_folder)),
])
def test_training_runs_on_real_data(background, data, command):
    folder = next(background(command).work.glob("07_training/*/done.json")).parent
    arms = [json.loads(p.read_text()) for p in (folder / "arms").rglob("arm.json")]
    assert len(arms) == 2
    assert all(a["data"] == data and 0 <= a["evaluations"][-1]["questions/all"] <= 1 for a in arms)


@pytest.mark.parametrize(("words", "code", "message"), [
    (["-p", "stepz=3"], 2, "Did you mean 'steps'"),
    (["-p", "steps=many"], 2, "steps='many' is not a whole number"),
    (["-p", "data=folder", "-p", "folder=nowhere"], 2, "'nowhere' is not a folder"),
    (["-p", "plan=bad.yaml"], 2, "Capacity 1.2 of t2i in layer 4 must lie in (0, 1]"),
    (["-p", "plan=zero.yaml"], 2, "Capacity 0 of mmu in layer 1 must lie in (0, 1]"),
    (["-p", "plan=ninth.yaml"], 2, "layer 9 of t2i does not exist"),
    (["-p", "checkpoint=broken", "-p", "models=showo-tiny"], 4, "model.safetensors cannot be read"),
])
def test_bad_input_is_one_paragraph_and_leaves_nothing_finished(tmp_path, words, code, message):
    (tmp_path / "bad.yaml").write_text("layers: 8\ncapacity: {t2i: {4: 1.2}}")
    (tmp_path / "zero.yaml").write_text("layers: 8\ncapacity: {mmu: {1: 0}}")
    (tmp_path / "ninth.yaml").write_text("layers: 8\ncapacity: {t2i: {9: 0.5}}")
    shipped = ROOT / "unimod" / "checkpoints" / "showo-tiny"
    (tmp_path / "broken" / "image_tokenizer").mkdir(parents=True)
    (tmp_path / "broken" / "config.json").write_bytes((shipped / "config.json").read_bytes())
    (tmp_path / "broken" / "model.safetensors").write_bytes((shipped / "model.safetensors").read_bytes()[:5000])
    for made in ("bad.yaml", "zero.yaml", "ninth.yaml", "broken"):
        words = [word.replace(f"={made}", f"={tmp_path / made}") for word in words]
    done = subprocess.run(unimod("run", "07", *SMOKE, *words, "--runs", tmp_path / "runs"), cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").rglob("done.json"))
