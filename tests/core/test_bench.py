"""What the benchmark measures: errors against the stock model, bytes, parts of a forward. No wall time is asserted."""

import torch

from unimod.batch import pack
from unimod.bench import against_stock, padded_step, saved_for_backward, time_steps, where_time_goes
from unimod.layers import apply_mod
from unimod.losses import losses
from unimod.plan import last_half


def test_the_packed_way_equals_the_stock_way(model, rows):
    d = against_stock(model, rows)
    assert d.logits < 2e-5 * max(1, d.largest_logit) and d.gradient < 1e-3 * d.largest_gradient
    torch.testing.assert_close(padded_step(model, rows), losses(model, pack(rows)).total)


def test_routing_saves_activation_memory(model, packed):
    dense = saved_for_backward(model, packed)
    assert saved_for_backward(model, packed) == dense > 0
    assert saved_for_backward(apply_mod(model, last_half(8, 0.3)), packed) < 0.95 * dense


def test_parts_and_times_are_reported(model, packed):
    assert where_time_goes(model, packed, rounds=1) == {}
    routed = apply_mod(model, last_half(8, 0.3))
    parts = where_time_goes(routed, packed, rounds=1)
    assert set(parts) == {"router and selection", "decoder layer", "gather and scatter"}
    assert all(v > 0 for v in parts.values())
    times = time_steps({"routed": routed}, packed, rounds=1)
    assert times["routed"]["ratio"] == 1 and next(routed.parameters()).grad is None
