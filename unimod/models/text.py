"""Text tokenizers behind one interface: a word-level one for the tiny models, and any of transformers'.

    text = WordTokenizer(("a", "red", "circle"))
    text.decode(text.encode("a red zebra")) == "a red zebra"
    text = HubText.load("folder/of/phi-1_5", size=50295)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerBase

MARKERS = ("USER:", "ASSISTANT:")  # role names of a conversation, one token each
GLUE = ("?", ".", ",", "*", *"0123456789", "You", "are", "a", "helpful", "assistant")  # what the layouts write
_PIECE = re.compile("|".join(map(re.escape, MARKERS)) + r"|\w+|[^\w\s]")


class Text(Protocol):
    """What a layout needs of a text tokenizer. Text ids are 0 .. size - 1; eot is <|endoftext|>."""

    size: int
    eot: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special token added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids up to the first eot; ids outside the text vocabulary are left out."""
        ...

    def token(self, i: int) -> str:
        """One token for a label in a figure."""
        ...


class HubText:
    """A tokenizer of transformers; `size` leaves out what a model adds after the text vocabulary.

    Raises ValueError when it does not know `eot`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, eot: str = "<|endoftext|>") -> None:
        self.tokenizer, self.size = tokenizer, size
        self.eot = tokenizer.convert_tokens_to_ids(eot)
        if self.eot is None:
            raise ValueError(f"This tokenizer has no token {eot!r}, which ends a text; it is not the model's own.")

    @classmethod
    def load(cls, where: str | Path, size: int, eot: str = "<|endoftext|>") -> HubText:
        """From a folder (or a hub name, where there is a network). Raises OSError or ValueError when there is none."""
        return cls(AutoTokenizer.from_pretrained(where), size, eot)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([i for i in _until(ids, self.eot) if 0 <= i < self.size]).strip()

    def token(self, i: int) -> str:
        return self.tokenizer.decode([i])


class WordTokenizer:
    """Known words are one token each, any other is the bytes of a space and the word; lossless up to white space.

    Ids: 0 .. 255 bytes, then the words, then <|endoftext|> (also Show-o's start of text, as in Phi's vocabulary).
    `words` are the data's own; markers and punctuation are added.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(dict.fromkeys([*MARKERS, *GLUE, *words]))
        self._id = {word: 256 + i for i, word in enumerate(self.words)}
        self.eot = 256 + len(self.words)
        self.size = self.eot + 1

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _PIECE.findall(text):
            ids.extend([self._id[piece]] if piece in self._id else f" {piece}".encode())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        out = bytearray()
        for i in _until(ids, self.eot):
            if 0 <= i < 256:
                out.append(i)
            elif 256 <= i < self.eot:
                out += f" {self.words[i - 256]}".encode()
        return re.sub(r" ([?.,])", r"\1", out.decode(errors="replace")).strip()

    def token(self, i: int) -> str:
        if i == self.eot:
            return "<|endoftext|>"
        return chr(i) if i < 256 else self.words[i - 256]


def _until(ids: Iterable[int], end: int) -> Iterable[int]:
    """The ids before the first `end`."""
    return itertools.takewhile(lambda i: i != end, ids)
