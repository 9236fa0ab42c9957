"""What a notebook writes: results, figures, tables and files in one run folder, which never looks done before it is.

    run = Run.open("03_token_redundancy", params)
    run.result("effective rank", 11.2, unit="directions", n=16)
    run.figure(fig, "rank_by_layer", caption="What to see in it.", alt="What is drawn, for those who cannot see it.")
    run.finish()

A figure is anything with `to_json`, a table anything with `to_parquet`: notebook packages are not imported here. """

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
import math
import os
import re
import site
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml

from ..files import describe_cpu, home, read_json, runs_folder, write, writing
from ..params import Params

PROGRESS_SECONDS = 5.0                                  # between two progress lines where no bar can be drawn
RUN_PARAMS = ("run_dir", "interactive", "runs")         # say where and how, not what is computed; the runner sets them
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
OWN_FILES = {"results.json", "done.json", "run.json", "params.yaml", "log.txt", "report.html", "plotly.min.js",
             "figures", "tables"}
DATA_KEYS = ("x", "y", "z", "r", "theta", "values", "a", "b", "lat", "lon", "cells", "dimensions", "link", "source",
             "value")                                   # where plotly's traces keep what they draw


class RunError(RuntimeError):
    """A run or report that cannot go on: the message says what and the fix, `code` is the command line's exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Run:
    """An open run folder. All but `finish` may be called in any order; a cell run again replaces what it wrote.

    Methods raise `RunError` for what a run folder does not take, `SetupError` where the disk refuses.
    """

    notebook: str
    dir: Path
    params: Params
    opened: float = field(default_factory=time.monotonic)
    written: dict[str, list] = field(default_factory=lambda: {"results": [], "figures": [], "tables": [], "files": []})

    @classmethod
    def open(cls, notebook: str, params: Params) -> Run:
        """Start writing to `params.run_dir`; without one to <runs>/<notebook>/interactive, where older files stay."""
        folder = Path(params.run_dir) if params.run_dir else runs_folder(params.runs) / notebook / "interactive"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "done.json").unlink(missing_ok=True)
        write(folder / "results.json", "[]\n")
        if not params.run_dir:
            values = {name: value for name, value in dataclasses.asdict(params).items() if name not in RUN_PARAMS}
            write(folder / "params.yaml", yaml.safe_dump(values, sort_keys=False))
        return cls(notebook, folder, params)

    def result(self, name: str, value: object, unit: str = "", n: int | None = None, seed: int | None = None) -> None:
        """Note one number (or word) with its unit, the samples behind it and its seed; None: could not be measured."""
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"Result {name!r} is {value}: not a number anyone can compare. Find its cause, or note "
                           "None where nothing could be measured.")
        if not name or not isinstance(value, bool | int | float | str | None):
            raise RunError(f"Result {name!r} = {value!r} must have a name and be one number, word, true, false or "
                           "None.")
        results = self.written["results"]
        others = [row for row in results if (row["name"], row["seed"]) != (name, seed)]
        self._refuse_second("result", name, len(others) < len(results))
        results[:] = [*others, {"name": name, "value": value, "unit": unit, "n": n, "seed": seed}]
        write(self.dir / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")

    def figure(self, fig, name: str, caption: str, alt: str):
        """Save a plotly figure for the report and return it, so that the cell shows it."""
        from ..views.style import FIGURE_BYTES

        self._claim("figures", name)
        for what, text, say in (("caption", caption, "to see"), ("alt", alt, "is drawn")):
            if not text.strip():
                raise RunError(f"Figure {name!r} has no {what}: say in a sentence what {say}.")
        text = fig.to_json()
        size, content = len(text.encode()), json.loads(text)
        if size > FIGURE_BYTES:
            raise RunError(f"Figure {name!r} is {size / 1000:.0f} KB; a report stays light with at most "
                           f"{FIGURE_BYTES // 1000} KB each. Pool its maps to 32 bins as uint8, or draw fewer slider "
                           "frames; raw data belongs into run.table or run.path.")
        if not drawable(content):
            raise RunError(f"Figure {name!r} would be blank: none of its visible traces holds data. Look at the "
                           "frame it was made from.")
        saved = {"name": name, "caption": caption, "alt": alt, "figure": content}
        write(self.dir / "figures" / f"{name}.json", json.dumps(saved, separators=(",", ":")))
        return fig

    def table(self, frame, name: str):
        """Save a data frame as parquet for the report and return it, so that the cell shows it."""
        self._claim("tables", name)
        path = self.dir / "tables" / f"{name}.parquet"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            frame.to_parquet(path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
        return frame

    def path(self, name: str) -> Path:
        """Where another file or folder of this run goes (`checkpoints/unimod`); `finish` checks that it is there."""
        parts = name.split("/")
        if not all(map(PART.fullmatch, parts)) or parts[0] in OWN_FILES:
            raise RunError(f"{name!r} cannot be a file of a run: letters, digits, '.', '_' and '-', folders "
                           f"separated by '/', and not one of {', '.join(sorted(OWN_FILES))}.")
        if name not in self.written["files"]:
            self.written["files"].append(name)
        path = self.dir / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self) -> None:
        """Mark the run as done, as the very last thing, after checking that it holds all it announced."""
        if not any(self.written.values()):
            raise RunError(f"{self.notebook} has written nothing: call run.result, run.figure, run.table or run.path "
                           "before run.finish().")
        missing = [name for name in self.written["files"] if not (self.dir / name).exists()]
        if missing:
            raise RunError(f"{self.notebook} asked for a place for {', '.join(missing)} but wrote nothing there.")
        torch = sys.modules.get("torch")                # a notebook that never imported it ran on the CPU
        cuda = self.params.device != "cpu" and torch is not None and torch.cuda.is_available()
        done = {"notebook": self.notebook, "finished": datetime.now(UTC).isoformat(),
                "seconds": round(time.monotonic() - self.opened, 1),
                "device": torch.cuda.get_device_name() if cuda else describe_cpu(),
                **self.written, "results": len(self.written["results"])}
        write(self.dir / "done.json", json.dumps(done, indent=1) + "\n")
        counts = ", ".join(f"{kind} {len(entries)}" for kind, entries in self.written.items())
        print(f"{self.notebook} is done, in {self.dir}: {counts}")

    def _claim(self, kind: str, name: str) -> None:
        if not NAME.fullmatch(name):
            raise RunError(f"{name!r} cannot name one of the {kind}: 1 to 64 letters, digits, '_' and '-', such as "
                           "rank_by_layer.")
        self._refuse_second(kind.rstrip("s"), name, name in self.written[kind])
        if name not in self.written[kind]:
            self.written[kind].append(name)

    def _refuse_second(self, kind: str, name: str, again: bool) -> None:
        if again and not self.params.interactive:       # a headless run runs each cell once: the first would be lost
            raise RunError(f"The {kind} {name!r} is written twice in one run; the second would replace the first. "
                           "Give each its own name.")


def latest(runs: str | Path, notebook: str) -> Path:
    """The newest finished run folder of `notebook`, headless or interactive. Raises `RunError` when there is none."""
    folders = [done.parent for done in (runs_folder(runs) / notebook).glob("*/done.json")]
    if not folders:
        raise RunError(f"There is no finished run of {notebook} in {runs_folder(runs)}. Make one with: "
                       f"python -m unimod run {notebook}")
    return max(folders, key=lambda folder: read_json(folder / "done.json")["finished"])


def notebook_folders() -> tuple[Path, ...]:
    """Where the workbook's notebooks may lie, in order of precedence: the working folder, the checkout of this
    package, and where installers put data files (beside a --target, in an environment, in a user's own site)."""
    package = Path(__file__).resolve().parents[2]
    own_site = [site.getuserbase()] if site.ENABLE_USER_SITE else []
    shared = [Path(place, "share/unimod/notebooks") for place in (package, sysconfig.get_path("data"), *own_site)]
    return home() / "notebooks", package / "notebooks", *shared


def records_folder() -> Path:
    """The committed records of measurements, beside the notebooks; it need not exist."""
    places = [folder / "records" for folder in notebook_folders()]
    return next(filter(Path.is_dir, places), places[0])


def progress(items: Iterable, label: str) -> Iterator:
    """Iterate over `items` and show how far it is: a bar where there is a front end, else a line every few seconds."""
    total = len(items) if hasattr(items, "__len__") else None
    if has_front_end():
        from tqdm.notebook import tqdm

        yield from tqdm(items, desc=label, total=total)
        return
    start = printed = time.monotonic()
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - printed >= PROGRESS_SECONDS and count != total:
            printed = now
            left = f" of {total}, about {(now - start) / count * (total - count):.0f} s left" if total else ""
            print(f"{label}: {count}{left}", flush=True)
    if printed > start:
        print(f"{label}: {count} in {time.monotonic() - start:.0f} s", flush=True)


def has_front_end() -> bool:
    """Whether a person can click here: a front end lets the kernel ask for input, papermill and nbconvert do not."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    asks = bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))
    return asks and importlib.util.find_spec("ipywidgets") is not None


def drawable(figure: dict) -> bool:
    """Whether a plotly figure (as a dict) shows anything: a visible trace whose data arrays all hold values."""
    for trace in figure.get("data", []):
        data = [trace[key] for key in DATA_KEYS if key in trace]
        if trace.get("visible", True) is True and data and all(map(_has_values, data)):
            return True
    return False


def _has_values(data: object) -> bool:
    """Whether a (nested) array holds at least one value that is neither null nor NaN."""
    if isinstance(data, dict) and "bdata" in data:      # plotly packs numpy arrays as base64, under numpy's dtype names
        import numpy as np  # 0.1 s that `check` need not wait for

        values = np.frombuffer(base64.b64decode(data["bdata"]), data["dtype"])
        return bool((values == values).any())
    if isinstance(data, dict | list):
        return any(map(_has_values, data.values() if isinstance(data, dict) else data))
    return data is not None and data != "" and data == data
