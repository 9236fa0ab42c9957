"""From data to packed batches: picture and text -> image tokens and sequences -> `Batch`.

    batches = Batches(data, image_tokenizer, model.layout, rows=(16, 16, 2), seed=0)
    batch = batches.train(step)                   # the same batch for the same (seed, step), so a run can resume

A training batch holds `rows` sequences of text-to-image (t2i), understanding (mmu) and text (lm), all in one forward.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Task, TokenSequence, pack
from .sources import Dataset, Sample


def cosine_mask(u_ratio: Tensor, u_slots: Tensor) -> Tensor:
    """Show-o's masking noise. u_ratio: [B], u_slots: [B, N], both uniform on [0, 1). Returns bool [B, N].

    r = cos(pi/2 * t), n = max(1, round(N * r)); slot j is masked iff argsort(u)[j] < n.
    """
    n = (u_slots.shape[1] * torch.cos(math.pi / 2 * u_ratio)).round().clamp(min=1)
    # the permutation's values, not ranks, are compared with n: as in Show-o's code
    return u_slots.argsort(-1) < n[:, None]


class Batches:
    """Makes sequences in the layout of one model from the samples of one data set."""

    def __init__(self, data: Dataset, image_tokenizer: torch.nn.Module, layout: object,
                 rows: tuple[int, int, int] = (16, 16, 2), seed: int = 0) -> None:
        self.data, self.image_tokenizer, self.layout, self.rows, self.seed = data, image_tokenizer, layout, rows, seed

    def samples(self, split: str, start: int, count: int, seed: int | None = None) -> list[Sample]:
        """`count` samples from index `start` on."""
        return [self.data.sample(split, start + i, self.seed if seed is None else seed) for i in range(count)]

    def codes(self, samples: list[Sample]) -> Tensor:
        """Image tokens of the samples' pictures: int64 [B, N] in raster order."""
        pictures = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2)
        return self.image_tokenizer.encode(pictures).flatten(1)

    def train(self, step: int) -> Batch:
        """The training batch of a step."""
        count = sum(self.rows)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return self.mixed(self.samples("train", step * count, count), self.rows, generator)

    def held_out(self, split: str, count: int) -> Batch:
        """A fixed batch of a held-out split, for losses and analyses: `count` rows of t2i and of mmu, one of lm."""
        samples = self.samples(split, 0, 2 * count + 1, seed=0)
        return self.mixed(samples, (count, count, 1), torch.Generator().manual_seed(0), drop=False)

    def mixed(self, samples: list[Sample], rows: tuple[int, int, int], generator: torch.Generator,
              drop: bool = True) -> Batch:
        """Pack samples, in this order, as `rows` sequences of t2i, mmu and lm; `drop`: with caption dropout."""
        codes, (t2i, mmu, _) = self.codes(samples), rows
        sequences = self.t2i([s.caption for s in samples[:t2i]], codes[:t2i], generator, drop)
        sequences += map(self.mmu, samples[t2i : t2i + mmu], codes[t2i:])
        sequences += [self.layout.lm(s.caption) for s in samples[t2i + mmu :]]
        return pack(sequences)

    def t2i(self, captions: list[str], codes: Tensor, generator: torch.Generator,
            drop: bool = True) -> list[TokenSequence]:
        """Training rows of text-to-image. Draws ratios [B], slots [B, N] (masked models), then caption dropout [B]."""
        masked = []
        if not self.layout.causal_images:
            u_ratio = torch.rand(len(captions), generator=generator)
            masked = [cosine_mask(u_ratio, torch.rand(codes.shape, generator=generator))]
        dropped = torch.rand(len(captions), generator=generator) < self.layout.drop_caption * drop
        texts = ["" if d else c for d, c in zip(dropped.tolist(), captions)]
        return list(map(self.layout.t2i, texts, codes, *masked))

    def mmu(self, sample: Sample, codes: Tensor) -> TokenSequence:
        """One understanding row: all questions about the picture, as turns of one conversation."""
        turns = [(q.text, q.answer) for q in sample.questions] or [("describe the picture", sample.caption)]
        return self.layout.mmu(codes, turns)

    def paired(self, split: str, count: int) -> Batch:
        """The same pictures in both tasks: `count` rows of t2i with all image tokens known, then `count` of mmu."""
        samples = self.samples(split, 0, count, seed=0)
        codes = self.codes(samples)
        masked = [] if self.layout.causal_images else [torch.zeros_like(codes, dtype=torch.bool)]
        return pack([*map(self.layout.t2i, [s.caption for s in samples], codes, *masked),
                     *map(self.mmu, samples, codes)])

    def single_task(self, task: Task, split: str, count: int, start: int = 0) -> Batch:
        """`count` rows of one task from a split, without caption dropout."""
        samples = self.samples(split, start, count, seed=0)
        if task == Task.LM:
            return pack([self.layout.lm(s.caption) for s in samples])
        codes = self.codes(samples)
        if task == Task.MMU:
            return pack(list(map(self.mmu, samples, codes)))
        generator = torch.Generator().manual_seed(start)
        return pack(self.t2i([s.caption for s in samples], codes, generator, drop=False))
