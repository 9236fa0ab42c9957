"""ARank of maps whose rank is known, and its dependence on what one may choose."""

from itertools import pairwise

import pytest
import torch

from unimod.analysis.redundancy import Spectra, arank, mask_arank, shares, spectra
from unimod.capture import AttentionRecord, LayerAttention, observe
from unimod.config import ParameterError
from unimod.tokens import Modality, Task, TokenSequence, pack, suffix_hi


def record_of(logits_rank, n, rows=2):
    """A record of bidirectional rows whose softmax maps have the given rank: queries take one of `logits_rank` values."""
    ids = torch.arange(n)
    sequence = TokenSequence(Task.T2I, ids, ids, torch.full((n,), int(Modality.IMAGE)), suffix_hi(0, n), ids, ((n, "topk"),))
    packed = pack([sequence] * rows)
    k = torch.randn(2, rows * n, 16, generator=torch.Generator().manual_seed(0))
    q = torch.randn(2, logits_rank, 16, generator=torch.Generator().manual_seed(1))[:, torch.arange(rows * n) % logits_rank]
    return AttentionRecord({0: LayerAttention(q, k, 1.0, packed)}, [packed])


@pytest.mark.parametrize("known", (1, 3, 7))
def test_known_ranks(known):
    found = arank(record_of(known, 24), Task.T2I, tolerance=1e-5)
    assert found.rank.tolist() == [[known, known]] and found.length.tolist() == [[24, 24]]
    assert found.share[0, 0] == pytest.approx(known / 24)


def test_it_equals_torchs_matrix_rank(world):
    model, batches = world["emu3-tiny"]
    record = observe(model, batches.single_task(Task.MMU, "validation", 3))
    for tolerance in (1e-1, 1e-2):
        found = arank(record, Task.MMU, tolerance)
        for layer in (0, 4):
            for row in range(3):
                want = torch.linalg.matrix_rank(record.maps([row], layer)[0], rtol=tolerance).float().mean()
                assert found.rank[layer, row] == want
    want = torch.linalg.matrix_rank(record.maps([1], 2)[0]).float().mean()
    assert arank(record, Task.MMU, None).rank[2, 1] == want


def test_tolerance_and_samples(world):
    model, batches = world["showo-tiny"]
    record = observe(model, batches.held_out("validation", 4))
    found = spectra(record, Task.MMU)
    ranks = [found.arank(t).rank for t in (1e-1, 1e-2, 1e-3, None)]
    assert all((a <= b).all() for a, b in pairwise(ranks))
    assert torch.equal(found.arank(1e-2, 2).rank, found.arank(1e-2).rank[:, :2])
    b = found.arank().bootstrap()
    assert (b.low <= b.mean).all() and (b.mean <= b.high).all()
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
    assert list(found) == ["t2i", "mmu", "lm"] and all(len(row) == 8 and all(0 < a <= 1 for a in row) for row in found.values())
    record = observe(model, batches.single_task(Task.LM, "train", 3))
    assert found["lm"] == arank(record, Task.LM, 0.05).share.mean(1).tolist()


def test_the_mask_alone():
    found = mask_arank(record_of(3, 24), Task.T2I, 1e-3)
    assert found.rank.tolist() == [[1, 1]]                          # even and bidirectional: every row is the same


def test_a_layer_without_a_row_is_nan():
    found = Spectra(Task.T2I, (0,), torch.tensor([[[[2.0, 1.0]], [[0.0, 0.0]]]]), torch.tensor([[2.0, torch.nan]])).arank()
    assert found.share[0, 0] == 1 and found.share[0, 1].isnan() and found.bootstrap().mean.isfinite().all()
