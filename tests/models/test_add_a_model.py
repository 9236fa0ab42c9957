"""The example of `unimod.models`, "How to add a model", run as it is written."""

import textwrap

import pytest
import torch

import unimod.models
from unimod.batch import pack
from unimod.config import RouterConfig
from unimod.flops import count
from unimod.generate import answer, calibrate, draw
from unimod.layers import apply_mod
from unimod.losses import losses
from unimod.models import checkpoint
from unimod.models.text import WordTokenizer
from unimod.plan import last_half

TEXT = WordTokenizer(["a", "red", "circle", "yes"])
CODES = 12
SPECIAL = {f"{name}_token_id": TEXT.size + i for i, name in enumerate(("bos", "eos", "boi", "eoi"))}
CONFIG = {"model_type": "llama", "vocab_size": TEXT.size + 4 + CODES, "hidden_size": 32, "intermediate_size": 64,
          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, **SPECIAL,
          "image_offset": TEXT.size + 4, "codebook_size": CODES, "grid": [2, 3], "text_budget": 20}


@pytest.fixture
def family(monkeypatch):
    code = [line for line in unimod.models.__doc__.splitlines() if line.startswith("    ") or not line]
    assert 10 < sum(map(bool, code)) < 20, "the example is less than 20 lines of code"
    names = {}
    exec(textwrap.dedent("\n".join(code)), names)
    monkeypatch.setattr(checkpoint, "FAMILIES", (*checkpoint.FAMILIES, names["FAMILY"]))
    return names["FAMILY"]


@pytest.mark.parametrize("routed", [False, True])
def test_the_example_trains_generates_saves_and_loads(family, tmp_path, routed):
    torch.manual_seed(0)
    model = family.build(CONFIG, family.layout(CONFIG, TEXT), {})
    layout, codes = model.layout, torch.arange(6)
    if routed:
        apply_mod(model, last_half(4), RouterConfig(std=0.5))
    question = layout.mmu(codes, [("a circle ?", "")], open_ended=True)
    batch = pack([layout.t2i("a red circle", codes), layout.mmu(codes, [("a circle ?", "yes")]), layout.lm("a circle")])
    loss = losses(model, batch)
    loss.total.backward()
    assert loss.total.isfinite() and all(p.grad is not None for p in model.decoder.layers[0].parameters())
    assert (count(model, batch).saved > 0) == routed
    model.eval()
    with torch.no_grad():
        if routed:
            calibrate(model, batch)
        drawn, answers = draw(model, ["a red circle", ""], top_k=1), answer(model, [question], max_new=3)
        assert drawn.shape == (2, 6) and 0 <= int(drawn.min()) <= int(drawn.max()) < CODES and len(answers) == 1
        folder = checkpoint.save_pretrained(tmp_path, model)
        again, _ = checkpoint.from_pretrained(folder, text=TEXT)
        assert torch.equal(again(batch), model(batch)) and again.layout.special == layout.special
        if not routed:
            row, stock = layout.t2i("a red circle", codes), type(model.lm).from_pretrained(folder).eval()
            ours, theirs = model.head(model(pack([row]))), stock(row.ids[None]).logits[0]
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    found = checkpoint.inspect(folder)
    assert found.kind == "mine" and found.loads and found.layers == 4 and (found.routed != "none") == routed
