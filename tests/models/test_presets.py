"""What plans save on the released sizes: the paper's figures, the full counting and torch's own counter."""

import json
from copy import deepcopy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unimod.__main__ import main
from unimod.baselines import PRESETS as ROUTERS
from unimod.batch import pack
from unimod.config import ParameterError
from unimod.flops import BACKWARD, count, encoding, measured, planned, savings
from unimod.layers import apply_mod
from unimod.models.image_tokenizer import build_image_tokenizer
from unimod.plan import CapacityPlan, dense, last_half, paper_emu3, paper_showo
from unimod.presets import PRESETS, picture_tokenizer, preset


@pytest.mark.parametrize("name", [*PRESETS, "showo-tiny", "emu3-tiny"])
def test_the_full_counting_equals_torchs_counter_within_one_percent(name):
    (model, rows), image_tokenizer = preset(name), picture_tokenizer(name)
    plan = (paper_showo if name.startswith("showo") else paper_emu3)(len(model.layers))
    for m in (model, apply_mod(deepcopy(model), plan)):
        cost = count(m, pack(rows), image_tokenizer)
        assert measured(m, rows, image_tokenizer) == pytest.approx(cost.step, rel=0.01)
        assert cost.step == (1 + BACKWARD) * cost.total + cost.tokenizer
        assert (cost.tokenizer == 0) == name.endswith("tiny"), "the dictionary looks codes up"


@pytest.mark.parametrize(
    "image_tokenizer",
    [
        *map(picture_tokenizer, ("showo-256", "emu3-4k")),
        build_image_tokenizer("magvit"),
        build_image_tokenizer("emu3vq"),
        build_image_tokenizer("emu3vq", temporal=4, res_blocks=2, attention_levels=(2, 3)),
    ],
    ids=["MAGVIT-v2", "Emu3's", "magvit", "emu3vq", "emu3vq-4"],
)
def test_a_tokenizer_of_any_size_is_counted_on_any_grid(image_tokenizer):
    picture = torch.zeros(1, 3, *(n * image_tokenizer.downsample for n in (6, 10)), dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        deepcopy(image_tokenizer).to("meta").encode(picture)
    # the nearest code: left out
    search = 2 * 60 * image_tokenizer.codebook_size * 4 if image_tokenizer.name == "emu3vq" else 0
    assert encoding(image_tokenizer, (6, 10)) == counter.get_total_flops() - search


def test_text_rows_have_no_picture():
    model, rows = preset("showo-256")
    layout, image_tokenizer = model.layout, picture_tokenizer("showo-256")
    assert count(model, pack([layout.lm("x" * 20)]), image_tokenizer).tokenizer == 0
    assert count(model, pack([*rows, layout.lm("x" * 20)]), image_tokenizer).tokenizer == 2 * encoding(
        image_tokenizer, layout.grid
    )


def test_planned_leaves_the_model_as_it_was_and_counts_training():
    model, rows = preset("showo-tiny")
    model.eval()
    before = [type(layer) for layer in model.layers]
    with planned(model, last_half(8), ROUTERS["random"]):
        assert count(model, pack(rows)).saved > 0.2, "random routers keep every token in evaluation"
    assert [type(layer) for layer in model.layers] == before and not model.training
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
@pytest.mark.parametrize("router", [n for n, c in ROUTERS.items() if c.topk_scope != "sequences"])
def test_so_it_does_for_every_router(name, router):
    """Frozen weights, attention looked at once more, decisions that are repeated."""
    model, rows = preset(name)
    with planned(model, last_half(8), ROUTERS[router]):
        assert measured(model, rows) == pytest.approx(count(model, pack(rows)).step, rel=0.01)


def test_so_it_does_for_adapters_on_frozen_weights():
    from peft import LoraConfig, inject_adapter_in_model

    model, rows = preset("emu3-tiny")
    inject_adapter_in_model(
        LoraConfig(r=8, target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3, 4, 5]), model.lm
    )
    assert count(model, pack(rows)).step < 0.8 * count(model, pack(rows)).dense_step
    assert measured(model, rows) == pytest.approx(count(model, pack(rows)).step, rel=0.03)


@pytest.mark.parametrize(
    "name, plan, reported, dense_tflops", [("showo-512", paper_showo, 43.3, 51.1), ("emu3-8k", paper_emu3, 53.5, 89.0)]
)
def test_the_papers_counting_gives_the_papers_ratios(name, plan, reported, dense_tflops):
    model, rows = preset(name)
    saved = savings(model, plan(len(model.layers)), rows, image_tokenizer=picture_tokenizer(name))
    assert saved.paper == pytest.approx(1 - reported / dense_tflops, abs=0.003)
    assert saved.full == pytest.approx(saved.measured, abs=0.002)
    assert saved.full < saved.model, "the pictures' codes are not saved"
    assert savings(model, dense(len(model.layers)), rows).full == 0


def test_the_command_prints_a_table_and_json(capsys):
    assert main(["plan", "paper_showo", "--model", "showo-256", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["savings"]["paper"] == pytest.approx(0.15) and said["layers"] == 24
    assert set(said["savings"]) == {"paper", "full", "measured", "model"}
    assert said["kinds"].count("Shared") == 11 and said["kinds"][12] == "T2I"
    assert "█" not in json.dumps(said, ensure_ascii=False)
    assert main(["plan", "last_half", "--model", "emu3-tiny", "--saving", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "paper      20.0% saved" in out and "kinds  dense dense dense dense Shared Shared Shared Shared" in out
    assert "mmu  ████▅▅▅▅   -20%" in out
    assert main(["plan", "nothing", "--model", "emu3-tiny"]) == 2 and "is neither a maker" in capsys.readouterr().err
    assert main(["plan", "last_half", "--model", "showo-1024"]) == 2
    assert "neither a preset (showo-256" in capsys.readouterr().err
    with pytest.raises(ParameterError, match="neither a preset"):
        preset("nowhere")


@pytest.mark.parametrize("router", ["unimod", "random"])
def test_a_share_of_the_full_counting_is_solved_for(capsys, router):
    assert (
        main(
            [
                "plan",
                "last_half_per_task",
                "--model",
                "emu3-tiny",
                "--count",
                "full",
                "--saving",
                "0.2",
                "--router",
                router,
                "--json",
            ]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["savings"]["full"] == pytest.approx(0.2, abs=0.003) and said["savings"]["paper"] > 0.22
    assert said["router"] == router


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["last_half", "--saving", "0.6"], "ask for 0 to 0.475"),
        (["last_half", "--saving", "-1"], "--saving -1 must be a share"),
        (
            ["last_half", "--saving", "0.47", "--count", "full", "--router", "gamma-mod"],
            "A price of 0.53 is out of reach: these plans cost 0.",
        ),
        (["cosine_decay", "--count", "full"], "out of reach"),
        (["last_half", "--router", "mood"], "--router mood is not known, or needs many rows"),
        (["short.yaml"], "plans 3 layers, the model has 8"),
        (["bad.yaml"], "is not a plan"),
    ],
)
def test_plans_that_cannot_be_are_refused_with_the_reason(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    CapacityPlan({"t2i": [1, 0.5, 0.5]}).save("short.yaml")
    (tmp_path / "bad.yaml").write_text("layers: many")
    assert main(["plan", *words, "--model", "emu3-tiny"]) == 2
    assert message in capsys.readouterr().err
