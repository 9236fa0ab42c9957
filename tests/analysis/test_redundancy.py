"""ARank of maps whose rank is known, and its dependence on what one may choose."""

import copy
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

from unimod.analysis.redundancy import (
    GAMMA_MOD,
    Reading,
    Spectra,
    arank,
    bootstrap,
    drift,
    mask_arank,
    readings,
    shares,
    spectra,
)
from unimod.batch import Modality, Task, TokenSequence, pack
from unimod.capture import AttentionRecord, LayerAttention, capture_batch
from unimod.config import ParameterError, RouterConfig
from unimod.layers import apply_mod, remove_mod
from unimod.mask import suffix_hi
from unimod.plan import last_half


def record_of(logits_rank, n, rows=2):
    """A record of bidirectional rows whose softmax maps have the given rank: queries take `logits_rank` values."""
    ids = torch.arange(n)
    image = torch.full((n,), int(Modality.IMAGE))
    sequence = TokenSequence(Task.T2I, ids, ids, image, suffix_hi(0, n), ids, ((n, "topk"),))
    batch = pack([sequence] * rows)
    k = torch.randn(2, rows * n, 16, generator=torch.Generator().manual_seed(0))
    q = torch.randn(2, logits_rank, 16, generator=torch.Generator().manual_seed(1))
    q = q[:, torch.arange(rows * n) % logits_rank]
    return AttentionRecord({0: LayerAttention(q, k, 1.0, batch)}, batch)


@pytest.mark.parametrize("known", (1, 3, 7))
def test_known_ranks(known):
    found = arank(record_of(known, 24), Task.T2I, tolerance=1e-5)
    assert found.rank.tolist() == [[known, known]] and found.length.tolist() == [[24, 24]]
    assert found.share[0, 0] == pytest.approx(known / 24)


def test_it_equals_torchs_matrix_rank(world):
    model, batches = world["emu3-tiny"]
    record = capture_batch(model, batches.single_task(Task.MMU, "validation", 3))
    for tolerance in (1e-1, 1e-2):
        found = arank(record, Task.MMU, tolerance)
        for layer in (0, 4):
            for row in range(3):
                want = torch.linalg.matrix_rank(record.map(row, layer), rtol=tolerance).float().mean()
                assert found.rank[layer, row] == want
    want = torch.linalg.matrix_rank(record.map(1, 2)).float().mean()
    assert arank(record, Task.MMU, None).rank[2, 1] == want


def test_tolerance_and_samples(world):
    model, batches = world["showo-tiny"]
    record = capture_batch(model, batches.held_out("validation", 4))
    found = spectra(record, Task.MMU)
    ranks = [found.arank(t).rank for t in (1e-1, 1e-2, 1e-3, None)]
    assert all((a <= b).all() for a, b in pairwise(ranks))
    assert torch.equal(found.arank(1e-2, 2).rank, found.arank(1e-2).rank[:, :2])
    mean, low, high = bootstrap(found.arank().share)
    assert (low <= mean).all() and (mean <= high).all()
    rows = found.sensitivity(samples=(2, 4))
    assert {r["varied"] for r in rows} == {"tolerance", "samples"} and len(rows) == 8 * (6 + 2)
    curve = found.curve()
    assert curve[:, 0].allclose(torch.ones(8)) and (curve.diff(dim=1) <= 1e-6).all()
    for bad in (0.0, 1.0, -1):
        with pytest.raises(ParameterError, match="tolerance"):
            found.arank(bad)
    with pytest.raises(ParameterError, match="1 to 4"):
        found.arank(samples=5)


def test_shares_of_every_task_are_those_of_its_own_training_rows(world):
    model, batches = world["emu3-tiny"]
    found = shares(model, batches, 3, 0.05)
    assert list(found) == ["t2i", "mmu", "lm"]
    assert all(len(row) == 8 and all(0 < a <= 1 for a in row) for row in found.values())
    record = capture_batch(model, batches.single_task(Task.LM, "train", 3))
    assert found["lm"] == arank(record, Task.LM, 0.05).share.mean(1).tolist()


def test_the_mask_alone():
    found = mask_arank(record_of(3, 24), Task.T2I, 1e-3)
    assert found.rank.tolist() == [[1, 1]]                          # even and bidirectional: every row is the same


def test_a_layer_without_a_row_is_nan():
    values, length = torch.tensor([[[[2.0, 1.0]], [[0.0, 0.0]]]]), torch.tensor([[2.0, torch.nan]])
    found = Spectra(Task.T2I, (0,), values, length).arank()
    assert found.share[0, 0] == 1 and found.share[0, 1].isnan() and bootstrap(found.share)[0].isfinite().all()
    assert found.effective[0, 0] < 2 and found.effective[0, 1].isnan()


MAP = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
KINDS = torch.tensor([Modality.TEXT, Modality.IMAGE, Modality.IMAGE])


