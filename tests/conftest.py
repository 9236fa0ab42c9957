"""Order of the tests: the fast ones first, then those in a browser, then those that execute notebooks or train.

What `background.py` runs for them is started first. Generated examples are the same every time.
"""

import os
from contextlib import suppress

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from a second thread; read at torch's import

import pytest
from background import Background

with suppress(ImportError):                             # a machine with a GPU may lack it: its tests do without
    from hypothesis import settings

    settings.register_profile("same", derandomize=True)
    settings.load_profile("same")

BACKGROUND = pytest.StashKey[Background]()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [item.get_closest_marker(name) is not None for name in ("slow", "browser")])


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    if session.testsfailed or session.config.option.collectonly:
        return
    session.stash[BACKGROUND] = background = Background()
    for item in session.items:
        if not any(item.iter_markers("skip")):
            for marker in item.iter_markers("background"):
                background.start(*marker.args)


def pytest_sessionfinish(session):
    if BACKGROUND in session.stash:
        session.stash[BACKGROUND].stop()


@pytest.fixture(scope="session")
def background(request):
    """background(command): the `Outcome` of a command that ran, or runs, beside the tests; see background.py."""
    return request.session.stash[BACKGROUND]
