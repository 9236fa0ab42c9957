"""Rows of every task and of different lengths, for the core's tests."""

import torch

WORDS = ("a", "red", "blue", "circle", "square", "is", "there", "yes", "no", "and")
CAPTIONS = ("", "a red circle", "a blue square and a red circle", "zebra")
TURNS = ([("is there a circle ?", "yes")], [("is there a red circle ?", "no"), ("is there a square ?", "yes")],
         [("circle ?", "")])


def make_rows(layout, seed=0):
    """Rows of every task and of different lengths, the last understanding row open-ended."""
    g = torch.Generator().manual_seed(seed)
    def codes():
        return torch.randint(layout.codebook_size, (layout.image_tokens,), generator=g)
    if layout.causal_images:
        rows = [layout.t2i(c, codes()) for c in CAPTIONS]
    else:
        rows = [layout.t2i(c, codes(), torch.rand(layout.image_tokens, generator=g) < 0.6) for c in CAPTIONS]
    rows += [layout.mmu(codes(), turns, open_ended=not turns[-1][1]) for turns in TURNS]
    return [*rows, layout.lm("a red circle is there")]


def rows_of(layout):
    """One sequence of each task, for any layout that takes codes."""
    codes = torch.arange(layout.image_tokens) % layout.codebook_size
    masked = () if layout.causal_images else (torch.arange(layout.image_tokens) % 2 == 0,)
    return [layout.t2i("a red circle", codes, *masked), layout.mmu(codes, [("is there a circle ?", "yes")]),
            layout.lm("a red circle is there")]
