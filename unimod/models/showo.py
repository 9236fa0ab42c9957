"""Show-o (v1): transformers' stock Phi with qk-layernorm, its vocabulary and the sequences it is trained on.

    config = showo_config()                                   # the real one: 1,448,176,770 parameters
    layout = ShowoLayout(text, codebook_size=256, grid=(6, 6), text_budget=96)
    row = layout.t2i("a red circle", codes, masked)           # a TokenSequence
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM

from ..batch import FEATURE, IGNORE, Modality, Task, TokenSequence
from ..mask import prefix_hi, suffix_hi
from .layout import Layout, Turns, shifted
from .text import Text
from .unified import UnifiedModel
from .weights import Family, Shapes, agree, setting, settings

# special tokens in their order after the text vocabulary; the image codes come next, the mask token is last
SPECIAL = ("pad", "soi", "eoi", "sov", "eov", "t2i_task", "mmu_task", "t2v", "v2v", "lvg")

SYSTEM_PROMPT = ("A chat between a curious user and an artificial intelligence assistant. "
                 "The assistant gives helpful, detailed, and polite answers to the user's questions.")
"""System prompt that the CLIP-ViT variant is tuned with, after the task token (LLaVA's; 28 tokens in Phi-1.5)."""


def showo_config(vocab_size: int = 58498, width: int = 2048, layers: int = 24, heads: int = 32, ffn: int = 8192,
                 rope_theta: float = 10000.0, max_positions: int = 2048) -> PhiConfig:
    """Phi-1.5 as Show-o changes it: layer norm on queries and keys, half of each head rotated, no dropout."""
    return PhiConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, qk_layernorm=True, max_position_embeddings=max_positions,
        hidden_act="gelu_pytorch_tanh",     # the same function as gelu_new, fused: a quarter of a tiny model's step
        resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0, layer_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta, "partial_rotary_factor": 0.5})


def clip_projector(features: int, width: int) -> nn.Sequential:
    """Projector of the CLIP-ViT variant (`mm_projector`), [F, features] -> [F, width]: linear, exact GELU, linear."""
    return nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))



class ShowoLayout(Layout):
    """Writes Show-o's sequences without their padding; positions count the left pads that the reference has.

    text_budget is the reference's T: a t2i text part, task token included, takes T + 1 places and is padded on the
    left, the text of an understanding sequence takes at most T.
    """

    kind = "showo"
    causal_images = False
    whole_turns = False

    def __init__(self, text: Text, codebook_size: int, grid: tuple[int, int], text_budget: int) -> None:
        self.image_offset = text.size + len(SPECIAL)
        self.mask = self.image_offset + codebook_size
        special = {name: text.size + i for i, name in enumerate(SPECIAL)}
        code_ids = self.image_offset + torch.arange(codebook_size)
        super().__init__(text, special, code_ids, grid, text_budget, self.mask + 1)
        self._modality[self.mask] = Modality.IMAGE

    def t2i(self, caption: str, codes: Tensor, masked: Tensor) -> TokenSequence:
        """Text to image: [t2i] [sot] text [eot] [soi] N codes [eoi]; the text is causal, the image part sees all.

        codes: int64 [N] (raster order); masked: bool [N], the places shown as mask tokens and predicted. Targets are
        not shifted and include soi and eoi, as in the reference.
        """
        front = self._ended([self.t2i_task, *self._begun(caption)], self.text_budget + 1)
        n, image = len(front), self.code_ids[codes]
        shown = torch.where(masked, self.mask, image)
        ids = torch.cat([torch.tensor([*front, self.soi]), shown, torch.tensor([self.eoi])])
        target = torch.full_like(ids, IGNORE)
        target[n], target[-1] = self.soi, self.eoi
        target[n + 1:-1] = torch.where(masked, image, IGNORE)
        position = torch.arange(len(ids)) + self.text_budget + 1 - n
        return self._sequence(Task.T2I, ids, suffix_hi(n, len(ids)), target, [(len(ids), "topk")], position)

    def mmu(self, picture: Tensor, turns: Turns, open_ended: bool = False, system: str = "") -> TokenSequence:
        """A conversation about an image, as in LLaVA: the image's prefix, then "USER: q ASSISTANT: a" [eot] per turn.

        picture: codes int64 [N], or features float [F, D_v] of a vision tower (the CLIP-ViT variant, with the `system`
        prompt it was tuned with: `SYSTEM_PROMPT`; of openai/clip-vit-large-patch14-336 `hidden_states[-2][0, 1:]`, the
        patches of the last layer but one). Targets are the answers and their eot. A conversation is cut at T tokens, or
        with features where the sequence is as long as those of the other tasks; an `open_ended` one is not cut and its
        last answer, whose text so far may be empty, is left for the model to continue. Raises ValueError when features
        leave no room.
        """
        system_ids, budget = [], self.text_budget
        if picture.is_floating_point():
            system_ids = self.text.encode(system) if system else []
            budget += self.image_tokens - len(picture) - len(system_ids)
            if budget < 1 and not open_ended:
                raise ValueError(
                    f"{len(picture)} features and {len(system_ids)} tokens of system prompt leave no room for a "
                    f"conversation in rows of {self.text_budget} + {self.image_tokens} + 3 tokens; load the model with "
                    "a larger text_budget (Show-o's own: 512 or 576).")
        return self._about(picture, *self._turns(turns, open_ended, budget), system_ids)

    def mmu_caption(self, codes: Tensor, text: str, open_ended: bool = False) -> TokenSequence:
        """An image and a text that is learned from its first token on: [mmu] [soi] N codes [eoi] [sot] text [eot].

        The reference's captioning text is "USER: \\n" question " ASSISTANT: " caption. `open_ended` leaves out the eot
        and every target: its way to ask a question, with the text "USER: \\n" question " ASSISTANT:". All text is
        always kept by routed layers.
        """
        ids = self._begun(text)
        ids = ids if open_ended else self._ended(ids, self.text_budget)
        return self._about(codes, ids, [not open_ended] * len(ids), [(len(ids), "keep")])

    def lm(self, text: str) -> TokenSequence:
        """Plain text: [sot] text [eot], causal, every next token a target; cut at the length of the other tasks."""
        ids = torch.tensor([*self._begun(text), self.text.eot][: self.text_budget + self.image_tokens + 3])
        target = shifted(ids, torch.ones_like(ids, dtype=torch.bool))
        return self._sequence(Task.LM, ids, prefix_hi(0, len(ids)), target, [(len(ids), "topk")])

    def _about(self, picture: Tensor, ids: list[int], learned: list[bool], parts: list,
               system: Seq[int] = ()) -> TokenSequence:
        """[mmu] [soi] codes [eoi], all of which see one another, and causal text; or [mmu] system [soi] features [eoi]
        text, causal but for the features, which everything sees."""
        if picture.is_floating_point():
            # packed first, at their own positions, so that what the tokens before them see is one interval
            f, front, features = len(picture), len(system) + 2, picture
            full = torch.tensor([FEATURE] * f + [self.mmu_task, *system, self.soi, self.eoi, *ids])
            position, hi, prefix = torch.arange(len(full)), torch.arange(1, len(full) + 1), f + front + 1
            position[:f], position[f:f + front] = torch.arange(front, front + f), torch.arange(front)
            hi[:f] = f + front
        else:
            full = torch.tensor([self.mmu_task, self.soi, *self.code_ids[picture].tolist(), self.eoi, *ids])
            position, features, prefix = None, None, len(full) - len(ids)
            hi = prefix_hi(prefix, len(full))
        target = shifted(full, torch.tensor([False] * prefix + learned))
        return self._sequence(Task.MMU, full, hi, target, [(prefix, "topk"), *parts], position, features)

    def _begun(self, text: str) -> list[int]:
        """Ids of a text that begins with sot (which is eot), once."""
        ids = self.text.encode(text)
        return ids if ids[:1] == [self.text.eot] else [self.text.eot, *ids]

    def _ended(self, ids: list[int], budget: int) -> list[int]:
        """Ids with an eot; a text that is too long keeps its beginning and still ends in one."""
        return [*ids[: budget - 1], self.text.eot]


