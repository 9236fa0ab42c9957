"""Every backend of interval attention against the reference, as far as a CPU goes: all but the kernels themselves."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from core.tiny_rows import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.attention_rows import GENERAL, ROWS, SlowKernel, odd, routed

from unimod.analysis.attention import patterns
from unimod.batch import Task, pack
from unimod.capture import capture_batch
from unimod.config import RouterConfig
from unimod.layers import apply_mod
from unimod.mask import mask_kind
from unimod.models.checkpoint import build_model
from unimod.ops import attention
from unimod.ops.attention import attention_mass, flex, interval_attention, reference, varlen
from unimod.ops.backend import use_backend
from unimod.plan import last_half

HERE = Path(__file__).parent
EVERY = [row for rows in ROWS.values() for row in rows]


def tensors(packed, dtype=torch.double, heads=4, kv_heads=2, width=8):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(h, len(packed), width, generator=g, dtype=dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def dense(packed):
    """bool [T, T]."""
    j = torch.arange(len(packed))
    return (j >= packed.mask.lo[:, None]) & (j < packed.mask.hi[:, None])


def truth(q, k, v, packed, scale=0.3):
    """Softmax over a dense mask, written once more."""
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    return ((q @ k.mT * scale).masked_fill(~dense(packed), -torch.inf).softmax(-1) @ v).transpose(0, 1)


def same(out, expected, inputs, **tolerance):
    torch.testing.assert_close(out, expected, **tolerance)
    mix = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    for ours, theirs in zip(*(torch.autograd.grad((x * mix).sum(), inputs) for x in (out, expected))):
        torch.testing.assert_close(ours, theirs, **tolerance)


def split(packed, inputs):
    """By runs of a slow kernel; no product of a query and a key may be computed that is not asked for."""
    varlen.KERNELS["slow"] = kernel = SlowKernel()
    try:
        out = varlen.attend(*inputs, varlen.prepare(packed.mask.lo, packed.mask.hi, packed.lengths, packed.mask.kinds), 0.3, "slow")
    finally:
        del varlen.KERNELS["slow"]
    assert kernel.pairs == int((packed.mask.hi - packed.mask.lo).sum()), "computed and thrown away"
    assert kernel.calls == 2 - (set(packed.mask.kinds) == {"causal"})
    return out


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("name", ROWS)
def test_every_layout_in_one_or_two_calls_and_by_the_reference(name, kept):
    packed = pack(ROWS[name])
    assert "general" not in packed.mask.kinds
    if kept < 1:
        packed = routed(packed, torch.rand(len(packed), generator=torch.Generator().manual_seed(3)) < kept)
    inputs = tensors(packed)
    same(split(packed, inputs), truth(*inputs, packed), inputs)
    same(interval_attention(*inputs, packed.mask.lo, packed.mask.hi, packed.lengths, 0.3, packed.mask.kinds), truth(*inputs, packed), inputs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_mixture_of_rows_and_any_tokens_kept(data):
    packed = pack([EVERY[i] for i in data.draw(st.lists(st.integers(0, len(EVERY) - 1), min_size=1, max_size=5))])
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(packed), max_size=len(packed))))
    keep[data.draw(st.integers(0, len(packed) - 1))] = True     # rows may be empty, the batch is not
    packed = routed(packed, keep)
    inputs = tensors(packed)
    same(split(packed, inputs), truth(*inputs, packed), inputs)


def test_masks_are_known_on_the_host_and_outlive_routing_and_moving():
    kinds = {name: {mask_kind(row.hi) for row in rows} for name, rows in ROWS.items()}
    assert kinds["showo"] == {"causal", "prefix", "suffix"} and kinds["showo features"] == {"prefix"}
    assert kinds["emu3"] == kinds["chameleon"] == kinds["janus"] == {"causal"}
    assert [mask_kind(row.hi) for row in ROWS["degenerate"]] == ["causal", "prefix", "prefix", "causal", "suffix", "prefix", "prefix"]
    assert mask_kind(GENERAL.hi) == "general"
    packed = pack(ROWS["showo"])
    smaller = routed(packed, packed.position % 2 == 0)
    assert len(packed.mask.kinds) == len(packed.lengths) and smaller.mask.kinds == packed.mask.kinds == packed.to("cpu").mask.kinds


@pytest.mark.parametrize("module", [reference, varlen, flex])
def test_no_backend_reads_from_the_device(module):
    """A meta tensor has nothing to read."""
    packed = pack(ROWS["showo"])
    module.prepare(packed.mask.lo.to("meta"), packed.mask.hi.to("meta"), packed.lengths, packed.mask.kinds)


@pytest.mark.parametrize("rows", [ROWS["showo"] * 8, ROWS["emu3"] * 8, [GENERAL] * 60, [odd([1])]], ids=["showo", "emu3", "general", "one token"])
def test_flex_runs_from_the_intervals_and_visits_no_block_in_vain(rows):
    packed = pack(rows)
    plan = flex.prepare(packed.mask.lo, packed.mask.hi, packed.lengths, packed.mask.kinds)
    n, see = -(-len(packed) // flex.BLOCK), dense(packed)
    there = torch.zeros(n * flex.BLOCK, n * flex.BLOCK, dtype=torch.bool)
    there[:len(packed), :len(packed)] = see
    tiles = there.view(n, flex.BLOCK, n, flex.BLOCK).transpose(1, 2)
    assert torch.equal(plan.to_dense()[0, 0].bool(), tiles.flatten(2).any(-1))
    for i in range(n):
        for j in plan.full_kv_indices[0, 0, i, :plan.full_kv_num_blocks[0, 0, i]].tolist():
            assert see[i * flex.BLOCK:(i + 1) * flex.BLOCK, j * flex.BLOCK:(j + 1) * flex.BLOCK].all()
    inputs = tensors(packed, torch.float32, width=16)
    plain = [x.detach() for x in inputs]
    torch.testing.assert_close(flex.attend(*plain, plan, 0.3), truth(*plain, packed))
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex.attend(*inputs, plan, 0.3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, {}), (torch.bfloat16, {"atol": 0.02, "rtol": 0.02})])
def test_halves_and_floats_stay_what_they_are(dtype, tolerance):
    packed = pack(ROWS["showo"])
    inputs = tensors(packed, dtype)
    out = interval_attention(*inputs, packed.mask.lo, packed.mask.hi, packed.lengths, 0.3, packed.mask.kinds)
    assert out.dtype == dtype
    torch.testing.assert_close(out, truth(*(x.float() for x in inputs), packed).to(dtype), **tolerance)


def test_what_a_kernel_cannot_express_goes_to_sdpa_and_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(attention, "backend", lambda *_: "varlen")
    attention._say.cache_clear()
    packed = pack([GENERAL, *ROWS["showo"]])
    inputs = tensors(packed)
    for masks in (packed.mask.kinds, packed.mask.kinds, ()):
        torch.testing.assert_close(interval_attention(*inputs, packed.mask.lo, packed.mask.hi, packed.lengths, 0.3, masks), truth(*inputs, packed))
    narrow = tensors(packed, width=12)
    interval_attention(*narrow, packed.mask.lo, packed.mask.hi, packed.lengths, 0.3, ("causal",) * len(packed.mask.kinds))
    said = "".join(capsys.readouterr()).splitlines()     # on stdout where a kernel's package is loaded
    assert len(said) == 3 and said[0].startswith("unimod: attention by sdpa instead of varlen where a row's mask is neither causal nor")
    assert "does not know" in said[1] and "heads are 12 wide" in said[2]


@pytest.mark.parametrize("kind", ["showo-tiny", "emu3-tiny"])
def test_a_routed_model_by_runs_equals_one_by_sdpa(kind, monkeypatch):
    """Outputs and gradients of the whole model; every batch is prepared once for the layers that share it."""
    torch.manual_seed(0)
    model = apply_mod(build_model(kind, WORDS, codebook_size=16, grid=(3, 4), text_budget=24), last_half(8), RouterConfig(std=0.5))
    found, asked = [], []
    for name in ("sdpa", "varlen"):
        packed = pack(ROWS[kind.removesuffix("-tiny")])
        module = {"sdpa": reference, "varlen": varlen}[name]
        monkeypatch.setattr(module, "prepare", lambda *a, prepare=module.prepare, name=name: asked.append(name) or prepare(*a))
        monkeypatch.setattr(attention, "backend", lambda family, *_, name=name: name)
        monkeypatch.setitem(varlen.KERNELS, "varlen", SlowKernel())
        h = model(packed)
        found.append((h, *torch.autograd.grad(h.square().mean(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)))
    assert asked.count("sdpa") == asked.count("varlen") == 1 + 4
    for ours, theirs in zip(*found):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_batch_seen_in_inference_mode_can_be_learned_from():
    packed, memo = pack(ROWS["showo"]), {}
    inputs = tensors(packed)
    with torch.inference_mode():
        interval_attention(*inputs, packed.mask.lo, packed.mask.hi, packed.lengths, 0.3, packed.mask.kinds, memo)
    same(interval_attention(*inputs, packed.mask.lo, packed.mask.hi, packed.lengths, 0.3, packed.mask.kinds, memo), truth(*inputs, packed), inputs)


@pytest.mark.parametrize("takes", [(), ("scale", "window_size"), ("scale", "window_size", "enable_gqa")], ids=["2.10", "between", "2.13"])
def test_varlen_is_called_as_this_torch_wants_it(takes, monkeypatch):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa or q.shape[1] == k.shape[1]
        return SlowKernel()(q, k, v, cu_q, cu_k, max_q, is_causal or window_size == (-1, 0), scale or q.shape[2] ** -0.5)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "TAKES", frozenset(takes))
    packed = pack(ROWS["showo"])
    inputs = tensors(packed)
    plan = varlen.prepare(packed.mask.lo, packed.mask.hi, packed.lengths, packed.mask.kinds)
    same(varlen.attend(*inputs, plan, 0.3, "varlen"), truth(*inputs, packed), inputs)


@pytest.mark.parametrize("module, out", [("flash_attn", lambda x: x), ("flash_attn_interface", lambda x: (x, None))])
def test_flash_is_called_by_the_names_of_its_arguments(module, out, monkeypatch):
    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
        return out(SlowKernel()(q, k, v, cu_seqlens_q, cu_seqlens_k, max(max_seqlen_q, max_seqlen_k), causal, softmax_scale))

    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func) if name == module else None)
    packed = pack(ROWS["showo"])
    inputs = tensors(packed)
    plan = varlen.prepare(packed.mask.lo, packed.mask.hi, packed.lengths, packed.mask.kinds)
    same(varlen.attend(*inputs, plan, 0.3, "flash"), truth(*inputs, packed), inputs)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["showo-tiny", "emu3-tiny"])
@pytest.mark.parametrize("entries", [2**24, 1000])
def test_streamed_statistics_are_those_of_the_maps(kind, entries, monkeypatch):
    """Per query against the record's maps, dense and routed layers; and averaged against the analysis."""
    monkeypatch.setattr(reference, "ENTRIES", entries)
    torch.manual_seed(0)
    model = apply_mod(build_model(kind, WORDS, codebook_size=16, grid=(3, 4), text_budget=24), last_half(8), RouterConfig(std=0.5)).eval()
    packed = pack(ROWS[kind.removesuffix("-tiny")])
    record = capture_batch(model, packed)
    found = patterns(record, Task.MMU)
    for layer in (0, 6):
        seen, part = record.captured[layer], record.batch(layer)
        mass, entropy, distance = attention_mass(seen.q, seen.k, part.mask.lo, part.mask.hi, part.modality, 3, part.lengths, seen.scale, part.position)
        for row, where in enumerate(part.rows()):
            maps, at = record.map(row, layer), part.position[where].float()
            for label in range(3):
                torch.testing.assert_close(mass[:, where, label], maps[..., part.modality[where] == label].sum(-1))
            torch.testing.assert_close(entropy[:, where], -torch.xlogy(maps, maps).sum(-1))
            torch.testing.assert_close(distance[:, where], (maps * (at[:, None] - at).abs()).sum(-1))
        i = record.layers.index(layer)
        for n, row in enumerate(record.rows(Task.MMU)):
            where = part.rows()[row]
            torch.testing.assert_close(found.received[i, n], mass[:, where].mean(1))
            torch.testing.assert_close(found.entropy[i, n], entropy[:, where].mean(1))
            torch.testing.assert_close(found.distance[i, n], distance[:, where].mean(1))
        here = attention_mass(seen.q, seen.k, part.mask.lo, part.mask.hi, part.modality, 3, part.lengths, seen.scale)[2]
        there = attention_mass(seen.q, seen.k, part.mask.lo, part.mask.hi, part.modality, 3, part.lengths, seen.scale, torch.arange(len(part)))[2]
        assert torch.equal(here, there), "without positions, places in the packed order"


def test_statistics_of_doubles_go_to_the_reference():
    packed = pack(ROWS["showo"])
    q, k, _ = tensors(packed)
    with use_backend():
        mass, _, _ = attention_mass(q, k, packed.mask.lo, packed.mask.hi, packed.modality, 3, packed.lengths, 0.3)
    torch.testing.assert_close(mass.sum(-1), torch.ones(4, len(packed)))


@pytest.mark.parametrize("file, interpret", [("interpreted_attention.py", "1"), ("compiled_attention.py", "0")], ids=["interpreted", "ahead of time"])
def test_the_triton_statistics(file, interpret):
    """In a process of their own: triton reads its variable when it is imported."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)], capture_output=True, text=True,
                          cwd=HERE.parents[1], env={**os.environ, "TRITON_INTERPRET": interpret})
    assert done.returncode == 0, done.stdout + done.stderr
