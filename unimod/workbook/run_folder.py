"""What a notebook writes: results, figures, tables and files in one run folder, which never looks done before it is.

    run = Run.open("03_token_redundancy", params)
    run.result("effective rank", 11.2, unit="directions", n=16)
    run.figure(fig, "rank_by_layer", caption="What to see in it.", alt="What is drawn, for those who cannot see it.")
    run.finish()

No notebook package is imported before it is needed: a figure is anything with `to_json`, a table anything with `to_parquet`.
"""

from __future__ import annotations

import array
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

from ..config import Params
from ..files import describe_cpu, home, runs_folder, write, writing

SAY_EVERY = 5.0
"""Seconds between two progress lines where no bar can be drawn."""
RUNNERS = ("run_dir", "interactive", "runs")
"""Parameters that say where and how a run happens, not what it computes."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
OWN_FILES = {"results.json", "done.json", "run.json", "params.yaml", "log.txt", "report.html", "plotly.min.js", "figures", "tables"}


class RunError(RuntimeError):
    """Something that cannot be written into a run folder: the message says what and how to mend it."""


@dataclass(frozen=True)
class Run:
    """An open run folder. Everything but `finish` may be called in any order; a cell that is run again replaces what it wrote."""

    notebook: str
    dir: Path
    params: Params
    opened: float = field(default_factory=time.monotonic)
    written: dict[str, list] = field(default_factory=lambda: {"results": [], "figures": [], "tables": [], "files": []})

    @classmethod
    def open(cls, notebook: str, params: Params) -> Run:
        """Start writing to `params.run_dir`, or without one to <runs>/<notebook>/interactive, where older files stay until replaced."""
        folder = Path(params.run_dir) if params.run_dir else runs_folder(params.runs) / notebook / "interactive"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "done.json").unlink(missing_ok=True)
        write(folder / "results.json", "[]\n")
        if not params.run_dir:
            values = {name: value for name, value in dataclasses.asdict(params).items() if name not in RUNNERS}
            write(folder / "params.yaml", yaml.safe_dump(values, sort_keys=False))
        return cls(notebook, folder, params)

    def result(self, name: str, value: object, unit: str = "", n: int | None = None, seed: int | None = None) -> None:
        """Note one number (or word) with its unit, the number of samples behind it and its seed. None says: could not be measured."""
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"Result {name!r} is {value}: not a number anyone can compare. Find its cause, or note None where nothing "
                           "could be measured.")
        if not name or not (value is None or isinstance(value, bool | int | float | str)):
            raise RunError(f"Result {name!r} = {value!r} must have a name and be one number, word, true, false or None.")
        results = self.written["results"]
        others = [row for row in results if (row["name"], row["seed"]) != (name, seed)]
        self._once("result", name, len(others) < len(results))
        results[:] = [*others, {"name": name, "value": value, "unit": unit, "n": n, "seed": seed}]
        write(self.dir / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")

    def figure(self, fig, name: str, caption: str, alt: str):
        """Save a plotly figure for the report and give it back, so that the cell shows it."""
        from ..views.style import FIGURE_BYTES  # plotly is imported with it: not before there is a figure

        self._claim("figures", name)
        for what, text in (("caption", caption), ("alt", alt)):
            if not text.strip():
                raise RunError(f"Figure {name!r} has no {what}: say in a sentence what {'to see' if what == 'caption' else 'is drawn'}.")
        text = fig.to_json()
        size = len(text.encode())
        if size > FIGURE_BYTES:
            raise RunError(f"Figure {name!r} is {size / 1000:.0f} KB; a report stays light with at most {FIGURE_BYTES // 1000} KB each. "
                           "Pool its maps to 32 bins as uint8, or draw fewer slider frames; raw data belongs into run.table or run.path.")
        content = json.loads(text)
        if not drawable(content):
            raise RunError(f"Figure {name!r} would be blank: none of its visible traces holds data. Look at the frame it was made from.")
        saved = {"name": name, "caption": caption, "alt": alt, "figure": content}
        write(self.dir / "figures" / f"{name}.json", json.dumps(saved, separators=(",", ":")))
        return fig

    def table(self, frame, name: str):
        """Save a data frame as parquet for the report and give it back, so that the cell shows it."""
        self._claim("tables", name)
        path = self.dir / "tables" / f"{name}.parquet"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            frame.to_parquet(path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
        return frame

    def path(self, name: str) -> Path:
        """Where another file or folder of this run goes (`plan.yaml`, `checkpoints/unimod`); `finish` checks that it was written."""
        parts = name.split("/")
        if not all(PART.fullmatch(part) for part in parts) or parts[0] in OWN_FILES:
            raise RunError(f"{name!r} cannot be a file of a run: letters, digits, '.', '_' and '-', folders separated by '/', and not one "
                           f"of {', '.join(sorted(OWN_FILES))}.")
        if name not in self.written["files"]:
            self.written["files"].append(name)
        path = self.dir / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self) -> None:
        """Mark the run as done, as the very last thing, after checking that it holds what it promised."""
        if not any(self.written.values()):
            raise RunError(f"{self.notebook} has written nothing: call run.result, run.figure, run.table or run.path before run.finish().")
        missing = [name for name in self.written["files"] if not (self.dir / name).exists()]
        if missing:
            raise RunError(f"{self.notebook} asked for a place for {', '.join(missing)} but wrote nothing there.")
        done = {"notebook": self.notebook, "finished": datetime.now(UTC).isoformat(), "seconds": round(time.monotonic() - self.opened, 1),
                "device": _device(self.params.device), **self.written, "results": len(self.written["results"])}
        write(self.dir / "done.json", json.dumps(done, indent=1) + "\n")
        print(f"{self.notebook} is done, in {self.dir}: "
              f"results {done['results']}, figures {len(done['figures'])}, tables {len(done['tables'])}, files {len(done['files'])}")

    def _claim(self, kind: str, name: str) -> None:
        if not NAME.fullmatch(name):
            raise RunError(f"{name!r} cannot name one of the {kind}: 1 to 64 letters, digits, '_' and '-', such as rank_by_layer.")
        self._once(kind.rstrip("s"), name, name in self.written[kind])
        if name not in self.written[kind]:
            self.written[kind].append(name)

    def _once(self, kind: str, name: str, again: bool) -> None:
        if again and not self.params.interactive:  # in a headless run every cell runs once: the first would be lost without a word
            raise RunError(f"The {kind} {name!r} is written twice in one run; the second would replace the first. Give each its own name.")


def latest(runs: str | Path, notebook: str) -> Path:
    """The newest finished run folder of `notebook`, headless or interactive. Raises `RunError` when there is none."""
    folders = [done.parent for done in (runs_folder(runs) / notebook).glob("*/done.json")]
    if not folders:
        raise RunError(f"There is no finished run of {notebook} in {runs_folder(runs)}. Make one with: python -m unimod run {notebook}")
    return max(folders, key=lambda folder: json.loads((folder / "done.json").read_text(encoding="utf-8"))["finished"])


def notebook_folders() -> tuple[Path, ...]:
    """Where the workbook's notebooks may lie, the first that holds any counts: the working folder, the checkout that this package lies in, and
    where an installation puts them (beside a --target, in an environment, in a user's own site)."""
    package, user = Path(__file__).resolve().parents[2], site.getuserbase() if site.ENABLE_USER_SITE else None
    installed = [package, Path(sysconfig.get_path("data")), *([Path(user)] if user else [])]
    return home() / "notebooks", package / "notebooks", *(place / "share" / "unimod" / "notebooks" for place in installed)


def records_folder() -> Path:
    """The committed records of measurements, beside the notebooks; they need not be there."""
    return next((folder / "records" for folder in notebook_folders() if (folder / "records").is_dir()), home() / "notebooks" / "records")


def progress(items: Iterable, label: str, total: int | None = None) -> Iterator:
    """Go through `items` and say how far it is: a bar in a notebook that someone looks at, else a plain line every few seconds."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if someone_looks():
        from tqdm.notebook import tqdm

        yield from tqdm(items, desc=label, total=total)
        return
    start = said = time.monotonic()
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= SAY_EVERY and count != total:
            said = now
            left = f" of {total}, about {(now - start) / count * (total - count):.0f} s left" if total else ""
            print(f"{label}: {count}{left}", flush=True)
    if said > start:
        print(f"{label}: {count} in {time.monotonic() - start:.0f} s", flush=True)


def drawable(figure: dict) -> bool:
    """Whether a plotly figure (as a dict) shows anything: at least one visible trace whose data arrays all hold something."""
    keys = ("x", "y", "z", "r", "theta", "values", "a", "b", "lat", "lon", "cells", "dimensions", "link", "source", "value")
    for trace in figure.get("data", []):
        data = [trace[key] for key in keys if key in trace]
        if trace.get("visible", True) is True and data and all(_holds(part) for part in data):
            return True
    return False


def _holds(data: object) -> bool:
    """Whether a (nested) array holds at least one value that is neither null nor NaN; plotly packs numpy arrays as base64."""
    if isinstance(data, dict) and "bdata" in data:
        raw = base64.b64decode(data["bdata"])
        kind = {"f4": "f", "f8": "d"}.get(data["dtype"])
        return any(x == x for x in array.array(kind, raw)) if kind else bool(raw)
    if isinstance(data, dict):
        return any(_holds(part) for part in data.values())
    if isinstance(data, list):
        return any(_holds(part) for part in data)
    return data is not None and data != "" and data == data


def someone_looks() -> bool:
    """A front end with a person before it lets the kernel ask for input; papermill and nbconvert do not."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False)) and importlib.util.find_spec("ipywidgets") is not None


def _device(asked: str) -> str:
    torch = sys.modules.get("torch")
    if asked != "cpu" and torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return describe_cpu()
