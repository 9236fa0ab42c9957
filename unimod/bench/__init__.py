"""Is the packed, routed way right, and what does it save? Errors, times and memory against slower ways of doing the same.

    error = against_stock(model, rows)                       # one sequence at a time, eager attention, dense mask
    times = time_steps({"dense": a, "unimod": b}, packed)    # interleaved, medians, ratios to the first
    bytes_ = saved_for_backward(model, packed)
    parts = part_shares(model, lambda: losses(model, packed).total)
    python -m unimod bench layer --preset cpu                # the record of a whole benchmark

clock (time), compare (the slower ways), parts (where time goes), sizes and job (what is measured), training, sampling, attention and looking
(the measures), record and command (what comes out), costs (plans by predicted time).
"""

from .clock import interleave, saved_for_backward, time_steps
from .compare import against_stock, padded_step, stock_attention
from .parts import part_shares, where_time_goes

__all__ = ["against_stock", "interleave", "padded_step", "part_shares", "saved_for_backward", "stock_attention", "time_steps", "where_time_goes"]
