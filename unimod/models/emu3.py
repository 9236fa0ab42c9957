"""Emu3: transformers' stock text model, its vocabulary and the sequences it is trained on. Attention is causal.

    config = emu3_config()                                    # the real one: 8.49 B parameters
    layout = Emu3Layout(text, codebook_size=256, grid=(6, 6), text_budget=96)
    row = layout.t2i("a red circle", codes)                   # a TokenSequence
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Emu3ForCausalLM, Emu3TextConfig

from ..batch import Modality, TokenSequence
from .layout import CausalLayout, Turns
from .text import Text
from .unified import UnifiedModel
from .weights import Family, Shapes, described, settings, special_ids

SPECIAL = ("pad", "eol", "eof", "bos", "eos", "img", "boi", "eoi")
"""Special tokens between the text vocabulary and the image tokens (of the 211 such ids of Emu3, those it uses)."""
RELEASED = {"pad": 151643, "eol": 151846, "eof": 151847, "bos": 151849, "eos": 151850, "img": 151851, "boi": 151852,
            "eoi": 151853}
"""Their ids in the released models, where image code c is 151854 + c."""
NAMES = {"pad": "<|endoftext|>", "eol": "<|extra_200|>", "eof": "<|extra_201|>", "bos": "<|extra_203|>",
         "eos": "<|extra_204|>", "img": "<|image token|>", "boi": "<|image start|>", "eoi": "<|image end|>"}
"""Their names in the tokenizer; image code c is "<|visual token cccccc|>", six digits."""
VOCABULARY = 184622
"""Size of the released vocabulary."""


def emu3_config(vocab_size: int = VOCABULARY, width: int = 4096, layers: int = 32, heads: int = 32, kv_heads: int = 8,
                ffn: int = 14336, rope_theta: float = 1e6, max_positions: int = 9216, eps: float = 1e-5,
                pad: int = RELEASED["pad"], bos: int = RELEASED["bos"], eos: int = RELEASED["eos"]) -> Emu3TextConfig:
    """Emu3's language model: grouped-query attention, SwiGLU, RMSNorm; no attention dropout, for packed training."""
    return Emu3TextConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=max_positions,
        attention_dropout=0.0, rms_norm_eps=eps, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": rope_theta})


def grid_of(ratio: str, area: int = 518400, downsample: int = 8) -> tuple[int, int]:
    """(rows, columns) of codes of an image of aspect ratio "width:height" and about `area` pixels: "1:1" is 90 x 90.

    Raises ValueError for a ratio that is not two positive numbers.
    """
    try:
        w, h = (float(part) for part in ratio.split(":"))
        side = math.sqrt(area / (w * h)) / downsample if w > 0 else math.nan
        return round(h * side), round(w * side)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"ratio {ratio!r} is not 'width:height' with two positive numbers, such as '4:3'.") from None


class Emu3Layout(CausalLayout):
    """Writes Emu3's sequences. A text longer than text_budget is cut. Images with codes [h, w] bring their own grid.

    special and image_offset: ids of the special tokens and of code 0; by default they follow the text vocabulary, as in
    the tiny models.
    """

    kind = "emu3"
    drop_caption = 0.05

    def __init__(self, text: Text, codebook_size: int, grid: tuple[int, int], text_budget: int,
                 special: Mapping[str, int] | None = None, image_offset: int | None = None) -> None:
        special = special or {name: text.size + i for i, name in enumerate(SPECIAL)}
        self.image_offset = text.size + len(SPECIAL) if image_offset is None else image_offset
        super().__init__(text, special, self.image_offset + torch.arange(codebook_size), grid, text_budget,
                         self.image_offset + codebook_size)
        self._modality[text.size:self.image_offset] = Modality.SPECIAL

    def t2i(self, caption: str, codes: Tensor, *, prompt: bool = False) -> TokenSequence:
        """Text to image: [bos] text [boi] "h*w" [img] rows of codes [eof] [eoi], each full row followed by [eol].

        codes: int64 [N] (raster order) or [h, w]; targets are the codes. With `prompt`, codes are the [n] first ones
        and the sequence ends where the next code is predicted; its tokens are routed by threshold.
        """
        before = [self.bos, *self.cut(caption), *self._image_start(codes)]
        return self.image_sequence(before, codes, [self.eof, self.eoi], prompt)

    def mmu(self, codes: Tensor, turns: Turns, open_ended: bool = False) -> TokenSequence:
        """Understanding: [bos] "You are a helpful assistant. USER: " image "q. ASSISTANT: a" [eos] and further turns.

        The image is written as in `t2i`. Targets are the answers and their eos; turns after the first are written as
        long as they fit text_budget, or all of them when `open_ended` leaves the last answer to the model.
        """
        system = self.text.encode("You are a helpful assistant. USER: ")
        image = [*self._image_start(codes), *self.image_ids(codes), self.eof, self.eoi]
        return self.conversation([self.bos, *system, *image], turns, open_ended)

    def after_code(self, codes: Tensor, n: int) -> list[Tensor]:
        """The code's ids, then [eol] after the last code of a row."""
        ids = super().after_code(codes, n)
        return [*ids, torch.full_like(codes, self.eol)] if n % self.grid[1] == 0 else ids

    def question_text(self, turn: int, question: str) -> str:
        return f"USER: {question}." if turn else f"{question}."      # the head ends in the first turn's "USER: "

    def _grid(self, codes: Tensor) -> tuple[int, int]:
        return tuple(codes.shape) if codes.dim() == 2 else self.grid

    def _image_start(self, codes: Tensor) -> list[int]:
        height, width = self._grid(codes)
        return [self.boi, *self.text.encode(f"{height}*{width}"), self.img]

    def image_ids(self, codes: Tensor) -> list[int]:
        width, ids = self._grid(codes)[1], []
        for i, image in enumerate(super().image_ids(codes), 1):
            ids += [image, self.eol] if i % width == 0 else [image]
        return ids


