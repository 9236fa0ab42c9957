"""Show-o (v1): transformers' stock Phi with qk-layernorm, its vocabulary and the sequences it is trained on.

    config = showo_config()                                   # the real one: 1,448,176,770 parameters
    layout = ShowoLayout(text, codebook_size=256, grid=(6, 6), text_budget=96)
    row = layout.t2i("a red circle", codes, masked)           # a TokenSequence
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial

import torch
from torch import Tensor
from transformers import PhiConfig

from ..tokens import IGNORE, Modality, Task, TokenSequence, prefix_hi, suffix_hi
from .text import WordTokenizer

SPECIAL = ("pad", "soi", "eoi", "sov", "eov", "t2i_task", "mmu_task", "t2v", "v2v", "lvg")
"""Special tokens in the order in which they follow the text vocabulary; the image codes come next, the mask token is last."""


def showo_config(vocab_size: int = 58498, width: int = 2048, layers: int = 24, heads: int = 32, ffn: int = 8192,
                 rope_theta: float = 10000.0, max_positions: int = 2048) -> PhiConfig:
    """Phi-1.5 as Show-o changes it: layer norm on queries and keys, half of each head rotated, no dropout."""
    return PhiConfig(vocab_size=vocab_size, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                     hidden_act="gelu_pytorch_tanh",    # the same function as gelu_new, fused: a quarter of a tiny model's step
                     qk_layernorm=True, max_position_embeddings=max_positions, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0,
                     layer_norm_eps=1e-5, tie_word_embeddings=False,
                     rope_parameters={"rope_type": "default", "rope_theta": rope_theta, "partial_rotary_factor": 0.5})


class ShowoLayout:
    """Writes Show-o's sequences without their padding; positions count the left pads that the reference has.

    text_budget is the reference's T: a t2i text part, task token included, takes T + 1 places and is padded on the left, an
    mmu conversation at most T. `grid` is the picture's (rows, columns) of tokens.
    """

    kind = "showo"
    causal_images = False

    def __init__(self, text: WordTokenizer, codebook_size: int, grid: tuple[int, int], text_budget: int) -> None:
        self.text, self.codebook_size, self.grid, self.text_budget = text, codebook_size, grid, text_budget
        for i, name in enumerate(SPECIAL):
            setattr(self, name, text.size + i)
        self.image_offset = text.size + len(SPECIAL)
        self.mask = self.image_offset + codebook_size
        self.vocab_size = self.mask + 1
        self.image_tokens = grid[0] * grid[1]

    def t2i(self, caption: str, codes: Tensor, masked: Tensor) -> TokenSequence:
        """Text to image. codes: int64 [N] (raster order), masked: bool [N], the slots shown as mask tokens and predicted.

        [t2i] [sot] text [eot] [soi] N codes [eoi]; the text is causal, the picture segment sees everything. Targets are not
        shifted and include soi and eoi, as in the reference.
        """
        front = self._fit([self.t2i_task, self.text.eot, *self.text.encode(caption), self.text.eot], self.text_budget + 1)
        n, image = len(front), codes + self.image_offset
        ids = torch.cat([torch.tensor([*front, self.soi]), torch.where(masked, self.mask, image), torch.tensor([self.eoi])])
        target = torch.full_like(ids, IGNORE)
        target[n], target[-1] = self.soi, self.eoi
        target[n + 1:-1] = torch.where(masked, image, IGNORE)
        position = torch.arange(len(ids)) + self.text_budget + 1 - n
        return self._sequence(Task.T2I, ids, position, suffix_hi(n, len(ids)), target, ((len(ids), "topk"),))

    def mmu(self, codes: Tensor, turns: Seq[tuple[str, str]], open_ended: bool = False) -> TokenSequence:
        """Understanding. [mmu] [soi] N codes [eoi], then "USER: q ASSISTANT: a" [eot] per turn; the picture is a fully visible prefix.

        Targets are the answers and their eot. With `open_ended` the last answer is left for the model to go on from (its text
        so far may be empty). From "ASSISTANT:" on a turn is text that decoding generates: routed layers keep it (rule "keep"),
        and every question competes among its own tokens, so that no choice depends on a token still to come.
        """
        head = torch.tensor([self.mmu_task, self.soi])
        ids, parts, learned = [], [(self.image_tokens + 3, "topk")], []
        for i, (question, answer) in enumerate(turns):
            asked = self.text.encode(f"USER: {question}")
            said = self.text.encode(f"ASSISTANT: {answer}")
            if not (open_ended and i == len(turns) - 1):
                said.append(self.text.eot)
            if len(ids) + len(asked) + len(said) > self.text_budget and ids:
                break
            ids += asked + said
            learned += [False] * (len(asked) + 1) + [True] * (len(said) - 1)
            parts += [(len(asked), "topk"), (len(said), "keep")]
        full = torch.cat([head, codes + self.image_offset, torch.tensor([self.eoi, *ids])])
        answer_token = torch.cat([torch.zeros(self.image_tokens + 3, dtype=torch.bool), torch.tensor(learned, dtype=torch.bool)])
        return self._sequence(Task.MMU, full, torch.arange(len(full)), prefix_hi(self.image_tokens + 3, len(full)), shifted(full, answer_token), tuple(parts))

    def lm(self, text: str) -> TokenSequence:
        """Plain text: [sot] text [eot], causal, every next token a target."""
        ids = torch.tensor([self.text.eot, *self.text.encode(text), self.text.eot][: self.text_budget + self.image_tokens + 3])
        target = shifted(ids, torch.ones_like(ids, dtype=torch.bool))
        return self._sequence(Task.LM, ids, torch.arange(len(ids)), prefix_hi(0, len(ids)), target, ((len(ids), "topk"),))

    def token(self, i: int) -> str:
        """Name of a token id for a label."""
        if i < self.text.size:
            return self.text.token(i)
        if i < self.image_offset:
            return f"<|{SPECIAL[i - self.text.size].removesuffix('_task')}|>"
        return "[mask]" if i == self.mask else f"code {i - self.image_offset}"

    def _fit(self, ids: list[int], budget: int) -> list[int]:
        """Too long a text keeps its beginning and still ends in eot."""
        return ids if len(ids) <= budget else [*ids[: budget - 1], self.text.eot]

    def _sequence(self, task: Task, ids: Tensor, position: Tensor, hi: Tensor, target: Tensor, parts: tuple) -> TokenSequence:
        modality = torch.full_like(ids, Modality.TEXT)
        modality[ids >= self.image_offset] = Modality.IMAGE
        modality[(ids >= self.text.size) & (ids < self.image_offset)] = Modality.SPECIAL
        return TokenSequence(task, ids, position, modality, hi, target, parts)


def shifted(ids: Tensor, learned: Tensor) -> Tensor:
    """Next-token targets: position i predicts token i + 1 where `learned` holds for token i + 1; int64 [n]."""
    return torch.cat([torch.where(learned[1:], ids[1:], IGNORE), torch.tensor([IGNORE])])


tiny_showo_config = partial(showo_config, width=128, layers=8, heads=4, ffn=512, rope_theta=100.0, max_positions=512)
"""Eight layers of width 128 (1.6 M parameters of layers); theta 100 suits a hundred tokens."""
