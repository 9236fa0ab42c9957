"""The kernels through Triton's interpreter; run by test_kernels.py in processes of their own, with
TRITON_INTERPRET=1."""

import copy
import sys

import pytest
import torch
from core.tiny_rows import WORDS, make_rows
from ops.kernel_cases import ROUTES, SHAPES, check_route, check_scatter, check_select, norm_module

from unimod.baselines import PRESETS
from unimod.batch import pack
from unimod.config import RouterConfig
from unimod.layers import apply_mod, record_routing, remove_mod
from unimod.losses import losses
from unimod.models.checkpoint import build_model
from unimod.models.unified import compile_layers
from unimod.ops import cross_entropy
from unimod.ops.backend import backend, count_launches, use_backend
from unimod.plan import CapacityPlan
from unimod.routing import BatchPlan, ForwardState
from unimod.seam import known_norm

HALF = torch.bfloat16


@pytest.mark.parametrize("gated", [False, True], ids=["update", "mlp"])
@pytest.mark.parametrize("dtype, weight_dtype", [(torch.float32, torch.float32), (HALF, torch.float32), (HALF, HALF),
                                                 (torch.float16, torch.float32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_scatter(shape, dtype, weight_dtype, gated):
    check_scatter("cpu", dtype, *SHAPES[shape], gated, weight_dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (HALF, 0.02), (torch.float16, 0.005)])
@pytest.mark.parametrize("n, v, held, block", [(7, 11, 22, 8192), (1, 5, 1, 8192), (6, 300, 999, 64), (5, 64, 128, 16)])
def test_cross_entropy(n, v, held, block, dtype, tolerance, bias, monkeypatch):
    """Values and gradients in chunks, and of rows longer than a block; runs repeat bit by bit."""
    from unimod.ops import cross_entropy_triton as kernel
    monkeypatch.setattr(cross_entropy, "KERNEL_LOGITS", held)
    monkeypatch.setattr(kernel, "BLOCK", block)
    g = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in ((n, 8), (v, 8), (v,)))
    target, scale = torch.randint(v, (n,), generator=g), torch.rand(n, generator=g)
    wanted, found = [h, w, b] if bias else [h, w], []
    for name in ("reference", "triton", "triton"):
        with use_backend(name), count_launches() as launched:
            total, nll = cross_entropy.linear_cross_entropy(h, w, b if bias else None, target, scale)
            found.append([total, nll, *torch.autograd.grad(3 * total, wanted)])
            with torch.no_grad():
                alone = cross_entropy.linear_cross_entropy(h, w, b if bias else None, target, scale)[1]
        assert torch.equal(alone, nll) and set(launched) == ({"softmax_kernel"} if name == "triton" else set())
    torch.testing.assert_close(found[1], found[0], atol=tolerance, rtol=tolerance)
    assert all(map(torch.equal, found[1], found[2]))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("lengths, keep", [((1,), (1,)), ((1,), (0,)), ((7,), (0,)), ((7,), (7,)), ((64,), (63,)),
                                           ((3, 3), (0, 0)), ((40, 25, 33), (1, 24, 9)),
                                           ((0, 5, 0, 1, 20, 0), (0, 2, 0, 1, 10, 0))], ids=str)
def test_select(lengths, keep, dtype):
    T = sum(lengths)
    g = torch.Generator().manual_seed(T)
    check_select(torch.randn(T, generator=g).to(dtype), lengths, keep)
    check_select(torch.randint(3, (T,), generator=g).to(dtype), lengths, keep)
    pool = torch.tensor([-torch.inf, torch.inf, 0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 3e38, -3e38])
    check_select(pool[torch.randint(len(pool), (T,), generator=g)].to(dtype), lengths, keep)
    check_select(pool.new_full((T,), -torch.inf).to(dtype), lengths, keep)
    pool = torch.tensor([torch.nan, 1.0, -torch.inf])
    check_select(pool[torch.randint(len(pool), (T,), generator=g)].to(dtype), lengths, keep)


def test_select_takes_what_the_kernel_cannot_to_the_reference(monkeypatch):
    import unimod.ops.select as module
    monkeypatch.setattr(module, "LONGEST", 4)
    monkeypatch.setitem(sys.modules, "unimod.ops.kernels_triton", None)
    assert module.select(torch.arange(5.0), (5,), (2,))[0].tolist() == [3, 4]
    assert backend("kernels", "cpu", torch.float64) == "reference"
    with pytest.raises(ValueError, match="does not fit"):
        module.select(torch.zeros(3), (3,), (4,))


@pytest.fixture
def few(monkeypatch):
    """Several tokens for each program of the backward."""
    monkeypatch.setattr("unimod.ops.route_triton.PROGRAMS", 3)


@pytest.mark.parametrize("shape", ROUTES)
@pytest.mark.parametrize("dtype, kind, tasks", [(torch.float32, "layer", 3), (HALF, "rms", 1), (HALF, "layer", 3),
                                                (torch.float32, "rms", 1)])
def test_route(few, shape, dtype, kind, tasks):
    check_route("cpu", dtype, *ROUTES[shape], kind=kind, tasks=tasks)


def test_route_with_a_program_per_token():
    check_route("cpu", torch.float16, *ROUTES["ragged"], kind="layer without bias")


@pytest.mark.parametrize("gate", ["sigmoid", "raw", "straight-through"])
def test_route_by_every_gate(few, gate):
    check_route("cpu", torch.float32, *ROUTES["ragged"], gate=gate, kind="rms")


@pytest.mark.parametrize("used", [("h", "x", "normed"), ("h", "x", "normed", "weight"), ("normed", "score"), ("x",),
                                  ("weight",), ("score",)], ids=" ".join)
def test_route_with_gradients_that_nobody_asks_for(few, used):
    gate = "tanh" if "weight" in used else "none"
    check_route("cpu", torch.float32, *ROUTES["ragged"], gate=gate, used=used, flags=False)


@pytest.mark.parametrize("frozen", [("scorer", "shift"), ("weight", "shift"), ("scorer", "shift", "weight", "bias")],
                         ids=" ".join)
def test_route_with_frozen_parameters(few, frozen):
    check_route("cpu", torch.float32, *ROUTES["ragged"], frozen=frozen)


@pytest.fixture(params=["showo-tiny", "emu3-tiny"])
def layer(request):
    """A model with one routed layer in training mode, and a batch of three tasks' rows."""
    torch.manual_seed(0)
    model = build_model(request.param, WORDS, codebook_size=16, grid=(2, 2), text_budget=16)
    rows = make_rows(model.layout)
    return model, pack([rows[0], rows[-1]])


def step(model, batch, name):
    """Loss, gradients and routing by the kernels or by the reference."""
    with use_backend(name), record_routing() as log:
        torch.manual_seed(0)
        loss = losses(model, batch).total
        loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads, {n: r.index for n, r in log.items()}


def call_arguments(batch, rotary):
    """What a decoder layer is called with beside `unimod`."""
    return {"position_embeddings": rotary, "attention_mask": None, "position_ids": batch.position[None]}


def routed(model, config):
    plan = CapacityPlan({"t2i": [1, 1, 1, 1, 1, 1, .5, 1], "mmu": [1, 1, 1, 1, 1, 1, .3, 1]})
    return apply_mod(model, plan, config).train()


SCALED = RouterConfig(gate="sigmoid", scale_skipped=True, std=0.5)


@pytest.mark.parametrize("config", [RouterConfig(std=0.5), PRESETS["p-mod"], SCALED],
                         ids=["unimod", "p-mod", "scaled"])
def test_a_routed_model_computes_the_same(layer, config, monkeypatch):
    model, batch = layer
    normed, seen = model.layers[6].input_layernorm, []
    stock = type(normed).forward
    monkeypatch.setattr(type(normed), "forward", lambda self, x: seen.append(self) or stock(self, x))
    ours = step(routed(model, config), batch, "triton")
    fused = not config.scale_skipped
    assert (normed in seen) != fused and model.layers[5].input_layernorm in seen, "the kernel normed what it gathered"
    torch.testing.assert_close(ours, step(copy.deepcopy(model), batch, "reference"), atol=1e-5, rtol=1e-4)
    step(model, batch, "reference")
    assert normed in seen
    with use_backend("triton"), torch.no_grad():
        h = model.embed(batch)[None]
        before = h.clone()
        rotary = model.rotary(h.new_empty(0), position_ids=batch.position[None])
        out = model.layers[6](h, unimod=ForwardState(batch), **call_arguments(batch, rotary))
        assert torch.equal(h, before) and not torch.equal(out, h), "what the caller holds is not written to"
        dense = remove_mod(copy.deepcopy(model))
        assert torch.equal(dense(batch), remove_mod(model)(batch)) and "forward" not in vars(normed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(layer, reentrant):
    model, batch = layer
    plain = step(routed(model, RouterConfig(std=0.5)), batch, "triton")
    model.lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(step(model, batch, "triton"), plain)


@pytest.mark.parametrize("layer", ["showo-tiny"], indirect=True)
def test_compile_without_a_graph_break(layer):
    model, batch = layer
    layer = routed(model, PRESETS["gamma-mod"]).layers[6]
    with torch.no_grad():
        h = model.embed(batch)[None]
        rotary = model.rotary(h.new_empty(0), position_ids=batch.position[None])
    plan = BatchPlan({6: layer.router.layer_plan(batch)})
    found, leaves = [], (layer.input_layernorm.weight, layer.router.proj.weight)
    with use_backend("triton"):
        for run in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
            out = run(h, unimod=ForwardState(batch, plan=plan), **call_arguments(batch, rotary))
            found.append((out, torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(found[0], found[1])


def test_export_keeps_the_numbers(layer):
    model, batch = layer
    layer = routed(model, RouterConfig(std=0.5)).layers[6].eval()

    class Bound(torch.nn.Module):
        """A routed layer on rows of these lengths."""
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, h, cos, sin):
            return self.layer(h, unimod=ForwardState(batch), **call_arguments(batch, (cos, sin)))
    with use_backend("triton"), torch.no_grad():
        h, bound = model.embed(batch)[None], Bound()
        rotary = model.rotary(h.new_empty(0), position_ids=batch.position[None])
        bound(h, *rotary)                           # what the host must know of a batch is worked out before the trace
        program = torch.export.export(bound, (h, *rotary), strict=False)
        other = torch.randn_like(h)
        torch.testing.assert_close(program.module()(other, *rotary), bound(other, *rotary))


def test_norms_that_compute_something_else_are_left_alone():
    module = norm_module("layer", 8, "cpu", torch.float32)
    assert known_norm(module).kind == "layer" and known_norm(norm_module("rms", 8, "cpu", torch.float32)).kind == "rms"
    for other in (torch.nn.LayerNorm(8, elementwise_affine=False), torch.nn.RMSNorm(8), None):
        assert known_norm(other) is None


def test_a_compiled_layer_is_routed_by_the_same_kernels(layer):
    """It norms its input itself; score, selection and gather are one op as in a layer that is not compiled."""
    model, batch = layer
    routed(model, RouterConfig(std=0.5))
    found = []
    with use_backend("triton"):
        for compiled in (False, True):
            if compiled:
                compile_layers(model, backend="eager")
            with count_launches() as launched:
                h = model(batch)
                found.append((h, *torch.autograd.grad(h.square().mean(), [model.layers[6].router.proj.weight,
                                                                          model.layers[6].input_layernorm.weight])))
            assert launched.count("route_backward_kernel") == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
