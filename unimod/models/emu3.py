"""Emu3: transformers' stock text model, its vocabulary and the sequences it is trained on. Attention is causal everywhere.

    config = emu3_config()                                    # the real one: 8.49 B parameters
    layout = Emu3Layout(text, codebook_size=256, grid=(6, 6), text_budget=96)
    row = layout.t2i("a red circle", codes)                   # a TokenSequence
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial

import torch
from torch import Tensor
from transformers import Emu3TextConfig

from ..tokens import Modality, Task, TokenSequence, prefix_hi
from .showo import shifted
from .text import WordTokenizer

SPECIAL = ("pad", "eol", "eof", "bos", "eos", "img", "boi", "eoi")
"""Special tokens between the text vocabulary and the visual tokens (Emu3 has 211 such places; these are the ones it uses)."""


def emu3_config(vocab_size: int = 184622, width: int = 4096, layers: int = 32, heads: int = 32, kv_heads: int = 8, ffn: int = 14336,
                rope_theta: float = 1e6, max_positions: int = 9216, pad: int = 151643, bos: int = 151849, eos: int = 151850) -> Emu3TextConfig:
    """Emu3's language model: grouped-query attention, SwiGLU, RMSNorm; attention dropout off, as packed training needs it."""
    return Emu3TextConfig(vocab_size=vocab_size, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                          num_key_value_heads=kv_heads, max_position_embeddings=max_positions, attention_dropout=0.0, rms_norm_eps=1e-5,
                          pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, tie_word_embeddings=False,
                          rope_parameters={"rope_type": "default", "rope_theta": rope_theta})


class Emu3Layout:
    """Writes Emu3's sequences. `grid` is the picture's (rows, columns) of tokens; a text longer than text_budget is cut."""

    kind = "emu3"
    causal_images = True

    def __init__(self, text: WordTokenizer, codebook_size: int, grid: tuple[int, int], text_budget: int) -> None:
        self.text, self.codebook_size, self.grid, self.text_budget = text, codebook_size, grid, text_budget
        for i, name in enumerate(SPECIAL):
            setattr(self, name, text.size + i)
        self.image_offset = text.size + len(SPECIAL)
        self.vocab_size = self.image_offset + codebook_size
        self.image_tokens = grid[0] * grid[1]

    def t2i(self, caption: str, codes: Tensor, *, prompt: bool = False) -> TokenSequence:
        """Text to image: [bos] text, then the picture block. codes: int64 [N] in raster order; targets are the visual tokens only.

        With `prompt`, codes are the [n] first ones (n < N) and the sequence ends where the next code is predicted; its tokens
        are routed by threshold, because those after them are not known yet. In training they compete in one top-k.
        """
        front = [self.bos, *self.text.encode(caption)[: self.text_budget], *self._grid_open()]
        visual = self._rows(codes)
        ids = torch.cat([torch.tensor(front), visual if prompt else torch.cat([visual, torch.tensor([self.eof, self.eoi])])])
        return self._sequence(Task.T2I, ids, shifted(ids, ids >= self.image_offset), ((len(ids), "threshold" if prompt else "topk"),))

    def mmu(self, codes: Tensor, turns: Seq[tuple[str, str]], open_ended: bool = False) -> TokenSequence:
        """Understanding: [bos] "You are a helpful assistant. USER: " picture block "q. ASSISTANT: a" [eos], then further turns.

        Targets are the answers and their eos; `open_ended` leaves the last answer to the model. Routing as in Show-o's layout:
        system prompt with picture, and each question, compete among themselves; the answers are kept.
        """
        ids = [self.bos, *self.text.encode("You are a helpful assistant. USER:"), *self._grid_open(), *self._rows(codes).tolist(), self.eof, self.eoi]
        parts, learned, budget = [(len(ids), "topk")], [False] * len(ids), len(ids) + self.text_budget
        for i, (question, answer) in enumerate(turns):
            asked = self.text.encode(f"USER: {question}." if i else f"{question}.")
            said = self.text.encode(f"ASSISTANT: {answer}")
            if not (open_ended and i == len(turns) - 1):
                said.append(self.eos)
            if len(ids) + len(asked) + len(said) > budget and i:
                break
            ids += asked + said
            learned += [False] * (len(asked) + 1) + [True] * (len(said) - 1)
            parts += [(len(asked), "topk"), (len(said), "keep")]
        full = torch.tensor(ids)
        return self._sequence(Task.MMU, full, shifted(full, torch.tensor(learned)), tuple(parts))

    def lm(self, text: str) -> TokenSequence:
        """Plain text: [bos] text [eos], every next token a target."""
        ids = torch.tensor([self.bos, *self.text.encode(text)[: self.text_budget], self.eos])
        return self._sequence(Task.LM, ids, shifted(ids, torch.ones_like(ids, dtype=torch.bool)), ((len(ids), "topk"),))

    def token(self, i: int) -> str:
        """Name of a token id for a label."""
        if i < self.text.size:
            return self.text.token(i)
        return f"<|{SPECIAL[i - self.text.size]}|>" if i < self.image_offset else f"code {i - self.image_offset}"

    def _grid_open(self) -> list[int]:
        return [self.boi, *self.text.encode(f"{self.grid[0]}*{self.grid[1]}"), self.img]

    def _rows(self, codes: Tensor) -> Tensor:
        """Codes [n] as visual tokens with an end of line after every full row."""
        visual, w = codes + self.image_offset, self.grid[1]
        full = visual[: len(codes) // w * w].view(-1, w)
        return torch.cat([torch.cat([full, full.new_full((len(full), 1), self.eol)], 1).flatten(), visual[full.numel():]])

    def _sequence(self, task: Task, ids: Tensor, target: Tensor, parts: tuple) -> TokenSequence:
        modality = torch.full_like(ids, Modality.TEXT)
        modality[ids >= self.text.size] = Modality.SPECIAL
        modality[ids >= self.image_offset] = Modality.IMAGE
        return TokenSequence(task, ids, torch.arange(len(ids)), modality, prefix_hi(0, len(ids)), target, parts)


tiny_emu3_config = partial(emu3_config, width=128, layers=8, heads=4, kv_heads=2, ffn=384, rope_theta=1e4, max_positions=512)
"""Eight layers of width 128, as Show-o's tiny sibling. Every dimension of a head rotates here, so theta is not as small: the slow
dimensions find content a hundred tokens away."""
