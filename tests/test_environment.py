"""environment.yml is thin: conda brings Python and pip, and pip reads every pin from pyproject.toml."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
(PIP,) = [part["pip"] for part in ENVIRONMENT["dependencies"] if isinstance(part, dict)]


def test_python_is_the_one_pyproject_asks_for():
    assert ENVIRONMENT["name"] == PROJECT["name"]
    conda = {re.match(r"[a-z]+", part)[0]: part for part in ENVIRONMENT["dependencies"] if isinstance(part, str)}
    assert set(conda) == {"python", "pip"}
    assert SpecifierSet(conda["python"].removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])


def test_pip_installs_this_package_with_known_extras():
    (line,) = PIP
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", line)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"]) and {"notebooks", "test"} <= set(extras)
    assert line.removeprefix("-e ") in (ROOT / "Makefile").read_text()  # both doors open on the same room


@pytest.mark.skipif(find_spec("setuptools") is None or find_spec("pip") is None, reason="pip or setuptools is not in this environment")
def test_pip_accepts_the_line(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("\n".join(PIP))
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-build-isolation", "-r", requirements],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install unimod" in done.stdout
