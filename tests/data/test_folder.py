import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from unimod.data import SPLITS, DataError, Folder, open_data
from unimod.data.sources import EXAMPLE, read_picture

ASKED = [{"question": "what color is it?", "answer": "red"}]


def write(folder, entries):
    """A data.jsonl of these entries; a text is written as it is, anything else as JSON."""
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def picture(folder, name, size=(60, 50), color=(200, 30, 30), mode="RGB"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(folder / name)
    return {"image": name, "caption": "a red wall", "questions": ASKED}


def keys_of(data):
    return {split: {data.sample(split, index).key for index in range(data.size(split))} for split in SPLITS}


@pytest.fixture
def good(tmp_path):
    """Four good entries, in a folder that further entries can be added to."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder, [picture(folder, f"walls/{number}.png") for number in range(4)]


def test_good_entries_are_read(good):
    folder, entries = good
    entries[0]["questions"] = [{"question": "Is it Blue?", "answer": "no", "kind": "existence"}, *ASKED]
    write(folder, [entries[0], "", *entries[1:]])
    data = open_data("folder", folder=str(folder), strict=True)
    samples = {
        data.sample(split, index).key: data.sample(split, index)
        for split in SPLITS
        for index in range(data.size(split))
    }
    assert sorted(samples) == [f"walls/{number}.png" for number in range(4)]
    first = samples["walls/0.png"]
    assert first.image.shape == (48, 48, 3) and first.image.dtype == np.uint8 and (first.image == (200, 30, 30)).all()
    assert first.caption == "a red wall" and first.things == ()
    assert [(q.text, q.answer, q.kind) for q in first.questions] == [
        ("Is it Blue?", "no", "existence"),
        ("what color is it?", "red", "question"),
    ]
    assert data.kinds == ("existence", "question")
    assert set(data.words()) == {"a", "red", "wall", "is", "it", "blue", "?", "no", "what", "color"}
    assert data.skipped == [] and "4 entries" in data.report() and "None was skipped" in data.report()


def test_pictures_are_resized_by_the_short_side_cropped_and_turned(good):
    folder, entries = good
    wide = np.zeros((50, 150, 3), np.uint8)
    wide[:, 50:100] = (0, 255, 0)  # the center square
    Image.fromarray(wide).save(folder / "walls/0.png")
    top = np.zeros((40, 40, 3), np.uint8)
    top[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # to be shown upside down
    Image.fromarray(top).save(folder / "walls/1.png", exif=exif)
    picture(folder, "walls/2.png", color=(0, 0, 0, 0), mode="RGBA")
    picture(folder, "walls/3.png", color=100, mode="L")
    write(folder, entries)
    data = Folder(folder, image_size=32)
    images = {
        data.sample(split, index).key[6]: data.sample(split, index).image
        for split in SPLITS
        for index in range(data.size(split))
    }
    assert (images["0"][:, 4:-4] == (0, 255, 0)).all()
    assert images["1"][:12].max() < 20 and images["1"][-12:].min() > 235
    assert (images["2"] == 255).all() and (images["3"] == 100).all()


def bad_entries(folder):
    """(an unusable entry, the reason that is to be given)"""
    ok = picture(folder, "ok.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"broken" * 20)
    cut = folder / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:3000])
    (folder / "note.png").write_text("no picture at all")
    picture(folder.parent, "outside.png")
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return [
        ({**ok, "image": "broken.png"}, "picture cannot be read"),
        ({**ok, "image": "cut.png"}, "picture cannot be read"),
        ({**ok, "image": "note.png"}, "picture cannot be read"),
        ({**ok, "image": "a\0b.png"}, "picture cannot be read"),
        ({**ok, "image": "none.png"}, "picture missing"),
        ({**ok, "image": "walls"}, "picture missing"),
        ({**ok, "image": "../outside.png"}, "path leads out of the folder"),
        ({**ok, "image": str(folder.parent / "outside.png")}, "path leads out of the folder"),
        ({**ok, "image": "link.png"}, "path leads out of the folder"),
        ({**ok, "image": 7}, "no image"),
        ({**ok, "caption": "  "}, "no caption"),
        ({**ok, "caption": None}, "no caption"),
        ({"image": "ok.png", "questions": ASKED}, "no caption"),
        ({**ok, "questions": []}, "no questions"),
        ({**ok, "questions": "what?"}, "no questions"),
        ({**ok, "questions": ["what?"]}, "a question is not a JSON object"),
        ({**ok, "questions": [{"question": "what?"}]}, "no answer"),
        ({**ok, "questions": [{"question": "", "answer": "red"}]}, "no question"),
        ({**ok, "questions": [{**ASKED[0], "kind": 3}]}, "no kind"),
        ('{"image": "ok.png",', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "not a JSON object"),
    ]


def test_each_bad_entry_is_skipped_with_its_line_and_reason(good):
    folder, entries = good
    bad = bad_entries(folder)
    write(folder, [*entries, *(entry for entry, _ in bad)])
    data = Folder(folder)
    assert sum(data.size(split) for split in SPLITS) == 4
    assert [reason for _, reason in data.skipped] == [reason for _, reason in bad]
    assert [int(where.split()[1]) for where, _ in data.skipped] == list(range(5, 5 + len(bad)))
    assert data.skipped[4][0] == "line 9 (none.png)" and data.skipped[19][0] == "line 24"
    for reason, count in Counter(reason for _, reason in bad).items():
        assert f"{count} x {reason}" in data.report()
    assert f"{len(bad)} skipped" in data.report() and "line 9 (none.png)" in data.report()


def test_sixteen_bits_are_read_as_eight_and_floats_are_refused(tmp_path):
    ramp = np.repeat(np.arange(8, dtype=np.uint16) * 9000, 8).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.array_equal(read_picture(tmp_path / "deep.png", 8)[..., 1], ramp // 256)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="which number is white"):
        read_picture(tmp_path / "float.tiff", 8)


def test_bytes_that_are_no_text_are_skipped(good):
    folder, entries = good
    write(folder, entries)
    path = folder / "data.jsonl"
    path.write_bytes(path.read_bytes() + b'{"image": "\xff\xfe"}\n')
    assert Folder(folder).skipped == [("line 5", "not valid JSON")]


def test_strict_refuses_and_names_the_first_ten(good):
    folder, entries = good
    write(folder, [*entries, *(entry for entry, _ in bad_entries(folder))])
    with pytest.raises(DataError, match=r"22 unusable entries .*refused under strict") as error:
        open_data("folder", folder=str(folder), strict=True)
    assert "line 5 (broken.png): picture cannot be read" in str(error.value)
    assert "line 14:" in str(error.value) and "line 15" not in str(error.value)


@pytest.mark.parametrize("count", [3, 4, 5, 40])
def test_every_split_has_an_entry_and_keeps_it(tmp_path, count):
    entries = [picture(tmp_path, f"{number}.png", size=(8, 8)) for number in range(count)]
    write(tmp_path, entries)
    keys = keys_of(Folder(tmp_path))
    assert all(keys.values()) and sum(map(len, keys.values())) == count == len(set().union(*keys.values()))
    write(tmp_path, entries[::-1])
    assert keys_of(Folder(tmp_path)) == keys


def test_entries_of_one_picture_share_a_split(good):
    folder, entries = good
    again = [{**entry, "image": f"walls/../{entry['image']}", "caption": "a wall again"} for entry in entries]
    write(folder, [*entries, *again])
    data = Folder(folder)
    for split in SPLITS:
        captions = Counter(data.sample(split, index).caption for index in range(data.size(split)))
        assert captions["a red wall"] == captions["a wall again"] > 0


def test_samples_wrap_around(good):
    folder, entries = good
    write(folder, entries)
    data = Folder(folder)
    for split in SPLITS:
        assert data.sample(split, 1000 * data.size(split)) is data.sample(split, 0)
    with pytest.raises(DataError, match="unknown split 'dev'"):
        data.sample("dev", 0)


def test_too_few_or_no_usable_pictures_are_refused(good):
    folder, entries = good
    write(folder, [*entries[:2], *entries[:2]])
    with pytest.raises(DataError, match="2 usable pictures, too few for train, validation and test"):
        Folder(folder)
    write(folder, ["{", {**entries[0], "caption": ""}])
    with pytest.raises(DataError, match=r"no usable entry .* 2 skipped: 1 x not valid JSON, 1 x no caption"):
        Folder(folder)
    write(folder, [])
    with pytest.raises(DataError, match="no usable entry"):
        Folder(folder)


@pytest.mark.parametrize(
    ("folder", "message"), [("", "no such folder"), ("absent", "no such folder"), (".", "no data.jsonl in it")]
)
def test_a_missing_folder_or_list_is_refused_with_an_example(tmp_path, monkeypatch, folder, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        open_data("folder", folder=folder)
    assert EXAMPLE in str(error.value) and json.loads(EXAMPLE)["caption"]


def test_too_small_an_image_size_is_refused(good):
    with pytest.raises(DataError, match="image_size 4 is too small"):
        Folder(good[0], image_size=4)
