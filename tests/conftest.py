"""Order of the tests: the fast ones first, then those in a browser, then those that execute notebooks or train."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [item.get_closest_marker(name) is not None for name in ("slow", "browser")])
