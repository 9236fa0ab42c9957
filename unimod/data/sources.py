"""The contract of a data set, and the two that hold given pictures: scikit-learn's digits and a folder of one's own.

A data set turns (split, index, seed) into one `Sample`: a picture, a caption that describes it, and questions with
known answers. All are opened by `unimod.data.open_data`; `Scenes`, which draws its pictures, is in `scenes.py`.
"""

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from unimod.config import expanded

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

    def size(self, split: str) -> int | None:
        """How many different samples the split holds; None where it never runs out."""

    def sample(self, split: str, index: int, seed: int = 0) -> Sample:
        """Sample `index` (any integer from 0; modulo the split's size, if any); raises DataError for an unknown split
        or a negative index."""


def split_words(text: str) -> list[str]:
    """The lower-case words and punctuation marks of a text, in order: "Is it red?" -> ["is", "it", "red", "?"]."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def vocabulary(*texts: str) -> tuple[str, ...]:
    """The different words of all texts, sorted."""
    return tuple(sorted(set(split_words(" ".join(texts)))))


def split_of(key: str) -> str:
    """The split a piece of content belongs to, the same on every machine and in every run: about 80/10/10 %."""
    # not Python's own hash(), which differs from process to process
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    return SPLITS[(share >= 0.8) + (share >= 0.9)]


def check_request(split: str, index: int) -> None:
    """Raises DataError unless `split` is one of SPLITS and `index` is not negative."""
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if index < 0:
        raise DataError(f"sample index {index} is negative: count from 0")


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits:
    """Real pictures without a download: the 1,797 handwritten digits of scikit-learn, such as "a handwritten three".

    The scans are 8 x 8 pixels, enlarged bicubically to `image_size`, dark on white. A hash of a digit's number in the
    collection decides its split. Raises DataError for an image_size below 8.
    """

    name = "digits"
    kinds = ("digit", "parity", "compare")

    def __init__(self, image_size: int = 48, seed: int = 0):
        if image_size < 8:
            raise DataError(f"image_size {image_size} is smaller than the 8-pixel scans: use 8 or more, such as 48")
        from sklearn.datasets import load_digits  # half a second to import: only where digits are asked for

        self.image_size, self.seed = image_size, seed
        scans = load_digits()
        self._scans, self._labels = scans.images, scans.target
        splits = [split_of(f"digit {number}") for number in range(len(self._labels))]
        self._members = {split: [number for number, own in enumerate(splits) if own == split] for split in SPLITS}

    def words(self) -> tuple[str, ...]:
        return vocabulary("a handwritten which digit is this ? it even odd greater than yes no", *DIGITS)

    def size(self, split: str) -> int:
        check_request(split, 0)
        return len(self._members[split])

    def sample(self, split: str, index: int, seed: int = 0) -> Sample:
        """Scan `index` modulo the split's size; each round and each seed asks other questions about the same scans."""
        check_request(split, index)
        number = self._members[split][index % self.size(split)]
        digit = int(self._labels[number])
        # a scan is float [8, 8] from 0 (paper) to 16 (ink)
        paper = Image.fromarray((255 - self._scans[number] * (255 / 16)).astype(np.uint8))
        paper = paper.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        questions = questions_of(digit, random.Random(f"{self.seed}/{seed}/{split}/{index}"))
        return Sample(f"digits/{number}", np.asarray(paper.convert("RGB")), f"a handwritten {DIGITS[digit]}", questions,
                      DIGITS[digit])


def questions_of(digit: int, rng: random.Random) -> tuple[Question, ...]:
    """Six in random order: which digit, whether even, whether odd, and three times whether greater than another."""
    asked = [Question("which digit is this?", DIGITS[digit], "digit")]
    for name, remainder in (("even", 0), ("odd", 1)):
        asked.append(Question(f"is it {name}?", "yes" if digit % 2 == remainder else "no", "parity"))
    for other in rng.sample(range(9), 3):
        asked.append(Question(f"is it greater than {DIGITS[other]}?", "yes" if digit > other else "no", "compare"))
    rng.shuffle(asked)
    return tuple(asked)


EXAMPLE = ('{"image": "cats/1.png", "caption": "a cat on a mat", '
           '"questions": [{"question": "where is the cat?", "answer": "on a mat"}]}')


