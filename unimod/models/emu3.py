"""Emu3: transformers' stock text model, its vocabulary and the sequences it is trained on. Attention is causal everywhere.

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

from ..batch import Modality, Task, TokenSequence
from ..mask import prefix_hi
from .family import Family, Shapes, settings, special_ids
from .layout import Layout, Turns, shifted
from .text import Text
from .unified import UnifiedModel

SPECIAL = ("pad", "eol", "eof", "bos", "eos", "img", "boi", "eoi")
"""Special tokens between the text vocabulary and the visual tokens (Emu3 has 211 such places; these are the ones it uses)."""
RELEASED = {"pad": 151643, "eol": 151846, "eof": 151847, "bos": 151849, "eos": 151850, "img": 151851, "boi": 151852, "eoi": 151853}
"""Their ids in the released models, where visual code c is 151854 + c."""
NAMES = {"pad": "<|endoftext|>", "eol": "<|extra_200|>", "eof": "<|extra_201|>", "bos": "<|extra_203|>", "eos": "<|extra_204|>",
         "img": "<|image token|>", "boi": "<|image start|>", "eoi": "<|image end|>"}
"""Their names in the tokenizer; visual code c is "<|visual token cccccc|>", six digits."""


def emu3_config(vocab_size: int = 184622, width: int = 4096, layers: int = 32, heads: int = 32, kv_heads: int = 8, ffn: int = 14336,
                rope_theta: float = 1e6, max_positions: int = 9216, eps: float = 1e-5,
                pad: int = 151643, bos: int = 151849, eos: int = 151850) -> Emu3TextConfig:
    """Emu3's language model: grouped-query attention, SwiGLU, RMSNorm; attention dropout off, as packed training needs it."""
    return Emu3TextConfig(vocab_size=vocab_size, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                          num_key_value_heads=kv_heads, max_position_embeddings=max_positions, attention_dropout=0.0, rms_norm_eps=eps,
                          pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, tie_word_embeddings=False,
                          rope_parameters={"rope_type": "default", "rope_theta": rope_theta})


def grid_of(ratio: str, area: int = 518400, downsample: int = 8) -> tuple[int, int]:
    """(rows, columns) of codes of a picture of ratio "w:h" and about `area` pixels: "1:1" is 90 x 90 at 720^2 pixels.

    Raises ValueError for a ratio that is not two positive numbers.
    """
    try:
        w, h = (float(part) for part in ratio.split(":"))
        side = math.sqrt(area / (w * h)) / downsample if w > 0 else math.nan
        return round(h * side), round(w * side)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"ratio {ratio!r} is not 'width:height' with two positive numbers, such as '4:3'.") from None


class Emu3Layout(Layout):
    """Writes Emu3's sequences. A text longer than text_budget is cut. Pictures with codes [h, w] bring their own grid.

    special and image_offset: ids of the special tokens and of code 0; without them they follow the text vocabulary (tiny models).
    """

    kind = "emu3"
    causal_images = True
    drop_caption = 0.05

    def __init__(self, text: Text, codebook_size: int, grid: tuple[int, int], text_budget: int, special: Mapping[str, int] | None = None,
                 image_offset: int | None = None) -> None:
        special = special or {name: text.size + i for i, name in enumerate(SPECIAL)}
        self.image_offset = text.size + len(SPECIAL) if image_offset is None else image_offset
        super().__init__(text, special, self.image_offset + torch.arange(codebook_size), grid, text_budget, self.image_offset + codebook_size)
        self._modality[text.size:self.image_offset] = Modality.SPECIAL
        self.stop = special["eos"]

    def t2i(self, caption: str, codes: Tensor, *, prompt: bool = False) -> TokenSequence:
        """Text to image: [bos] text, then the picture block. codes: int64 [N] (raster order) or [h, w]; targets are the visual tokens only.

        With `prompt`, codes are the [n] first ones (n < N) and the sequence ends where the next code is predicted; its tokens
        are routed by threshold, because those after them are not known yet. In training they compete in one top-k.
        """
        grid = tuple(codes.shape) if codes.dim() == 2 else self.grid
        front = [self.bos, *self.text.encode(caption)[: self.text_budget], *self._opened(grid)]
        ids = torch.tensor(front + self._rows(codes, grid) + ([] if prompt else [self.eof, self.eoi]))
        visual = self.modality(ids) == Modality.IMAGE
        return self._sequence(Task.T2I, ids, prefix_hi(0, len(ids)), shifted(ids, visual), [(len(ids), "threshold" if prompt else "topk")])

    def mmu(self, codes: Tensor, turns: Turns, open_ended: bool = False) -> TokenSequence:
        """Understanding: [bos] "You are a helpful assistant. USER: " picture block "q. ASSISTANT: a" [eos], then further turns.

        Targets are the answers and their eos; turns after the first are written as long as they fit text_budget, or all when
        `open_ended` leaves the last answer to the model. Routing as in Show-o's layout: system prompt with picture, and each question, compete among
        themselves; the answers are kept.
        """
        grid = tuple(codes.shape) if codes.dim() == 2 else self.grid
        head = [self.bos, *self.text.encode("You are a helpful assistant. USER: "), *self._opened(grid), *self._rows(codes, grid), self.eof, self.eoi]
        ids, learned, parts = self._turns(turns, lambda i, question: f"USER: {question}." if i else f"{question}.", open_ended)
        full = torch.tensor(head + ids)
        target = shifted(full, torch.tensor([False] * len(head) + learned))
        return self._sequence(Task.MMU, full, prefix_hi(0, len(full)), target, [(len(head), "topk"), *parts])

    def lm(self, text: str) -> TokenSequence:
        """Plain text: [bos] text [eos], every next token a target."""
        ids = torch.tensor([self.bos, *self.text.encode(text)[: self.text_budget], self.eos])
        return self._sequence(Task.LM, ids, prefix_hi(0, len(ids)), shifted(ids, torch.ones_like(ids, dtype=torch.bool)), [(len(ids), "topk")])

    def after_code(self, codes: Tensor, n: int) -> list[Tensor]:
        """Also the end of a line."""
        return [*super().after_code(codes, n), *([torch.full_like(codes, self.eol)] if n % self.grid[1] == 0 else [])]

    def _opened(self, grid: tuple[int, int]) -> list[int]:
        return [self.boi, *self.text.encode(f"{grid[0]}*{grid[1]}"), self.img]

    def _rows(self, codes: Tensor, grid: tuple[int, int]) -> list[int]:
        """Codes as visual tokens with an end of line after every full row."""
        ids = self.code_ids[codes.flatten()].tolist()
        return [token for i, image in enumerate(ids, 1) for token in ([image, self.eol] if i % grid[1] == 0 else [image])]


