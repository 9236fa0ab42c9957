"""Files that are written whole or not at all, the folder of runs, and what a record says of the code and the machine behind it.

Standard library only: every room may use it, and importing it costs nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import SetupError, expanded


def home() -> Path:
    """The folder that relative run folders start from: JupyterLab works in notebooks/, everything else one folder above."""
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def runs_folder(runs: str | Path) -> Path:
    """`runs` as an absolute path, the same one from a notebook in JupyterLab and from the command line."""
    return home() / expanded(runs)


def writable(runs: Path) -> None:
    """Raise `SetupError` where nothing can be written under `runs`, an absolute path that need not exist; nothing is made."""
    nearest = next(place for place in (runs, *runs.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise SetupError(f"The folder of runs, {runs}, cannot be made: {nearest} is not a folder. Choose another one with --runs DIR.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise SetupError(f"The folder of runs, {runs}, cannot be written: {nearest} is read-only here. Choose another one with --runs DIR.")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `SetupError` where the disk refuses what the block writes: a full one, a read-only one, a file in a folder's place."""
    try:
        yield
    except OSError as error:
        raise SetupError(f"{path} cannot be written ({error.strerror or error}). Make room there, or choose another folder of runs with --runs DIR "
                         "(in a notebook: runs).") from None


def write(path: Path, text: str) -> None:
    """Write all of a file or nothing. Raises `SetupError` where it cannot be written."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def facts() -> dict[str, object]:
    """What ran this: code, versions, machine."""
    root = Path(__file__).resolve().parents[1]
    git = {"sha": None, "dirty": None}
    if (root / ".git").exists() and shutil.which("git"):
        say = lambda *args: subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True).stdout.strip()  # noqa: E731
        git = {"sha": say("rev-parse", "--verify", "-q", "HEAD") or None, "dirty": bool(say("status", "--porcelain"))}
    versions = {"python": platform.python_version()}
    for name in ("unimod", "torch", "transformers", "triton", "plotly", "papermill"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"git": git, "versions": versions, "platform": platform.platform()}


def describe_cpu() -> str:
    """The CPU in words: the cores that this process may use."""
    return f"CPU, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
