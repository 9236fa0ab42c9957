"""What routing should realise on an H200, on paper: shown where there is no record, and marked as what it is.

Per routed layer that keeps half of its tokens. Matrix products at 790 TFLOP/s, memory at 4.3 TB/s; x = 2 D T bytes; router, gather and scatter
move (10 + 22 c) x in plain torch, (4 + 15 c) x fused, (1 + 6 c) x fused in place, forward and backward.
"""

from __future__ import annotations

import json
from pathlib import Path

PAPER = "estimate on paper, H200, not measured"
ESTIMATE = (
    {"preset": "showo-256", "batch": "387 x 10", "plain torch": 0.75, "fused": 0.90, "fused in place": 0.95},
    {"preset": "showo-512", "batch": "1,155 x 24", "plain torch": 0.91, "fused": 0.95, "fused in place": 0.98},
    {"preset": "emu3-4k", "batch": "4,096 x 4", "plain torch": 0.955, "fused": 0.98, "fused in place": 0.99},
)
"""Realised share of the theoretical saving at capacity 0.5."""
COMMAND = "python -m unimod bench gpu --out notebooks/records/bench-gpu.json"
"""Makes the record that takes its place."""


def on_gpu(folder: Path) -> list[dict]:
    """Realised shares of the stack on a GPU, of the committed records (bench-*.json); where there is none, the estimate. `source` says which; `kept` is
    the capacity of every other layer, or "paper" for the paper's own plan."""
    rows = []
    for path in sorted(folder.glob("bench-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows += [{"model": f"{row['preset']}, {row['tokens']} tokens", "kept": str(row["capacity"]), "way": row["backend"], "realised": row["realised"],
                  "source": f"{path.name}: {found['device']}, commit {found['commit'][:10]}"}
                 for row in found["rows"] if row["bench"] == "layer" and row["realised"] is not None and not found["device"].startswith("CPU")]
    return rows or [{"model": f"{row['preset']}, {row['batch']}", "kept": "0.5", "way": way, "realised": row[way], "source": PAPER}
                    for row in ESTIMATE for way in ("plain torch", "fused", "fused in place")]
