"""What every data set of the package hands out, and the contract it keeps.

A data set turns (split, index) into one `Sample`: a picture, a caption that describes it, and questions with known
answers. Nothing here reads files or draws: see `scenes`, `digits` and `folder`, all opened with `unimod.data.open_data`.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np

SPLITS = ("train", "validation", "test")


class DataError(ValueError):
    """A data set, split or option that cannot be used; the message names the value, the allowed ones and the fix."""


@dataclass(frozen=True)
class Question:
    """One question about a picture, its one right answer, and the kind it is reported under."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Thing:
    """One object in a picture, as drawn or as detected.

    `cell` is the quarter of the picture that holds the object's center: 0 top left, 1 top right, 2 bottom left,
    3 bottom right. `box` is (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
    """

    color: str
    shape: str
    cell: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Sample:
    """One picture with its texts. `image` is uint8 RGB [S, S, 3]; `things` is empty where no ground truth exists."""

    key: str
    image: np.ndarray
    caption: str
    questions: tuple[Question, ...]
    category: str = ""
    things: tuple[Thing, ...] = ()


class Dataset(Protocol):
    """The contract of every data set: the same (options, split, index, seed) always gives the same sample."""

    name: str
    image_size: int
    kinds: tuple[str, ...]

    def words(self) -> tuple[str, ...]:
        """Every word (see `split_words`) its captions, questions and answers can hold, sorted."""
        ...

    def size(self, split: str) -> int | None:
        """How many different samples the split holds; None where it never runs out."""
        ...

    def sample(self, split: str, index: int, seed: int = 0) -> Sample:
        """Sample `index` (any integer from 0) of a split; raises DataError for an unknown split or a negative index."""
        ...


def split_words(text: str) -> list[str]:
    """The lower-case words and punctuation marks of a text, in order: "Is it red?" -> ["is", "it", "red", "?"]."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def split_of(key: str) -> str:
    """The split a piece of content belongs to, the same on every machine and in every run: about 80/10/10 %."""
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    return SPLITS[(share >= 0.8) + (share >= 0.9)]


def check_request(split: str, index: int) -> None:
    """Raises DataError unless `split` is one of SPLITS and `index` is not negative."""
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if index < 0:
        raise DataError(f"sample index {index} is negative: count from 0")
