"""What every kernel of a routed layer must do, on any device: each check runs the kernel in memory full of NaN and
compares it with the reference in float64, outputs and all gradients."""

from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers.models.emu3.modeling_emu3 import Emu3RMSNorm

from unimod.ops.backend import use_backend
from unimod.ops.gather_scatter import scatter, scatter_
from unimod.ops.route import Routed, Scorer, route_gather
from unimod.ops.select import prefix_count, reference_select, segment_sizes, select
from unimod.seam import known_norm

ROUNDING = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Relative error allowed: a few roundings of the dtype; for float32 of a sum."""
SHAPES = {"one token": (1, 16, (0,)), "none kept": (4, 33, ()), "one kept": (7, 64, (6,)),
          "all kept": (5, 40, tuple(range(5))), "ragged": (17, 100, (0, 3, 6, 10, 11, 12, 16))}
"""Tokens, width, and the tokens that are kept."""
ROUTES = {"one token": ((1,), (1,), 16), "none kept": ((3, 2), (0, 0), 17), "all kept": ((4, 2), (4, 2), 20),
          "ragged": ((6, 0, 5, 3), (2, 0, 3, 0), 33)}
"""Tokens and kept tokens of each segment, width."""
FLOATS = ("h", "x", "normed", "weight", "score")
"""What `Routed` has a gradient from."""


@contextmanager
def poisoned():
    """Memory that torch hands out unwritten is NaN, or the largest integer, as long as the block lasts."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all() and int(torch.empty(1, dtype=torch.long)) == torch.iinfo(torch.long).max
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def draw(*shape, seed, device, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def both(run, leaves, seed):
    """What `run(*leaves)` returns and the gradients of the leaves for a random mix of it, by the kernels; then by the
    reference in float64."""
    found = []
    for name, inputs in (("triton", leaves), ("reference", [x.detach().double().requires_grad_() for x in leaves])):
        with use_backend(name), poisoned():
            outs = run(*inputs)
            grads = [draw(*out.shape, seed=seed + n, device=out.device, dtype=leaves[0].dtype).detach().to(out.dtype)
                     for n, out in enumerate(outs)]
            found.append((*outs, *torch.autograd.grad(outs, inputs, grads, allow_unused=True)))
    return found


def allowed(dtype, device):
    """Triton's interpreter cuts bfloat16 off instead of rounding it: twice as much."""
    return ROUNDING[dtype] * (2 if dtype == torch.bfloat16 and torch.device(device).type == "cpu" else 1)


def near(ours, truth, dtype, names):
    for name, a, b in zip(names, ours, truth, strict=True):
        if a is None or b is None:
            assert a is b, f"{name}: a gradient of one, none of the other"
            continue
        assert a.shape == b.shape, name
        error, scale = allowed(dtype, a.device), b.detach().abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=error, atol=error * scale / 4,
                                   msg=lambda said, name=name: f"{name}: {said}")


def check_scatter(device, dtype, tokens, width, kept, gated, weight_dtype):
    index = torch.tensor(kept, dtype=torch.long, device=device)
    h, y, m = (draw(n, width, seed=s, device=device, dtype=dtype) for s, n in enumerate((tokens, len(kept), len(kept))))
    w = 0.3 * draw(len(kept), seed=4, device=device, dtype=torch.float32).detach() + 1
    w = w.to(weight_dtype).requires_grad_()
    leaves = [h, y, w, m] if gated else [h, y, w]

    def run(h, y, w, m=None):
        return (scatter(h, y, index, w, gated=m, rank=prefix_count(index, tokens)),)
    near(*both(run, leaves, 9), dtype, ("out", "dh", "dy", "dweight", "dgated")[:1 + len(leaves)])
    with use_backend("triton"), poisoned(), torch.no_grad():
        out, place = run(*leaves)[0], h.detach().clone()
        gate = m if gated else None
        assert scatter_(place, y, index, w, gated=gate) is place and torch.equal(place, out), "in place, the same bits"
        whole = scatter(h, y, index, torch.ones_like(w), gated=gate)
        assert torch.equal(whole, h.detach().index_copy(0, index, y)), "exact at weight 1"
    with use_backend("triton"):                         # nothing to learn: y and h are not kept for the backward pass
        out = scatter(h, y, index, w.detach())
        dh, dy = torch.autograd.grad(out, (h, y), torch.ones_like(out))
    weight = w.double()[:, None].expand_as(y)
    near((dh[index], dy), (1 - weight, weight), dtype, ("dh", "dy"))


