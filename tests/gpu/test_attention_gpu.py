"""Kernels of interval attention and its statistics on a GPU, against sdpa and the reference.

    python -m pytest -m gpu tests/gpu/test_attention_gpu.py
"""

import pytest
import torch

from unimod.batch import Segment, Task, TokenSequence, pack
from unimod.mask import prefix_hi, suffix_hi
from unimod.ops.attention import attention_mass, attention_received, interval_attention
from unimod.ops.attention_varlen import flash_function
from unimod.ops.backend import use_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
NO_FLASH = pytest.mark.skipif(flash_function() is None, reason="flash-attn is not installed")
BACKENDS = ["varlen", pytest.param("flash", marks=NO_FLASH)]
SHAPES = {"387 x 10": (387, 10, 32, 32, 64), "1,155 x 8": (1155, 8, 32, 32, 64), "4,096 x 2": (4096, 2, 32, 8, 128),
          "a few tokens": (5, 4, 4, 2, 64)}
"""Tokens of a sequence, sequences, heads, heads of keys, width of a head."""
MIXED = ("suffix", "prefix", "causal", "full")


def make(length, sequences, kinds, kept):
    """Sequences of these kinds in turn on the GPU, and what a routed layer keeps of them: one loses all its tokens, one
    keeps its last."""
    front = max(1, length // 3)
    hi = {"causal": prefix_hi(0, length), "full": prefix_hi(length, length),
          "prefix": prefix_hi(length - front, length), "suffix": suffix_hi(front, length)}
    i, zeros = torch.arange(length), torch.zeros(length, dtype=torch.long)
    batch = pack([TokenSequence(Task.LM, zeros, i, i % 3, hi[kinds[b % len(kinds)]], zeros, ((length, "topk"),))
                  for b in range(sequences)])
    if kept < 1:
        keep = torch.rand(len(batch), generator=torch.Generator().manual_seed(0)) < kept
        keep[:length] = False
        keep[2 * length - 1] = True
        counts = [int(part.sum()) for part in keep.split(length)]
        batch = batch.take(keep.nonzero()[:, 0], [Segment(b, Task.LM, n) for b, n in enumerate(counts)])
    return batch.to("cuda")


def tensors(batch, heads, kv_heads, width, dtype=torch.bfloat16):
    """As a model has them: [T, H, d] in memory."""
    g = torch.Generator("cuda").manual_seed(0)
    drawn = [torch.randn(len(batch), n, width, generator=g, dtype=dtype, device="cuda")
             for n in (heads, kv_heads, kv_heads)]
    return [x.transpose(0, 1).requires_grad_() for x in drawn]


def run(name, batch, inputs):
    scale = inputs[0].shape[2] ** -0.5
    with use_backend(name):
        out = interval_attention(*inputs, batch.mask, scale)
    mix = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, mix)]


@pytest.mark.parametrize("kept", [1.0, 0.5])
@pytest.mark.parametrize("kinds", [("causal",), MIXED], ids=["causal", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_gives_the_numbers_of_sdpa(name, shape, kinds, kept):
    """Outputs and gradients in bf16: no token is far from float32, and on the whole it is no further than twice what
    sdpa in bf16 is."""
    length, sequences, *heads = SHAPES[shape]
    batch = make(length, sequences, kinds, kept)
    inputs = tensors(batch, *heads)
    exact = run("sdpa", batch, [x.detach().float().requires_grad_() for x in inputs])
    for what, token, ours, theirs, right in zip(("out", "dq", "dk", "dv"), (0, 1, 1, 1), run(name, batch, inputs),
                                                run("sdpa", batch, inputs), exact):
        def norm(x, token=token):
            return x.movedim(token, 0).flatten(1).norm(dim=1)
        size = norm(right)
        assert ours.isfinite().all(), f"{what}: not finite"
        far, reference = (norm(x.float() - right) / size.mean() for x in (ours, theirs))
        assert far.mean() <= 2 * reference.mean() + 1e-4, f"{what}: {far.mean():.2e}, sdpa {reference.mean():.2e}"
        # relative to the token's own size where it is above the mean: the first keys of a sequence get from all queries
        far = norm(ours.float() - right) / size.clamp(min=size.mean())
        assert far.max() <= 0.02, f"{what}: token {int(far.argmax())} of {len(batch)} is {far.max():.2f} from float32"


@pytest.mark.parametrize("name", BACKENDS)
def test_no_backend_waits_for_the_device(name):
    """After a first call (which compiles), a new batch of routed sequences goes through without a synchronisation."""
    for again in (False, True):
        batch = make(387, 4, ("suffix", "prefix"), 0.5)
        inputs = tensors(batch, 4, 4, 64)
        torch.cuda.set_sync_debug_mode("error" if again else "default")
        try:
            run(name, batch, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_statistics_are_those_of_the_reference(shape, dtype, tolerance):
    """Of the same numbers in float32: the reference rounds the products of halves."""
    length, sequences, *heads = SHAPES[shape]
    batch = make(length, sequences, MIXED, 0.5)
    q, k, _ = (x.detach() for x in tensors(batch, *heads, dtype=dtype))

    def statistics(q, k):
        common = batch.lengths, q.shape[2] ** -0.5
        return (attention_received(q, k, batch.mask.lo, batch.mask.hi, batch.segment_numbers(), *common),
                *attention_mass(q, k, batch.mask.lo, batch.mask.hi, batch.modality, 3, *common, batch.position))
    with use_backend("triton"):
        found = statistics(q, k)
    with use_backend("reference"):
        expected = statistics(q.float(), k.float())
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
