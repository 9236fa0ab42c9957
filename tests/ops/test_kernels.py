"""Kernels of a routed layer by hand; every Triton kernel by the interpreter, and compiled for GPUs that need not be
there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unimod.batch import Segment, Task, TokenSequence, pack
from unimod.ops.backend import backend
from unimod.ops.gather_scatter import gather_norm, scatter, scatter_
from unimod.ops.select import prefix_count, reference_select, segment_rank, select
from unimod.seam import known_norm

HERE = Path(__file__).parent


def run(*command, **environment):
    """Python with these arguments: triton reads TRITON_INTERPRET when it is imported, so in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "UNIMOD_BACKEND")} | environment
    done = subprocess.run([sys.executable, *command], env=env, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("file, interpret", [("interpreted_kernels.py", "1"), ("interpreted_attention.py", "1"),
                                             ("compiled.py", "0")])
def test_every_kernel_equals_its_reference_and_compiles(file, interpret):
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file), TRITON_INTERPRET=interpret)
    assert " passed" in out and "skipped" not in out and "failed" not in out


def test_scatter_and_its_gradients_by_hand():
    h = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.double, requires_grad=True)
    y = torch.tensor([[4.0, 8.0]], dtype=torch.double, requires_grad=True)
    w = torch.tensor([0.25], dtype=torch.double, requires_grad=True)
    index, g = torch.tensor([1]), torch.tensor([[1.0, 1.0], [2.0, 3.0], [5.0, 7.0]], dtype=torch.double)
    for x in (None, h[index]):
        out = scatter(h, y, index, w, x=x)
        assert out.tolist() == [[1, 2], [3 + 0.25 * 1, 4 + 0.25 * 4], [5, 6]]
        dh, dy, dw = torch.autograd.grad(out, (h, y, w), g)
        assert dh.tolist() == [[1, 1], [1.5, 2.25], [5, 7]]
        assert dy.tolist() == [[0.5, 0.75]] and dw.tolist() == [2 * 1 + 3 * 4]
    gated = torch.tensor([[2.0, 0.5]], dtype=torch.double, requires_grad=True)
    out = scatter(h, y, index, w, gated=gated)
    assert out[1].tolist() == [4 - 0.75 * 2, 8 - 0.75 * 0.5]
    dh, dy, dw, dgated = torch.autograd.grad(out, (h, y, w, gated), g)
    assert dh[1].tolist() == [0, 0] and dy.tolist() == [[2, 3]]
    assert dw.tolist() == [2 * 2 + 3 * 0.5] and dgated.tolist() == [[-1.5, -2.25]]


def test_scatter_in_place_writes_into_what_it_is_given_and_refuses_gradients():
    h, y, index, w = torch.zeros(3, 2), torch.ones(1, 2), torch.tensor([2]), torch.tensor([0.5])
    assert scatter_(h, y, index, w) is h and h.tolist() == [[0, 0], [0, 0], [0.5, 0.5]]
    with pytest.raises(RuntimeError, match=r"use scatter, or torch.no_grad"):
        scatter_(h.clone().requires_grad_(), y, index, w)


def test_scatter_in_half_precision_is_rounded_once():
    """weight - 1 is not rounded to bfloat16 first: at 1.001 that would lose the whole factor."""
    h, y, gated = (torch.full((1, 1), x, dtype=torch.bfloat16) for x in (0.0, 1.0, 64.0))
    out = scatter(h, y, torch.tensor([0]), torch.tensor([1.001]), gated=gated)
    assert out.item() == torch.tensor(1 + 0.064).bfloat16().item()


def test_gather_reference_is_the_gather_and_the_module():
    h, index = torch.randn(5, 8), torch.tensor([0, 3])
    module = torch.nn.LayerNorm(8)
    x, n = gather_norm(h, index, known_norm(module), prefix_count(index, 5))
    assert torch.equal(x, h[index]) and torch.equal(n, module(h[index]))


def test_the_prefix_count_gives_the_intervals():
    n = torch.arange(6)
    row = TokenSequence(Task.T2I, n, n, n * 0 + 1, (n + 3).clamp(max=6), n, ((6, "topk"),))
    batch = pack([row] * 2)
    index, last, rank = select(torch.tensor([3.0, 1, 2, 0, 9, 9, 0, 0, 5, 0, 1, 0]), (6, 6), (3, 2))
    assert index.tolist() == [0, 4, 5, 8, 10] and last.tolist() == [0, 10]
    assert rank.tolist() == [0, 1, 1, 1, 1, 2, 3, 3, 3, 4, 4, 5, 5]
    segments = [Segment(0, Task.T2I, 3), Segment(1, Task.T2I, 2)]
    searched, counted = (batch.take(index, segments, *known).mask for known in ((), (rank,)))
    assert torch.equal(searched.lo, counted.lo) and torch.equal(searched.hi, counted.hi)
    assert searched.lengths == counted.lengths == (3, 2)


def test_a_nan_of_either_sign_is_the_best_score():
    bits = torch.tensor([0x7FC0, 0x7F80, 0x3F80, 0xFFC0 - 2**16, 0x8000 - 2**16, 0]).to(torch.int16)
    score = bits.view(torch.bfloat16)                       # nan, inf, 1, nan with the sign bit, -0, 0
    assert score.isnan().tolist() == [True, False, False, True, False, False]
    assert segment_rank(score, (6,)).tolist() == [0, 2, 3, 1, 4, 5]
    assert reference_select(score, (6,), (3,))[0].tolist() == [0, 1, 3]


def test_float64_and_machines_without_triton_take_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend("kernels", "cpu", torch.float64) == "reference"
    run("-c", "import sys; sys.modules['triton'] = None\n"
              "import torch, unimod.layers\nfrom unimod.ops.gather_scatter import scatter\n"
              "assert not any(name.startswith('unimod.ops') and 'triton' in name for name in sys.modules)\n"
              "scatter(torch.ones(2, 2), torch.ones(1, 2), torch.tensor([0]), torch.ones(1))")
