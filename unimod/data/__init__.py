"""The data sets: pictures with captions and questions, opened by name.

    from unimod.data import open_data
    data = open_data("scenes", level="hard")
    sample = data.sample("train", 0)

"scenes" draws colored shapes without end, "digits" holds scikit-learn's 1,797 handwritten digits, and "folder" reads
the user's own pictures; `sample.Dataset` is the contract they share.
"""

from unimod.data.digits import Digits
from unimod.data.folder import Folder
from unimod.data.sample import SPLITS, DataError, Dataset, Question, Sample, Thing, split_words
from unimod.data.scenes import LEVELS, Level, Scenes

__all__ = [
    "DATA", "LEVELS", "SPLITS", "DataError", "Dataset", "Digits", "Folder", "Level", "Question", "Sample", "Scenes", "Thing",
    "open_data", "split_words",
]

DATA = ("scenes", "digits", "folder")


def open_data(
    name: str, *, image_size: int = 48, level: str | Level = "default", folder: str = "", strict: bool = False, seed: int = 0
) -> Dataset:
    """The data set of that name, with pictures of [image_size, image_size, 3].

    `level` is for scenes only, `folder` and `strict` are for folder only, and `seed` picks another stream of samples
    (scenes) or questions (digits).
    Raises DataError, naming what is allowed, for an unknown name or an option the data set does not take.
    """
    if name not in DATA:
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(DATA)}")
    if name != "scenes" and level != "default":
        raise DataError(f"level {level!r} is an option of scenes; leave it at its default for {name}")
    if name != "folder" and (folder or strict):
        raise DataError(f'folder={folder!r}, strict={strict} are options of folder; drop them, or use name="folder" instead of {name!r}')
    if name == "scenes":
        return Scenes(image_size, level, seed)
    if name == "digits":
        return Digits(image_size, seed)
    return Folder(folder, image_size, strict)
