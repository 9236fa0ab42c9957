"""What plans save on the released sizes: the paper's figures, the full counting and torch's own counter."""

import json
from copy import deepcopy

import pytest

from unimod.__main__ import main
from unimod.config import ParameterError
from unimod.flops import BACKWARD, count, measured, savings
from unimod.layers import apply_mod
from unimod.plan import dense, paper_emu3, paper_showo
from unimod.presets import PRESETS, preset
from unimod.tokens import pack


@pytest.mark.parametrize("name", [*PRESETS, "showo-tiny", "emu3-tiny"])
def test_the_full_counting_equals_torchs_counter_within_one_percent(name):
    model, rows = preset(name)
    plan = (paper_showo if name.startswith("showo") else paper_emu3)(len(model.layers))
    for m in (model, apply_mod(deepcopy(model), plan)):
        cost = count(m, pack(rows))
        assert measured(m, rows) == pytest.approx((1 + BACKWARD) * cost.total, rel=0.01)


@pytest.mark.parametrize("name, plan, reported, dense_tflops", [("showo-512", paper_showo, 43.3, 51.1), ("emu3-8k", paper_emu3, 53.5, 89.0)])
def test_the_papers_counting_gives_the_papers_ratios(name, plan, reported, dense_tflops):
    model, rows = preset(name)
    saved = savings(model, plan(len(model.layers)), rows)
    assert saved.paper == pytest.approx(1 - reported / dense_tflops, abs=0.003)
    assert saved.full == pytest.approx(saved.measured, abs=0.002)
    assert savings(model, dense(len(model.layers)), rows).full == 0


def test_the_command_prints_a_table_and_json(capsys):
    assert main(["plan", "paper_showo", "--model", "showo-256", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["savings"]["paper"] == pytest.approx(0.15) and said["layers"] == 24 and set(said["savings"]) == {"paper", "full", "measured"}
    assert main(["plan", "last_half", "--model", "emu3-tiny", "--saving", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "paper      20.0% saved" in out and "kinds  dense dense dense dense Shared Shared Shared Shared" in out
    assert main(["plan", "nothing", "--model", "emu3-tiny"]) == 2 and "is neither a maker" in capsys.readouterr().err
    assert main(["plan", "last_half", "--model", "showo-1024"]) == 2 and "neither a preset (showo-256" in capsys.readouterr().err
    with pytest.raises(ParameterError, match="neither a preset"):
        preset("nowhere")
