"""The default data set: one to four colored shapes, drawn on the fly and without end.

    data = Scenes()                              # or Scenes(level="hard"), or open_data("scenes", level="hard")
    sample = data.sample("train", 0)             # image, caption, eight questions, category, things

The picture has 2 x 2 cells; each object sits in a cell of its own. What a scene holds, its content, is the set of
(cell, color, shape): 13**4 - 1 = 28,560 contents. A hash of the content alone decides the split, so no test content is
ever in train, whatever the level or seed. Two levels with the same seed show the same contents; a level only changes
what the caption leaves open: where in its quarter an object is, how large it is, and on which background.

The caption settles the content. Each sample has one category, after GenEval's:

    single_object      one object
    two_objects        two objects that share a color or a shape, not both
    attribute_binding  two objects that differ in color and in shape
    position           two different objects, and how one lies to the other
    counting           two to four objects, all alike
    color              three or four objects, not all alike

Contents of one object are few (48) and of four alike objects fewer (12); SALT is chosen so that every split has some of
each: validation and test hold seven single objects each, of every color, shape and cell among them.
"""

import itertools
import random
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np

from unimod.data.sources import DataError, Question, Sample, Thing, check_request, split_of, vocabulary

COLORS = {"red": (214, 40, 40), "green": (30, 150, 70), "blue": (40, 80, 210), "yellow": (250, 200, 30)}
SHAPES = ("circle", "square", "triangle")
CELLS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
BACKGROUNDS = {"white": (245, 245, 245), "silver": (190, 190, 190), "gray": (110, 110, 110), "black": (20, 20, 20)}
KINDS = ("existence", "color", "shape", "count", "position")
CATEGORIES = {  # category -> how often each number of objects is drawn; the weights sum to 100
    "single_object": {1: 20},
    "two_objects": {2: 10},
    "attribute_binding": {2: 10},
    "position": {2: 12},
    "counting": {2: 4, 3: 6, 4: 6},
    "color": {3: 16, 4: 16},
}
SALT = "scene-59"
QUESTIONS_PER_SAMPLE = 8

Content = tuple[tuple[int, str, str], ...]  # (cell, color, shape), ordered by cell
_DRAWS = [(category, count) for category, counts in CATEGORIES.items() for count in counts]
_WEIGHTS = [weight for counts in CATEGORIES.values() for weight in counts.values()]
COLORED_SHAPES = [(color, shape) for color in COLORS for shape in SHAPES]


@dataclass(frozen=True)
class Level:
    """What varies beyond the content. Lengths are pixels of a 48-pixel picture and grow with it.

    `jitter`: how far an object may lie from its cell's center, each way. `sizes`: side of the square an object is drawn
    in, its 1-pixel margin included (from 14, below which shapes are hard to tell apart). `backgrounds`: names from
    BACKGROUNDS. `placement`: "cells" keeps an object inside its cell; "free" only keeps its center in that quarter, and
    objects apart (jitter then has no further effect). Raises DataError for an option outside these.
    """

    jitter: int = 0
    sizes: tuple[int, ...] = (24,)
    backgrounds: tuple[str, ...] = ("white",)
    placement: str = "cells"

    def __post_init__(self):
        if not self.sizes or not all(14 <= size <= 24 for size in self.sizes):
            raise DataError(f"sizes {self.sizes} must hold at least one side, each from 14 to 24 pixels")
        if not 0 <= self.jitter <= (24 - max(self.sizes)) // 2:
            most = (24 - max(self.sizes)) // 2
            raise DataError(f"jitter {self.jitter} must be from 0 to {most}, or objects leave their cells")
        if not self.backgrounds or not set(self.backgrounds) <= set(BACKGROUNDS):
            raise DataError(f"backgrounds {self.backgrounds} must be one or more of {', '.join(BACKGROUNDS)}")
        if self.placement not in ("cells", "free"):
            raise DataError(f'placement {self.placement!r} must be "cells" or "free"')
        if self.placement == "free" and max(self.sizes) > 18:
            raise DataError("free placement needs sizes of at most 18 pixels, or four objects may not fit; got "
                            f"{self.sizes}")


LEVELS = {
    "default": Level(),
    "jitter": Level(jitter=2, sizes=(20,)),
    "sizes": Level(sizes=(14, 18, 24)),
    "backgrounds": Level(backgrounds=tuple(BACKGROUNDS)),
    "free": Level(sizes=(16,), placement="free"),
    "hard": Level(sizes=(14, 16, 18), backgrounds=tuple(BACKGROUNDS), placement="free", jitter=3),
}


