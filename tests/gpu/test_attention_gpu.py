"""Kernels of interval attention and its statistics on a GPU, against sdpa and the reference.

    python -m pytest -m gpu tests/gpu/test_attention_gpu.py
"""

import importlib.util

import pytest
import torch

from unimod.batch import Segment, Task, TokenSequence, pack
from unimod.mask import prefix_hi, suffix_hi
from unimod.ops.attention import attention_mass, attention_received, interval_attention
from unimod.ops.backend import use_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FLASH = any(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_interface"))
BACKENDS = ["varlen", pytest.param("flash", marks=pytest.mark.skipif(not FLASH, reason="flash-attn is not installed")), "flex"]
SHAPES = {"387 x 10": (387, 10, 32, 32, 64), "1,155 x 8": (1155, 8, 32, 32, 64), "4,096 x 2": (4096, 2, 32, 8, 128), "a few tokens": (5, 4, 4, 2, 64)}
"""Tokens of a row, rows, heads, heads of keys, width of a head."""


def batch(length, rows, kinds, kept):
    """Rows of these kinds in turn on the GPU, and what a routed layer keeps of them: one row loses all its tokens, one keeps its last."""
    def hi(kind):
        front = max(1, length // 3)
        return suffix_hi(front, length) if kind == "suffix" else prefix_hi({"causal": 0, "prefix": length - front, "full": length}[kind], length)

    zeros = torch.zeros(length, dtype=torch.long)
    packed = pack([TokenSequence(Task.LM, zeros, torch.arange(length), torch.arange(length) % 3, hi(kinds[b % len(kinds)]), zeros, ((length, "topk"),))
                   for b in range(rows)])
    if kept < 1:
        keep = torch.rand(len(packed), generator=torch.Generator().manual_seed(0)) < kept
        keep[:length] = False
        keep[2 * length - 1] = True
        counts = [int(part.sum()) for part in keep.split(length)]
        packed = packed.take(keep.nonzero()[:, 0], [Segment(b, Task.LM, n) for b, n in enumerate(counts)])
    return packed.to("cuda")


def tensors(packed, heads, kv_heads, width, dtype=torch.bfloat16):
    """As a model has them: [T, H, d] in memory."""
    g = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(len(packed), h, width, generator=g, dtype=dtype, device="cuda").transpose(0, 1).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def run(name, packed, inputs):
    with use_backend(name):
        out = interval_attention(*inputs, packed.mask.lo, packed.mask.hi, packed.lengths, inputs[0].shape[2] ** -0.5, packed.mask.kinds)
    mix = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, mix)]


@pytest.mark.parametrize("kept", [1.0, 0.5])
@pytest.mark.parametrize("kinds", [("causal",), ("suffix", "prefix", "causal", "full")], ids=["causal", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_gives_the_numbers_of_sdpa(name, shape, kinds, kept):
    """Outputs and gradients in bf16: no token is far from float32, and on the whole it is no further than twice what sdpa in bf16 is."""
    length, rows, *heads = SHAPES[shape]
    packed = batch(length, rows, kinds, kept)
    inputs = tensors(packed, *heads)
    exact = run("sdpa", packed, [x.detach().float().requires_grad_() for x in inputs])
    for what, token, ours, theirs, right in zip(("out", "dq", "dk", "dv"), (0, 1, 1, 1), run(name, packed, inputs), run("sdpa", packed, inputs), exact):
        size = right.movedim(token, 0).flatten(1).norm(dim=1).mean()
        assert ours.isfinite().all(), f"{what}: not finite"
        far, reference = ((x.float() - right).movedim(token, 0).flatten(1).norm(dim=1) / size for x in (ours, theirs))
        assert far.mean() <= 2 * reference.mean() + 1e-4, f"{what}: {far.mean():.2e} from float32, sdpa in bf16 {reference.mean():.2e}"
        assert far.max() <= 0.1, f"{what}: token {int(far.argmax())} of {len(packed)} is {far.max():.2f} from float32"


@pytest.mark.parametrize("name", BACKENDS)
def test_no_backend_waits_for_the_device(name):
    """After a first call (which compiles), a new batch of routed rows goes through without a synchronisation."""
    for again in (False, True):
        packed = batch(387, 4, ("suffix", "prefix"), 0.5)
        inputs = tensors(packed, 4, 4, 64)
        torch.cuda.set_sync_debug_mode("error" if again else "default")
        try:
            run(name, packed, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_statistics_are_those_of_the_reference(shape, dtype, tolerance):
    """Of the same numbers in float32: the reference rounds the products of halves."""
    length, rows, *heads = SHAPES[shape]
    packed = batch(length, rows, ("suffix", "prefix", "causal", "full"), 0.5)
    q, k, _ = (x.detach() for x in tensors(packed, *heads, dtype=dtype))
    intervals, scale = (packed.mask.lo, packed.mask.hi), q.shape[2] ** -0.5
    with use_backend("triton"):
        received = attention_received(q, k, *intervals, packed.segment_numbers(), packed.lengths, scale)
        found = attention_mass(q, k, *intervals, packed.modality, 3, packed.lengths, scale, packed.position)
    with use_backend("reference"):
        right = attention_received(q.float(), k.float(), *intervals, packed.segment_numbers(), packed.lengths, scale)
        expected = attention_mass(q.float(), k.float(), *intervals, packed.modality, 3, packed.lengths, scale, packed.position)
    torch.testing.assert_close(received, right, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
