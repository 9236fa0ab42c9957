"""The kernels of decode steps through Triton's interpreter; run by test_decode.py with TRITON_INTERPRET=1."""

import pytest
import torch
from core.tiny_rows import WORDS, make_rows
from ops.decode_cases import CONFIGS, check_applied, check_attention, check_decision, check_norm

from unimod.batch import pack
from unimod.config import RouterConfig
from unimod.decode import DecodeSession
from unimod.generate import calibrate, draw
from unimod.layers import apply_mod
from unimod.models.checkpoint import build_model
from unimod.ops.backend import use_backend
from unimod.plan import last_half

HALF = torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)


@DTYPES
@pytest.mark.parametrize("room, used, active, heads, kv_heads, width", [
    (8, (0,), None, 2, 2, 16), (70, (66, 0, 5), None, 4, 1, 24), (150, (1, 140), (True, False), 6, 2, 8),
    (200, (128, 64, 63), (False, True, True), 2, 1, 16)])
def test_attention(room, used, active, heads, kv_heads, width, dtype):
    check_attention("cpu", dtype, heads, kv_heads, width, room, used, active)


@DTYPES
@pytest.mark.parametrize("source", [None, 4])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.gate)
def test_decision(config, source, dtype):
    check_decision("cpu", dtype, config, source)


@DTYPES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_applied(gated, scaled, dtype):
    check_applied("cpu", dtype, gated, scaled)


@DTYPES
def test_norm(dtype):
    check_norm("cpu", dtype)


def test_float16():
    check_attention("cpu", torch.float16, 4, 2, 16, 70, (66, 3), None)
    check_decision("cpu", torch.float16, CONFIGS[2], None)
    check_applied("cpu", torch.float16, True, True)
    check_norm("cpu", torch.float16)


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
@pytest.mark.parametrize("config", [None, RouterConfig(std=0.5), RouterConfig(std=0.5, branch="mlp", predictor=True)])
def test_a_model_decodes_the_same(name, config):
    torch.manual_seed(0)
    model = build_model(name, WORDS, codebook_size=16, grid=(2, 2), text_budget=16).eval()
    rows = make_rows(model.layout)
    if config is not None:
        apply_mod(model, last_half(8, 0.3), config).eval()
        if not config.predictor:
            calibrate(model, pack(rows))
    if model.layout.causal_images:
        prompts = [model.layout.t2i(c, torch.zeros(0, dtype=torch.long), prompt=True) for c in ("a red circle", "")]
    else:
        picture = torch.zeros(4, dtype=torch.long)
        prompts = [model.layout.mmu(picture, [(q, "")], open_ended=True) for q in ("a", "a red")]
    norms = [type(m) for m in model.modules()]
    found = []
    for backend in ("triton", "reference"):
        with use_backend("reference"), torch.no_grad():
            session = DecodeSession(model, prompts, 4, static=True)
        with use_backend(backend), torch.no_grad():
            found.append(torch.stack([session.step(torch.tensor([3, i]), [0, 1]) for i in range(3)]))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert norms == [type(m) for m in model.modules()], "norms are as they were"
    if model.layout.causal_images:
        with use_backend("triton"):
            drawn = draw(model, ["a red circle", ""], top_k=1, static=True)
        assert torch.equal(drawn, draw(model, ["a red circle", ""], temperature=0.0))
