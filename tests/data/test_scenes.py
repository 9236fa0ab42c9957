import itertools
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from unimod.data import LEVELS, SPLITS, DataError, Level, Scenes, open_data, split_words
from unimod.data.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    CELLS,
    COLORS,
    NUMBERS,
    QUESTIONS_PER_SAMPLE,
    SHAPES,
    scene_split,
)

OBJECT = rf"a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?: at the)? ({'|'.join(CELLS)})"
COUNTED = rf"({'|'.join(NUMBERS)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})s at the (.+)"


@cache
def draw_many(level="default", split="train", count=500, seed=0):
    data = Scenes(level=level)
    return [data.sample(split, index, seed) for index in range(count)]


def content(sample):
    return tuple((thing.cell, thing.color, thing.shape) for thing in sample.things)


def parse(caption):
    """The content a caption names, read by its grammar alone."""
    counted = re.fullmatch(COUNTED, caption)
    if counted:
        number, color, shape, cells = counted.groups()
        cells = re.split(", | and ", cells)
        assert NUMBERS.index(number) == len(cells)
        return tuple((CELLS.index(cell), color, shape) for cell in cells)
    assert re.fullmatch(rf"{OBJECT}(?:(?:, | and |, (?:left of|right of|above|below) ){OBJECT})*", caption), caption
    return tuple(sorted((CELLS.index(cell), color, shape) for color, shape, cell in re.findall(OBJECT, caption)))


def answer(text, things):
    """The answer to a question, derived from the ground-truth objects alone."""
    if found := re.fullmatch(r"is there a (\w+) (\w+)\?", text):
        return "yes" if any((thing.color, thing.shape) == found.groups() for thing in things) else "no"
    if found := re.fullmatch(r"what color is the shape at the (.+)\?", text):
        return next(thing.color for thing in things if CELLS[thing.cell] == found[1])
    if found := re.fullmatch(r"what shape is at the (.+)\?", text):
        return next(thing.shape for thing in things if CELLS[thing.cell] == found[1])
    if found := re.fullmatch(r"where is the (\w+) (\w+)\?", text):
        (thing,) = (thing for thing in things if (thing.color, thing.shape) == found.groups())
        return CELLS[thing.cell]
    words = re.fullmatch(r"how many (.+)s are there\?", text)[1].split()
    return NUMBERS[sum(set(words) <= {"shape", thing.color, thing.shape} for thing in things)]


def test_the_same_request_gives_the_same_sample():
    for level in LEVELS:
        one, two = Scenes(level=level).sample("test", 7), open_data("scenes", level=level).sample("test", 7)
        assert (one.key, one.caption, one.questions, one.things) == (two.key, two.caption, two.questions, two.things)
        np.testing.assert_array_equal(one.image, two.image)
    data = Scenes()
    streams = [
        data.sample("train", 7),
        data.sample("train", 8),
        data.sample("train", 7, seed=1),
        Scenes(seed=1).sample("train", 7),
    ]
    assert len({sample.caption for sample in streams}) == len({sample.key for sample in streams}) == 4


def test_splits_share_no_content_at_any_level_or_seed():
    seen = {split: {content(sample) for sample in draw_many(split=split, count=1500)} for split in SPLITS}
    for level, seed, split in itertools.product(LEVELS, (1, 2), SPLITS):
        seen[split] |= {content(sample) for sample in draw_many(level, split, 80, seed)}
    assert min(map(len, seen.values())) > 400
    assert not any(seen[one] & seen[two] for one, two in itertools.combinations(SPLITS, 2))


def test_every_split_has_single_and_alike_objects():
    single = {split: [] for split in SPLITS}
    four = Counter()
    for color, shape in itertools.product(COLORS, SHAPES):
        four[scene_split(tuple((cell, color, shape) for cell in range(4)))] += 1
        for cell in range(4):
            single[scene_split(((cell, color, shape),))].append((cell, color, shape))
    assert {split: len(members) for split, members in single.items()} == {"train": 34, "validation": 7, "test": 7}
    assert all([len(set(values)) for values in zip(*members)] == [4, 4, 3] for members in single.values())
    assert set(four) == set(SPLITS)