class Scenes:
    """The data set, unlimited in every split. Raises DataError for an unknown level or a size that does not fit.

    `image_size` is a multiple of 16 from 48: the two cells of a row then start on the 8-pixel token grid.
    `level` is a name from LEVELS or a Level of one's own.
    """

    name = "scenes"
    kinds = KINDS

    def __init__(self, image_size: int = 48, level: str | Level = "default", seed: int = 0):
        if image_size < 48 or image_size % 16:
            raise DataError(f"image_size {image_size} does not suit scenes: use a multiple of 16 from 48, such as 48, "
                            "64 or 96")
        if isinstance(level, str) and level not in LEVELS:
            raise DataError(f"unknown level {level!r}: choose one of {', '.join(LEVELS)}")
        self.image_size, self.seed = image_size, seed
        self.level = LEVELS[level] if isinstance(level, str) else level

    def words(self) -> tuple[str, ...]:
        fixed = "a at the and , left of right above below is are there ? what color shape how many shapes where yes no"
        return vocabulary(fixed, *COLORS, *SHAPES, *(shape + "s" for shape in SHAPES), *CELLS, *NUMBERS)

    def size(self, split: str) -> None:
        check_request(split, 0)

    def sample(self, split: str, index: int, seed: int = 0) -> Sample:
        """Scene `index` of a split; image uint8 [S, S, 3]. `seed` picks another endless stream of the same split."""
        check_request(split, index)
        rng = random.Random(f"{self.seed}/{seed}/{split}/{index}")
        category, count = rng.choices(_DRAWS, _WEIGHTS)[0]
        content = draw_content(rng, category, count)
        while scene_split(content) != split:
            content = draw_content(rng, category, count)
        caption, questions = caption_of(content, category, rng), questions_of(content, rng)
        image, things = draw(content, self.level, self.image_size, rng)
        return Sample(f"scenes/{split}/{self.seed}-{seed}-{index}", image, caption, questions, category, things)


@cache
def scene_split(content: Content) -> str:
    """The split a content belongs to, decided by a stable hash of the content alone."""
    return split_of(SALT + " " + "; ".join(f"{cell} {color} {shape}" for cell, color, shape in content))


def draw_content(rng: random.Random, category: str, count: int) -> Content:
    """A random content of `count` objects that fits the category."""
    cells = sorted(rng.sample(range(4), count))
    while True:
        alike = category == "counting"
        drawn = rng.choices(COLORED_SHAPES, k=1 if alike else count) * (count if alike else 1)
        colors, shapes = (len(set(values)) for values in zip(*drawn))
        allowed = {"two_objects": (3,), "attribute_binding": (4,), "position": (3, 4), "color": range(3, 8)}
        if colors + shapes in allowed.get(category, (2,)):
            return tuple((cell, color, shape) for cell, (color, shape) in zip(cells, drawn))


