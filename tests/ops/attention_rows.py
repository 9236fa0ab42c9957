"""Rows of every model's layout and mask, and a kernel for rows of different lengths in plain torch, for the tests of
attention."""

import torch
from core.tiny_rows import TURNS, WORDS, make_rows

from unimod.batch import IGNORE, Segment, Task, TokenSequence
from unimod.models.chameleon import ChameleonLayout
from unimod.models.checkpoint import build_model
from unimod.models.janus import JanusLayout

SHOWO, EMU3 = (build_model(kind, WORDS, codebook_size=16, grid=(3, 4), text_budget=24).layout
               for kind in ("showo-tiny", "emu3-tiny"))


def _layout(kind, names):
    size = SHOWO.text.size + len(names)
    specials = {name: SHOWO.text.size + i for i, name in enumerate(names)}
    layout = kind(SHOWO.text, specials, size + torch.arange(16), (3, 4), 24, size + 16)
    layout.stop = layout.eos
    return layout


def _janus():
    layout, codes, features = _layout(JanusLayout, ("bos", "eos", "boi", "eoi")), torch.arange(12), torch.randn(12, 8)
    drawn = [layout.t2i("a red circle", codes), layout.t2i("", codes, prompt=True)]
    return [*drawn, *[layout.mmu(features, turns) for turns in TURNS], layout.lm("a circle")]


def odd(hi):
    """A row with these upper ends."""
    n = len(hi)
    zeros, target = torch.zeros(n).long(), torch.full((n,), IGNORE)
    return TokenSequence(Task.LM, zeros, torch.arange(n), zeros, torch.tensor(hi), target, ((n, "topk"),))


ROWS = {
    "showo": make_rows(SHOWO),
    "showo features": [SHOWO.mmu(torch.randn(6, 8), turns, system=system)
                       for turns in TURNS[:2] for system in ("", "is there a")],
    "emu3": make_rows(EMU3),
    "chameleon": make_rows(_layout(ChameleonLayout, ("bos", "pad", "eos", "boi", "eoi", "sep"))),
    "janus": _janus(),
    "degenerate": [odd(hi) for hi in ([1], [7] * 7, [2, 2], [1, 2], [1, 3, 3], [3, 3, 3, 4], [3, 2, 3, 4])],
}
GENERAL = odd([2, 2, 4, 4, 5])
"""Two blocks, one behind the other."""


def routed(packed, keep):
    """The batch of the tokens where `keep` (bool [T]) holds."""
    counts = [int(keep[where].sum()) for where in packed.rows()]
    return packed.take(keep.nonzero()[:, 0], [Segment(b, t, n) for b, (t, n) in enumerate(zip(packed.tasks, counts))])


class SlowKernel:
    """The contract of `unimod.ops.attention_varlen.KERNELS`, run by run. `pairs`: products of a query and a key so
    far."""

    def __init__(self):
        self.pairs = self.calls = 0

    def __call__(self, q, k, v, cu_q, cu_k, most, causal, scale):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
        outs, group, self.calls = [], q.shape[1] // k.shape[1], self.calls + 1
        for cu in (cu_q, cu_k):
            assert cu[0] == 0 and cu[-1] == len(q) and (cu.diff() >= 0).all() and cu.diff().max() <= most, cu
        for a, b, c, d in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]):
            if c == d:                                      # no keys: what comes out is of no use, and has no gradient
                outs.append(q.new_full((b - a, *q.shape[1:]), torch.nan))
                continue
            key, value = (x[c:d].repeat_interleave(group, 1) for x in (k, v))
            see = torch.ones(b - a, d - c, dtype=torch.bool)
            see = see.tril(d - c - b + a) if causal else see    # aligned at the last key
            weights = (torch.einsum("ihd,jhd->hij", q[a:b], key) * scale).masked_fill(~see, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hij,jhd->ihd", weights, value))
            self.pairs += int(see.sum())
        return torch.cat(outs)