def tiny(text: Text, codebook_size: int, grid: tuple[int, int], text_budget: int) -> UnifiedModel:
    """Eight layers of width 128 (1.6 M parameters of layers) with fresh weights."""
    layout = Emu3Layout(text, codebook_size, grid, text_budget)
    # every dimension of a head rotates here, so theta is not as small as Show-o-tiny's: the slow dimensions find
    # content a hundred tokens away
    config = emu3_config(layout.vocab_size, width=128, layers=8, heads=4, kv_heads=2, ffn=384, rope_theta=1e4,
                         max_positions=512, pad=layout.pad, bos=layout.bos, eos=layout.eos)
    return UnifiedModel(Emu3ForCausalLM(config), layout)


DIMENSIONS = {"vocab_size": "vocab_size", "hidden_size": "width", "num_hidden_layers": "layers",
              "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "intermediate_size": "ffn",
              "rope_theta": "rope_theta", "max_position_embeddings": "max_positions", "rms_norm_eps": "eps"}
"""Settings of the language model in config.json -> parameters of `emu3_config`; its defaults are the released ones."""


def _language(config: dict) -> dict:
    """The language model's settings, which are in text_config or at the top level."""
    flat = {**config, **config.get("text_config", {})}
    return {**flat, **(flat.get("rope_parameters") or {})}


def _special(config: dict, text: Text | None = None) -> dict[str, int]:
    released = _language(config).get("vocab_size", VOCABULARY) == VOCABULARY
    return special_ids(config, NAMES, text, RELEASED if released else None)


def _text(config: dict) -> tuple[int, int, str]:
    # the text vocabulary ends at the first special token, <|endoftext|>, which ends a text
    special = _special(config)
    return min(special.values()), special["pad"], NAMES["pad"]


def _layout(config: dict, text: Text) -> Emu3Layout:
    special, words = _special(config, text), config.get("vocabulary_map") or {}
    offset = config.get("image_offset", words.get("<|visual token 000000|>", special["eoi"] + 1))
    codebook = _language(config).get("vocab_size", VOCABULARY) - offset
    return Emu3Layout(text, codebook, config.get("grid", grid_of("1:1")), config.get("text_budget", 1024), special,
                      offset)


def _build(config: dict, layout: Emu3Layout, shapes: Shapes) -> UnifiedModel:
    given = settings(_language(config), DIMENSIONS)
    language = emu3_config(**given, pad=layout.pad, bos=layout.bos, eos=layout.eos)
    return UnifiedModel(Emu3ForCausalLM(language), layout)


def _describe(model: UnifiedModel) -> dict:
    return {**described(model), "architectures": ["Emu3ForCausalLM"], "image_offset": model.layout.image_offset}


FAMILY = Family("emu3", "Emu3: config.json with model_type emu3, Emu3 or emu3_text_model, "
                        "keys 'model.text_model.', 'text_model.model.' or 'model.layers.'",
                recognises=lambda config: str(config.get("model_type")).lower() in ("emu3", "emu3_text_model"),
                text=_text, layout=_layout, build=_build, describe=_describe,
                prefixes={"model.text_model.": "lm.model.", "text_model.model.": "lm.model.",
                          "text_model.lm_head.": "lm.lm_head.", "model.vqmodel.": None, "vqmodel.": None, "": "lm."})