def listed(parts: list[str]) -> str:
    """["x", "y", "z"] -> "x, y and z"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def caption_of(content: Content, category: str, rng: random.Random) -> str:
    """The sentence that settles the content, at most 24 words and marks; only "position" makes a random choice."""
    if category == "counting":
        _, color, shape = content[0]
        return f"{NUMBERS[len(content)]} {color} {shape}s at the {listed([CELLS[cell] for cell, _, _ in content])}"
    if len(content) > 2:
        return listed([f"a {color} {shape} {CELLS[cell]}" for cell, color, shape in content])
    phrases = [f"a {color} {shape} at the {CELLS[cell]}" for cell, color, shape in content]
    if category != "position":
        return listed(phrases)
    (row, column), (other_row, other_column) = divmod(content[0][0], 2), divmod(content[1][0], 2)
    relations = []  # how the first object lies to the second, and the second to the first
    if row != other_row:
        relations.append(("above", "below"))
    if column != other_column:
        relations.append(("left of", "right of") if column < other_column else ("right of", "left of"))
    relation, turn = rng.choice(relations), rng.randrange(2)
    return f"{phrases[turn]}, {relation[turn]} {phrases[1 - turn]}"


def questions_of(content: Content, rng: random.Random) -> tuple[Question, ...]:
    """Eight in random order: existence twice, color and shape of up to two objects, position if unique, counts."""
    present = Counter((color, shape) for _, color, shape in content)
    absent = [kind for kind in COLORED_SHAPES if kind not in present]
    near = [kind for kind in absent if any((kind[0] == color) != (kind[1] == shape) for color, shape in present)]
    asked, named = [], set()
    for _ in range(2):
        there = rng.random() < 0.5 and not present.keys() <= named
        # four of five negatives share the color or the shape of an object, so that neither alone gives the answer
        pool = list(present) if there else near if rng.random() < 0.8 else absent
        color, shape = rng.choice([kind for kind in pool if kind not in named])
        named.add((color, shape))
        asked.append(Question(f"is there a {color} {shape}?", "yes" if there else "no", "existence"))
    for cell, color, _ in rng.sample(content, min(2, len(content))):
        asked.append(Question(f"what color is the shape at the {CELLS[cell]}?", color, "color"))
    for cell, _, shape in rng.sample(content, min(2, len(content))):
        asked.append(Question(f"what shape is at the {CELLS[cell]}?", shape, "shape"))
    unique = [thing for thing in content if present[thing[1:]] == 1]
    if unique:
        cell, color, shape = rng.choice(unique)
        asked.append(Question(f"where is the {color} {shape}?", CELLS[cell], "position"))
    shown = rng.choice(content)[1]
    other = rng.choice([color for color in COLORS if color != shown])
    counts = ["shapes", f"{shown} shapes", f"{other} shapes", rng.choice(SHAPES) + "s"]
    for what in rng.sample(counts, QUESTIONS_PER_SAMPLE - len(asked)):
        number = sum(what in ("shapes", f"{color} shapes", f"{shape}s") for _, color, shape in content)
        asked.append(Question(f"how many {what} are there?", NUMBERS[number], "count"))
    rng.shuffle(asked)
    return tuple(asked)


@cache
def shape_mask(shape: str, height: int, width: int) -> np.ndarray:
    """The pixels of a shape that fills its box and touches all four sides: bool [height, width]."""
    # whole numbers, so that every machine agrees: twice the distances of a pixel's center
    x, y = (np.abs(2 * np.arange(n) + 1 - n) for n in (width, height))  # from the middle column and row
    top = 2 * np.arange(height) + 1
    if shape == "circle":
        return (x * height) ** 2 + (y[:, None] * width) ** 2 <= (height * width) ** 2
    if shape == "triangle":
        return 2 * x * height <= np.maximum(top[:, None] * width, 2 * height)  # at least the tip in every row
    return np.ones((height, width), bool)


def draw(content: Content, level: Level, image_size: int, rng: random.Random) -> tuple[np.ndarray, tuple[Thing, ...]]:
    """The picture, uint8 [S, S, 3], and its objects in the order of `content`. Edges are hard: no color is mixed."""
    image = np.full((image_size, image_size, 3), BACKGROUNDS[rng.choice(level.backgrounds)], np.uint8)
    sides = [rng.choice(level.sizes) * image_size // 48 for _ in content]
    corners = place([cell for cell, _, _ in content], sides, level, image_size, rng)
    things = []
    for (cell, color, shape), side, (x, y) in zip(content, sides, corners):
        box = (x + 1, y + 1, x + side - 1, y + side - 1)
        image[box[1] : box[3], box[0] : box[2]][shape_mask(shape, side - 2, side - 2)] = COLORS[color]
        things.append(Thing(color, shape, cell, box))
    return image, tuple(things)


def place(cells: list[int], sides: list[int], level: Level, image_size: int,
          rng: random.Random) -> list[tuple[int, int]]:
    """The top left corner (x, y) of each object's square; no two squares overlap, each center is in its cell."""
    half = image_size // 2
    if level.placement == "cells":
        reach = level.jitter * image_size // 48
        return [tuple(half * part + (half - side) // 2 + rng.randint(-reach, reach) for part in (cell % 2, cell // 2))
                for cell, side in zip(cells, sides)]

    def along(second: int, side: int) -> int:
        # the center stays two pixels clear of the picture's middle line, so that its quarter is never in doubt
        if second:
            return rng.randint(half + 2 - side // 2, image_size - side)
        return rng.randint(0, half - 2 - (side + 1) // 2)

    while True:  # drawn anew until no two squares overlap
        corners = [(along(cell % 2, side), along(cell // 2, side)) for cell, side in zip(cells, sides)]
        pairs = itertools.combinations(zip(corners, sides), 2)
        if all(x + side <= u or u + other <= x or y + side <= v or v + other <= y
               for ((x, y), side), ((u, v), other) in pairs):
            return corners
