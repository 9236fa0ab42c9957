"""Every backend of interval attention against the reference, as far as a CPU goes: all but the kernels themselves."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from core.tiny_rows import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.attention_rows import GENERAL, ROWS, SlowKernel, routed

from unimod.analysis.attention import patterns
from unimod.batch import Task, pack
from unimod.capture import capture_batch
from unimod.config import RouterConfig
from unimod.layers import apply_mod
from unimod.mask import KeptMask, mask_kind
from unimod.models.checkpoint import build_model
from unimod.ops import attention
from unimod.ops import attention_varlen as varlen
from unimod.ops.attention import attention_mass, interval_attention
from unimod.ops.backend import use_backend
from unimod.ops.select import prefix_count
from unimod.plan import last_half
from unimod.upload import upload

EVERY = [row for rows in ROWS.values() for row in rows]


def tensors(batch, dtype=torch.double, heads=4, kv_heads=2, width=8):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, len(batch), width, generator=g, dtype=dtype).requires_grad_()
            for n in (heads, kv_heads, kv_heads)]


def truth(q, k, v, batch, scale=0.3):
    """Softmax over a dense mask."""
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    return ((q @ k.mT * scale).masked_fill(~batch.mask.dense(), -torch.inf).softmax(-1) @ v).transpose(0, 1)


def same(out, batch, inputs):
    """Values and gradients are those of the dense mask."""
    expected = truth(*inputs, batch)
    torch.testing.assert_close(out, expected)
    mix = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    for ours, theirs in zip(*(torch.autograd.grad((x * mix).sum(), inputs) for x in (out, expected))):
        torch.testing.assert_close(ours, theirs)


def attend(batch, inputs, memo=None):
    return interval_attention(*inputs, batch.mask, 0.3, memo)


def by_runs(batch, inputs, name="slow"):
    """By the calls of a kernel for sequences of different lengths."""
    return varlen.attend(*inputs, varlen.prepare(batch.mask), 0.3, name)


def split(batch, inputs):
    """`by_runs` in plain torch; no product of a query and a key may be computed that is not asked for."""
    kernel = SlowKernel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(varlen.KERNELS, "slow", kernel)
        out = by_runs(batch, inputs)
    assert kernel.pairs == int((batch.mask.hi - batch.mask.lo).sum()), "computed and thrown away"
    assert kernel.calls == 2 - (set(batch.mask.kinds) == {"causal"})
    return out


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("name", ROWS)
def test_every_layout_in_one_or_two_calls_and_by_the_reference(name, kept):
    batch = pack(ROWS[name])
    assert "general" not in batch.mask.kinds
    if kept < 1:
        batch = routed(batch, torch.rand(len(batch), generator=torch.Generator().manual_seed(3)) < kept)
    inputs = tensors(batch)
    same(split(batch, inputs), batch, inputs)
    same(attend(batch, inputs), batch, inputs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_mixture_of_rows_and_any_tokens_kept(data):
    batch = pack([EVERY[i] for i in data.draw(st.lists(st.integers(0, len(EVERY) - 1), min_size=1, max_size=5))])
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(batch), max_size=len(batch))))
    keep[data.draw(st.integers(0, len(batch) - 1))] = True  # sequences may be empty, the batch is not
    batch = routed(batch, keep)
    inputs = tensors(batch)
    same(split(batch, inputs), batch, inputs)


def test_masks_are_known_on_the_host_and_outlive_routing_and_moving():
    kinds = {name: {mask_kind(row.hi) for row in rows} for name, rows in ROWS.items()}
    assert kinds["showo"] == {"causal", "prefix", "suffix"} and kinds["showo features"] == {"prefix"}
    assert kinds["emu3"] == kinds["chameleon"] == kinds["janus"] == {"causal"}
    degenerate = ["causal", "prefix", "prefix", "causal", "suffix", "prefix", "prefix"]
    assert [mask_kind(row.hi) for row in ROWS["degenerate"]] == degenerate and mask_kind(GENERAL.hi) == "general"
    batch = pack(ROWS["showo"])
    smaller = routed(batch, batch.position % 2 == 0)
    assert len(batch.mask.kinds) == len(batch.lengths)
    assert smaller.mask.kinds == batch.mask.kinds == batch.to("cpu").mask.kinds


def test_no_backend_reads_from_the_device():
    """A meta tensor has nothing to read."""
    mask = pack(ROWS["showo"]).to("meta").mask
    varlen.prepare(mask)
    upload(attention.Padded.of(mask.lengths), "meta").allowed(mask)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, {}), (torch.bfloat16, {"atol": 0.02, "rtol": 0.02})])
def test_halves_and_floats_stay_what_they_are(dtype, tolerance):
    batch = pack(ROWS["showo"])
    inputs = tensors(batch, dtype)
    out = attend(batch, inputs)
    assert out.dtype == dtype
    torch.testing.assert_close(out, truth(*(x.float() for x in inputs), batch).to(dtype), **tolerance)


def test_what_a_kernel_cannot_express_goes_to_sdpa_and_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(attention, "backend", lambda *_: "varlen")
    attention._say.cache_clear()
    batch = pack([GENERAL, *ROWS["showo"]])
    inputs, narrow = tensors(batch), tensors(batch, width=12)
    for kinds in (batch.mask.kinds, batch.mask.kinds, ()):
        out = interval_attention(*inputs, replace(batch.mask, kinds=kinds), 0.3)
        torch.testing.assert_close(out, truth(*inputs, batch))
    interval_attention(*narrow, replace(batch.mask, kinds=("causal",) * len(batch.mask.kinds)), 0.3)
    said = "".join(capsys.readouterr()).splitlines()        # on stdout where a kernel's package is loaded
    assert len(said) == 3 and said[0].startswith("unimod: attention by sdpa instead of varlen where ")
    assert "neither causal nor" in said[0] and "does not know" in said[1] and "heads are 12 wide" in said[2]


@pytest.mark.parametrize("kind", ["showo-tiny", "emu3-tiny"])
def test_a_routed_model_by_runs_equals_one_by_sdpa(kind, monkeypatch):
    """Outputs and gradients of the whole model; what a mask asks for is worked out once, kept tokens' dense mask per
    layer."""
    torch.manual_seed(0)
    model = build_model(kind, WORDS, codebook_size=16, grid=(3, 4), text_budget=24)
    apply_mod(model, last_half(8), RouterConfig(std=0.5))
    monkeypatch.setitem(varlen.KERNELS, "varlen", SlowKernel())
    found = []
    for name, where, what in (("sdpa", attention.Padded, "allowed"), ("varlen", varlen, "prepare")):
        batch, asked = pack(ROWS[kind.removesuffix("-tiny")]), []
        made = getattr(where, what)
        monkeypatch.setattr(where, what, lambda *a, made=made, asked=asked: asked.append(a) or made(*a))
        monkeypatch.setattr(attention, "backend", lambda family, *_, name=name: name)
        h = model(batch)
        weights = [p for p in model.parameters() if p.requires_grad]
        found.append((h, *torch.autograd.grad(h.square().mean(), weights, allow_unused=True)))
        assert len(asked) == (1 + 4 if name == "sdpa" else 1), "by runs, routed layers take the batch's own plan"
    for ours, theirs in zip(*found):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_batch_seen_in_inference_mode_can_be_learned_from():
    batch, memo = pack(ROWS["showo"]), {}
    inputs = tensors(batch)
    with torch.inference_mode():
        attend(batch, inputs, memo)
    same(attend(batch, inputs, memo), batch, inputs)


@pytest.mark.parametrize("kept", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("name", ROWS)
def test_the_plan_of_kept_tokens_is_read_off_the_plan_of_the_batch(name, kept, monkeypatch):
    """As in a routed layer: bounds renumbered by rank; the batch's own plan is made once for two layers."""
    whole = pack(ROWS[name])
    keep = torch.rand(len(whole), generator=torch.Generator().manual_seed(3)) < kept
    keep[0] = True
    batch, index = routed(whole, keep), keep.nonzero()[:, 0]
    made, kernel, prepare = [], SlowKernel(), varlen.prepare
    monkeypatch.setitem(varlen.KERNELS, "slow", kernel)
    monkeypatch.setattr(attention, "_implementation", lambda *_: "slow")
    monkeypatch.setattr(varlen, "prepare", lambda *mask: made.append(1) or prepare(*mask))
    memo, rank = {}, prefix_count(index, len(whole))
    kept = KeptMask(whole.mask, index, rank, batch.lengths)
    assert torch.equal(kept.lo, batch.mask.lo) and torch.equal(kept.hi, batch.mask.hi)
    plan = prepare(whole.mask)
    gathered = replace(kept, bounds=rank[plan.bounds.flatten()].int(),
                       flags=None if plan.causal is None else plan.causal[index])
    for mask in (kept, gathered):
        inputs = tensors(batch)
        same(interval_attention(*inputs, mask, 0.3, memo), batch, inputs)
    assert len(made) == 1 and kernel.pairs == 2 * int((batch.mask.hi - batch.mask.lo).sum())
    monkeypatch.setattr(attention, "_implementation", lambda *_: "sdpa")
    memo = {}
    same(interval_attention(*inputs, kept, 0.3, memo), batch, inputs)
    assert [key for key, _ in memo] == [batch.lengths], "kept tokens' dense mask serves one layer, and would be held"