def test_about_a_tenth_of_all_contents_is_held_out_in_each_split():
    cells = [[None, *itertools.product(COLORS, SHAPES)]] * 4
    counts = Counter(
        scene_split(tuple((cell, *look) for cell, look in enumerate(looks) if look))
        for looks in itertools.product(*cells)
        if any(looks)
    )
    assert counts.total() == 28_560
    assert counts["test"] == pytest.approx(2856, rel=0.05) and counts["validation"] == pytest.approx(2856, rel=0.05)


@pytest.mark.parametrize("split", SPLITS)
def test_categories_and_object_counts_all_occur(split):
    samples = draw_many(split=split, count=1500)
    categories = Counter(sample.category for sample in samples)
    for category, counts in CATEGORIES.items():
        assert categories[category] / 1500 == pytest.approx(sum(counts.values()) / 100, abs=0.035)
    objects = Counter(len(sample.things) for sample in samples)
    assert set(objects) == {1, 2, 3, 4} and min(objects.values()) > 240


def test_a_category_says_what_the_scene_is():
    for sample in draw_many(count=1500):
        colors, shapes, number = {t.color for t in sample.things}, {t.shape for t in sample.things}, len(sample.things)
        kinds = (len(colors), len(shapes))
        assert {
            "single_object": number == 1,
            "two_objects": number == 2 and sorted(kinds) == [1, 2],
            "attribute_binding": number == 2 and kinds == (2, 2),
            "position": number == 2 and kinds != (1, 1) and re.search("left of|right of|above|below", sample.caption),
            "counting": number > 1 and kinds == (1, 1),
            "color": number > 2 and kinds != (1, 1),
        }[sample.category]


@pytest.mark.parametrize("level", LEVELS)
def test_captions_parse_back_to_the_scene(level):
    for sample in draw_many(level):
        assert parse(sample.caption) == content(sample)
        assert len(split_words(sample.caption)) <= 24


@pytest.mark.parametrize("level", ["default", "free"])
def test_relations_hold_between_the_drawn_objects(level):
    relations = Counter()
    for sample in (sample for sample in draw_many(level, count=1500) if sample.category == "position"):
        relation = re.search(", (left of|right of|above|below) ", sample.caption)[1]
        (color, shape, _), *_ = re.findall(OBJECT, sample.caption)
        first, second = sorted(sample.things, key=lambda thing: (thing.color, thing.shape) != (color, shape))
        x, y = (first.box[i] + first.box[i + 2] - second.box[i] - second.box[i + 2] for i in (0, 1))
        assert {"left of": x < 0, "right of": x > 0, "above": y < 0, "below": y > 0}[relation]
        relations[relation] += 1
    assert len(relations) == 4 and min(relations.values()) > 20


@pytest.mark.parametrize("level", LEVELS)
def test_questions_have_the_right_answer(level):
    kinds = Counter()
    for sample in draw_many(level):
        assert len(sample.questions) == QUESTIONS_PER_SAMPLE == len({question.text for question in sample.questions})
        for question in sample.questions:
            assert question.answer == answer(question.text, sample.things), (sample.caption, question)
            kinds[question.kind] += 1
    assert set(kinds) == set(Scenes.kinds)
    assert kinds["existence"] == 1000 and kinds["color"] == kinds["shape"] > 500


def test_existence_answers_are_balanced_and_its_negatives_hard():
    answers, hard = Counter(), 0
    for sample in draw_many(count=1500):
        for question in (question for question in sample.questions if question.kind == "existence"):
            answers[question.answer] += 1
            color, shape = question.text[len("is there a ") : -1].split()
            hard += question.answer == "no" and any(color == t.color or shape == t.shape for t in sample.things)
    assert answers.total() == 3000 and 0.45 < answers["yes"] / 3000 < 0.52
    assert hard > 0.75 * answers["no"]


def test_no_answer_is_given_away_by_its_kind_alone():
    answers = {kind: Counter() for kind in Scenes.kinds}
    for sample in draw_many(count=1500):
        for question in sample.questions:
            answers[question.kind][question.answer] += 1
    for kind, most in {"existence": 0.55, "color": 0.3, "shape": 0.4, "position": 0.3, "count": 0.4}.items():
        assert max(answers[kind].values()) / answers[kind].total() < most, (kind, answers[kind])


