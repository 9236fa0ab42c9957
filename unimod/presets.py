"""Models at known sizes, without weights or with random ones, and rows for them: what can be counted or timed anywhere.

    model, rows = preset("showo-512")                  # on the meta device: shapes only; a row of each task
    model, rows = preset("folder/of/a/model")
    image_tokenizer = picture_tokenizer("showo-512")   # MAGVIT-v2 at its released size
    model, rows = SIZES["showo-256"][0].build("cuda", torch.bfloat16)     # random weights, rows of exactly 387 tokens

A released size needs no tokenizer here: its texts are made of token 0, as long as the model's own training writes them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import Emu3ForCausalLM

from . import seam
from .batch import TokenSequence
from .config import MODELS, ParameterError
from .models import emu3, emu3_vq, magvit, showo
from .models.checkpoint import outline, shipped
from .models.image_tokenizer import ImageTokenizer, load_image_tokenizer, stock_kind
from .models.layout import Layout
from .models.unified import UnifiedModel
from .models.weights import Weights
from .plan import CapacityPlan, interleaved, paper_emu3, paper_showo

RELEASED = {
    "_class_name": "Showo", "codebook_size": 8192, "llm_vocab_size": 50295, "mask_token_id": 58497, "vocab_size": 58498,
}
PRESETS = {
    "showo-256": (showo.FAMILY, RELEASED | {"num_vq_tokens": 256, "text_budget": 128}),
    "showo-512": (showo.FAMILY, RELEASED | {"num_vq_tokens": 1024, "text_budget": 381}),
    "emu3-4k": (emu3.FAMILY, {"model_type": "Emu3", "grid": [64, 64]}),
    "emu3-8k": (emu3.FAMILY, {"model_type": "Emu3", "grid": [90, 90]}),
}
"""Released sizes: Show-o at 256 and 512 px, Emu3 at 4,096 and 8,100 image tokens."""
TOKENIZERS = {"showo": (magvit.MagVitV2, magvit.SHOWO), "emu3": (emu3_vq.Emu3VQ, emu3_vq.EMU3)}
"""Their released image tokenizers, by the first word of the preset."""
WORDS = 100
"""Tokens of a caption and of an answer where the model has no fixed text length; a question has a fifth."""


@dataclass(frozen=True)
class Words:
    """A text tokenizer without words: a text of n characters is n tokens."""

    size: int
    eot: int

    def encode(self, text: str) -> list[int]:
        """Token 0, once per character."""
        return [0] * len(text)

    def decode(self, ids: Iterable[int]) -> str:
        """One character per token."""
        return "x" * len(list(ids))

    def token(self, i: int) -> str:
        """Name of a token."""
        return self.decode([i])


def preset(name: str) -> tuple[UnifiedModel, list[TokenSequence]]:
    """The model of a preset or of a folder, on the meta device, and one row of t2i and of mmu.

    Raises `ParameterError` when the name is neither.
    """
    if name in PRESETS:
        family, config = PRESETS[name]
        size, eot, _ = family.text(config)
        layout = family.layout(config, Words(size, eot))
        with torch.device("meta"):
            model = family.build(config, layout, {})
        return model, rows_of(layout)
    if name not in MODELS and not Path(name).exists():
        known = ", ".join([*PRESETS, *MODELS])
        raise ParameterError(f"model={name!r} is neither a preset ({known}) nor a folder.")
    model, _, _ = outline(shipped(name) if name in MODELS else name)
    model.layout.text = Words(model.layout.text.size, model.layout.text.eot)
    return model, rows_of(model.layout)


def picture_tokenizer(name: str) -> ImageTokenizer | None:
    """The image tokenizer of a preset, at its released size on the meta device, or the one in a folder; None if the
    folder holds none."""
    if name in PRESETS:
        found = TOKENIZERS[name.split("-")[0]]
    else:
        folder = Path(shipped(name) if name in MODELS else name)
        if (folder / "image_tokenizer").is_dir():
            return load_image_tokenizer(folder / "image_tokenizer")
        weights = Weights(folder)
        found = stock_kind(weights.under("model.vqmodel.").shapes) or stock_kind(weights.under("vqmodel.").shapes)
    if found is None:
        return None
    with torch.device("meta"):
        return found[0](found[1])


def rows_of(layout: Layout) -> list[TokenSequence]:
    """One row of each task: a full caption with a picture (all masked for masked decoding); one question and answer."""
    text = min(WORDS, layout.text_budget - 3)
    picture, masked = _picture(layout)
    return [layout.t2i("x" * text, picture, *masked), layout.mmu(picture, [("x" * (text // 5), "x" * (text // 2))])]


def _picture(layout: Layout) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Image tokens, all 0, and where the model draws by masked decoding the mask of all of them."""
    codes = torch.zeros(layout.image_tokens, dtype=torch.long)
    return codes, () if layout.causal_images else (torch.ones_like(codes, dtype=torch.bool),)


