"""Order of the tests: the fast ones first, then those in a browser, then those that execute notebooks or train. Generated examples are the same every time."""

from contextlib import suppress

with suppress(ImportError):                             # a machine with a GPU may lack it: its tests do without
    from hypothesis import settings

    settings.register_profile("same", derandomize=True)
    settings.load_profile("same")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [item.get_closest_marker(name) is not None for name in ("slow", "browser")])
