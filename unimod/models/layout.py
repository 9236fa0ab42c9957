"""What the layouts of all models share: one vocabulary of text, special and image tokens, and how sequences are built.

A model's own layout (`ShowoLayout`, `Emu3Layout`, ...) has the methods `t2i`, `mmu` and `lm`, each of which returns a
`TokenSequence`. `CausalLayout` is the base of models that attend causally and generate images token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from copy import copy
from typing import ClassVar

import torch
from torch import Tensor

from ..batch import FEATURE, IGNORE, Modality, Task, TokenSequence
from ..mask import prefix_hi
from .text import Text

Turns = Seq[tuple[str, str]]
"""A conversation: (question, answer) pairs."""


class Layout:
    """The vocabulary of one model and how it writes sequences.

    text: the text tokenizer. special: name -> id of every special token; each id is an attribute of the layout too.
    code_ids: int64 [codebook], the id of every image code. grid: (rows, columns) of codes of an image whose codes are
    given flat. text_budget: length limit of a text, in tokens. vocab_size: rows of the embedding.
    """

    kind: ClassVar[str]  # name of the model family, as in `Family.name`
    causal_images: ClassVar[bool]  # images are generated token by token; otherwise by masked decoding
    drop_caption: ClassVar[float] = 0.1  # share of t2i sequences that training writes without caption, for guidance
    whole_turns: ClassVar[bool] = True  # a conversation too long ends before the turn that does not fit, else inside it
    stop: int  # the token that ends an answer: eos where a model has one, else the text's eot

    def __init__(self, text: Text, special: Mapping[str, int], code_ids: Tensor, grid: tuple[int, int],
                 text_budget: int, vocab_size: int) -> None:
        self.text, self.special, self.code_ids = text, dict(special), code_ids
        self.grid, self.text_budget, self.vocab_size = tuple(grid), text_budget, vocab_size
        self.codebook_size, self.stop = len(code_ids), special.get("eos", text.eot)
        run = slice(int(code_ids[0]), int(code_ids[0]) + len(code_ids))
        # the image codes' rows of the head, in code order: a slice is a view, an index tensor copies them at every step
        self.codes_at = run if torch.equal(code_ids, torch.arange(run.start, run.stop)) else code_ids
        for name, i in special.items():
            setattr(self, name, i)
        self._modality = torch.full((vocab_size + 1,), Modality.TEXT)
        self._modality[list(special.values())] = Modality.SPECIAL
        self._modality[code_ids] = self._modality[FEATURE] = Modality.IMAGE     # FEATURE is -1: the last entry

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def resized(self, grid: tuple[int, int]) -> Layout:
        """The same layout for images of another grid."""
        other = copy(self)
        other.grid = tuple(grid)
        return other

    def after_code(self, codes: Tensor, n: int) -> list[Tensor]:
        """Ids, each int64 [B], that follow in token-by-token generation once the n-th codes (int64 [B]) are chosen."""
        return [self.code_ids[codes]]

    def modality(self, ids: Tensor) -> Tensor:
        """`Modality` of token ids: int64, of the same shape."""
        return self._modality[ids]

    def token(self, i: int) -> str:
        """Name of a token id for a label in a figure."""
        if i == FEATURE:
            return "feature"
        if self._modality[i] == Modality.IMAGE:
            code = (self.code_ids == i).nonzero()
            return f"code {int(code)}" if len(code) else "[mask]"
        names = {v: k for k, v in self.special.items()}
        return f"<|{names[i].removesuffix('_task')}|>" if i in names else self.text.token(i)

    def question_text(self, turn: int, question: str) -> str:
        """How the question of a turn (0, 1, ...) is written."""
        return f"USER: {question}"

    def role(self) -> list[int]:
        """Ids between a question and its answer."""
        return self.text.encode(" ASSISTANT:")

    def _turns(self, turns: Turns, open_ended: bool,
               budget: int | None = None) -> tuple[list[int], list[bool], list[tuple[int, str]]]:
        """Write a conversation: ids, which of them are targets (an answer and its stop token), and parts.

        A conversation ends at `budget` tokens (default: text_budget) as `whole_turns` says, a first whole turn always
        stays. With `open_ended` it is never cut, and the last answer has no stop token: the model continues it.
        """
        ids, learned, parts = [], [], []
        budget = self.text_budget if budget is None else budget
        for i, (question, answer) in enumerate(turns):
            question_ids, role = self.text.encode(self.question_text(i, question)), self.role()
            answer_ids = self.text.encode(f" {answer}") if answer else []
            if not (open_ended and i == len(turns) - 1):
                answer_ids = [*answer_ids, self.stop]
            length = len(ids) + len(question_ids) + len(role) + len(answer_ids)
            if self.whole_turns and not open_ended and ids and length > budget:
                break
            ids += question_ids + role + answer_ids
            learned += [False] * (len(question_ids) + len(role)) + [True] * len(answer_ids)
            # From the role on is text that decoding generates: always kept. Every question competes among its own
            # tokens, so that no routing decision depends on a token still to come.
            parts += [(len(question_ids), "topk"), (len(role) + len(answer_ids), "keep")]
        end = len(ids) if open_ended or self.whole_turns else budget
        return ids[:end], learned[:end], _cut(parts, end)

    def _sequence(self, task: Task, ids: Tensor, hi: Tensor, target: Tensor, parts: Seq[tuple[int, str]],
                  position: Tensor | None = None, features: Tensor | None = None) -> TokenSequence:
        position = torch.arange(len(ids)) if position is None else position
        return TokenSequence(task, ids, position, self.modality(ids), hi, target, tuple(parts), features)


class CausalLayout(Layout):
    """Base of layouts with causal attention, images generated token by token, and special tokens `bos` and `eos`.

    A model writes `t2i` and `mmu` with `image_sequence` and `conversation`.
    """

    causal_images = True

    def lm(self, text: str) -> TokenSequence:
        """Plain text: [bos] text [eos], every next token a target."""
        ids = [self.bos, *self.cut(text), self.eos]
        return self._causal(Task.LM, ids, [True] * len(ids), [(len(ids), "topk")])

    def cut(self, text: str) -> list[int]:
        """Ids of a text, at most text_budget."""
        return self.text.encode(text)[: self.text_budget]

    def image_ids(self, codes: Tensor) -> list[int]:
        """Ids of an image's codes (int64 [N] or [h, w], raster order)."""
        return self.code_ids[codes.flatten()].tolist()

    def image_sequence(self, before: list[int], codes: Tensor, after: list[int], prompt: bool) -> TokenSequence:
        """Text to image: `before`, the image, `after`; targets are the image's codes.

        With `prompt`, codes are the [n] first ones (n < N), `after` is left out, and the sequence ends where the next
        code is predicted. Its tokens are routed by threshold, since those after them are not known; in training all
        compete in one top-k.
        """
        image = torch.tensor(self.image_ids(codes) + ([] if prompt else after), dtype=torch.long)
        ids = [*before, *image.tolist()]
        learned = [False] * len(before) + (self.modality(image) == Modality.IMAGE).tolist()
        return self._causal(Task.T2I, ids, learned, [(len(ids), "threshold" if prompt else "topk")])

    def conversation(self, head: list[int], turns: Turns, open_ended: bool,
                      features: Tensor | None = None) -> TokenSequence:
        """Understanding: `head` (system prompt and image) and turns; targets are the answers and their stop token.

        Head and every question compete among themselves; the answers are always kept.
        """
        ids, learned, parts = self._turns(turns, open_ended)
        parts = [(len(head), "topk"), *parts]
        return self._causal(Task.MMU, head + ids, [False] * len(head) + learned, parts, features)

    def _causal(self, task: Task, ids: list[int], learned: list[bool], parts: list[tuple[int, str]],
                features: Tensor | None = None) -> TokenSequence:
        """A causal sequence whose next-token targets are the tokens that are `learned`."""
        ids = torch.tensor(ids)
        return self._sequence(task, ids, prefix_hi(0, len(ids)), shifted(ids, torch.tensor(learned)), parts,
                              features=features)


def shifted(ids: Tensor, learned: Tensor) -> Tensor:
    """Next-token targets, int64 [n]: position i predicts token i + 1 where `learned` (bool [n]) holds for it."""
    return torch.cat([torch.where(learned[1:], ids[1:], IGNORE), torch.tensor([IGNORE])])


def _cut(parts: Seq[tuple[int, str]], total: int) -> list[tuple[int, str]]:
    """The parts of a sequence's first `total` tokens."""
    kept = []
    for length, rule in parts:
        length = min(length, total)
        total -= length
        if length:
            kept.append((length, rule))
    return kept
