"""Masked decoding of pictures (MaskGIT, arXiv 2202.04200, as Show-o does it): a few forwards over whole sequences.

    drawing = MaskedDrawing(model, layout, captions, generator, steps=18, guidance=1.5)
    drawing.run()
    drawing.codes                                           # int64 [B, N]

Between steps only ids change, so sequences are packed and moved once, and a step is a function of tensors that stay
where they are: on CUDA it is recorded as one graph.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .batch import IGNORE, Modality, pack
from .decode import Replayed, sample
from .layers import routed_layers
from .models.layout import Layout
from .models.unified import UnifiedModel


class MaskedDrawing:
    """Sample every slot, keep the confident ones, mask the rest again, `steps` times.

    logits = (1 + w) cond - w uncond;  score = log p + temperature * gumbel;  m = floor(N cos(pi/2 (s + 1) / steps))
    stay masked, at least one and fewer than before. The temperature is a running product of 1 - (s + 1) / steps. A
    picture with nothing masked stays.

    generator: what draws, and where; None: torch's own, where the model is.
    guidance: w, over the text `negative`; 0 for none. share: routed layers judge the picture tokens of both branches by
    the captioned one's scores. known: codes int64 [B, N] and, bool [B, N], which of them are drawn anew.
    """

    def __init__(self, model: UnifiedModel, layout: Layout, captions: list[str], generator: torch.Generator | None,
                 steps: int, guidance: float, negative: str = "", share: bool = False,
                 known: tuple[Tensor, Tensor] | None = None) -> None:
        self.model, self.layout, self.generator, self.guidance = model, layout, generator, guidance
        n, count, at = layout.image_tokens, len(captions), model.device if generator is None else generator.device
        codes, unknown = known or (torch.zeros(count, n, dtype=torch.long), torch.ones(count, n, dtype=torch.bool))
        texts = captions + [negative] * count * (guidance > 0)
        self.branches = len(texts) // count
        batch = pack([layout.t2i(text, codes[i % count], unknown[i % count]) for i, text in enumerate(texts)])
        batch = batch.share_scores() if share and guidance > 0 else batch
        self.slots = (batch.modality == Modality.IMAGE).nonzero()[:, 0].to(model.device)
        # such a router counts the targets that are left, so its plan is another one at every step
        self.labelled = any("labelled" in layer.router.config.always_keep for layer in routed_layers(model))
        self.batch = batch.to(model.device)
        self.plan = None if self.labelled else model.plan(self.batch, targets=False)
        self.codes, self.unknown = codes.to(at, copy=True), unknown.to(at, copy=True)
        self.untouched = ~self.unknown.any(-1, keepdim=True)
        self.ids = layout.code_ids.to(model.device)
        ratios = [(s + 1) / steps for s in range(steps)]
        temperatures = [math.prod(1 - r for r in ratios[:s + 1]) for s in range(steps)]
        self.temperature = torch.tensor(temperatures, dtype=torch.float32).to(at)
        # in float32, whose rounding decides at whole numbers
        left = [int(n * torch.cos(torch.tensor(r) * math.pi / 2)) for r in ratios]
        self.left = torch.tensor(left).to(at)
        self.number = torch.zeros(1, dtype=torch.long, device=at)
        self.steps, self._replayed = steps, Replayed(model.device, generator)

    def run(self) -> None:
        """All steps."""
        for _ in range(self.steps):
            if self.labelled:                               # its plan is worked out on the host, at every step
                self.step()
            else:
                self._replayed(self.step)

    def step(self) -> None:
        """One step, of which nothing is returned: `codes` and `unknown` are new."""
        n, count, codes, unknown = self.layout.image_tokens, len(self.codes), self.codes, self.unknown
        logits = self._logits().to(codes.device).view(self.branches * count, n, -1)
        if self.guidance > 0:
            logits = (1 + self.guidance) * logits[:count] - self.guidance * logits[count:]
        probability = logits.softmax(-1)
        sampled = sample(probability.flatten(0, 1), self.generator).view(count, n)
        sampled = torch.where(unknown, sampled, codes)
        # known slots get the largest number, so they are never the ones masked again
        confidence = probability.gather(-1, sampled[..., None])[..., 0].masked_fill(~unknown,
                                                                                    torch.finfo(probability.dtype).max)
        uniform = torch.rand(count, n, generator=self.generator, device=codes.device)
        gumbel = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        score = confidence.clamp(min=1e-20).log() + self.temperature.index_select(0, self.number) * gumbel
        left = self.left.index_select(0, self.number)
        m = torch.minimum(unknown.sum(-1, keepdim=True) - 1, left).clamp(min=1, max=n - 1)
        unknown.copy_((score < score.sort(-1).values.gather(-1, m)) & ~self.untouched)
        codes.copy_(sampled)
        self.number.add_(1)

    def _logits(self) -> Tensor:
        """Logits of every slot of every branch, with the ids of this step: float32 [branches * B * N, codebook]."""
        device = self.model.device
        codes, unknown = (x.to(device).flatten().repeat(self.branches) for x in (self.codes, self.unknown))
        image = self.ids.index_select(0, codes)
        batch = self.batch
        batch.ids.index_copy_(0, self.slots, torch.where(unknown, self.layout.mask, image))
        if self.labelled:
            target = batch.target.index_copy(0, self.slots, torch.where(unknown, image, IGNORE))
            batch = replace(batch.host or batch, ids=batch.ids.cpu(), target=target.cpu()).to(device)
        hidden = self.model(batch, plan=self.plan)
        return self.model.code_logits(hidden.index_select(0, self.slots))
