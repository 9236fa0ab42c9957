"""Janus: transformers' stock model, causal. Understanding reads vision features; generation has codes with an embedding
and a head of their own.

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

from ..batch import FEATURE, Batch, TokenSequence
from .layout import CausalLayout, Turns
from .text import Text
from .unified import UnifiedModel, with_features
from .weights import Family, Shapes, special_ids

NAMES = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>",
         "boi": "<begin_of_image>", "eoi": "<end_of_image>"}
RELEASED = {"bos": 100000, "eos": 100001, "boi": 100016, "eoi": 100593}
"""Ids in the released models, for folders where neither config.json nor a tokenizer gives them."""
SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual content that the "
          "user provides, and assist the user with a variety of tasks using natural language.\n\n")


class Janus(UnifiedModel):
    """Text ids are the language model's; image code c has id text vocabulary + c."""

    @property
    def decoder(self) -> PreTrainedModel:
        """The language model."""
        return self.lm.model.language_model

    def embed(self, batch: Batch) -> Tensor:
        """What enters the first layer, [T, D]: text by the language model's embedding, features through the aligner,
        codes through the generation aligner."""
        codes = batch.ids - self.layout.image_offset
        image = self.lm.model.generation_aligner(self.lm.model.generation_embeddings(codes.clamp(min=0)))
        text = self.embedding(batch.ids.clamp(0, self.layout.image_offset - 1))
        h = torch.where((codes >= 0)[:, None], image, text)
        if batch.features is None:
            return h
        return with_features(h, batch.ids, self.lm.model.aligner(batch.features.to(h.dtype)))

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """As the base's; the logits of a code are the generation head's, over codes only."""
        code = target - self.layout.image_offset
        text_target = target.clamp(max=self.layout.image_offset - 1)
        text = F.cross_entropy(self.head(hidden).float(), text_target, reduction="none")
        image = F.cross_entropy(self.code_logits(hidden), code.clamp(min=0), reduction="none")
        return torch.where(code >= 0, image, text)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the generation head: float32 [N, codebook]. hidden: [N, D]."""
        return self.lm.model.generation_head(hidden).float()


class JanusLayout(CausalLayout):
    """Writes [bos] text [boi] image [eoi] ...; the image is codes in t2i and features in mmu."""

    kind = "janus"

    def t2i(self, caption: str, codes: Tensor, *, prompt: bool = False) -> TokenSequence:
        """Text to image: [bos] <|User|>: text <|Assistant|>: [boi] codes; targets are the codes.

        codes: int64 [N] or [h, w]; with `prompt` the [n] first ones, and the sequence ends where the next is predicted.
        """
        before = [self.bos, *self.cut(f"<|User|>: {caption}"), *self.role(), self.boi]
        return self.image_sequence(before, codes, [], prompt)

    def mmu(self, features: Tensor, turns: Turns, open_ended: bool = False) -> TokenSequence:
        """Understanding: [bos] system prompt <|User|>: [boi] features [eoi] question <|Assistant|>: answer [eos] ...

        features: float [F, D_v] of the vision model; targets are the answers and their eos.
        """
        system = self.text.encode(f"{SYSTEM}<|User|>: ")
        head = [self.bos, *system, self.boi, *[FEATURE] * len(features), self.eoi]
        return self.conversation(head, turns, open_ended, features)

    def question_text(self, turn: int, question: str) -> str:
        return f"<|User|>: {question}" if turn else f"\n{question}"

    def role(self) -> list[int]:
        return self.text.encode("\n\n<|Assistant|>:")


def _layout(config: dict, text: Text) -> JanusLayout:
    whole, given = JanusConfig(**config), {k: v for k, v in config.items() if v is not None}
    size, codebook = whole.text_config.vocab_size, whole.vq_config.num_embeddings
    side = math.isqrt(whole.vision_config.num_image_tokens)
    special = special_ids({**config["text_config"], **given}, NAMES, text, RELEASED if size == 102400 else None)
    layout = JanusLayout(text, special, size + torch.arange(codebook), config.get("grid", (side, side)),
                         config.get("text_budget", 1024), size + codebook)
    layout.image_offset = size
    return layout


def _build(config: dict, layout: JanusLayout, shapes: Shapes) -> UnifiedModel:
    # transformers ties the head to the embedding by default; the released head is a matrix of its own
    whole = JanusConfig(**{**config, "tie_word_embeddings": False})
    for part in (whole, whole.text_config, whole.vision_config, whole.vq_config):
        part.dtype = None                                   # every part gets the dtype that is asked for
    return Janus(JanusForConditionalGeneration(whole), layout)


def _text(config: dict) -> tuple[int, int, str]:
    language = config["text_config"]
    return language["vocab_size"], language.get("eos_token_id", RELEASED["eos"]), NAMES["eos"]


FAMILY = Family("janus", "Janus: config.json with model_type janus",
                recognises=lambda config: config.get("model_type") == "janus",
                text=_text, layout=_layout, build=_build)
