"""Reads the objects out of a picture of scenes, drawn or generated, and compares them with what its caption asked for.

    found = detect(picture)                      # (Thing("red", "circle", cell=0, box=(1, 1, 23, 23)), ...)
    matches(found, sample)                       # the picture is fully right
    partial(found, sample)                       # {"count": 1.0, "colors": 0.5, "shapes": 1.0, "positions": 1.0}

There is no learning in it. The background is the palette's one nearest to most pixels; each pixel is then read as a mix
of it with one palette color, and counts for that color where the mix is more than half. A majority of 3 x 3 pixels
removes noise and specks, and each connected patch of one color is compared with the outline of each shape, stretched to
the patch's box. A patch that is too small, too large, too long or like no shape is not an object.
"""

from collections import Counter

import numpy as np
from scipy import ndimage

from unimod.data.scenes import BACKGROUNDS, COLORS, SHAPES, shape_mask
from unimod.data.sources import Sample, Thing

SMALLEST, LARGEST = 1 / 8, 0.55  # allowed side of an object's box, as a share of the picture's side
LONGEST = 1.6  # allowed ratio of the box's sides
LEAST_OVERLAP = 0.7  # intersection over union with the best shape, below which a patch is no object
FARTHEST = 90.0  # distance in RGB from every mix of background and color, above which a pixel is neither
_PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], np.float32)


def detect(image: np.ndarray) -> tuple[Thing, ...]:
    """The objects in a picture, uint8 [S, S, 3], ordered by cell and place; raises ValueError for any other array."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape != (len(image), len(image), 3):
        raise ValueError(f"detect needs a square uint8 picture [S, S, 3]; got {image.dtype} {list(image.shape)}")
    colors = color_map(image)
    things = []
    for number, color in enumerate(COLORS):
        if number not in colors:
            continue
        votes = ndimage.uniform_filter((colors == number).astype(np.float32), size=3, mode="constant")
        patches, _ = ndimage.label(votes > 0.5)
        for label, (rows, columns) in enumerate(ndimage.find_objects(patches), start=1):
            box = (columns.start, rows.start, columns.stop, rows.stop)
            shape = shape_of(patches[rows, columns] == label, len(image))
            if shape:
                things.append(Thing(color, shape, cell_of(box, len(image)), box))
    return tuple(sorted(things, key=lambda thing: (thing.cell, thing.box, thing.color)))


def color_map(image: np.ndarray) -> np.ndarray:
    """The color of each pixel of uint8 [S, S, 3], as its number in COLORS, or -1 for the background: int [S, S]."""
    pixels = image.reshape(-1, 3).astype(np.float32)
    # squared distances, less the pixel's own square, which is the same for every palette color
    nearest = ((_PALETTE**2).sum(-1) - 2 * pixels @ _PALETTE.T).argmin(-1)
    background = _PALETTE[len(COLORS) + np.bincount(nearest, minlength=len(_PALETTE))[len(COLORS) :].argmax()]
    offsets, axes = pixels - background, _PALETTE[: len(COLORS)] - background
    lengths, along = (axes**2).sum(-1), offsets @ axes.T
    shares = (along / lengths).clip(0, 1)  # [pixels, colors], how much of each color is in the mix
    misses = (offsets**2).sum(-1, keepdims=True) + shares * (shares * lengths - 2 * along)  # squared distance to that mix
    best = misses.argmin(-1)
    pick = np.arange(len(pixels)), best
    return np.where((shares[pick] > 0.5) & (misses[pick] < FARTHEST**2), best, -1).reshape(image.shape[:2])


def shape_of(mask: np.ndarray, image_size: int) -> str:
    """The shape that a patch, bool [height, width] cut to its box, looks most like; "" where it is no object."""
    short, long = sorted(mask.shape)
    if short < SMALLEST * image_size or long > LARGEST * image_size or long > LONGEST * short:
        return ""
    outlines = {shape: shape_mask(shape, *mask.shape) for shape in SHAPES}
    overlaps = {shape: (mask & outline).sum() / (mask | outline).sum() for shape, outline in outlines.items()}
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= LEAST_OVERLAP else ""


def cell_of(box: tuple[int, int, int, int], image_size: int) -> int:
    """The quarter of the picture that holds the center of the box: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""
    x0, y0, x1, y1 = box
    return 2 * (y0 + y1 >= image_size) + (x0 + x1 >= image_size)


def matches(found: tuple[Thing, ...], sample: Sample) -> bool:
    """Whether exactly the objects that the caption names were found, each with its color, shape and quarter.

    Raises ValueError for a sample without ground truth, as partial does.
    """
    return Counter(map(_claim, found)) == Counter(map(_claim, _wanted(sample)))


def partial(found: tuple[Thing, ...], sample: Sample) -> dict[str, float]:
    """How far the objects found are right, each from 0 to 1.

    "count" is 1 where the number of objects is right, else 0; "colors", "shapes" and "positions" (quarters) are the share
    that agrees, whichever object has it, out of the objects wanted or found, whichever are more.
    """
    wanted = _wanted(sample)
    scores = {"count": float(len(found) == len(wanted))}
    for name, field in (("colors", "color"), ("shapes", "shape"), ("positions", "cell")):
        common = Counter(getattr(thing, field) for thing in found) & Counter(getattr(thing, field) for thing in wanted)
        scores[name] = common.total() / max(len(found), len(wanted))
    return scores


def _claim(thing: Thing) -> tuple[str, str, int]:
    return thing.color, thing.shape, thing.cell


def _wanted(sample: Sample) -> tuple[Thing, ...]:
    if not sample.things:
        raise ValueError(f"sample {sample.key!r} has no ground-truth objects: only samples of scenes can be compared")
    return sample.things
