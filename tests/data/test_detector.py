from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from unimod.data import LEVELS, Digits, Scenes
from unimod.data.scenes import BACKGROUNDS, COLORS
from unimod.evaluate import detect, matches

RENDERS = 1000


def noisy(image, rng, blur=0.0, noise=0.0):
    """A picture as a decoder may give it back: blurred, then with Gaussian noise."""
    blurred = ndimage.gaussian_filter(image.astype(np.float32), (blur, blur, 0))
    return (blurred + rng.normal(0, noise, image.shape)).clip(0, 255).astype(np.uint8)


def many(level, count=RENDERS, split="train"):
    data = Scenes(level=level)
    return [data.sample(split, index) for index in range(count)]


@pytest.mark.parametrize("level", LEVELS)
def test_ground_truth_is_read_right(level):
    right = np.mean([matches(detect(sample.image), sample) for sample in many(level)])
    print(f"{level}: {right:.2%} of {RENDERS} renders")
    assert right >= 0.995


@pytest.mark.parametrize("level", LEVELS)
def test_found_boxes_lie_on_the_drawn_objects(level):
    for sample in many(level, 100):
        for found, drawn in zip(detect(sample.image), sorted(sample.things, key=lambda thing: thing.cell), strict=True):
            assert (found.color, found.shape, found.cell) == (drawn.color, drawn.shape, drawn.cell)
            assert np.abs(np.subtract(found.box, drawn.box)).max() <= 3


@pytest.mark.parametrize(
    ("level", "least"), [("default", 0.99), ("jitter", 0.99), ("backgrounds", 0.95), ("free", 0.97), ("hard", 0.9)]
)
def test_noise_and_blur_do_little_harm(level, least):
    rng = np.random.default_rng(0)
    assert (
        np.mean([matches(detect(noisy(sample.image, rng, blur=0.8, noise=20)), sample) for sample in many(level, 100)])
        >= least
    )


def test_specks_are_ignored():
    rng, right = np.random.default_rng(0), []
    for sample in many("default", 200):
        image = sample.image.copy()
        for color in COLORS.values():
            y, x = rng.integers(0, 46, 2)
            image[y : y + 2, x : x + 2] = color
        right.append(matches(detect(image), sample))
    assert np.mean(right) >= 0.97  # a speck may bridge the gap between two objects of its color


@pytest.mark.parametrize("level", LEVELS)
def test_a_wrong_picture_never_matches(level):
    rng = np.random.default_rng(0)
    for sample in many(level, 100):
        thing = sample.things[rng.integers(len(sample.things))]
        x0, y0, x1, y1 = thing.box
        inside = (sample.image == COLORS[thing.color]).all(-1)
        inside[:y0], inside[y1:], inside[:, :x0], inside[:, x1:] = False, False, False, False
        other = next(color for color in COLORS if color != thing.color)

        recolored = np.where(inside[..., None], np.uint8(COLORS[other]), sample.image)
        found = detect(recolored)
        assert not matches(found, sample)
        wanted = sorted((t.cell, t.shape) for t in sample.things)
        assert sorted((t.cell, t.shape) for t in found) == wanted
        assert sorted(t.color for t in found) != sorted(t.color for t in sample.things)

        missing = np.where(inside[..., None], sample.image[0, 0], sample.image)
        found = detect(missing)
        assert not matches(found, sample)
        assert len(found) == len(sample.things) - 1

        mirrored = detect(np.ascontiguousarray(sample.image[:, ::-1]))
        flipped = {(thing.color, thing.shape, thing.cell ^ 1) for thing in sample.things}
        assert {(thing.color, thing.shape, thing.cell) for thing in mirrored} == flipped
        assert matches(mirrored, sample) == (
            flipped == {(thing.color, thing.shape, thing.cell) for thing in sample.things}
        )


def test_a_wrong_shape_is_told_apart():
    sample = next(
        sample
        for sample in many("default", 50)
        if sample.caption.startswith("a ") and sample.things[0].shape == "circle"
    )
    x0, y0, x1, y1 = sample.things[0].box
    image = sample.image.copy()
    image[y0:y1, x0:x1] = COLORS[sample.things[0].color]
    assert detect(image)[0] == replace(sample.things[0], shape="square", box=detect(image)[0].box)
    assert not matches(detect(image), sample)


def test_a_match_has_neither_too_few_nor_too_many():
    sample = next(sample for sample in many("default", 50) if len(sample.things) == 4)
    assert matches(sample.things, sample)
    for wrong in ((), sample.things[:3], (*sample.things, *sample.things)):
        assert not matches(wrong, sample)


def test_what_is_no_object_is_not_found():
    for color in BACKGROUNDS.values():
        assert detect(np.full((48, 48, 3), color, np.uint8)) == ()
    assert detect(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)) == ()
    assert detect(np.full((48, 48, 3), COLORS["red"], np.uint8)) == ()  # far larger than any object
    bar = np.full((48, 48, 3), BACKGROUNDS["white"], np.uint8)
    bar[4:12, 2:24] = COLORS["blue"]
    assert detect(bar) == ()  # far longer than any object


def test_cells_are_quarters_by_the_center():
    image = np.full((48, 48, 3), BACKGROUNDS["white"], np.uint8)
    for color, (x, y) in zip(COLORS.values(), [(1, 1), (26, 2), (6, 30), (16, 16)]):
        image[y : y + 12, x : x + 12] = color
    image[16:32, 16:32] = list(COLORS.values())[3]              # its center is the picture's
    assert {thing.color: thing.cell for thing in detect(image)} == dict(zip(COLORS, range(4)))


@pytest.mark.parametrize(
    "image", [np.zeros((48, 48, 3)), np.zeros((48, 40, 3), np.uint8), np.zeros((48, 48), np.uint8)]
)
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match="uint8 picture"):
        detect(image)


def test_samples_without_objects_are_refused():
    with pytest.raises(ValueError, match="no ground-truth objects"):
        matches((), Digits().sample("test", 0))
