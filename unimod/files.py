"""Files that are written whole or not at all, the folder of runs, and the code and machine that a record names. No
torch here: the command line imports this in milliseconds."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import SetupError, expanded
from .versions import CHECKOUT, installed

RECORDED = ("unimod", "torch", "transformers", "triton", "plotly", "papermill")     # versions beside every result


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `SetupError` where the disk refuses what the block writes: full, read-only, a file in a folder's place."""
    try:
        yield
    except OSError as error:
        raise SetupError(f"{path} cannot be written ({error.strerror or error}). Make room there, or choose another "
                         "folder of runs with --runs DIR (in a notebook: runs).") from None


def write(path: Path, text: str) -> None:
    """Write all of a file or nothing. Raises `SetupError` where it cannot be written."""
    # of this process alone: two that measure at once, such as those of a training on several GPUs, write one cache
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)              # atomic within a file system: no reader ever sees half a file


def read_json(path: Path, missing: object = None):
    """What a JSON file holds; `missing`, where one is given, stands for a file that is not there."""
    if missing is not None and not path.exists():
        return missing
    return json.loads(path.read_text(encoding="utf-8"))


def writable(folder: Path, name: str = "The folder of runs",
             cure: str = "Choose another one with --runs DIR.") -> None:
    """Raise `SetupError` where nothing can be written under `folder`, an absolute path that need not exist yet. name,
    cure: of the message."""
    nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        fault = f"cannot be made: {nearest} is not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        fault = f"cannot be written: {nearest} is read-only here"
    else:
        return
    raise SetupError(f"{name}, {folder}, {fault}. {cure}")


def home() -> Path:
    """The folder that relative run folders start from."""
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here        # JupyterLab works in notebooks/, all else one above


def runs_folder(runs: str | Path) -> Path:
    """`runs` as an absolute path, the same one from a notebook in JupyterLab and from the command line."""
    return home() / expanded(runs)


def cache_folder() -> Path:
    """Where what was measured on this machine is kept between processes."""
    named, own = os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~")
    # a container's user may have no home folder, and then "~" stays as it is
    place = os.path.join(own, ".cache") if own != "~" else tempfile.gettempdir()
    return Path(named or place) / "unimod"


def facts() -> dict[str, object]:
    """What runs here: git commit (`sha`, `dirty`; None without a checkout), versions by package, platform."""
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(CHECKOUT), *args], capture_output=True, text=True).stdout.strip()

    commit = {"sha": None, "dirty": None}
    if (CHECKOUT / ".git").exists() and shutil.which("git"):
        commit = {"sha": git("rev-parse", "--verify", "-q", "HEAD") or None,
                  "dirty": bool(git("status", "--porcelain"))}
    versions = {"python": platform.python_version(), **{name: installed(name) for name in RECORDED}}
    return {"git": commit, "versions": versions, "platform": platform.platform()}


def describe_cpu() -> str:
    """The CPU in words: how many cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} cores"
