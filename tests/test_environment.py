"""environment.yml is thin: conda brings Python and pip, and pip reads the versions from requirements.lock."""

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


def test_pip_installs_the_lock_and_this_package_with_known_extras():
    lock, line = PIP
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", line)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"]) and {"notebooks", "test"} <= set(extras)
    assert f'{lock} -e "{line.removeprefix("-e ")}"' in (ROOT / "Makefile").read_text()  # as make install


@pytest.mark.skipif(find_spec("setuptools") is None or find_spec("pip") is None,
                    reason="pip or setuptools is not in this environment")
def test_pip_accepts_the_lines():
    """conda hands pip these lines in a file beside environment.yml."""
    words = [word for line in PIP for word in line.split()]
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-build-isolation",
                           *words],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install" in done.stdout and "unimod" in done.stdout


def test_every_door_says_the_same_pythons():
    """pyproject's range, the Makefile's check, the lock's header and the README."""
    allowed = [f"3.{minor}" for minor in range(9, 20)
               if SpecifierSet(PROJECT["requires-python"]).contains(f"3.{minor}.0")]
    assert allowed == ["3.11", "3.12", "3.13"]
    assert "(3, 11) <= sys.version_info < (3, 14)" in (ROOT / "Makefile").read_text()
    assert "Python 3.11 to 3.13" in (ROOT / "requirements.lock").read_text()
    assert "Python 3.11, 3.12 or 3.13" in (ROOT / "README.md").read_text()