@pytest.mark.parametrize("takes", [(), ("scale", "window_size"), ("scale", "window_size", "enable_gqa")],
                         ids=["2.10", "between", "2.13"])
def test_varlen_is_called_as_this_torch_wants_it(takes, monkeypatch):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, *, scale=None, window_size=(-1, -1),
                    enable_gqa=False):
        assert enable_gqa or q.shape[1] == k.shape[1]
        causal = is_causal or window_size == (-1, 0)
        return SlowKernel()(q, k, v, cu_q, cu_k, max_q, causal, scale or q.shape[2] ** -0.5)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "TAKES", frozenset(takes))
    batch = pack(ROWS["showo"])
    inputs = tensors(batch)
    same(by_runs(batch, inputs, "varlen"), batch, inputs)


@pytest.mark.parametrize("module, out", [("flash_attn", lambda x: x), ("flash_attn_interface", lambda x: (x, None))])
def test_flash_is_called_by_the_names_of_its_arguments(module, out, monkeypatch, no_flash):
    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                               causal):
        longest = max(max_seqlen_q, max_seqlen_k)
        return out(SlowKernel()(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, causal, softmax_scale))

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    batch = pack(ROWS["showo"])
    inputs = tensors(batch)
    same(by_runs(batch, inputs, "flash"), batch, inputs)


