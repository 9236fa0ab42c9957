"""Every file in params/ holds fields of `Params` with values that it accepts; the default file holds the defaults."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from unimod.baselines import PRESETS
from unimod.config import LAYERS, ROUTERS, ParameterError
from unimod.params import Params
from unimod.plan import MAKERS
from unimod.workbook.run_folder import RUN_PARAMS

FILES = {path.stem: yaml.safe_load(path.read_text())
         for path in sorted((Path(__file__).resolve().parents[1] / "params").glob("*.yaml"))}


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_a_parameter_with_a_value_of_its_type(name, tmp_path):
    values = FILES[name]
    assert values and not set(values) & set(RUN_PARAMS)
    needs = {"folder": str(tmp_path)} if values.get("data") == "folder" else {}
    params = dataclasses.asdict(Params.of(**values, **needs))
    assert {key: params[key] for key in values} == values    # YAML's own types: 1e-4 would be a text


def test_default_file_says_what_the_code_does():
    """But for the arms: `unimod` gets 03's measured plan, and an arm with the code's default plan is its control."""
    defaults = dataclasses.asdict(Params())
    differing = {key for key, value in FILES["default"].items() if value != defaults[key]}
    assert differing <= {"arms"} and set(defaults["arms"]) <= set(FILES["default"]["arms"])


def test_smoke_is_no_larger_than_default():
    assert all(value <= FILES["default"][key] for key, value in FILES["smoke"].items() if isinstance(value, int))
    assert set(FILES["smoke"]["models"]) == set(FILES["default"]["models"])


@pytest.mark.parametrize(("values", "words"), [
    ({"stesp": 3}, ["'stesp'", "Did you mean 'steps'"]),
    ({"steps": "inf"}, ["steps='inf'", "whole number"]),
    ({"steps": 2.5}, ["steps=2.5", "whole number"]),
    ({"steps": True}, ["steps=True", "whole number"]),
    ({"steps": 0}, ["steps=0", "at least 1"]),
    ({"lr": "inf"}, ["lr=inf", "greater than 0"]),
    ({"lr": "nan"}, ["lr=nan", "greater than 0"]),
    ({"strict": "maybe"}, ["strict='maybe'", "true or false"]),
    ({"data": True}, ["data=True", "a text"]),
    ({"seeds": []}, ["seeds is empty"]),
    ({"seeds": "0,1,0"}, ["seeds=[0, 1, 0]", "twice"]),
    ({"seeds": [-1]}, ["seeds=-1", "at least 0"]),
    ({"models": "showo-tniy"}, ["'showo-tniy'", "Did you mean 'showo-tiny'"]),
    ({"arms": "shared.last_halve"}, ["'last_halve'", "Did you mean 'last_half'"]),
    ({"arms": "sharde.last_half"}, ["'sharde'", "Did you mean 'shared'"]),
    ({"saving": 1}, ["saving=1.0", "between 0 and 1"]),
    ({"checkpoint": "nowhere"}, ["checkpoint='nowhere' is not a folder"]),
    ({"routed": "nowhere"}, ["routed='nowhere' is not a folder", "fresh routers"]),
    ({"compare": ["nowhere"]}, ["compare='nowhere'", "done.json"]),
])
def test_nonsense_is_refused_by_name(values, words):
    with pytest.raises(ParameterError) as error:
        Params.of(**values)
    assert all(word in str(error.value) for word in words), error.value


def test_texts_mean_what_they_say():
    params = Params.of(lr="1e-4", strict="false", resume="yes", steps="1e2", seeds="[0, 2]", arms="dense, unimod")
    assert (params.lr, params.strict, params.resume, params.steps, params.seeds, params.arms) == (
        1e-4, False, True, 100, [0, 2], ["dense", "unimod"])


def test_a_notebook_gathers_what_it_declares():
    assert Params.declared({"seed": 3, "x": 1, "Params": Params}) == Params(seed=3)


def test_the_grids_names_are_those_of_the_package():
    assert set(ROUTERS) - {"separate", "shared"} == set(PRESETS) - {"unimod", "competitive"}
    assert set(LAYERS) - {"lowest_arank", "highest_arank", "learned"} <= set(MAKERS)


def test_the_grids_are_whole():
    """Every combination of the two questions, and the control beside what it controls."""
    assert set(FILES["grid"]["arms"]) == {"dense"} | {f"{r}.{p}" for r in ("shared", "separate")
                                                      for p in ("last_half", "last_half_per_task")}
    layers = ("last_half", "interleaved", "random", "lowest_arank", "highest_arank", "learned")
    assert {f"separate.{p}" for p in layers} | {"dense"} == set(FILES["layers"]["arms"])
    assert all(len(FILES[name]["seeds"]) == 3 for name in ("grid", "layers", "competitive"))
