"""Cross entropy over a large vocabulary on a GPU, against float64.

    python -m pytest -m gpu tests/gpu/test_cross_entropy_gpu.py
"""

import pytest
import torch
import torch.nn.functional as F

from unimod.ops import cross_entropy
from unimod.ops.backend import count_launches, use_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float32, 2e-3)])
@pytest.mark.parametrize("tokens, held", [(300, 2**30), (300, 2**22)], ids=["one chunk", "chunks"])
def test_the_kernel_gives_the_losses_and_gradients(tokens, held, dtype, tolerance, bias, monkeypatch):
    """Each gradient within the tolerance of its own size; a second run is equal bit by bit."""
    monkeypatch.setattr(cross_entropy, "KERNEL_LOGITS", held)
    g, vocabulary = torch.Generator("cuda").manual_seed(0), 40_003
    h, w, b = (torch.randn(*shape, generator=g, device="cuda").mul(0.3).to(dtype).requires_grad_()
               for shape in ((tokens, 256), (vocabulary, 256), (vocabulary,)))
    target = torch.randint(vocabulary, (tokens,), generator=g, device="cuda")
    scale = torch.rand(tokens, generator=g, device="cuda")
    wanted, found = [h, w, b] if bias else [h, w], []
    for _ in range(2):
        with use_backend("triton"), count_launches() as launched:
            total, nll = cross_entropy.linear_cross_entropy(h, w, b if bias else None, target, scale)
        found.append([nll, *torch.autograd.grad(total, wanted)])
    assert set(launched) == {"softmax_kernel"} and all(map(torch.equal, *found))
    exact = [x.detach().double().requires_grad_() for x in wanted]
    right = F.cross_entropy(F.linear(*exact), target, reduction="none")
    for ours, theirs in zip(found[0], [right, *torch.autograd.grad((right * scale.double()).sum(), exact)]):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