@pytest.mark.parametrize(("reading", "want", "rank"), [
    (Reading(), [[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], 2),
    (Reading(mask="causal"), [[0.5, 0, 0], [0.5, 0.3, 0], [0.1, 0.1, 0.8]], 3),
    (Reading(diagonal="zero"), [[0, 0.3, 0.2], [0.5, 0, 0.2], [0.1, 0.1, 0]], 3),
    (GAMMA_MOD, [[0, 0, 0], [0.5, 0, 0], [0.1, 0.1, 0]], 2),
    (Reading(tokens="text"), [[0.5, 0.3, 0.2]], 1),
    (Reading(tokens="image"), [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], 2),
    (Reading("causal", "zero", "image"), [[0.5, 0, 0], [0.1, 0.1, 0]], 2),
])
def test_every_reading_of_a_map_by_hand(reading, want, rank):
    read = reading.of(MAP, KINDS)
    assert torch.equal(read, torch.tensor(want))
    values, length = torch.linalg.svdvals(read)[None, None, None], torch.full((1, 1), float(len(want)))
    found = Spectra(Task.T2I, (0,), values, length, reading).arank(1e-5)
    assert found.rank.item() == rank == torch.linalg.matrix_rank(read, rtol=1e-5).item()
    assert found.share.item() == pytest.approx(rank / len(want))
    assert found.table()[0].items() >= {**asdict(reading), "tolerance": 1e-5, "samples": 1}.items()


def test_a_reading_that_is_not_known_is_refused():
    for bad in ({"mask": "full"}, {"diagonal": "off"}, {"tokens": "special"}):
        with pytest.raises(ParameterError, match="Allowed:"):
            Reading(**bad)


def test_gamma_mods_count_from_the_maps_themselves(world):
    model, batches = world["showo-tiny"]
    record = capture_batch(model, batches.single_task(Task.T2I, "validation", 2))
    found = arank(record, Task.T2I, None, GAMMA_MOD)
    maps = record.map(1, 3)
    want = torch.linalg.matrix_rank(maps.tril(-1)).float().mean()           # torch's default; below the diagonal
    assert found.rank[3, 1] == want and found.length[3, 1] == maps.shape[-1]
    image = arank(record, Task.T2I, 1e-2, Reading(tokens="image"))
    assert (image.length == 36).all() and (image.rank <= 36).all()
    rows = readings(record, Task.T2I)
    assert {r["varied"] for r in rows} == {"as used", "causal", "zero", "text", "image", "gamma-MoD"}
    assert len(rows) == 6 * 8


def test_effective_rank_of_known_spectra():
    values = torch.tensor([[[[2.0, 2.0, 2.0, 0.0]], [[3.0, 0.0, 0.0, 0.0]], [[2.0, 1.0, 1.0, 0.0]]]])
    found = Spectra(Task.T2I, (0,), values, torch.full((1, 3), 4.0)).arank()
    assert found.effective[0].tolist() == pytest.approx([3, 1, 2**1.5])     # entropy of (1/2, 1/4, 1/4) is 1.5 ln 2
    assert found.table()[0]["effective"] == pytest.approx((4 + 2**1.5) / 12)


def test_a_bootstrap_interval_holds_the_mean_and_ignores_what_is_missing():
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.0], [1.0], [2.0]])
    values[1, 5] = torch.nan
    mean, low, high = bootstrap(values)
    assert (low < mean).all() and (mean < high).all() and mean[1] == values[1].nanmean()
    half = (high - low) / 2
    torch.testing.assert_close(half[[0, 2]], 1.96 * values[[0, 2]].std(1) / 40**0.5, rtol=0.15, atol=0)


def test_drift_is_the_paired_change_and_routed_layers_hold_the_kept_tokens(world):
    model, batches = world["emu3-tiny"]
    batch = batches.single_task(Task.T2I, "validation", 4)
    before = arank(capture_batch(model, batch), Task.T2I)
    for row in drift(before, before):
        assert row["change"] == row["low"] == row["high"] == 0 and row["before"] == row["after"]
    routed = apply_mod(copy.deepcopy(model), last_half(8, 0.4), RouterConfig()).eval()
    after = arank(capture_batch(routed, batch), Task.T2I)
    assert (after.length[4:] < before.length[4:]).all() and torch.equal(after.length[:4], before.length[:4])
    rows = drift(before, after)
    assert all(row["change"] == 0 for row in rows[:4])
    assert all(row["low"] <= row["change"] <= row["high"] for row in rows)
    assert rows[6]["change"] == pytest.approx(float((after.share - before.share)[6].mean())) and rows[6]["samples"] == 4
    assert all(row["change"] == 0 for row in drift(before, arank(capture_batch(remove_mod(routed), batch), Task.T2I)))
    with pytest.raises(ParameterError, match="tolerance was 0.01 before and is 0.1 after"):
        drift(before, arank(capture_batch(model, batch), Task.T2I, 0.1))
    with pytest.raises(ParameterError, match="same rows"):
        drift(before, spectra(capture_batch(model, batch), Task.T2I).arank(samples=2))
