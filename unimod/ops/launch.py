"""How a kernel that takes one row of a matrix per program is launched."""

from __future__ import annotations


def row_block(width: int) -> dict[str, int]:
    """The block that holds a row of `width` entries, and its warps: keyword arguments of a launch."""
    block = max(16, 1 << (width - 1).bit_length())
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
