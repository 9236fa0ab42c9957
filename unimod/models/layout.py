"""What the layouts of all models share: a vocabulary of text, special tokens and picture codes, and the writing of sequences.

A model's own layout (`ShowoLayout`, `Emu3Layout`, ...) adds `t2i`, `mmu` and `lm`, each of which returns a `TokenSequence`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from copy import copy
from typing import ClassVar

import torch
from torch import Tensor

from ..batch import FEATURE, IGNORE, Modality, Task, TokenSequence
from .text import Text

Turns = Seq[tuple[str, str]]
"""A conversation: (question, answer) pairs."""


class Layout:
    """The vocabulary of one model and how it writes sequences.

    text: the text tokenizer. special: name -> id of every special token; each is an attribute too. code_ids: int64 [codebook], the
    id of every picture code. grid: (rows, columns) of codes of a picture whose codes are given flat. text_budget: how long texts may be.
    """

    kind: ClassVar[str]
    causal_images: ClassVar[bool]
    """Whether pictures are generated token by token; otherwise by masked decoding."""
    drop_caption: ClassVar[float]
    """Share of t2i rows that the model's own training writes without their caption, for guidance."""
    whole_turns: ClassVar[bool] = True
    """Whether a conversation that is too long ends before the turn that does not fit, or is cut inside it."""
    stop: int
    """The token that ends an answer."""

    def __init__(self, text: Text, special: Mapping[str, int], code_ids: Tensor, grid: tuple[int, int], text_budget: int, vocab_size: int) -> None:
        self.text, self.special, self.code_ids = text, dict(special), code_ids
        self.grid, self.text_budget, self.vocab_size = tuple(grid), text_budget, vocab_size
        self.codebook_size = len(code_ids)
        run = slice(int(code_ids[0]), int(code_ids[0]) + len(code_ids))
        self.codes_at = run if torch.equal(code_ids, torch.arange(run.start, run.stop)) else code_ids
        """Where the codes lie in the vocabulary, in code order: an index into rows of the head."""
        for name, i in special.items():
            setattr(self, name, i)
        self._modality = torch.full((vocab_size + 1,), Modality.TEXT)          # the last entry is the feature token's, id -1
        self._modality[list(special.values())] = Modality.SPECIAL
        self._modality[code_ids] = self._modality[FEATURE] = Modality.IMAGE

    @property
    def image_tokens(self) -> int:
        """Codes of a picture."""
        return self.grid[0] * self.grid[1]

    def resized(self, grid: tuple[int, int]) -> Layout:
        """The same layout for pictures of another grid."""
        other = copy(self)
        other.grid = tuple(grid)
        return other

    def after_code(self, codes: Tensor, n: int) -> list[Tensor]:
        """What a picture that is generated token by token goes on with when its n-th codes (int64 [B]) are chosen: ids, each [B]."""
        return [self.code_ids[codes]]

    def modality(self, ids: Tensor) -> Tensor:
        """What tokens stand for: int64, as `Modality`."""
        return self._modality[ids]

    def token(self, i: int) -> str:
        """Name of a token id for a label."""
        if i == FEATURE:
            return "feature"
        if self._modality[i] == Modality.IMAGE:
            code = (self.code_ids == i).nonzero()
            return f"code {int(code)}" if len(code) else "[mask]"
        names = {v: k for k, v in self.special.items()}
        return f"<|{names[i].removesuffix('_task')}|>" if i in names else self.text.token(i)

    def _turns(self, turns: Turns, ask: Callable[[int, str], str], open_ended: bool,
               budget: int | None = None) -> tuple[list[int], list[bool], list[tuple[int, str]]]:
        """Write a conversation: ids, which of them are learned (an answer and its stop token), and parts.

        A conversation ends at `budget` tokens (default: text_budget) as `whole_turns` says, a first whole turn always; not so with
        `open_ended`, where the last answer is left for the model to go on from. From the answer's role (" ASSISTANT:") on a turn is
        text that decoding generates: routed layers keep it, and every question competes among its own tokens, so that no choice
        depends on a token still to come.
        """
        ids, learned, parts = [], [], []
        budget = self.text_budget if budget is None else budget
        for i, (question, answer) in enumerate(turns):
            asked, role = self.text.encode(ask(i, question)), self._role()
            said = self.text.encode(f" {answer}") if answer else []
            if not (open_ended and i == len(turns) - 1):
                said = [*said, self.stop]
            if self.whole_turns and not open_ended and ids and len(ids) + len(asked) + len(role) + len(said) > budget:
                break
            ids += asked + role + said
            learned += [False] * (len(asked) + len(role)) + [True] * len(said)
            parts += [(len(asked), "topk"), (len(role) + len(said), "keep")]
        end = len(ids) if open_ended or self.whole_turns else budget
        return ids[:end], learned[:end], _cut(parts, end)

    def _role(self) -> list[int]:
        """What stands between a question and its answer."""
        return self.text.encode(" ASSISTANT:")

    def _sequence(self, task: Task, ids: Tensor, hi: Tensor, target: Tensor, parts: Seq[tuple[int, str]], position: Tensor | None = None,
                  features: Tensor | None = None) -> TokenSequence:
        position = torch.arange(len(ids)) if position is None else position
        return TokenSequence(task, ids, position, self.modality(ids), hi, target, tuple(parts), features)


def shifted(ids: Tensor, learned: Tensor) -> Tensor:
    """Next-token targets: position i predicts token i + 1 where `learned` holds for token i + 1; int64 [n]."""
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