def test_words_are_exactly_those_in_use():
    used = set()
    for sample in draw_many(count=1500):
        used |= set(split_words(" ".join([sample.caption, *(f"{q.text} {q.answer}" for q in sample.questions)])))
    assert tuple(sorted(used)) == Scenes().words()


def test_the_default_level_has_few_patches():
    pictures = np.stack([sample.image for sample in draw_many(count=1500)])
    patches = {patch.tobytes() for patch in pictures.reshape(-1, 6, 8, 6, 8, 3).swapaxes(2, 3).reshape(-1, 192)}
    print(f"{len(patches)} distinct patches")
    assert len(patches) == 89


@pytest.mark.parametrize("image_size", [48, 64])
@pytest.mark.parametrize("level", LEVELS)
def test_boxes_are_tight_and_objects_stay_apart_in_their_quarter(level, image_size):
    backgrounds = set()
    for sample in (Scenes(image_size, level).sample("train", index) for index in range(150)):
        assert sample.image.shape == (image_size, image_size, 3) and sample.image.dtype == np.uint8
        background = sample.image[0, 0]  # the margin around every object keeps the corner free
        drawn = (sample.image != background).any(-1)
        backgrounds.add(tuple(background.tolist()))
        for thing in sample.things:
            x0, y0, x1, y1 = thing.box
            object_pixels = (sample.image[y0:y1, x0:x1] == COLORS[thing.color]).all(-1)
            assert object_pixels[-1].any() and object_pixels[0].any() and object_pixels[:, 0].any()
            assert object_pixels[:, -1].any()
            around = drawn[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1].copy()
            around[1:-1, 1:-1] = False
            assert not around.any()
            assert thing.cell == 2 * (y0 + y1 > image_size) + (x0 + x1 > image_size)
    assert backgrounds == {BACKGROUNDS[name] for name in LEVELS[level].backgrounds}


def test_levels_vary_what_they_say():
    boxes = {level: {t.box for s in draw_many(level, count=200) for t in s.things} for level in LEVELS}
    sides = {level: {box[2] - box[0] for box in held} for level, held in boxes.items()}
    assert len(boxes["default"]) == len(boxes["backgrounds"]) == 4
    assert 90 < len(boxes["jitter"]) <= 4 * 25 and sides["jitter"] == {18}
    assert len(boxes["sizes"]) == 4 * 3 and sides["sizes"] == {12, 16, 22}
    assert any(box[0] < 24 < box[2] for box in boxes["free"]) and sides["free"] == {14}
    assert sides["hard"] == {12, 14, 16}
    assert [s.caption for s in draw_many("hard", count=50)] == [s.caption for s in draw_many("default", count=50)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scenes(level="easy"), "unknown level 'easy': choose one of default, jitter"),
        (lambda: Scenes(image_size=50), "image_size 50 .* multiple of 16"),
        (lambda: Scenes(image_size=32), "image_size 32 .* from 48"),
        (lambda: Scenes().sample("dev", 0), "unknown split 'dev': choose one of train, validation, test"),
        (lambda: Scenes().sample("test", -1), "-1 is negative"),
        (lambda: Scenes().size("dev"), "unknown split 'dev'"),
        (lambda: Level(sizes=()), "at least one side"),
        (lambda: Level(sizes=(30,)), "from 14 to 24"),
        (lambda: Level(jitter=1), "jitter 1 must be from 0 to 0"),
        (lambda: Level(backgrounds=("pink",)), "pink.*white, silver, gray, black"),
        (lambda: Level(placement="random"), "'random' must be"),
        (lambda: Level(placement="free"), "at most 18"),
        (lambda: open_data("coco"), "unknown data set 'coco': choose one of scenes, digits, folder"),
        (lambda: open_data("scenes", folder="/tmp"), "options of folder"),
        (lambda: open_data("digits", level="hard"), "level 'hard' is an option of scenes"),
        (lambda: open_data("digits", strict=True), "options of folder"),
    ],
)
def test_bad_options_are_refused_by_name(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_sizes_never_run_out():
    assert all(Scenes().size(split) is None for split in SPLITS)
