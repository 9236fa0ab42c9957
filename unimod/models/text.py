"""A word-level text tokenizer for the tiny models: known words are one token each, everything else falls back to bytes.

    text = WordTokenizer(("a", "red", "circle"))
    text.decode(text.encode("a red zebra")) == "a red zebra"

Ids: 0..255 bytes, then the words, then <|endoftext|> (which is also Show-o's start of text, as in Phi's vocabulary).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MARKERS = ("USER:", "ASSISTANT:")
"""Role names of a conversation, one token each."""
GLUE = ("?", ".", ",", "*", *"0123456789", "You", "are", "a", "helpful", "assistant")
"""Words that the layouts themselves write."""
_PIECE = re.compile("|".join(map(re.escape, MARKERS)) + r"|\w+|[^\w\s]")


class WordTokenizer:
    """Lossless up to the amount of white space. `words` are the data's own; markers and punctuation are added."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(dict.fromkeys([*MARKERS, *GLUE, *words]))
        self._id = {word: 256 + i for i, word in enumerate(self.words)}
        self.eot = 256 + len(self.words)
        self.size = self.eot + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text. An unknown word becomes the bytes of a space and the word."""
        ids: list[int] = []
        for piece in _PIECE.findall(text):
            ids.extend([self._id[piece]] if piece in self._id else f" {piece}".encode())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids up to the first <|endoftext|>; ids outside the vocabulary are left out."""
        out = bytearray()
        for i in ids:
            if i == self.eot:
                break
            if 0 <= i < 256:
                out.append(i)
            elif i < self.eot:
                out += f" {self.words[i - 256]}".encode()
        return re.sub(r" ([?.,])", r"\1", out.decode(errors="replace")).strip()

    def token(self, i: int) -> str:
        """One token for a label in a figure."""
        if i == self.eot:
            return "<|endoftext|>"
        return chr(i) if i < 256 else self.words[i - 256]
