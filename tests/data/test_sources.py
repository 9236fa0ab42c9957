"""The recipe for a further data set runs as it is written, and the names in the configuration are those that exist."""

import textwrap

import pytest

from unimod import config, data
from unimod.data.sources import Dataset


def test_the_configuration_names_every_data_set():
    assert tuple(data.SOURCES) == config.DATA and tuple(data.LEVELS) == config.LEVELS


def test_the_recipe_for_a_data_set_runs_as_written(monkeypatch):
    monkeypatch.setattr(data, "SOURCES", dict(data.SOURCES))
    _, recipe = data.__doc__.split("How to add a data set:")
    assert len(recipe.strip().splitlines()) <= 24
    code = textwrap.dedent(recipe[recipe.index("    import numpy") :])
    names = {}
    exec(code, names)
    sample, made = names["sample"], data.open_data("grays", image_size=16)
    assert sample.image.shape == (48, 48, 3) and sample.image.max() == 192 and sample.caption == "a bright wall"
    assert made.sample("test", 0).questions[0].answer == "yes" and made.sample("test", 0).image.shape == (16, 16, 3)
    assert all(hasattr(made, name) for name in (*Dataset.__annotations__, "words", "size", "sample"))
    with pytest.raises(data.DataError, match="choose one of scenes, digits, folder, grays"):
        data.open_data("greys")
