"""Triton's statistics of attention in its interpreter against the reference; run by test_attention.py with
TRITON_INTERPRET=1."""

import pytest
import torch
from ops.attention_rows import GENERAL, ROWS, routed

from unimod.batch import pack
from unimod.ops import attention_triton as triton
from unimod.ops.attention import attention_mass, attention_received
from unimod.ops.backend import count_launches, use_backend

BATCHES = {name: pack(ROWS[name][-6:]) for name in ("showo", "showo features", "degenerate")}
BATCHES |= {"causal": pack(ROWS["emu3"][3:6]), "general": pack([GENERAL, *ROWS["showo"][:2]]),
            "one token": pack(ROWS["degenerate"][:1])}
WHOLE = BATCHES["showo"]
BATCHES["routed"] = routed(WHOLE, (WHOLE.position % 3 > 0) & (WHOLE.row != 2) & (WHOLE.row != 5))


def inside(x):
    """The same numbers in a larger memory full of nan, last dimension dense."""
    room = x.new_full((x.shape[0] + 1, x.shape[1] + 3, x.shape[2] + 5), torch.nan)
    room[:-1, :-3, :-5] = x
    return room[:-1, :-3, :-5]


@pytest.mark.parametrize("dtype, heads, kv_heads, width", [(torch.float32, 2, 1, 24), (torch.bfloat16, 2, 2, 16)])
@pytest.mark.parametrize("name", BATCHES)
def test_statistics(name, dtype, heads, kv_heads, width):
    batch, g = BATCHES[name], torch.Generator().manual_seed(0)
    q, k = ((2 * torch.randn(h, len(batch), width, generator=g)).to(dtype) for h in (heads, kv_heads))
    intervals, position = (batch.mask.lo, batch.mask.hi), batch.position
    with use_backend("reference"):                          # of float32: it rounds the products of halves
        received = attention_received(q.float(), k.float(), *intervals, batch.segment_numbers(), batch.lengths, 0.4)
        expected = attention_mass(q.float(), k.float(), *intervals, batch.modality, 3, batch.lengths, 0.4, position)
    with use_backend("triton"):
        found = attention_received(inside(q), inside(k), *intervals, batch.segment_numbers(), batch.lengths, 0.4)
        torch.testing.assert_close(found, received, atol=1e-4, rtol=1e-4)
        found = attention_mass(inside(q), inside(k), *intervals, batch.modality, 3, batch.lengths, 0.4, position)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_large_logits_and_many_labels():
    batch, g = BATCHES["showo"], torch.Generator().manual_seed(0)
    q, k = (30 * torch.randn(2, len(batch), 16, generator=g) for _ in range(2))
    label = torch.arange(len(batch)) % 19
    for ours, theirs in zip(*(_with(name, q, k, batch, label) for name in ("triton", "reference"))):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def _with(name, q, k, batch, label):
    with use_backend(name):
        return attention_mass(q, k, batch.mask.lo, batch.mask.hi, label, 19, batch.lengths, 1.0)


def test_torch_sees_through_the_registered_ops():
    batch = BATCHES["degenerate"]
    q, k = torch.randn(2, len(batch), 16), torch.randn(1, len(batch), 16)
    checks = ("test_schema", "test_faketensor")
    common = q, k, batch.mask.lo, batch.mask.hi
    torch.library.opcheck(triton.attention_received, (*common, batch.segment_numbers(), 0.3), test_utils=checks)
    torch.library.opcheck(triton.attention_mass, (*common, batch.modality, batch.position, 3, 0.3), test_utils=checks)


def test_launches_are_made_on_the_device_of_their_tensors():
    """By `backend.launch`, which also counts them: Triton itself takes the current device, whatever it is given."""
    batch = BATCHES["degenerate"]
    q = torch.randn(1, len(batch), 16)
    with use_backend("triton"), count_launches() as launched:
        attention_received(q, q, batch.mask.lo, batch.mask.hi, batch.segment_numbers(), batch.lengths, 0.4)
        attention_mass(q, q, batch.mask.lo, batch.mask.hi, batch.modality, 3, batch.lengths, 0.4)
    assert launched == ["mass_kernel", "received_kernel", "mass_kernel"]
