"""Kernels of a routed layer by hand; every Triton kernel by the interpreter, and compiled for GPUs that need not be
there."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.kernel_cases import norm_module, route_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from unimod.batch import Segment, Task, TokenSequence, pack
from unimod.ops.backend import backend, count_launches, meta_as, use_backend
from unimod.ops.gather_scatter import reference_norm, scatter, scatter_
from unimod.ops.route import GATE, Scorer, route_gather
from unimod.ops.select import reference_select, segment_rank, segment_sizes, select
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


class DeviceOps(TorchDispatchMode):
    """Names of the ops that read or write memory: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        allocates = op.overloadpacket.__name__ in ("empty", "empty_like", "new_empty", "empty_strided")
        if not op.is_view and not allocates:
            self.names.append(op.overloadpacket.__name__)
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_routed_layer_launches_seven_kernels_and_no_other_op(kind, dtype):
    """On the meta device by the way of a GPU; scatter's gradients are all that comes back, as in a layer."""
    given = route_inputs("meta", (6, 0, 8), (2, 0, 3))
    h = torch.empty(14, 16, dtype=dtype, device="meta", requires_grad=True)
    norm, scorer = norm_module(kind, 16, "meta", dtype), torch.nn.Linear(16, 3, device="meta")
    leaves = [h, *norm.parameters(), *scorer.parameters()]
    with use_backend(), meta_as("cuda"), count_launches() as launched, DeviceOps() as ops:
        made = route_gather(h, Scorer(scorer.weight, scorer.bias, "tanh", 0.2), norm=known_norm(norm), **given)
        assert launched == ["score_kernel", "select_kernel", "gather_kernel"]
        out = scatter(made.h, made.normed, made.index, made.weight, x=made.x, rank=made.rank)
        assert launched[3:] == ["scatter_kernel"]
        grads = torch.autograd.grad((out, made.score), leaves, (torch.empty_like(out), torch.empty_like(made.score)))
        assert launched[4:] == ["scatter_backward_kernel", "route_backward_kernel", "total_kernel"]
    assert ops.names == []
    assert all(g.shape == x.shape and g.dtype == x.dtype for g, x in zip(grads, leaves))
    with use_backend("reference"):
        known = route_gather(torch.ones(14, 16, dtype=dtype), Scorer(torch.ones(3, 16), torch.ones(3), "tanh", 0.2),
                             norm=known_norm(norm_module(kind, 16, "cpu", dtype)),
                             **route_inputs("cpu", (6, 0, 8), (2, 0, 3)))
    assert [(x.shape, x.dtype) for x in made] == [(x.shape, x.dtype) for x in known]


@pytest.mark.parametrize("kind", ["layer", "layer without bias", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_the_module(kind, dtype):
    x, module = torch.randn(5, 8, dtype=dtype), norm_module(kind, 8, "cpu", dtype)
    assert torch.equal(reference_norm(x, known_norm(module)), module(x))


def test_gates_by_hand():
    score = torch.tensor([0.0, 2.0], requires_grad=True)
    tanh, soft = math.tanh(2), 1 / (1 + math.exp(-2))
    expected = {"tanh": ([1, 1 + 0.2 * tanh], [0.2, 0.2 * (1 - tanh ** 2)]), "raw": ([0, 2], [1, 1]),
                "sigmoid": ([0.5, soft], [0.25, soft * (1 - soft)]), "straight-through": ([1, 1],
                                                                                         [0.25, soft * (1 - soft)])}
    for name, (values, slopes) in expected.items():
        gate = GATE[name](score, 0.2)
        slope, = torch.autograd.grad(gate.sum(), score)
        torch.testing.assert_close((gate.detach(), slope), (torch.tensor(values).float(), torch.tensor(slopes).float()))
    assert GATE["none"](score, 0.2).tolist() == [1, 1]


def test_the_route_reference_by_hand():
    h = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 3]], dtype=torch.double, requires_grad=True)
    scorer = Scorer(torch.eye(2, dtype=torch.double), torch.tensor([0.5, 0], dtype=torch.double), "raw", 0.2)
    norm = known_norm(torch.nn.LayerNorm(2, dtype=torch.double))
    made = route_gather(h, scorer, torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, True, False]), (2, 2), (1, 1),
                        segment_sizes((2, 2), (1, 1)), norm, torch.arange(4.0)[:, None], torch.tensor([0, 2, 4]).int(),
                        None)
    assert made.h is h and made.score.tolist() == [1.5, 0.5, 0, 3] and made.weight.tolist() == [1.5, 1]
    assert made.index.tolist() == [0, 3] == made.kth.tolist() and made.rank.tolist() == [0, 1, 1, 1, 2]
    assert made.rotary.tolist() == [[0], [3]] and made.bounds.tolist() == [0, 1, 2] and made.flags is None
    assert torch.equal(made.x, h[[0, 3]]) and made.normed[1].tolist() == pytest.approx([-1, 1], abs=1e-5)


def test_segment_sizes():
    assert segment_sizes((3, 0, 2), (1, 0, 2)).tolist() == [[0, 3, 1, 0], [3, 0, 0, 1], [3, 2, 2, 1]]
