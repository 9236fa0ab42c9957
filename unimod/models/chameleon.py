"""Chameleon: transformers' stock model, causal, images as ids of one vocabulary.

    model, _ = from_pretrained("chameleon-7b")              # config.json with model_type chameleon

Lumina-mGPT has the same architecture and loads too, but its sequences contain an image's size and line ends, which are
not written here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from .. import seam
from ..batch import TokenSequence
from .layout import CausalLayout, Turns
from .text import Text
from .unified import UnifiedModel
from .weights import CheckpointError, Family, Shapes, described, setting, special_ids

NAMES = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "boi": "<racm3:break>", "eoi": "<eoss>", "sep": "<reserved08706>"}
"""Special tokens in the vocabulary map: begin and end of an image, and what ends a turn."""


class Chameleon(UnifiedModel):
    """As the base; an answer never continues with an image token, as in transformers."""

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary, float32 [N, V], with image tokens at -inf. hidden: [N, D]."""
        return super().text_logits(hidden).index_fill(1, self.layout.code_ids.to(hidden.device), -torch.inf)


class ChameleonLayout(CausalLayout):
    """Writes [bos] text with images as [boi] codes [eoi] inside; a question ends in [sep], which the answer follows."""

    kind = "chameleon"

    def t2i(self, caption: str, codes: Tensor, *, prompt: bool = False) -> TokenSequence:
        """Text to image: [bos] text [sep] [boi] codes [eoi] [eos]; targets are the codes.

        codes: int64 [N] or [h, w]; with `prompt` the [n] first ones, and the sequence ends where the next is predicted.
        """
        before = [self.bos, *self.cut(caption), self.sep, self.boi]
        return self.image_sequence(before, codes, [self.eoi, self.eos], prompt)

    def mmu(self, codes: Tensor, turns: Turns, open_ended: bool = False) -> TokenSequence:
        """Understanding: [bos] [boi] codes [eoi] question [sep] answer [eos] ...; targets are answers and their eos."""
        return self.conversation([self.bos, self.boi, *self.image_ids(codes), self.eoi], turns, open_ended)

    def question_text(self, turn: int, question: str) -> str:
        return question

    def role(self) -> list[int]:
        return [self.sep]


def _layout(config: dict, text: Text) -> ChameleonLayout:
    # ids are the vocabulary map's: the released config.json gives <s> the id of <pad>
    words = setting(config, "vocabulary_map")
    named = {f"{name}_token_id": words[spelling] for name, spelling in NAMES.items() if spelling in words}
    ids = seam.chameleon_codes(words)
    if not ids or set(ids) != set(range(len(ids))):
        raise CheckpointError(f"config.json's vocabulary_map names {len(ids)} picture codes (IMGIMG..Z); "
                              "expected the codes 0, 1, ... without a gap.")
    side = math.isqrt(config.get("image_seq_length", 1024))
    special, code_ids = special_ids({**config, **named}, NAMES, text), [ids[code] for code in range(len(ids))]
    return ChameleonLayout(text, special, torch.tensor(code_ids), config.get("grid", (side, side)),
                           config.get("text_budget", 1024), setting(config, "vocab_size"))


def _build(config: dict, layout: ChameleonLayout, shapes: Shapes) -> UnifiedModel:
    whole = ChameleonConfig(**config)
    whole.dtype = whole.vq_config.dtype = None              # every part gets the dtype that is asked for
    whole.attention_dropout = 0.0
    return Chameleon(ChameleonForConditionalGeneration(whole), layout)


FAMILY = Family("chameleon", "Chameleon or Lumina-mGPT: config.json with model_type chameleon",
                recognises=lambda config: config.get("model_type") == "chameleon",
                text=lambda config: (setting(config, "vocab_size"), config.get("eos_token_id", 2), "</s>"),
                layout=_layout, build=_build, describe=lambda model: described(model, ()))