@dataclass(frozen=True)
class Size:
    """A shape to measure: `batch` rows of `tokens` tokens (0: as long as the model's own) at these `capacities`.

    `layers` in the stack (0: all), and `step_layers` where the optimizer's state has to fit too.
    """

    preset: str
    tokens: int
    batch: int
    capacities: tuple[float, ...]
    layers: int = 0
    step_layers: int = 0

    def outline(self, step: bool = False) -> tuple[UnifiedModel, list[TokenSequence]]:
        """The dense model on the meta device, and the rows: t2i, where the paper has a plan every other one mmu."""
        model = _llama() if self.preset == "cpu" else preset(self.preset)[0]
        keep = (self.step_layers or self.layers) if step else self.layers
        if keep:
            model.decoder.layers = model.decoder.layers[:keep]
        both = self.family in PAPER
        return model, [row_of(model.layout, self.tokens, mmu=both and i % 2 == 1) for i in range(self.batch)]

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
CUDA = tuple(PRESETS)
"""Sizes that are timed on CUDA only."""
_HALF = (0.5, 0.8, 0.2)
SIZES = {
    # both shapes of the published comparisons: 8 rows of 512 and of 128 tokens
    "cpu": (Size("cpu", 512, 8, (0.5, 0.125)), Size("cpu", 128, 8, (0.5, 0.125))),
    "showo-tiny": (Size("showo-tiny", 0, 8, _HALF),),
    "emu3-tiny": (Size("emu3-tiny", 0, 8, _HALF),),
    "showo-256": (Size("showo-256", 387, 10, _HALF), Size("showo-256", 387, 24, _HALF)),
    "showo-512": (Size("showo-512", 1155, 8, _HALF),),
    # Emu3's 32 layers do not fit one device with their activations, gradients and optimizer
    "emu3-4k": (Size("emu3-4k", 4096, 4, _HALF, layers=16, step_layers=4),),
    "emu3-8k": (Size("emu3-8k", 8192, 1, _HALF, layers=16, step_layers=8),),
}
"""What `bench` measures, by preset."""
CAPTURE_SIZES = {
    "showo-tiny": (Size("showo-tiny", 0, 1, ()),),
    "emu3-tiny": (Size("emu3-tiny", 0, 1, ()),),
    # also on a CPU: two layers of Show-o and one of Emu3 fit its memory and take seconds
    "showo-512": (Size("showo-512", 1155, 1, (), layers=2),),
    "emu3-8k": (Size("emu3-8k", 8200, 1, (), layers=1),),
}
CAPTURE_SIZES["released"] = (*CAPTURE_SIZES["showo-512"], *CAPTURE_SIZES["emu3-8k"])
"""Rows whose attention `bench capture` captures."""


def _llama() -> UnifiedModel:
    """A Llama-like stack: RMSNorm, SwiGLU, rotary embedding, full-width keys; width 512, 8 layers."""
    layout = emu3.Emu3Layout(Words(1000, 0), codebook_size=256, grid=(16, 16), text_budget=512)
    config = emu3.emu3_config(
        layout.vocab_size, width=512, layers=8, heads=8, kv_heads=8, ffn=1376, max_positions=1024,
        pad=layout.pad, bos=layout.bos, eos=layout.eos,
    )
    with torch.device("meta"):
        return UnifiedModel(Emu3ForCausalLM(config), layout)


def shared_copy(model: UnifiedModel) -> UnifiedModel:
    """A copy whose parameters are the model's own: to be routed, without a second set of weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def materialise(model: UnifiedModel, device: str, dtype: torch.dtype) -> UnifiedModel:
    """A model of the meta device with random weights of deviation 0.02, norms at 1 and biases at 0, in training mode.

    Rotary angles stay float32.
    """
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
    """A row of exactly `tokens` tokens (0: about as many as the model's own rows have), its picture as large as fits.

    `text`: the share of its text that is kept, which makes the row shorter. Raises ValueError where no row has so many.
    """
    tokens = tokens or layout.image_tokens + min(layout.text_budget, 64)
    for height in range(layout.grid[0], 0, -1):
        part = layout.resized((height, layout.grid[1]))
        codes, masked = _picture(part)

        def write(n: int) -> TokenSequence:
            if mmu:
                return part.mmu(codes, [("x" * n, "x" * 8)])  # noqa: B023  # called in this round only
            return part.t2i("x" * n, codes, *masked)  # noqa: B023

        room = tokens - len(write(0).ids)
        # a fixed text length may cut what is written: only a row of the asked length will do
        if room >= 0 and len((row := write(room)).ids) == tokens:
            return row if text == 1 else write(round(text * room))
    raise ValueError(
        f"No picture of {layout.grid[1]} columns and text of {layout.text_budget} tokens make {tokens} tokens."
    )


def ragged(layout: Layout, tokens: int, batch: int) -> list[TokenSequence]:
    """Rows of at most `tokens` tokens, t2i and mmu in turn; their shares of the longest text are evenly spread."""
    # multiples of the square root of 2, modulo 1: spread evenly and out of order
    return [row_of(layout, tokens, mmu=i % 2 == 1, text=1 - i * math.sqrt(2) % 1) for i in range(batch)]
