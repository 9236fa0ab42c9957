"""Batch intervals against dense masks written here from the rules of the reference models, pads and all."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_rows import CAPTIONS, TURNS, WORDS, make_rows

from unimod.batch import Segment, Task, pack
from unimod.models.checkpoint import build_model
from unimod.ops.attention import attention_received, interval_attention
from unimod.ops.select import segment_rank, select

SHOWO = build_model("showo-tiny", WORDS, codebook_size=16, grid=(3, 4), text_budget=24).layout
EMU3 = build_model("emu3-tiny", WORDS, codebook_size=16, grid=(3, 4), text_budget=24).layout


def dense_showo(row, layout):
    """The reference's padded row of constant length, its 2-D allow rule, and where the real tokens are."""
    total = layout.text_budget + layout.image_tokens + 3
    n = len(row.ids)
    if row.task == Task.T2I:
        pads = total - n
        ids = torch.cat([torch.full((pads,), layout.pad), row.ids])
        allow = torch.zeros(total, total, dtype=torch.bool)
        soi, eoi = int((ids == layout.soi).nonzero()[0]), int((ids == layout.eoi).nonzero()[0])
        for q in range(total):
            for k in range(total):
                if soi <= q <= eoi:
                    allow[q, k] = k >= pads
                elif q >= pads:
                    allow[q, k] = pads <= k <= q
                else:
                    allow[q, k] = k <= q
        return allow, torch.arange(pads, total)
    ids = torch.cat([row.ids, torch.full((max(0, total - n),), layout.pad)])
    q, k = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    allow = k <= q
    if row.task == Task.MMU:
        allow = allow | (k <= int((ids == layout.eoi).nonzero()[0]))
    return allow, torch.arange(n)


def as_dense(packed):
    j = torch.arange(len(packed))
    return (j >= packed.mask.lo[:, None]) & (j < packed.mask.hi[:, None])


@pytest.mark.parametrize("layout", [SHOWO, EMU3], ids=["showo", "emu3"])
def test_intervals_and_positions_equal_the_reference_masks(layout):
    rows = make_rows(layout)
    packed = pack(rows)
    whole = as_dense(packed)
    for row, where in zip(rows, packed.rows()):
        if layout is SHOWO:
            allow, real = dense_showo(row, layout)
        else:
            allow, real = torch.ones(len(row.ids), len(row.ids)).tril().bool(), torch.arange(len(row.ids))
        assert torch.equal(packed.position[where], real)
        assert torch.equal(whole[where, where], allow[real][:, real])
        assert whole[where].sum() == whole[where, where].sum(), "a row must not see another"


@pytest.mark.parametrize("layout", [SHOWO, EMU3], ids=["showo", "emu3"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_take_equals_the_gathered_dense_mask(layout, data):
    packed = pack(make_rows(layout))
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(packed), max_size=len(packed))))
    idx = keep.nonzero()[:, 0]
    counts = [int(keep[where].sum()) for where in packed.rows()]
    smaller = packed.take(idx, [Segment(b, t, k) for b, (t, k) in enumerate(zip(packed.tasks, counts))])
    assert torch.equal(as_dense(smaller), as_dense(packed)[idx][:, idx])
    assert torch.equal(smaller.position, packed.position[idx]) and smaller.lengths == tuple(counts)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("ragged", [True, False])
def test_interval_attention_equals_softmax_over_the_dense_mask(kv_heads, ragged):
    rows = make_rows(SHOWO) if ragged else [make_rows(SHOWO)[0]] * 3
    packed = pack(rows)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(4, len(packed), 8, generator=g, dtype=torch.double, requires_grad=True)
    k, v = (torch.randn(kv_heads, len(packed), 8, generator=g, dtype=torch.double, requires_grad=True)
            for _ in range(2))
    out = interval_attention(q, k, v, replace(packed.mask, kinds=()), 0.3)
    kk, vv = (x.repeat_interleave(4 // kv_heads, 0) for x in (k, v))
    weights = (q @ kk.transpose(1, 2) * 0.3).masked_fill(~as_dense(packed), -torch.inf).softmax(-1)
    expected = (weights @ vv).transpose(0, 1)
    torch.testing.assert_close(out, expected)
    mix = torch.randn(out.shape, generator=g, dtype=torch.double)
    for ours, theirs in zip(torch.autograd.grad((out * mix).sum(), (q, k, v)),
                            torch.autograd.grad((expected * mix).sum(), (q, k, v))):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_select_keeps_the_best_of_each_segment(sizes, seed):
    lengths = tuple(n for n, _ in sizes)
    keep = tuple(min(n, k) for n, k in sizes)
    if not sum(lengths):
        return
    score = torch.randint(5, (sum(lengths),),
                          generator=torch.Generator().manual_seed(seed)).float()       # ties on purpose
    index, last, _ = select(score, lengths, keep)
    expected, start = [], 0
    for s, (n, k) in enumerate(zip(lengths, keep)):
        best = sorted(range(start, start + n), key=lambda i: (-float(score[i]), i))[:k]
        expected += sorted(best)
        assert not k or int(last[s]) == best[-1]
        start += n
    assert index.tolist() == expected


def test_select_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="keep=\\(4,\\) does not fit lengths=\\(3,\\)"):
        select(torch.zeros(3), (3,), (4,))


def test_packing_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one sequence"):
        pack([])


def test_a_packed_batch_prints_itself_and_knows_its_targets():
    packed = pack(make_rows(SHOWO))
    assert len(str(packed).splitlines()) == 1 + len(CAPTIONS) + len(TURNS) + 1
    assert sum(packed.target_counts) == len(packed.labelled) > 0
    moved = packed.to("cpu")
    assert moved.target_counts == packed.target_counts and torch.equal(moved.labelled, packed.labelled)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["showo-tiny", "emu3-tiny"])
@pytest.mark.parametrize("heads_kv", [2, 4])
def test_attention_received_equals_the_sum_over_queries(kind, heads_kv, monkeypatch):
    """Loop over every query and key; in pieces of a few queries, too; and an even attention gives every token 1."""
    layout = {"showo-tiny": SHOWO, "emu3-tiny": EMU3}[kind]
    packed = pack(make_rows(layout))
    g, n = torch.Generator().manual_seed(0), len(packed)
    q, k = torch.randn(4, n, 8, generator=g), torch.randn(heads_kv, n, 8, generator=g)
    segment = packed.segment_numbers()
    arguments = (packed.mask.lo, packed.mask.hi, segment, packed.lengths, 0.7)
    total, asked = torch.zeros(n), torch.zeros(n)
    for i in range(n):
        lo, hi = int(packed.mask.lo[i]), int(packed.mask.hi[i])
        a = torch.stack([(0.7 * q[h, i] @ k[h * heads_kv // 4, lo:hi].T).softmax(-1) for h in range(4)]).mean(0)
        for j in range(lo, hi):
            if segment[j] == segment[i]:
                total[j] += (hi - lo) * a[j - lo]
                asked[j] += 1
    found = attention_received(q, k, *arguments)
    torch.testing.assert_close(found, total / asked)
    monkeypatch.setattr("unimod.ops.attention.ENTRIES", 1000)
    torch.testing.assert_close(attention_received(q, k, *arguments), found)
    torch.testing.assert_close(attention_received(0 * q, k, *arguments), torch.ones(n))


def test_ranks_are_the_places_in_each_segments_order():
    score = torch.tensor([0.5, 2.0, 0.5, 1.0, -1.0, 3.0])
    assert segment_rank(score, (3, 0, 2, 1)).tolist() == [1, 0, 2, 0, 1, 0], "the earlier of two equals goes first"
