"""The user's own pictures: a folder that holds them and a file `data.jsonl`, one JSON object a line.

    {"image": "cats/1.png", "caption": "a cat on a mat", "questions": [{"question": "where is the cat?", "answer": "on a mat"}]}

`image` is a path inside the folder, in any format Pillow reads. Every entry needs a caption and at least one question;
a question may also carry a "kind", the name it is reported under. Blank lines are ignored.

    data = Folder("my/pictures")                 # or open_data("folder", folder="my/pictures")
    print(data.report())                         # what is in use, what was skipped and why; see also data.skipped

Pictures are upright RGB, resized (bicubic) so that the short side is `image_size`, then cropped to the center; transparent
parts become white. They are kept in memory, 3 * image_size**2 bytes each. A hash of the picture's path decides its split.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from unimod.config import expanded
from unimod.data.sample import SPLITS, DataError, Question, Sample, check_request, split_of, split_words

EXAMPLE = '{"image": "cats/1.png", "caption": "a cat on a mat", "questions": [{"question": "where is the cat?", "answer": "on a mat"}]}'


class Folder:
    """The data set. Entries that cannot be used are left out and listed in `skipped`, as (where, reason).

    Raises DataError where the folder or its data.jsonl is missing, where fewer than three pictures are usable (each split
    needs one), and, under `strict`, where any entry had to be skipped.
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
            raise DataError(f"folder {str(folder)!r}: there is no {what}; give a folder with a data.jsonl of lines like\n{EXAMPLE}")
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
        """Every word of the captions, questions and answers of all splits, sorted."""
        entries = [entry for members in self._entries.values() for entry in members]
        texts = [text for entry in entries for text in (entry.caption, *(t for q in entry.questions for t in (q.text, q.answer)))]
        return tuple(sorted(set(split_words(" ".join(texts)))))

    def size(self, split: str) -> int:
        """The number of entries in the split."""
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
        reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(reason for _, reason in self.skipped).most_common())
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
    """The sample of one parsed line. Raises DataError with the reason where it cannot be used."""
    if not isinstance(record, dict):
        raise DataError("not a JSON object")
    name, caption, asked = text_of(record, "image"), text_of(record, "caption"), record.get("questions")
    if not isinstance(asked, list) or not asked:
        raise DataError("no questions")
    if not all(isinstance(question, dict) for question in asked):
        raise DataError("a question is not a JSON object")
    questions = tuple(
        Question(text_of(q, "question"), text_of(q, "answer"), text_of(q, "kind") if "kind" in q else "question") for q in asked
    )
    try:
        path = (root / name).resolve()
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


def text_of(record: dict, field: str) -> str:
    """The stripped text of a field. Raises DataError where it is absent, empty or no text."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"no {field}")
    return value.strip()


def read_picture(path: Path, image_size: int) -> np.ndarray:
    """A picture file as uint8 RGB [S, S, 3]; raises what Pillow raises for a file it cannot read, and ValueError for numbers without a known white."""
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
    if picture.mode in ("I", "F"):
        raise ValueError(f"a picture of mode {picture.mode} does not say which number is white")
    if picture.mode.startswith("I;16"):                         # which convert() would cut at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture = picture.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return np.asarray(ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BICUBIC))


def split_paths(paths: set[str], source: Path) -> dict[str, str]:
    """The split of every picture, by a hash of its path; an empty split takes one from the fullest.

    Raises DataError for fewer than three pictures.
    """
    if len(paths) < len(SPLITS):
        raise DataError(f"{source} has {len(paths)} usable pictures, too few for train, validation and test: add at least 3 in all")
    members = {split: [path for path in sorted(paths) if split_of(path) == split] for split in SPLITS}
    for split in SPLITS:
        if not members[split]:
            members[split].append(max(members.values(), key=len).pop())
    return {path: split for split, held in members.items() for path in held}
