"""Pattern statistics against plain loops over full dense maps."""

import math
from dataclasses import replace

import pytest
import torch

from unimod.analysis.attention import STATISTICS, capture_patterns, patterns, statistics
from unimod.batch import Modality, Task
from unimod.capture import CaptureError, LayerAttention, capture_batch
from unimod.layers import apply_mod, remove_mod
from unimod.plan import CapacityPlan


@pytest.mark.parametrize("name", ("showo-tiny", "emu3-tiny"))
@pytest.mark.parametrize("task", (Task.T2I, Task.MMU))
def test_statistics_equal_loops_over_dense_maps(world, dense_maps, name, task):
    model, batches = world[name]
    batch = batches.single_task(task, "validation", 3)
    found = patterns(capture_batch(model, batch), task)
    dense = dense_maps(model, batch)
    for layer in (0, 5):
        for row, span in enumerate(batch.rows()):
            modality, position = batch.modality[span].tolist(), batch.position[span].tolist()
            for head in (0, 3):
                A = dense[layer][row][head].double()
                n = len(A)
                for key in Modality:
                    columns = [j for j in range(n) if modality[j] == key]
                    want = A[:, columns].sum().item() / n
                    assert found.received[layer, row, head, key].item() == pytest.approx(want, abs=1e-4)
                    for query in Modality:
                        lines = [i for i in range(n) if modality[i] == query]
                        if lines:
                            want = A[lines][:, columns].sum().item() / len(lines)
                            assert found.mass[layer, row, head, query, key].item() == pytest.approx(want, abs=1e-4)
                entropy = [-sum(p * math.log(p) for p in line if p > 0) for line in A.tolist()]
                assert found.entropy[layer, row, head].item() == pytest.approx(sum(entropy) / n, abs=1e-3)
                assert found.sink[layer, row, head].item() == pytest.approx(A[1:, 0].mean().item(), abs=1e-4)
                reach = sum(A[i, j].item() * abs(position[i] - position[j]) for i in range(n) for j in range(n)) / n
                assert found.distance[layer, row, head].item() == pytest.approx(reach, abs=1e-2)
    torch.testing.assert_close(found.received.sum(-1), torch.ones_like(found.entropy))
    assert found.even.sum(-1).allclose(torch.ones(8, 3))
    assert ((found.evenness >= 0) & (found.evenness <= 1 + 1e-5)).all()
    assert len(found.table()) == 8 * 4 and len(found.flows()) == 8 * 12


def test_flat_attention_is_even(world):
    model, batches = world["showo-tiny"]
    kept = [layer.self_attn.scaling for layer in model.layers]
    for layer in model.layers:
        layer.self_attn.scaling = 0.0
    try:
        found = patterns(capture_batch(model, batches.single_task(Task.MMU, "validation", 2)), Task.MMU)
    finally:
        for layer, scaling in zip(model.layers, kept):
            layer.self_attn.scaling = scaling
    assert found.evenness.allclose(torch.ones_like(found.evenness), atol=1e-5)
    assert found.received.mean(2).allclose(found.even, atol=1e-5)


def test_a_layer_without_any_token_gives_nan(world):
    model, batches = world["showo-tiny"]
    whole = capture_batch(model, batches.single_task(Task.MMU, "validation", 2)).layer(0)
    nothing = whole.batch.take(torch.empty(0, dtype=torch.long), [replace(s, length=0) for s in whole.batch.segments])
    found = statistics(LayerAttention(whole.q[:, :0], whole.k[:, :0], whole.scale, nothing), [0, 1])
    assert all(len(x) == 2 and x.isnan().all() for x in found.values())


def test_patterns_computed_inside_the_attention_are_those_of_records(world):
    model, batches = world["showo-tiny"]
    several = [batches.held_out("validation", 2), batches.single_task(Task.MMU, "validation", 3, start=2)]
    apply_mod(model, CapacityPlan({"mmu": [1.0] * 7 + [0.5]}))
    try:
        found = capture_patterns(model, several, Task.MMU)
        records = [capture_batch(model, batch) for batch in several]
        assert records[1].batch(7).lengths[0] < several[1].lengths[0]
    finally:
        remove_mod(model)
    assert found.mass.shape == (8, 5, 4, 3, 3) and found.received[7].isfinite().all()
    parts = [patterns(record, Task.MMU) for record in records]
    for name in STATISTICS:
        want = torch.cat([getattr(part, name) for part in parts], 1)
        torch.testing.assert_close(getattr(found, name), want, equal_nan=True)
    with pytest.raises(CaptureError, match="no lm row"):
        capture_patterns(model, several[1:], Task.LM)
