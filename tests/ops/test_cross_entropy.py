"""Cross entropy in chunks against torch's own: values, every gradient, and how little is held."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from unimod.batch import Task, pack
from unimod.layers import apply_mod
from unimod.losses import losses
from unimod.models.checkpoint import build_model
from unimod.ops import cross_entropy
from unimod.ops.backend import count_launches, meta_as
from unimod.ops.cross_entropy import linear_cross_entropy
from unimod.plan import last_half

WORDS = ("a", "red", "circle", "is", "there", "yes", "no")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n, v, held", [(7, 11, 22), (1, 5, 1), (6, 10, 1000), (9, 4, 12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_torchs(n, v, held, bias, dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", held)
    g = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in ((n, 3), (v, 3), (v,)))
    target, scale = torch.randint(v, (n,), generator=g), torch.rand(n, generator=g)
    total, nll = linear_cross_entropy(h, w, b if bias else None, target, scale)
    wanted = [h, w, b] if bias else [h, w]
    found = torch.autograd.grad(3 * total, wanted)
    expected = F.cross_entropy(F.linear(h, w, b if bias else None).float(), target, reduction="none")
    near = {"atol": 0.06, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(nll, expected, **near)
    assert not nll.requires_grad
    torch.testing.assert_close(found, torch.autograd.grad(3 * (expected * scale).sum(), wanted), **near)


def test_frozen_parts_get_no_gradient_and_cost_nothing():
    h, w = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4)
    for head, products in ((w, 2), (w.clone().requires_grad_(), 3)):
        with FlopCounterMode(display=False) as counter:
            total, _ = linear_cross_entropy(h, head, None, torch.arange(6), torch.ones(6))
            total.backward()
        assert counter.get_total_flops() == products * 2 * 6 * 10 * 4
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(h, w, None, torch.arange(6), torch.ones(6))
    assert counter.get_total_flops() == 2 * 6 * 10 * 4


def test_no_more_logits_than_a_chunk_are_held(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", 500)
    h, w, largest = torch.randn(64, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True), []

    def note(x):
        largest.append(x.numel())
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        total, _ = linear_cross_entropy(h, w, None, torch.zeros(64, dtype=torch.long), torch.ones(64))
    assert max(largest) == 100 * 8, "the head's gradient, not 64 x 100 logits"
    total.backward()


def test_on_a_gpu_a_chunk_is_one_launch_and_adds_to_one_gradient(monkeypatch):
    """Counted on the meta device: no operation makes another tensor of the weight's size."""
    monkeypatch.setattr(cross_entropy, "KERNEL_LOGITS", 200)
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            made.extend([func] if isinstance(out, torch.Tensor) and out.shape == (100, 8) else [])
            return out

    half = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    h, w = torch.empty(6, 8, **half), torch.empty(100, 8, **half)
    target, scale = torch.empty(6, dtype=torch.long, device="meta"), torch.empty(6, device="meta")
    with meta_as("cuda"), count_launches() as launched, Sizes():
        total, _ = linear_cross_entropy(h, w, None, target, scale)
    assert launched == ["softmax_kernel"] * 3
    assert [str(func).split(".")[1] for func in made] == ["zeros_like", *["addmm_"] * 3]
    total.backward()
    assert w.grad.dtype == h.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_a_models_losses_are_the_same_in_chunks(name, monkeypatch):
    torch.manual_seed(0)
    model = apply_mod(build_model(name, WORDS, codebook_size=16, grid=(3, 4), text_budget=24), last_half(8))
    codes = torch.arange(12)
    masked = () if model.layout.causal_images else (codes % 2 == 0,)
    layout = model.layout
    batch = pack([layout.t2i("a red circle", codes, *masked), layout.mmu(codes, [("is there a circle", "yes")]),
                  layout.lm("a red circle")])
    found = []
    for limit in (2**28, 0):
        monkeypatch.setattr("unimod.losses.CHUNKED", limit)
        monkeypatch.setattr(cross_entropy, "LOGITS", 1000)
        loss = losses(model, batch)
        loss.total.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.total.detach(), loss.per_task, grads))
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1], equal_nan=True)
    assert all(found[0][1][t] > 0 for t in Task)


def test_a_head_that_an_adapter_wraps_is_asked_itself(monkeypatch):
    from peft import LoraConfig, inject_adapter_in_model

    model = build_model("emu3-tiny", WORDS, codebook_size=16, grid=(3, 4), text_budget=24)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False), model.lm)
    batch = pack([model.layout.t2i("a red circle", torch.arange(12))])
    whole = losses(model, batch).total
    monkeypatch.setattr("unimod.losses.CHUNKED", 0)
    torch.testing.assert_close(losses(model, batch).total, whole)
