"""Models at known sizes with a row of each task, without weights: what a plan saves on them can be counted anywhere.

    model, rows = preset("showo-512")            # on the meta device: shapes only
    model, rows = preset("folder/of/a/model")
    image_tokenizer = picture_tokenizer("showo-512")   # MAGVIT-v2 at its released size

A released size needs no tokenizer here: its texts are made of token 0, as long as the model's own training writes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .batch import TokenSequence
from .config import MODELS, ParameterError
from .models import emu3, emu3_vq, magvit, showo
from .models.checkpoint import outline, shipped
from .models.image_tokenizer import ImageTokenizer, load_image_tokenizer, stock_kind
from .models.layout import Layout
from .models.unified import UnifiedModel
from .models.weights import Weights

RELEASED = {"_class_name": "Showo", "codebook_size": 8192, "llm_vocab_size": 50295, "mask_token_id": 58497, "vocab_size": 58498}
PRESETS = {
    "showo-256": (showo.FAMILY, RELEASED | {"num_vq_tokens": 256, "text_budget": 128}),
    "showo-512": (showo.FAMILY, RELEASED | {"num_vq_tokens": 1024, "text_budget": 381}),
    "emu3-4k": (emu3.FAMILY, {"model_type": "Emu3", "grid": [64, 64]}),
    "emu3-8k": (emu3.FAMILY, {"model_type": "Emu3", "grid": [90, 90]}),
}
"""Released sizes: Show-o at 256 and 512 px, Emu3 at 4,096 and 8,100 codes."""
TOKENIZERS = {"showo": (magvit.MagVitV2, magvit.SHOWO), "emu3": (emu3_vq.Emu3VQ, emu3_vq.EMU3)}
"""Their released picture tokenizers, by the first word of the preset."""
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
        raise ParameterError(f"model={name!r} is neither a preset ({', '.join([*PRESETS, *MODELS])}) nor a folder.")
    model, _, _ = outline(shipped(name) if name in MODELS else name)
    model.layout.text = Words(model.layout.text.size, model.layout.text.eot)
    return model, rows_of(model.layout)


def picture_tokenizer(name: str) -> ImageTokenizer | None:
    """What makes the codes of a preset's or folder's pictures: the released tokenizer on the meta device, or the one in the folder; None if it holds none."""
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
    """One row of each task: a full caption with a picture, all masked where it is drawn by masked decoding; one question and its answer."""
    text = min(WORDS, layout.text_budget - 3)
    picture = torch.zeros(layout.image_tokens, dtype=torch.long)
    masked = () if layout.causal_images else (torch.ones(layout.image_tokens, dtype=torch.bool),)
    return [layout.t2i("x" * text, picture, *masked), layout.mmu(picture, [("x" * (text // 5), "x" * (text // 2))])]
