#!/usr/bin/env python3
"""requirements.lock: made by a universal resolver (uv) from pyproject.toml, for all supported Pythons and platforms.

    python3 .ci/lock.py update [PYTEST ARGS]   # make update: resolve, test, rewrite the lock only if the tests pass
    python3 .ci/lock.py resolve FILE           # the newest versions within pyproject's bounds, into FILE
    python3 .ci/lock.py moved OLD NEW          # direct requirements that differ, one a line; none: exit code 1

The CUDA libraries behind torch are left out, for torch names each with its own exact version, and a CPU build of torch
has none of them; so is torch's local part (+cpu): one lock serves both builds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEADER = """# Every version that CI ran, for Python 3.11 to 3.13; written by `make update`, read by `make install`, \
environment.yml and CI.
# Without torch's own CUDA libraries and its local part: a CPU build and the CUDA build of the index both fit.
"""


def environment(folder: Path) -> Path:
    """A fresh virtual environment; returns its Python."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def resolve(file: Path) -> None:
    """Write the newest versions within the bounds to `file`."""
    with tempfile.TemporaryDirectory() as work:
        python, raw = environment(Path(work) / "uv"), Path(work) / "raw"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        known = {"UV_FIND_LINKS": links} if (links := os.environ.get("PIP_FIND_LINKS")) else {}
        subprocess.run([python, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "notebooks", "--extra",
                        "test", "--universal",
                        "--python-version", "3.11", "--no-header", "--no-annotate", "--quiet", "--output-file", raw],
                       check=True, cwd=ROOT, env=os.environ | known)
        lines = [re.sub(r"^(torch==[\d.]+)\+\w+", r"\1", line) for line in raw.read_text(encoding="utf-8").splitlines()
                 if not re.match(r"(nvidia|cuda)-", line)]
    file.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


def versions(file: Path) -> dict[str, list[str]]:
    """name -> its lines without the name, one per marker."""
    found: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        if match := re.match(r"([\w.-]+)==(.+)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def moved(old: Path, new: Path) -> list[str]:
    """A line for each package whose versions differ."""
    before, after = versions(old), versions(new)
    return [f"{name}: {' | '.join(before.get(name, ['-']))} -> {' | '.join(after.get(name, ['-']))}"
            for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def direct() -> set[str]:
    """The names that pyproject.toml itself asks for."""
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["notebooks"],
             *PROJECT["optional-dependencies"]["test"]]
    return {re.match(r"[\w.-]+", line)[0] for line in lines}


def update(arguments: list[str]) -> int:
    """Resolve, test in an environment of its own, rewrite the lock if the tests pass; returns the exit code."""
    with tempfile.TemporaryDirectory() as work:
        new = Path(work) / "requirements.lock"
        resolve(new)
        changes = moved(LOCK, new)
        if not changes:
            print("Nothing has moved within the bounds of pyproject.toml.")
            return 0
        print("Moved:", *changes, "Installing and testing these ...", sep="\n  ", flush=True)
        python = environment(Path(work) / "venv")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", new, "-e", ".[notebooks,test]"], check=True,
                       cwd=ROOT)
        code = subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT).returncode
        if code:
            print("The tests fail with these versions; requirements.lock stays as it was.")
            return code
        LOCK.write_bytes(new.read_bytes())
    print("The tests pass; requirements.lock is rewritten:", *changes, sep="\n  ")
    return 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["update", *rest]:
            sys.exit(update(rest))
        case ["resolve", file]:
            resolve(Path(file))
        case ["moved", old, new]:
            found = [line for line in moved(Path(old), Path(new)) if line.split(":")[0] in direct()]
            print(*found, sep="\n")
            sys.exit(not found)
        case _:
            sys.exit(__doc__)
