"""One row of every task for any layout that takes codes."""

import torch


def rows_of(layout):
    codes = torch.arange(layout.image_tokens) % layout.codebook_size
    more = () if layout.causal_images else (torch.arange(layout.image_tokens) % 2 == 0,)
    return [layout.t2i("a red circle", codes, *more), layout.mmu(codes, [("is there a circle ?", "yes")]), layout.lm("a red circle is there")]
