"""What the kernels of decode steps must do, on any device: each check compares the kernel, in memory full of NaN, with
the reference in float64."""

import torch
from ops.kernel_cases import allowed, norm_module, poisoned
from torch import nn

from unimod.batch import Batch
from unimod.config import RouterConfig
from unimod.mask import IntervalMask
from unimod.ops.backend import use_backend
from unimod.ops.decode import apply_decision, attend_appended, rms_norm
from unimod.router import TaskRouter
from unimod.routing import RoutingState, Segment
from unimod.seam import known_norm

CAPACITY = {"t2i": 0.5, "mmu": 0.5, "lm": 1.0}


def near(ours, truth, dtype):
    error = 2 * allowed(dtype, ours.device)
    torch.testing.assert_close(ours.double(), truth.double(), rtol=error, atol=error)


def check_attention(device, dtype, heads, kv_heads, width, room, used, active, steps=2):
    """A few steps from caches that hold `used` tokens; q and k come in float32, as after the rotary embedding, and all
    of them as transposed views."""
    g, rows = torch.Generator().manual_seed(0), len(used)
    stored = [torch.randn(rows, kv_heads, room, width, generator=g).to(device, dtype) for _ in range(2)]
    for b, n in enumerate(used):
        for x in stored:
            x[b, :, n:] = torch.nan                         # what is behind the end is never read
    ours = [*(x.clone() for x in stored), torch.tensor(used, device=device)]
    truth = [*(x.double() for x in stored), torch.tensor(used, device=device)]
    for x in truth[:2]:
        x.nan_to_num_(0)
    flag = None if active is None else torch.tensor(active, device=device)
    for _ in range(steps):
        q, k, v = (2 * torch.randn(rows, h, width, generator=g).to(device).transpose(0, 1)
                   for h in (heads, kv_heads, kv_heads))
        # numbers of the cache's dtype: the interpreter cuts bfloat16 off where a GPU and the reference round
        q, k, v = q.to(dtype).float(), k.to(dtype).float(), v.to(dtype)
        with use_backend("triton"), poisoned():
            got = attend_appended(q, k, v, *ours, flag, 0.3)
        with use_backend("reference"):
            want = attend_appended(q, k, v.double(), *truth, flag, 0.3)
        assert got.dtype == dtype and got.shape == (rows, heads, width)
        near(got, want, dtype)
        assert torch.equal(ours[2], truth[2])
        for b, n in enumerate(truth[2].tolist()):
            for a, c in zip(ours[:2], truth[:2]):
                near(a[b, :, :n], c[b, :, :n], dtype)


def tokens(count, device, source=None):
    """A decode step's batch of `count` tokens of both tasks and all modalities."""
    n = torch.arange(count)
    segments = tuple(Segment(i, 0, 1, "threshold") for i in range(count))
    batch = Batch(n, n, n, n % 2, n % 3, n - 100, IntervalMask(n, n + 1, (1,) * count), segments,
                  score_source=None if source is None else n % source)
    return batch.to(device)


def router(device, dtype, width, config):
    torch.manual_seed(1)
    made = TaskRouter(width, CAPACITY, config).eval()
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    made.threshold.copy_(torch.tensor([0.1, -0.2, 0.0]))
    return made.to(device, dtype)


CONFIGS = [RouterConfig(), RouterConfig(shared=True, gate="raw"), RouterConfig(gate="sigmoid", always_keep=("image",)),
           RouterConfig(gate="straight-through", predictor=True),
           RouterConfig(gate="none", predictor=True, shared=True)]


def check_decision(device, dtype, config, source):
    h = torch.randn(9, 50, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    made, batch = router(device, dtype, 50, config), tokens(9, device, source)
    found = []
    for name in ("triton", "reference"):
        with use_backend(name), poisoned(), torch.no_grad():
            found.append(made.decode(h, batch, RoutingState()))
    (kept, gate), (expected, gates) = found
    assert torch.equal(kept, expected) and (source or 0 < int(kept.sum()) < 9)
    torch.testing.assert_close(gate, gates.float(), atol=1e-5, rtol=1e-5)


def check_applied(device, dtype, gated, scaled):
    g = torch.Generator().manual_seed(3)
    h, y, m = (torch.randn(1, 5, 40, generator=g).to(device, dtype) for _ in range(3))
    kept = torch.tensor([True, False, True, False, True], device=device)
    gate = torch.tensor([1.0, 0.3, 1.2, -2.0, 0.5], device=device)
    with use_backend("triton"), poisoned():
        got = apply_decision(h, y, kept, gate, m if gated else None, scaled)
    with use_backend("reference"):
        want = apply_decision(h.double(), y.double(), kept, gate.double(), m.double() if gated else None, scaled)
    near(got, want, dtype)
    assert torch.equal(got[:, 0], y[:, 0]) and (scaled or torch.equal(got[:, ~kept], h[:, ~kept]))


def check_norm(device, dtype):
    module = norm_module("rms", 100, device, dtype)
    x = 3 * torch.randn(1, 4, 100, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    with use_backend("triton"), poisoned(), torch.no_grad():
        got = rms_norm(x, known_norm(module))
    torch.testing.assert_close(got, module(x), rtol=allowed(dtype, device), atol=allowed(dtype, device))
    with use_backend("reference"):
        assert torch.equal(rms_norm(x, known_norm(module)), module(x)), "the reference is the norm"
