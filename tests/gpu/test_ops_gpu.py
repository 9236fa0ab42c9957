"""The kernels on a GPU at real sizes: Show-o's width, nine thousand tokens."""

import pytest
import torch
from ops.kernel_cases import SHAPES, check_gather, check_scatter, check_select

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TOKENS, WIDTH = 9216, 2048
ORDER = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
REAL = {share: (TOKENS, WIDTH, tuple(ORDER[:int(share * TOKENS)].sort().values.tolist()))
        for share in (0.2, 0.8)} | {"odd width": (1155, 4099, tuple(range(0, 1155, 2)))} | SHAPES
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("gated", [False, True], ids=["update", "mlp"])
@pytest.mark.parametrize("shape", REAL)
def test_scatter(shape, dtype, gated):
    check_scatter("cuda", dtype, *REAL[shape], gated, torch.float32)


@DTYPES
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape", REAL)
def test_gather(shape, dtype, kind):
    check_gather("cuda", dtype, *REAL[shape], kind)


@DTYPES
@pytest.mark.parametrize("lengths, keep", [((1155,) * 8, (231,) * 8), ((20000,), (5000,)),
                                           ((8192, 0, 1, 16384, 300), (1638, 0, 1, 16383, 0))], ids=str)
def test_select(lengths, keep, dtype):
    g = torch.Generator().manual_seed(0)
    check_select(torch.randn(sum(lengths), generator=g).to("cuda", dtype), lengths, keep)
    check_select(torch.randint(50, (sum(lengths),), generator=g).to("cuda", dtype), lengths, keep)
    pool = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, torch.nan])
    check_select(pool[torch.randint(5, (sum(lengths),), generator=g)].to("cuda", dtype), lengths, keep)


def test_nothing_waits_for_the_device():
    """Select, gather and scatter, forward and backward, with torch's detector of synchronisations on."""
    from unimod.ops.gather_scatter import gather_norm, scatter
    from unimod.ops.select import select
    from unimod.seam import known_norm
    h = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    norm = known_norm(torch.nn.LayerNorm(WIDTH, device="cuda", dtype=torch.bfloat16))
    torch.cuda.set_sync_debug_mode("error")
    try:
        index, _, rank = select(h[:, 0], (1152,) * 8, (300,) * 8)
        _, n = gather_norm(h, index, norm, rank)
        scatter(h, n, index, 1 + h[:, 0].float()[index], rank=rank).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert h.grad.isfinite().all()