class Folder:
    """The user's own pictures: a folder that holds them and a file `data.jsonl`, one JSON object a line, as `EXAMPLE`.

    `image` is a path inside the folder, in any format Pillow reads. Every entry needs a caption and at least one
    question; a question may also carry a "kind", the name it is reported under. Blank lines are ignored. Pictures are
    kept in memory, 3 * image_size**2 bytes each (see `read_picture`). A hash of a picture's path decides its split.

    Entries that cannot be used are left out and listed in `skipped`, as (where, reason); `report()` sums them up.
    Raises DataError where the folder or its data.jsonl is missing, where fewer than three pictures are usable (each
    split needs one), and, under `strict`, where any entry had to be skipped.
    """

    name = "folder"

    def __init__(self, folder: str | Path, image_size: int = 48, strict: bool = False):
        if image_size < 8:
            raise DataError(f"image_size {image_size} is too small: use 8 or more, such as 48")
        self.image_size = image_size
        self.path = Path(expanded(folder)) / "data.jsonl"
        self.skipped: list[tuple[str, str]] = []
        if not str(folder) or not self.path.is_file():
            what = "data.jsonl in it" if str(folder) and self.path.parent.is_dir() else "such folder"
            raise DataError(f"folder {str(folder)!r}: there is no {what}; give a folder with a data.jsonl of lines "
                            f"like\n{EXAMPLE}")
        entries = self._read()
        if strict and self.skipped:
            first = "; ".join(f"{where}: {reason}" for where, reason in self.skipped[:10])
            raise DataError(f"{len(self.skipped)} unusable entries in {self.path}, refused under strict: {first}")
        if not entries:
            raise DataError(f"no usable entry in {self.path}. {self._skips()} A line should look like\n{EXAMPLE}")
        splits = split_paths({entry.key for entry in entries}, self.path)
        self._entries = {split: [entry for entry in entries if splits[entry.key] == split] for split in SPLITS}
        self.kinds = tuple(sorted({question.kind for entry in entries for question in entry.questions}))

    def words(self) -> tuple[str, ...]:
        entries = [entry for members in self._entries.values() for entry in members]
        asked = [question for entry in entries for question in entry.questions]
        return vocabulary(*(entry.caption for entry in entries), *(f"{q.text} {q.answer}" for q in asked))

    def size(self, split: str) -> int:
        check_request(split, 0)
        return len(self._entries[split])

    def sample(self, split: str, index: int, seed: int = 0) -> Sample:
        """Entry `index` modulo the split's size, in the order of the file; `seed` changes nothing here."""
        check_request(split, index)
        return self._entries[split][index % self.size(split)]

    def report(self) -> str:
        """One paragraph: how many entries are in use, by split, and how many were skipped for which reason."""
        sizes = ", ".join(f"{split} {self.size(split)}" for split in SPLITS)
        return f"{sum(map(self.size, SPLITS))} entries of {self.path} are in use ({sizes}). {self._skips()}"

    def _skips(self) -> str:
        if not self.skipped:
            return "None was skipped."
        counts = Counter(reason for _, reason in self.skipped).most_common()
        reasons = ", ".join(f"{count} x {reason}" for reason, count in counts)
        places = "; ".join(where for where, _ in self.skipped[:10]) + ("; ..." if len(self.skipped) > 10 else "")
        return f"{len(self.skipped)} skipped: {reasons} ({places})."

    def _read(self) -> list[Sample]:
        entries = []
        for number, line in enumerate(self.path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("image"), str):
                    where += f" ({record['image']})"
                entries.append(read_entry(record, self.path.parent.resolve(), self.image_size))
            except DataError as error:
                self.skipped.append((where, str(error)))
            except (ValueError, RecursionError):
                self.skipped.append((where, "not valid JSON"))
        return entries


def read_entry(record: object, root: Path, image_size: int) -> Sample:
    """The sample of one parsed line of a folder's data.jsonl. Raises DataError with the reason it cannot be used."""
    if not isinstance(record, dict):
        raise DataError("not a JSON object")

    def text(holder: dict, field: str) -> str:
        value = holder.get(field)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"no {field}")
        return value.strip()

    name, caption, asked = text(record, "image"), text(record, "caption"), record.get("questions")
    if not isinstance(asked, list) or not asked:
        raise DataError("no questions")
    if not all(isinstance(q, dict) for q in asked):
        raise DataError("a question is not a JSON object")
    questions = tuple(Question(text(q, "question"), text(q, "answer"), text(q, "kind") if "kind" in q else "question")
                      for q in asked)
    try:
        path = (root / name).resolve()  # follows links: one that leads out of the folder is refused too
        if not path.is_relative_to(root):
            raise DataError("path leads out of the folder")
        if not path.is_file():
            raise DataError("picture missing")
        image = read_picture(path, image_size)
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError("picture cannot be read") from error
    return Sample(path.relative_to(root).as_posix(), image, caption, questions)


def read_picture(path: Path, image_size: int) -> np.ndarray:
    """A picture file as upright RGB, its short side resized (bicubic) to `image_size` and its center cut out.

    Returns uint8 [S, S, 3]; transparent parts are white. Raises what Pillow raises for a file it cannot read, and
    ValueError for numbers without a known white.
    """
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
    if picture.mode in ("I", "F"):
        raise ValueError(f"a picture of mode {picture.mode} does not say which number is white")
    if picture.mode.startswith("I;16"):  # which convert() would cut at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture = picture.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return np.asarray(ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BICUBIC))


def split_paths(paths: set[str], source: Path) -> dict[str, str]:
    """The split of every picture, by a hash of its path; an empty split takes one from the fullest.

    Raises DataError for fewer than three pictures.
    """
    if len(paths) < len(SPLITS):
        raise DataError(f"{source} has {len(paths)} usable pictures, too few for train, validation and test: add at "
                        "least 3 in all")
    members = {split: [path for path in sorted(paths) if split_of(path) == split] for split in SPLITS}
    for split in SPLITS:
        if not members[split]:
            members[split].append(max(members.values(), key=len).pop())
    return {path: split for split, held in members.items() for path in held}
