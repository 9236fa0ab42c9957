"""What is measured: models of known size with random weights, and batches of exactly so many tokens.

    size = SIZES["showo-256"][0]
    model, rows = size.build("cuda", torch.bfloat16)
    routed = twin(model)                       # the same weights, to be routed

cpu is a Llama-like stack (Emu3's family: RMSNorm, SwiGLU, rotary embedding, full-width keys), width 512, 8 layers, in both shapes of the
published comparisons: 8 rows of 512 and of 128 tokens. The others are the presets of `unimod.presets`, cut to fewer layers where memory asks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Emu3ForCausalLM

from .. import seam
from ..batch import TokenSequence
from ..models.emu3 import Emu3Layout, emu3_config
from ..models.layout import Layout
from ..models.unified import UnifiedModel
from ..plan import CapacityPlan, interleaved, paper_emu3, paper_showo
from ..presets import Words, preset

ANSWER = "x" * 8


@dataclass(frozen=True)
class Size:
    """One shape: `batch` rows of `tokens` tokens; `layers` of them in the stack (0: all) and `step_layers` where an optimizer is there too."""

    preset: str
    tokens: int
    batch: int
    capacities: tuple[float, ...]
    layers: int = 0
    step_layers: int = 0

    def outline(self, step: bool = False) -> tuple[UnifiedModel, list[TokenSequence]]:
        """The dense model on the meta device, and the rows: t2i, and where there is a paper's plan every other one mmu."""
        model = _llama() if self.preset == "cpu" else preset(self.preset)[0]
        keep = (self.step_layers or self.layers) if step else self.layers
        if keep:
            model.decoder.layers = model.decoder.layers[:keep]
        return model, [row_of(model.layout, self.tokens, mmu=self.family in PAPER and i % 2 == 1) for i in range(self.batch)]

    def build(self, device: str, dtype: torch.dtype, step: bool = False) -> tuple[UnifiedModel, list[TokenSequence]]:
        """The same with random weights, in training mode."""
        model, rows = self.outline(step)
        return materialise(model, device, dtype), rows

    @property
    def family(self) -> str:
        """Which of the paper's models it is; the cpu preset is a family of its own, without a plan of the paper's."""
        return self.preset.split("-")[0]

    def plans(self, layers: int) -> dict[str, CapacityPlan]:
        """Every other layer at each of the capacities, and the paper's own plan."""
        routed = len(range(1, layers, 2))
        plans = {f"{c:g}": interleaved(layers, (1 - c) * routed / layers) for c in self.capacities}
        return plans | ({"paper": PAPER[self.family](layers)} if self.family in PAPER else {})


PAPER = {"showo": paper_showo, "emu3": paper_emu3}
"""The paper's own plans."""
_HALF = (0.5, 0.8, 0.2)
SIZES = {
    "cpu": (Size("cpu", 512, 8, (0.5, 0.125)), Size("cpu", 128, 8, (0.5, 0.125))),
    "showo-tiny": (Size("showo-tiny", 0, 8, _HALF),),
    "emu3-tiny": (Size("emu3-tiny", 0, 8, _HALF),),
    "showo-256": (Size("showo-256", 387, 10, _HALF), Size("showo-256", 387, 24, _HALF)),
    "showo-512": (Size("showo-512", 1155, 8, _HALF),),
    "emu3-4k": (Size("emu3-4k", 4096, 4, _HALF, layers=16, step_layers=4),),
    "emu3-8k": (Size("emu3-8k", 8192, 1, _HALF, layers=16, step_layers=8),),
}
"""By preset. Tokens 0: rows as long as the model's own. Emu3's 32 layers do not fit one device with their activations, gradients and optimizer."""
LOOKED = {name: (Size(name, 0, 1, ()),) for name in ("showo-tiny", "emu3-tiny")} | {
    "showo-512": (Size("showo-512", 1155, 1, (), layers=2),), "emu3-8k": (Size("emu3-8k", 8200, 1, (), layers=1),)}
LOOKED["released"] = (*LOOKED["showo-512"], *LOOKED["emu3-8k"])
"""Rows to look at the attention of, also on a CPU: two layers of Show-o, one of Emu3."""
CUDA = ("showo-256", "showo-512", "emu3-4k", "emu3-8k")
"""Presets of released sizes."""


def twin(model: UnifiedModel) -> UnifiedModel:
    """A copy whose parameters are the model's own."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def materialise(model: UnifiedModel, device: str, dtype: torch.dtype) -> UnifiedModel:
    """A model of the meta device with random weights of deviation 0.02, norms at 1 and biases at 0, in training mode; rotary angles stay float32."""
    model = model.to(dtype).to_empty(device=device)
    for m in model.modules():
        for name, p in m.named_parameters(recurse=False):
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.constant_(p, float(name == "weight"))
    seam.set_rotary(model.decoder, copy.deepcopy(model.rotary).to(device))
    return model.train()


def row_of(layout: Layout, tokens: int, mmu: bool, text: float = 1.0) -> TokenSequence:
    """A row of exactly so many tokens (0: about as many as the model's own rows have) with as large a picture as there is room for, or the same
    row with this share of its text. Raises ValueError where no row is as short, or as long."""
    tokens = tokens or layout.image_tokens + min(layout.text_budget, 64)
    for height in range(layout.grid[0], 0, -1):
        part = layout.resized((height, layout.grid[1]))
        codes = torch.zeros(part.image_tokens, dtype=torch.long)
        masked = () if layout.causal_images else (torch.ones(part.image_tokens, dtype=torch.bool),)

        def write(n: int) -> TokenSequence:
            return part.mmu(codes, [("x" * n, ANSWER)]) if mmu else part.t2i("x" * n, codes, *masked)  # noqa: B023  # called in this round only

        room = tokens - len(write(0).ids)
        if room >= 0 and len((row := write(room)).ids) == tokens:
            return row if text == 1 else write(round(text * room))
    raise ValueError(f"No picture of {layout.grid[1]} columns and text of {layout.text_budget} tokens make {tokens} tokens.")


def _llama() -> UnifiedModel:
    layout = Emu3Layout(Words(1000, 0), codebook_size=256, grid=(16, 16), text_budget=512)
    config = emu3_config(layout.vocab_size, width=512, layers=8, heads=8, kv_heads=8, ffn=1376, max_positions=1024,
                         pad=layout.pad, bos=layout.bos, eos=layout.eos)
    with torch.device("meta"):
        return UnifiedModel(Emu3ForCausalLM(config), layout)


def ragged(layout: Layout, tokens: int, batch: int) -> list[TokenSequence]:
    """Rows of at most so many tokens, t2i and mmu in turn; the share of the longest text that each has is evenly spread and out of order."""
    return [row_of(layout, tokens, mmu=i % 2 == 1, text=1 - i * math.sqrt(2) % 1) for i in range(batch)]