def tiny(text: Text, codebook_size: int, grid: tuple[int, int], text_budget: int) -> UnifiedModel:
    """Eight layers of width 128, as Show-o's tiny sibling, with fresh weights. Every dimension of a head rotates here, so theta is
    not as small: the slow dimensions find content a hundred tokens away."""
    layout = Emu3Layout(text, codebook_size, grid, text_budget)
    config = emu3_config(layout.vocab_size, width=128, layers=8, heads=4, kv_heads=2, ffn=384, rope_theta=1e4, max_positions=512,
                         pad=layout.pad, bos=layout.bos, eos=layout.eos)
    return UnifiedModel(Emu3ForCausalLM(config), layout)


DIMENSIONS = {"vocab_size": "vocab_size", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
              "num_key_value_heads": "kv_heads", "intermediate_size": "ffn", "rope_theta": "rope_theta", "max_position_embeddings": "max_positions",
              "rms_norm_eps": "eps"}


def _language(config: dict) -> dict:
    """The language model's settings, which stand inside text_config or at the top."""
    flat = {**config, **config.get("text_config", {})}
    return {**flat, **(flat.get("rope_parameters") or {})}


def _special(config: dict, text: Text | None = None) -> dict[str, int]:
    return special_ids(config, NAMES, text, RELEASED if _language(config).get("vocab_size", 184622) == 184622 else None)


def _layout(config: dict, text: Text) -> Emu3Layout:
    special = _special(config, text)
    offset = config.get("image_offset", (config.get("vocabulary_map") or {}).get("<|visual token 000000|>", special["eoi"] + 1))
    codebook = _language(config).get("vocab_size", 184622) - offset
    return Emu3Layout(text, codebook, config.get("grid", (90, 90)), config.get("text_budget", 1024), special, offset)


def _build(config: dict, layout: Emu3Layout, shapes: Shapes) -> UnifiedModel:
    return UnifiedModel(Emu3ForCausalLM(emu3_config(**settings(_language(config), DIMENSIONS), pad=layout.pad, bos=layout.bos, eos=layout.eos)), layout)


def _describe(model: UnifiedModel) -> dict:
    layout = model.layout
    return {**model.lm.config.to_dict(), "architectures": ["Emu3ForCausalLM"], **{f"{name}_token_id": layout.special[name] for name in SPECIAL},
            "image_offset": layout.image_offset, "grid": list(layout.grid), "text_budget": layout.text_budget}


def _text(config: dict) -> tuple[int, int, str]:
    """The text vocabulary ends where the first special token stands, <|endoftext|>, which ends a text."""
    special = _special(config)
    return min(special.values()), special["pad"], "<|endoftext|>"


FAMILY = Family("emu3", "Emu3: config.json with model_type emu3, Emu3 or emu3_text_model, keys 'model.text_model.', 'text_model.model.' or 'model.layers.'",
                recognises=lambda config: str(config.get("model_type")).lower() in ("emu3", "emu3_text_model"),
                text=_text, layout=_layout, build=_build, describe=_describe,
                prefixes={"model.text_model.": "lm.model.", "text_model.model.": "lm.model.", "text_model.lm_head.": "lm.lm_head.",
                          "model.vqmodel.": None, "vqmodel.": None, "": "lm."})
