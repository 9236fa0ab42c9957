"""Real pictures without a download: the 1,797 handwritten digits that scikit-learn carries, one to a picture.

    data = Digits()                              # or open_data("digits")
    sample = data.sample("test", 0)              # "a handwritten three", and six questions about it

The scans are 8 x 8 pixels, enlarged smoothly to `image_size` and shown dark on white. A hash of a digit's number in the
collection decides its split, the same in every run.
"""

import random

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from unimod.data.sample import SPLITS, DataError, Question, Sample, check_request, split_of, split_words

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = ("digit", "parity", "compare")


class Digits:
    """The data set. Raises DataError for an image_size below 8, the size of the scans."""

    name = "digits"
    kinds = KINDS

    def __init__(self, image_size: int = 48, seed: int = 0):
        if image_size < 8:
            raise DataError(f"image_size {image_size} is smaller than the 8-pixel scans: use 8 or more, such as 48")
        self.image_size = image_size
        self.seed = seed
        scans = load_digits()
        self._scans, self._labels = scans.images, scans.target
        self._members = {split: [i for i in range(len(self._labels)) if split_of(f"digit {i}") == split] for split in SPLITS}

    def words(self) -> tuple[str, ...]:
        """Every word of the captions, questions and answers, sorted."""
        return tuple(sorted(set(split_words(" ".join(("a handwritten which digit is this ? it even odd greater than yes no", *NAMES))))))

    def size(self, split: str) -> int:
        """The number of scans in the split."""
        check_request(split, 0)
        return len(self._members[split])

    def sample(self, split: str, index: int, seed: int = 0) -> Sample:
        """Scan `index` modulo the split's size; each round, and each seed, asks other questions about the same scans."""
        check_request(split, index)
        number = self._members[split][index % self.size(split)]
        digit = int(self._labels[number])
        rng = random.Random(f"{self.seed}/{seed}/{split}/{index}")
        image = enlarged(self._scans[number], self.image_size)
        return Sample(f"digits/{number}", image, f"a handwritten {NAMES[digit]}", questions_of(digit, rng), NAMES[digit])


def enlarged(scan: np.ndarray, image_size: int) -> np.ndarray:
    """A scan, float [8, 8] from 0 (paper) to 16 (ink), as a gray picture: uint8 [S, S, 3]."""
    paper = Image.fromarray((255 - scan * (255 / 16)).astype(np.uint8))
    return np.asarray(paper.resize((image_size, image_size), Image.Resampling.BICUBIC).convert("RGB"))


def questions_of(digit: int, rng: random.Random) -> tuple[Question, ...]:
    """Six questions in random order: which digit, even, odd, and three times whether it is greater than another."""
    asked = [Question("which digit is this?", NAMES[digit], "digit")]
    for name, remainder in (("even", 0), ("odd", 1)):
        asked.append(Question(f"is it {name}?", "yes" if digit % 2 == remainder else "no", "parity"))
    for other in rng.sample(range(9), 3):
        asked.append(Question(f"is it greater than {NAMES[other]}?", "yes" if digit > other else "no", "compare"))
    rng.shuffle(asked)
    return tuple(asked)
