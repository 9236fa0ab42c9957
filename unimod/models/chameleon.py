"""Chameleon: transformers' stock model, causal, pictures as ids of one vocabulary.

    model, _ = from_pretrained("chameleon-7b")              # config.json with model_type chameleon

Lumina-mGPT has the same architecture and loads too, but writes a picture's size and line ends into its sequences, which is not done here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from .. import seam
from ..batch import Task, TokenSequence
from ..mask import prefix_hi
from .emu3 import Emu3Layout
from .family import Family, Shapes, setting, special_ids
from .layout import Layout, Turns, shifted
from .text import Text
from .unified import UnifiedModel
from .weights import CheckpointError

NAMES = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "boi": "<racm3:break>", "eoi": "<eoss>", "sep": "<reserved08706>"}
"""Special tokens in the vocabulary map: begin and end of a picture, and what ends a turn."""


class Chameleon(UnifiedModel):
    """An answer never goes on with a picture code, as in transformers."""

    def text_logits(self, hidden: Tensor) -> Tensor:
        """As the base's, with picture codes at -inf."""
        return super().text_logits(hidden).index_fill(1, self.layout.code_ids.to(hidden.device), -torch.inf)


class ChameleonLayout(Layout):
    """Writes [bos] text with pictures as [boi] codes [eoi] inside; a turn ends in [sep], which the answer follows."""

    kind = "chameleon"
    causal_images = True
    drop_caption = 0.1
    lm = Emu3Layout.lm

    def t2i(self, caption: str, codes: Tensor, *, prompt: bool = False) -> TokenSequence:
        """Text to image: [bos] text [sep] [boi] codes [eoi] [eos]; targets are the codes. `prompt`: as in `Emu3Layout.t2i`."""
        front = [self.bos, *self.text.encode(caption)[: self.text_budget], self.sep, self.boi]
        ids = torch.cat([torch.tensor(front), self.code_ids[codes.flatten()], torch.tensor([] if prompt else [self.eoi, self.eos], dtype=torch.long)])
        at = torch.arange(len(ids))
        target = shifted(ids, (at >= len(front)) & (at < len(front) + codes.numel()))
        return self._sequence(Task.T2I, ids, prefix_hi(0, len(ids)), target, [(len(ids), "threshold" if prompt else "topk")])

    def mmu(self, codes: Tensor, turns: Turns, open_ended: bool = False) -> TokenSequence:
        """Understanding: [bos] [boi] codes [eoi] question [sep] answer [eos] ...; targets are the answers and their eos."""
        head = [self.bos, self.boi, *self.code_ids[codes.flatten()].tolist(), self.eoi]
        ids, learned, parts = self._turns(turns, lambda _, question: question, open_ended)
        full = torch.tensor(head + ids)
        target = shifted(full, torch.tensor([False] * len(head) + learned))
        return self._sequence(Task.MMU, full, prefix_hi(0, len(full)), target, [(len(head), "topk"), *parts])

    def _role(self) -> list[int]:
        return [self.sep]


def _layout(config: dict, text: Text) -> ChameleonLayout:
    """Ids are the vocabulary map's: the released config.json gives <s> the id of <pad>."""
    words = setting(config, "vocabulary_map")
    named = {f"{name}_token_id": words[spelled] for name, spelled in NAMES.items() if spelled in words}
    ids = seam.chameleon_codes(words)
    if not ids or set(ids) != set(range(len(ids))):
        raise CheckpointError(f"config.json's vocabulary_map names {len(ids)} picture codes (IMGIMG..Z); expected the codes 0, 1, ... without a gap.")
    side = math.isqrt(config.get("image_seq_length", 1024))
    layout = ChameleonLayout(text, special_ids({**config, **named}, NAMES, text), torch.tensor([ids[code] for code in range(len(ids))]),
                             config.get("grid", (side, side)), config.get("text_budget", 1024), setting(config, "vocab_size"))
    layout.stop = layout.eos
    return layout


def _build(config: dict, layout: ChameleonLayout, shapes: Shapes) -> UnifiedModel:
    whole = ChameleonConfig(**config)
    whole.dtype = whole.vq_config.dtype = None              # the parts, too, get the dtype that is asked for
    whole.attention_dropout = 0.0
    return Chameleon(ChameleonForConditionalGeneration(whole), layout)


FAMILY = Family("chameleon", "Chameleon or Lumina-mGPT: config.json with model_type chameleon",
                recognises=lambda config: config.get("model_type") == "chameleon",
                text=lambda config: (setting(config, "vocab_size"), config.get("eos_token_id", 2), "</s>"), layout=_layout, build=_build,
                describe=lambda model: {**model.lm.config.to_dict(), "grid": list(model.layout.grid), "text_budget": model.layout.text_budget},
                prefixes={"": "lm."})
