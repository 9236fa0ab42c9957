"""Is the packed, routed way right, and what does it save? Errors, times and memory against slower ways.

    error = against_stock(model, rows)                       # one sequence at a time, eager attention, dense mask
    times = time_steps({"dense": a, "unimod": b}, batch)     # interleaved, medians, ratios to the first
    bytes_ = saved_for_backward(model, batch)
    parts = part_shares(model, lambda: losses(model, batch).total)
    python -m unimod bench layer --preset cpu                # the record of a whole benchmark

timing (the clock, memory), parts (where time goes), stock (the slower ways), jobs and cases (what the command
measures), capture (what capturing attention costs), record (what the command writes), costs (predicted time of a plan).
The sizes are in `unimod.presets`.
"""

from .parts import part_shares, where_time_goes
from .stock import against_stock, padded_step, stock_attention
from .timing import interleave, saved_for_backward, time_steps

__all__ = [
    "against_stock", "interleave", "padded_step", "part_shares", "saved_for_backward", "stock_attention", "time_steps",
    "where_time_goes",
]
