"""Janus: transformers' stock model, causal. Pictures are vision features to understand, and codes with embeddings and a head of their own to draw.

    model, _ = from_pretrained("Janus-Pro-1B")              # config.json with model_type janus
    features = model.lm.model.vision_model(pixels).last_hidden_state[0]
    row = model.layout.mmu(features, [("what is it?", "a cat")])
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusConfig, JanusForConditionalGeneration, PreTrainedModel

from ..batch import FEATURE, Batch, Task, TokenSequence
from ..mask import prefix_hi
from .emu3 import Emu3Layout
from .family import Family, Shapes, special_ids
from .layout import Layout, Turns, shifted
from .text import Text
from .unified import UnifiedModel

NAMES = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>", "boi": "<begin_of_image>", "eoi": "<end_of_image>"}
RELEASED = {"bos": 100000, "eos": 100001, "boi": 100016, "eoi": 100593}     # where neither config.json nor a tokenizer says them
SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
          "and assist the user with a variety of tasks using natural language.\n\n")


class Janus(UnifiedModel):
    """Text ids are the language model's; picture code c has id text vocabulary + c."""

    @property
    def decoder(self) -> PreTrainedModel:
        """The language model."""
        return self.lm.model.language_model

    def embed(self, packed: Batch) -> Tensor:
        """Text by the language model's embedding, features through the aligner, codes through the generation aligner: [T, D]."""
        codes = packed.ids - self.layout.image_offset
        drawn = self.lm.model.generation_aligner(self.lm.model.generation_embeddings(codes.clamp(min=0)))
        h = torch.where((codes >= 0)[:, None], drawn, self.embedding(packed.ids.clamp(0, self.layout.image_offset - 1)))
        return h if packed.features is None else h.masked_scatter((packed.ids == FEATURE)[:, None], self.lm.model.aligner(packed.features.to(h.dtype)))

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """As the base's; a code is scored by the generation head, among codes."""
        code = target - self.layout.image_offset
        text = F.cross_entropy(self.head(hidden).float(), target.clamp(max=self.layout.image_offset - 1), reduction="none")
        return torch.where(code >= 0, F.cross_entropy(self.code_logits(hidden), code.clamp(min=0), reduction="none"), text)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the generation head: float32 [N, codebook]."""
        return self.lm.model.generation_head(hidden).float()


class JanusLayout(Layout):
    """Writes [bos] text [boi] picture [eoi] ...; the picture is codes in t2i and features in mmu."""

    kind, causal_images, drop_caption = "janus", True, 0.1
    lm = Emu3Layout.lm

    def t2i(self, caption: str, codes: Tensor, *, prompt: bool = False) -> TokenSequence:
        """Text to image: [bos] <|User|>: text <|Assistant|>: [boi] codes; targets are the codes. `prompt`: as in `Emu3Layout.t2i`."""
        front = [self.bos, *self.text.encode(f"<|User|>: {caption}")[: self.text_budget], *self._role(), self.boi]
        ids = torch.cat([torch.tensor(front), self.code_ids[codes.flatten()]])
        return self._sequence(Task.T2I, ids, prefix_hi(0, len(ids)), shifted(ids, torch.arange(len(ids)) >= len(front)),
                              [(len(ids), "threshold" if prompt else "topk")])

    def mmu(self, features: Tensor, turns: Turns, open_ended: bool = False) -> TokenSequence:
        """[bos] system prompt <|User|>: [boi] features [eoi] question <|Assistant|>: answer [eos] ...; features: float [F, D_v] of the vision model."""
        ids, learned, parts = self._turns(turns, lambda i, question: f"<|User|>: {question}" if i else f"\n{question}", open_ended)
        head = [self.bos, *self.text.encode(f"{SYSTEM}<|User|>: "), self.boi, *[FEATURE] * len(features), self.eoi]
        full, target = torch.tensor(head + ids), shifted(torch.tensor(head + ids), torch.tensor([False] * len(head) + learned))
        return self._sequence(Task.MMU, full, prefix_hi(0, len(full)), target, [(len(head), "topk"), *parts], features=features)

    def _role(self) -> list[int]:
        return self.text.encode("\n\n<|Assistant|>:")


def _layout(config: dict, text: Text) -> JanusLayout:
    whole, said = JanusConfig(**config), {**config["text_config"], **{k: v for k, v in config.items() if v is not None}}
    size, codebook, side = whole.text_config.vocab_size, whole.vq_config.num_embeddings, math.isqrt(whole.vision_config.num_image_tokens)
    layout = JanusLayout(text, special_ids(said, NAMES, text, RELEASED if size == 102400 else None), size + torch.arange(codebook),
                         config.get("grid", (side, side)), config.get("text_budget", 1024), size + codebook)
    layout.image_offset, layout.stop = size, layout.eos
    return layout


def _build(config: dict, layout: JanusLayout, shapes: Shapes) -> UnifiedModel:
    whole = JanusConfig(**{**config, "tie_word_embeddings": False})     # transformers' default; the released head is its own
    whole.dtype = whole.text_config.dtype = whole.vision_config.dtype = whole.vq_config.dtype = None    # every part gets the dtype that is asked for
    return Janus(JanusForConditionalGeneration(whole), layout)


FAMILY = Family("janus", "Janus: config.json with model_type janus",
                recognises=lambda config: config.get("model_type") == "janus", layout=_layout, build=_build, prefixes={"": "lm."},
                text=lambda config: (config["text_config"]["vocab_size"], config["text_config"].get("eos_token_id", 100001), "<｜end▁of▁sentence｜>"),
                describe=lambda model: {**model.lm.config.to_dict(), "grid": list(model.layout.grid), "text_budget": model.layout.text_budget,
                                        **{f"{name}_token_id": i for name, i in model.layout.special.items()}})