def norm_module(kind, width, device, dtype):
    module = {"layer": lambda: nn.LayerNorm(width), "layer without bias": lambda: nn.LayerNorm(width, bias=False),
              "rms": lambda: Emu3RMSNorm(width, eps=1e-5)}[kind]()
    for n, p in enumerate(module.parameters()):
        p.data = torch.randn(width, generator=torch.Generator().manual_seed(20 + n)) + (n == 0)
    return module.to(device, dtype)


def check_select(score, lengths, keep):
    with use_backend("triton"), poisoned():
        index, last, rank = select(score, lengths, keep)
    expected = reference_select(score.cpu(), lengths, keep)
    assert torch.equal(index.cpu(), expected[0]) and torch.equal(rank.cpu(), expected[2])
    there = torch.tensor(lengths) > 0
    assert torch.equal(last.cpu()[there], expected[1][there])
    assert ((last >= 0) & (last < len(score))).all()


def check_norm(normed, stock, dtype, device):
    """The kernel rounds where the module does."""
    # on an H200 two of 15,097,856 float16 numbers were 1.5 roundings from the stock norm's
    error = allowed(dtype, device) * (2 if normed.is_cuda and dtype == torch.float16 else 1)
    torch.testing.assert_close(normed, stock, rtol=error, atol=error)
    if normed.numel() and dtype != torch.float32 and allowed(dtype, device) == ROUNDING[dtype]:
        assert (normed == stock).double().mean() > 0.98


def route_inputs(device, lengths, kept, tasks=3, flags=True):
    """What `route_gather` takes beside hidden states, weights and norm, by its names."""
    T, g = sum(lengths), torch.Generator().manual_seed(50)
    task = torch.randint(tasks, (T,), generator=g)
    eligible = torch.rand(T, generator=g) < .7
    rotary = torch.randn(T, 24, generator=g)
    bounds = torch.randint(T + 1, (21,), generator=g, dtype=torch.int32)
    marks = torch.rand(T, generator=g) < .5 if flags else None
    tensors = {"task": task, "eligible": eligible, "sizes": segment_sizes(lengths, kept), "rotary": rotary,
               "bounds": bounds, "flags": marks}
    return {"lengths": lengths, "kept": kept} | {n: None if x is None else x.to(device) for n, x in tensors.items()}


def check_route(device, dtype, lengths, kept, width, *, kind="layer", gate="tanh", tasks=3, used=FLOATS, frozen=(),
                flags=True):
    """`used`: from which outputs a gradient comes; `frozen`: leaves that need none."""
    given = route_inputs(device, lengths, kept, tasks, flags)
    module = norm_module(kind, width, device, dtype)
    leaves = {"h": draw(sum(lengths), width, seed=40, device=device, dtype=dtype)}
    with torch.no_grad():
        leaves["h"].mul_(3).add_(1)                         # a mean to be taken off
    for name, shape in (("scorer", (tasks, width)), ("shift", (tasks,))):   # float32 numbers that bfloat16 holds
        x = draw(*shape, seed=len(leaves) + 41, device=device, dtype=torch.bfloat16).detach()
        leaves[name] = x.float().div_(16).requires_grad_()
    leaves |= dict(module.named_parameters())
    learned = [name for name in leaves if name not in frozen]
    fixed = {name: leaves[name].detach() for name in frozen}
    seen = []

    def run(*values):
        now = {name: x.to(values[0].dtype) if values[0].dtype == torch.double else x for name, x in fixed.items()}
        now |= dict(zip(learned, values))
        norm = replace(known_norm(module), weight=now["weight"], bias=now.get("bias"))
        out = route_gather(now["h"], Scorer(now["scorer"], now["shift"], gate, 0.2), norm=norm, **given)
        seen.append(out)
        return tuple(getattr(out, name) for name in used)
    found = both(run, [leaves[name] for name in learned], 60)
    near(*found, dtype, (*used, *(f"d{name}" for name in learned)))
    ours, truth = seen
    for name in set(Routed._fields) - set(FLOATS) - {"kth"}:
        a, b = getattr(ours, name), getattr(truth, name)
        assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b)), name
    there = torch.tensor(lengths) > 0
    assert torch.equal(ours.kth.cpu()[there], truth.kth.cpu()[there])
    for name in FLOATS:
        summed = torch.float32 if name in ("weight", "score") else dtype
        near([getattr(ours, name).detach()], [getattr(truth, name).detach()], summed, [name])
    assert ours.weight.dtype == ours.score.dtype == torch.float32 and ours.normed.dtype == dtype
    check_norm(ours.normed, module(ours.x), dtype, device)
    again = both(run, [leaves[name] for name in learned], 60)[0]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found[0], again)), "runs repeat bit by bit"
