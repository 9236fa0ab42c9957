"""The data sets: pictures with captions and questions, opened by name.

    from unimod.data import open_data
    sample = open_data("scenes", level="hard").sample("train", 0)     # image, caption, questions, category, things

"scenes" draws colored shapes without end, "digits" holds scikit-learn's 1,797 handwritten digits, and "folder" reads
the user's own pictures; `sources.Dataset` is the contract they share.

How to add a data set: write its class and enter it in `SOURCES`; its name in `DATA` of `unimod/config.py` offers it to
the notebooks and to `python -m unimod run`.

    import numpy as np
    from unimod.data import SOURCES, Question, Sample, check_request, open_data, vocabulary

    class Grays:
        name, kinds = "grays", ("shade",)

        def __init__(self, image_size: int = 48, seed: int = 0):
            self.image_size = image_size

        def words(self): return vocabulary("a dark bright wall is it ? yes no")

        def size(self, split): return check_request(split, 0)         # None: no end

        def sample(self, split, index, seed=0):
            check_request(split, index)
            shade, image = ("dark", "bright")[index % 2], np.full((self.image_size,) * 2 + (3,), 64 + 128 * (index % 2))
            asked = Question("is it dark?", "no" if index % 2 else "yes", "shade")
            return Sample(f"grays/{split}/{index}", image.astype(np.uint8), f"a {shade} wall", (asked,))

    SOURCES["grays"] = Grays
    sample = open_data("grays").sample("train", 1)
"""

from unimod.data.scenes import LEVELS, Level, Scenes
from unimod.data.sources import (
    SPLITS,
    DataError,
    Dataset,
    Digits,
    Folder,
    Question,
    Sample,
    Thing,
    check_request,
    split_words,
    vocabulary,
)

__all__ = [
    "LEVELS", "SOURCES", "SPLITS", "DataError", "Dataset", "Digits", "Folder", "Level", "Question", "Sample", "Scenes",
    "Thing", "check_request", "open_data", "split_words", "vocabulary",
]

SOURCES = {"scenes": Scenes, "digits": Digits, "folder": Folder}


def open_data(name: str, *, image_size: int = 48, level: str | Level = "default", folder: str = "",
              strict: bool = False, seed: int = 0) -> Dataset:
    """The data set of that name, with pictures of [image_size, image_size, 3].

    `level` is for scenes only, `folder` and `strict` are for folder only, and `seed` picks another stream of samples
    (scenes) or questions (digits).
    Raises DataError, naming what is allowed, for an unknown name or an option the data set does not take.
    """
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(SOURCES)}")
    if name != "scenes" and level != "default":
        raise DataError(f"level {level!r} is an option of scenes; leave it at its default for {name}")
    if name != "folder" and (folder or strict):
        given = f"folder={folder!r}, strict={strict}"
        raise DataError(f'{given} are options of folder; drop them, or use name="folder" instead of {name!r}')
    if name == "scenes":
        return Scenes(image_size, level, seed)
    if name == "folder":
        return Folder(folder, image_size, strict)
    return SOURCES[name](image_size, seed)
