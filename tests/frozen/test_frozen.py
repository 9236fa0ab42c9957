"""The numbers of the shipped models and the command line are those of frozen.json (made by freeze.py digest)."""

import json
from pathlib import Path

import pytest
import torch
from freeze import different, digest, take

FROZEN = json.loads(Path(__file__).with_name("frozen.json").read_text())


@pytest.fixture(scope="module")
def now():
    threads = torch.get_num_threads()
    yield take(notebook=False)
    torch.set_num_threads(threads)


def near(a, b, tolerance=1e-5):
    """Equal but for `tolerance` in numbers, wherever they are."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(near(x, y, tolerance) for x, y in zip(a, b))
    return a == pytest.approx(b, rel=tolerance, abs=tolerance) if isinstance(a, float) else a == b


def test_everything_is_as_it_was_frozen(now):
    digests = {name: json.loads(json.dumps(digest(value))) for name, value in now.items()}
    assert digests.keys() == FROZEN.keys()
    # behind an optimizer, which divides by the size of gradients, another processor's roundings grow in 20 steps
    moved = [name for name in FROZEN if not near(FROZEN[name], digests[name], 1e-3 if "trained" in name else 1e-5)]
    assert not moved, {name: (FROZEN[name], digests[name]) for name in moved}


def test_a_difference_is_seen(now):
    name = "showo-tiny, unimod: hidden"
    other = {**now, name: now[name] + 1e-6}
    assert different(now, now) == [] and different(now, other) == [name]
    assert not near(digest(now[name]), digest(now[name] * 1.001))
