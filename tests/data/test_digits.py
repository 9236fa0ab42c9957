import re

import numpy as np
import pytest
from sklearn.datasets import load_digits

from unimod.data import SPLITS, DataError, Digits, open_data, split_words
from unimod.data.sources import DIGITS as NAMES


@pytest.fixture(scope="module")
def data():
    return open_data("digits")


def test_every_scan_is_in_exactly_one_split(data):
    keys = [[data.sample(split, index).key for index in range(data.size(split))] for split in SPLITS]
    assert len(set().union(*keys)) == sum(map(len, keys)) == 1797
    assert 1380 < len(keys[0]) < 1490 and min(len(keys[1]), len(keys[2])) > 140
    for split in SPLITS:
        assert {data.sample(split, index).category for index in range(data.size(split))} == set(NAMES)


def test_the_picture_is_the_scan(data):
    scans = load_digits()
    for index in range(20):
        sample = data.sample("test", index)
        number = int(sample.key.split("/")[1])
        assert sample.image.shape == (48, 48, 3) and sample.image.dtype == np.uint8
        ink = 255 - sample.image[..., 0].reshape(8, 6, 8, 6).mean((1, 3))
        assert np.corrcoef(ink.ravel(), scans.images[number].ravel())[0, 1] > 0.95
        assert sample.caption == f"a handwritten {NAMES[scans.target[number]]}"


def test_questions_have_the_right_answer(data):
    answers = {kind: [] for kind in data.kinds}
    for index in range(300):
        sample = data.sample("train", index)
        digit = NAMES.index(sample.caption.split()[-1])
        for question in sample.questions:
            if question.text == "which digit is this?":
                right = NAMES[digit]
            elif question.kind == "parity":
                right = "yes" if question.text == ("is it odd?" if digit % 2 else "is it even?") else "no"
            else:
                right = (
                    "yes"
                    if digit > NAMES.index(re.fullmatch(r"is it greater than (\w+)\?", question.text)[1])
                    else "no"
                )
            assert question.answer == right
            answers[question.kind].append(question.answer)
        assert len({question.text for question in sample.questions}) == 6
    assert all(0.4 < answers[kind].count("yes") / len(answers[kind]) < 0.6 for kind in ("parity", "compare"))


def test_words_are_exactly_those_in_use(data):
    samples = [data.sample("train", index) for index in range(500)]
    texts = [text for s in samples for text in (s.caption, *(f"{q.text} {q.answer}" for q in s.questions))]
    assert tuple(sorted(set(split_words(" ".join(texts))))) == data.words()


def test_samples_repeat_exactly_and_wrap_around(data):
    size = data.size("test")
    again, wrapped = Digits().sample("test", 3), data.sample("test", 3 + size)
    assert again.questions == data.sample("test", 3).questions
    np.testing.assert_array_equal(again.image, wrapped.image)
    assert wrapped.key == again.key and data.sample("test", 2).key != again.key
    assert len({data.sample("test", 3, seed=seed).questions for seed in range(5)}) > 1


def test_bad_requests_are_refused(data):
    with pytest.raises(DataError, match="image_size 4 is smaller"):
        Digits(image_size=4)
    with pytest.raises(DataError, match="unknown split 'dev'"):
        data.sample("dev", 0)
    with pytest.raises(DataError, match="-1 is negative"):
        data.sample("test", -1)
