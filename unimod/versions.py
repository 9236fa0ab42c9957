"""What this package was tested with and what is installed here; `python -m unimod doctor` shows both.

The tested ranges are the caps of pyproject.toml, the exact versions those of requirements.lock; an installation that is
not a checkout carries the ranges in its own metadata and has no lock. No torch here: only metadata are read.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement

CHECKOUT = Path(__file__).resolve().parents[1]      # of pyproject.toml and the lock, unless installed as a copy
MOVING = ("torch", "transformers")      # our layers run in their insides: another release can change or break a result


@cache
def tested() -> dict[str, Requirement]:
    """The direct dependencies with their tested ranges, extras included, by name; none without project or metadata."""
    file, lines = CHECKOUT / "pyproject.toml", []
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    else:
        with suppress(importlib.metadata.PackageNotFoundError):
            lines = importlib.metadata.requires("unimod") or []
    return {need.name: need for need in map(Requirement, lines)}


@cache
def locked() -> dict[str, str]:
    """The versions of requirements.lock for this Python and platform, by name; empty where there is no lock."""
    file = CHECKOUT / "requirements.lock"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    needs = [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return {need.name: next(iter(need.specifier)).version for need in needs
            if need.marker is None or need.marker.evaluate()}


def installed(name: str) -> str | None:
    """The version of an installed library; None: it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def fits(name: str) -> bool:
    """Whether the installed version lies in the tested range; True where there is no range to hold it against."""
    need, version = tested().get(name), installed(name)
    return version is not None and (need is None or need.specifier.contains(version, prereleases=True))


def remedy() -> str:
    """The command that installs tested versions."""
    if locked():
        return "make install, or pip install -r requirements.lock"
    return "pip install " + " ".join(f"'{name}{tested()[name].specifier}'" for name in MOVING if name in tested())


def advice() -> str:
    """One sentence where torch or transformers is outside the tested range, else nothing."""
    strange = [f"{name} {installed(name)} (tested: {tested()[name].specifier})" for name in MOVING
               if installed(name) and not fits(name)]
    return f"unimod was never run with {' and '.join(strange)}. Tested versions: {remedy()}." if strange else ""


def warn() -> None:
    """Give `advice` as a warning, if there is any."""
    if text := advice():
        warnings.warn(text, stacklevel=2)


@contextmanager
def explained() -> Iterator[None]:
    """What fails inside the block says `advice`, too: a stock layer of an untested release fails in its own words."""
    try:
        yield
    except Exception as error:
        if text := advice():
            error.add_note(text)
        raise
