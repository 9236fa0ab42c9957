"""Every backend of interval attention against the reference, as far as a CPU goes: all but the kernels themselves."""

import inspect
import json
import sys
from contextlib import contextmanager
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
from unimod.ops import attention_choice as choice
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
    monkeypatch.setattr(attention, "implementation", lambda *_: "slow")
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
    monkeypatch.setattr(attention, "implementation", lambda *_: "sdpa")
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


WHEELS = {
    # file: the function's arguments, and what it returns
    "flash_attn_interface.py": ("q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
                                "seqused_k=None, softmax_scale=None, causal=False, qv=None", "out"),
    "flash_attn/__init__.py": ("q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
                               "softmax_scale=None, causal=False, window_size=(-1, -1)", "out"),
    # 4 alone: no file in flash_attn itself
    "flash_attn/cute/__init__.py": ("q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
                                    "max_seqlen_k=None, seqused_q=None, page_table=None, softmax_scale=None, "
                                    "causal=False, window_size=(None, None), return_lse=False", "out, None"),
    # its first releases
    "flash_attn/cute/__init__.py ": ("q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, "
                                     "softmax_scale=None, causal=False", "out, None"),
}
"""Names in the wheels of flash-attn 3, 2 and 4."""


@pytest.mark.parametrize("file", WHEELS)
def test_flash_is_called_by_the_names_of_its_arguments(file, monkeypatch, tmp_path, no_flash):
    arguments, out = WHEELS[file]
    path = tmp_path / file.strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"from ops.attention_rows import SlowKernel\ndef flash_attn_varlen_func({arguments}):\n"
                    "    out = SlowKernel()(q, k, v, cu_seqlens_q, cu_seqlens_k, 512, causal, softmax_scale)\n"
                    f"    return {out}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert inspect.getfile(varlen.flash_function()) == str(path)
    batch = pack(ROWS["showo"])
    inputs = tensors(batch)
    same(by_runs(batch, inputs, "flash"), batch, inputs)


def test_a_flash_attention_without_the_function_is_none(monkeypatch, tmp_path, no_flash):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert varlen.flash_function() is None


@pytest.fixture
def no_flash(monkeypatch):
    def forget():
        varlen.flash_function.cache_clear()
        for name in [name for name in sys.modules if name.startswith("flash_attn")]:
            del sys.modules[name]

    forget()
    yield
    forget()


@pytest.fixture
def two(monkeypatch, tmp_path):
    """Two backends that run on a CPU, and a clock by which the second is the faster; the calls of the first."""
    kernel, calls = SlowKernel(), []

    def runs(*given):
        calls.append(1)
        clock[0] += 1.0
        return kernel(*given)

    clock = [0.0]
    monkeypatch.setitem(varlen.KERNELS, "varlen", runs)
    monkeypatch.setattr(attention, "possible", lambda *_: ("varlen", "sdpa"))
    monkeypatch.setattr(choice, "use_backend", lambda name: only(monkeypatch, name))
    monkeypatch.setattr(choice, "_fastest", {})
    monkeypatch.setattr(choice, "SECONDS", 100.0)
    monkeypatch.setattr(choice, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return calls


@contextmanager
def only(monkeypatch, name):
    with monkeypatch.context() as inside:
        inside.setattr(attention, "possible", lambda *_: (name,))
        inside.setattr(attention, "backend", lambda *_: name)
        yield


def test_the_faster_backend_is_measured_once_for_a_class_of_shapes(two, tmp_path, capsys):
    batch = pack(ROWS["emu3"])
    inputs, state = tensors(batch), torch.get_rng_state()
    for _ in range(2):
        same(attend(batch, inputs), batch, inputs)
    rounds = 1 + choice.ROUNDS
    assert len(two) == rounds and torch.equal(torch.get_rng_state(), state)
    said = "".join(capsys.readouterr()).splitlines()
    assert len(said) == 1 and "attention by sdpa on cpu for " in said[0] and "varlen 1e+03 ms, sdpa 0 ms" in said[0]
    choice._fastest.clear()                                 # as in the next process
    attend(batch, inputs)
    assert len(two) == rounds and list((tmp_path / "unimod").iterdir()) == [tmp_path / "unimod" / "attention.json"]
    assert len(json.loads((tmp_path / "unimod" / "attention.json").read_text())) == 1
    attend(batch, tensors(batch, heads=2, kv_heads=2))
    assert len(two) == 2 * rounds, "another class"
    (tmp_path / "unimod" / "attention.json").write_text("{half")
    choice._fastest.clear()
    attend(batch, inputs)
    assert len(two) == 3 * rounds, "a file that is not readable is measured anew"


def test_batches_of_alike_sizes_are_one_class():
    def of(lengths, kinds=("causal",)):
        return choice._class(("sdpa",), lengths, kinds, "cpu", torch.float32, (4, 2, 8), None)

    assert of((100, 120, 90)) == of((70, 128, 70)) != of((100, 100, 100)) == of((127,) * 3)
    assert of((100,)) != of((130,)) and of((100,)) != of((100,), ("prefix",)) and of((100,) * 4) != of((100,) * 9)


def test_what_breaks_is_not_chosen_and_says_why(two, monkeypatch, capsys):
    def breaks(*_):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setitem(varlen.KERNELS, "varlen", breaks)
    batch = pack(ROWS["emu3"])
    inputs = tensors(batch)
    same(attend(batch, inputs), batch, inputs)
    assert "varlen: no kernel image" in "".join(capsys.readouterr())


def test_nothing_is_measured_for_a_recording_or_a_count(two, monkeypatch):
    batch = pack(ROWS["emu3"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(choice, "_device", lambda device: "a GPU")
    given = batch.mask, "cuda", torch.bfloat16, (4, 2, 8), interval_attention
    assert choice.fastest(("varlen", "sdpa"), *given) == "varlen"
    monkeypatch.setattr(attention, "possible", lambda *_: ("flash", "varlen", "sdpa"))
    assert attention.implementation("meta", torch.bfloat16, batch.mask, (4, 2, 8)) == "varlen"
    assert not two and not choice._fastest


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