def tiny(text: Text, codebook_size: int, grid: tuple[int, int], text_budget: int) -> UnifiedModel:
    """Eight layers of width 128 (1.6 M parameters of layers) with fresh weights; theta 100 suits a hundred tokens."""
    layout = ShowoLayout(text, codebook_size, grid, text_budget)
    config = showo_config(layout.vocab_size, width=128, layers=8, heads=4, ffn=512, rope_theta=100.0, max_positions=512)
    return UnifiedModel(PhiForCausalLM(config), layout)


# settings of the backbone in config.json -> parameters of `showo_config`, whose defaults are Phi-1.5's
DIMENSIONS = {"vocab_size": "vocab_size", "hidden_size": "width", "num_hidden_layers": "layers",
              "num_attention_heads": "heads", "intermediate_size": "ffn", "rope_theta": "rope_theta",
              "max_position_embeddings": "max_positions"}


def _text(config: dict) -> tuple[int, int, str]:
    # Phi-1.5's <|endoftext|> is 50256, 39 ids before the end of its vocabulary; elsewhere it is the last id
    size = setting(config, "llm_vocab_size")
    return size, 50256 if size == 50295 else size - 1, "<|endoftext|>"


def _layout(config: dict, text: Text) -> ShowoLayout:
    side = math.isqrt(setting(config, "num_vq_tokens"))
    layout = ShowoLayout(text, setting(config, "codebook_size"), config.get("grid", (side, side)),
                         config.get("text_budget", 128))
    agree(config, vocab_size=layout.vocab_size, mask_token_id=layout.mask, num_vq_tokens=layout.image_tokens)
    return layout


def _build(config: dict, layout: ShowoLayout, shapes: Shapes) -> UnifiedModel:
    phi = showo_config(**{"vocab_size": layout.vocab_size, **settings(config, DIMENSIONS)})
    features = shapes.get("mm_projector.0.weight", (0, 1024))[1] if config.get("w_clip_vit") else 0
    projector = clip_projector(features, phi.hidden_size) if features else None
    return UnifiedModel(PhiForCausalLM(phi), layout, projector)


def _describe(model: UnifiedModel) -> dict:
    layout, phi = model.layout, model.lm.config
    return {"_class_name": "Showo", "w_clip_vit": model.projector is not None, "vocab_size": layout.vocab_size,
            "llm_vocab_size": layout.text.size, "llm_model_path": "", "codebook_size": layout.codebook_size,
            "num_vq_tokens": layout.image_tokens, "mask_token_id": layout.mask,
            **{name: getattr(phi, name) for name in DIMENSIONS if hasattr(phi, name)},
            "rope_theta": phi.rope_parameters["rope_theta"], "grid": list(layout.grid),
            "text_budget": layout.text_budget}


FAMILY = Family("showo", "Show-o: config.json with _class_name Showo, keys that begin with 'showo.'",
                recognises=lambda config: config.get("_class_name") == "Showo",
                text=_text, layout=_layout, build=_build, describe=_describe,
                prefixes={"showo.": "lm.", "mm_projector.": "projector."})