def test_a_flash_attention_without_the_function_is_none(monkeypatch, no_flash):
    """As flash-attn 4 is, whose package has the name of 2's."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    assert varlen.flash_function() is None


@pytest.fixture
def no_flash(monkeypatch):
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    varlen.flash_function.cache_clear()
    yield
    varlen.flash_function.cache_clear()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["showo-tiny", "emu3-tiny"])
@pytest.mark.parametrize("entries", [2**24, 1000])
def test_streamed_statistics_are_those_of_the_maps(kind, entries, monkeypatch):
    """Per query against the record's maps, dense and routed layers; and averaged against the analysis."""
    monkeypatch.setattr(attention, "ENTRIES", entries)
    torch.manual_seed(0)
    model = build_model(kind, WORDS, codebook_size=16, grid=(3, 4), text_budget=24)
    apply_mod(model, last_half(8), RouterConfig(std=0.5)).eval()
    record = capture_batch(model, pack(ROWS[kind.removesuffix("-tiny")]))
    found = patterns(record, Task.MMU)
    for layer in (0, 6):
        seen, part = record.captured[layer], record.batch(layer)
        arguments = seen.q, seen.k, part.mask.lo, part.mask.hi, part.modality, 3, part.lengths, seen.scale
        mass, entropy, distance = attention_mass(*arguments, part.position)
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
        packed_order = attention_mass(*arguments, torch.arange(len(part)))[2]
        assert torch.equal(attention_mass(*arguments)[2], packed_order), "without positions, places in the packed order"


def test_statistics_of_doubles_go_to_the_reference():
    batch = pack(ROWS["showo"])
    q, k, _ = tensors(batch)
    with use_backend():
        mass, _, _ = attention_mass(q, k, batch.mask.lo, batch.mask.hi, batch.modality, 3, batch.lengths, 0.3)
    torch.testing.assert_close(mass.sum(-1), torch.ones(4, len(batch)))
