"""The kernels on a GPU at real sizes: Show-o's width, nine thousand tokens."""

import pytest
import torch
from ops.kernel_cases import (
    ROUTES,
    SHAPES,
    check_route,
    check_scatter,
    check_select,
    draw,
    norm_module,
    route_inputs,
)

from unimod.ops.gather_scatter import scatter
from unimod.ops.route import Scorer, route_gather
from unimod.seam import known_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TOKENS, WIDTH = 9216, 2048
ORDER = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
REAL = {share: (TOKENS, WIDTH, tuple(ORDER[:int(share * TOKENS)].sort().values.tolist()))
        for share in (0.2, 0.8)} | {"odd width": (1155, 4099, tuple(range(0, 1155, 2)))} | SHAPES
REAL_ROUTES = ROUTES | {"Show-o": ((387,) * 24, (194,) * 24, WIDTH), "Emu3": ((4096, 1155), (819, 1155), 4096),
                        "odd width": ((300, 0, 855), (60, 0, 1), 4099)}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("gated", [False, True], ids=["update", "mlp"])
@pytest.mark.parametrize("shape", REAL)
def test_scatter(shape, dtype, gated):
    check_scatter("cuda", dtype, *REAL[shape], gated, torch.float32)


@DTYPES
@pytest.mark.parametrize("lengths, keep", [((1155,) * 8, (231,) * 8), ((20000,), (5000,)),
                                           ((8192, 0, 1, 16384, 300), (1638, 0, 1, 16383, 0))], ids=str)
def test_select(lengths, keep, dtype):
    g = torch.Generator().manual_seed(0)
    check_select(torch.randn(sum(lengths), generator=g).to("cuda", dtype), lengths, keep)
    check_select(torch.randint(50, (sum(lengths),), generator=g).to("cuda", dtype), lengths, keep)
    pool = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, torch.nan])
    check_select(pool[torch.randint(5, (sum(lengths),), generator=g)].to("cuda", dtype), lengths, keep)


@DTYPES
@pytest.mark.parametrize("kind, tasks", [("layer", 3), ("rms", 3), ("layer", 1), ("rms", 1)])
@pytest.mark.parametrize("shape", REAL_ROUTES)
def test_route(shape, kind, tasks, dtype):
    check_route("cuda", dtype, *REAL_ROUTES[shape], kind=kind, tasks=tasks)


@pytest.mark.parametrize("gate", ["sigmoid", "raw", "straight-through"])
def test_route_by_every_gate(gate):
    check_route("cuda", torch.bfloat16, *REAL_ROUTES["Show-o"], gate=gate)


@pytest.mark.parametrize("used", [("h", "x", "normed"), ("h", "x", "normed", "weight"), ("normed", "score"), ("x",),
                                  ("weight",), ("score",)], ids=" ".join)
def test_route_with_gradients_that_nobody_asks_for(used):
    gate = "tanh" if "weight" in used else "none"
    check_route("cuda", torch.bfloat16, *REAL_ROUTES["Show-o"], gate=gate, used=used, flags=False)


@pytest.mark.parametrize("frozen", [("scorer", "shift"), ("weight", "shift"), ("scorer", "shift", "weight", "bias")],
                         ids=" ".join)
def test_route_with_frozen_parameters(frozen):
    check_route("cuda", torch.bfloat16, *REAL_ROUTES["Show-o"], frozen=frozen)


def test_nothing_waits_for_the_device():
    """Route and scatter, forward and backward, with torch's detector of synchronisations on."""
    lengths, kept, _ = REAL_ROUTES["Show-o"]
    given = route_inputs("cuda", lengths, kept)
    h = draw(sum(lengths), WIDTH, seed=0, device="cuda", dtype=torch.bfloat16)
    norm, proj = norm_module("layer", WIDTH, "cuda", torch.bfloat16), torch.nn.Linear(WIDTH, 3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = route_gather(h, Scorer(proj.weight, proj.bias, "tanh", 0.2), norm=known_norm(norm), **given)
        out = scatter(made.h, made.normed, made.index, made.weight, rank=made.rank)
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert h.grad.isfinite().all() and proj.weight.grad.isfinite().all()
