"""The runner: runs notebooks in fresh kernels and leaves one folder per run, which says how it went, and a report.

    python -m unimod run 03 -p data=digits -p samples=8
    python -m unimod run all -f params/default.yaml

What is asked is read and checked by `unimod.workbook.request` before any kernel starts; what is done is not done again. Exit codes: 0 ok,
2 parameters, 3 environment, 4 error in a notebook, 124 timeout, 130 interrupted, 138 kernel died. papermill is imported here alone,
and only when a notebook is about to run.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import yaml

from ..config import ParameterError, SetupError
from ..files import facts, write, writing
from ..versions import advice
from . import report
from .request import Request, Step
from .run_folder import RUNNERS, RunError

HEARTBEAT = 15.0
"""Seconds between two signs of life of a running cell."""
START = 180
"""Seconds a kernel may take to start."""
STATUS = {0: "ok", 1: "error", 2: "parameters", 3: "environment", 4: "notebook", 124: "timeout", 130: "interrupted", 138: "kernel died"}
NEEDED = ("papermill", "nbclient", "ipykernel", "plotly", "pandas", "pyarrow", "mistune")


class Stop(Exception):
    """A run that cannot go on, with its exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def run(request: Request, force: bool = False, timeout: float | None = None) -> Path:
    """Run what is not done yet, in order, and write the report; stops at the first failure. Returns the report's page."""
    steps = request.steps(force)
    _environment()
    todo = [step.book for step in steps if force or not step.done]
    _say(f"{len(steps)} notebook{'s' * (len(steps) > 1)}, {len(todo)} to run: about {sum(book.minutes for book in todo):.2g} min at the "
         f"default parameters on 2 CPU cores. Runs go to {_short(request.runs)}.")
    whole = len(steps) > 1
    page = request.runs / "report" / "index.html"
    if whole:
        page.unlink(missing_ok=True)  # a report of an earlier call must not pass for this one's
    made: dict[str, Path] = {}
    for number, book in enumerate(request.books, 1):
        place = f"[{number}/{len(steps)}] {book.name}"
        try:
            step = request.step(book, made)
            if step.done and not force:
                _say(f"{place}: done before, {_short(step.folder)}")
            else:
                _say(f"{place}: {book.title} (about {book.minutes:g} min)")
                with _some_home():
                    _run_one(step, force, timeout)
        except OSError as error:
            raise Stop(3, f"{book.name}: {error.filename or request.runs} cannot be read or written ({error.strerror or error}). Make room there, or choose "
                          "another folder with --runs DIR.") from None
        except (Stop, ParameterError, RunError, SetupError) as error:
            done, left = ", ".join(made) or "nothing", ", ".join(b.name for b in request.books[number:]) or "nothing"
            account = f"\nDone: {done}. Failed: {book.name}. Not run: {left}." if whole else ""
            raise Stop(getattr(error, "code", 2), f"{error}{account}") from None
        made[book.name] = step.folder
    return report.write_page(list(made.values()), page) if whole else step.folder / "report.html"


def _run_one(step: Step, force: bool, timeout: float | None) -> None:
    """One notebook from start to report. Whatever goes wrong, what stays behind says so and is not taken for done."""
    folder, start = step.folder, time.monotonic()
    if force:
        shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)  # files of an interrupted run stay: training resumes from its checkpoints
        for name in ("done.json", "report.html"):
            (folder / name).unlink(missing_ok=True)
    asked = {name: getattr(step.params, name) for name in step.book.defaults if name not in RUNNERS}
    write(folder / "params.yaml", yaml.safe_dump(asked, sort_keys=False, allow_unicode=True))
    record = {"notebook": step.book.name, "title": step.book.title, "key": folder.name, "status": "running", "exit": None,
              "start": datetime.now(UTC).isoformat(timespec="seconds"), "seed": asked.get("seed"), **facts()}
    write(folder / "run.json", json.dumps(record, indent=1))
    code = 1
    try:
        _execute(step, timeout)
        report.write_page([folder], folder / "report.html")
        code = 0
    except (Stop, SetupError) as stop:
        code = stop.code
        raise
    except OSError:
        code = 3
        raise
    except report.ReportError as error:
        code = 4
        raise Stop(code, f"{step.book.name}: {error}") from None
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        done = folder / "done.json"
        record["device"] = json.loads(done.read_text(encoding="utf-8"))["device"] if done.exists() else step.params.device
        if code:
            done.unlink(missing_ok=True)
        end = {"end": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(time.monotonic() - start, 1)}
        write(folder / "run.json", json.dumps(record | end | {"status": STATUS[code], "exit": code}, indent=1))
    _say(f"    done in {time.monotonic() - start:.0f} s: {_short(folder)}")


def _execute(step: Step, timeout: float | None) -> None:
    """Run the notebook in a fresh kernel of this very interpreter. Raises `Stop` unless every cell ran and the run was finished."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    name, output = step.book.name, step.folder / f"{step.book.name}.ipynb"
    look = f"As far as it got: {_short(output)}; what it said: {_short(step.folder / 'log.txt')}."
    end = time.monotonic() + timeout if timeout else None
    with _Log(step.folder / "log.txt") as log:
        try:
            executed = papermill.execute_notebook(
                str(step.book.path), str(output), parameters={n: getattr(step.params, n) for n in step.book.defaults},
                kernel_name="python3", language="python", kernel_manager_class=_this_python(), start_timeout=START, iopub_timeout=60,
                progress_bar=False, stdout_file=log, stderr_file=log, on_cell_execute=log.cell, shutdown_kernel="immediate",
                timeout_func=(lambda cell: max(0.1, end - time.monotonic())) if end else None)
        except papermill.exceptions.PapermillExecutionError as error:
            raise _stop(name, error.exec_count, error.ename, error.evalue, error.traceback, look) from None
        except CellTimeoutError:
            raise Stop(124, f"{name} took longer than --timeout {timeout:g} s, in cell {log.where}. {look}") from None
        except DeadKernelError:
            raise Stop(138, f"The kernel of {name} died in cell {log.where}. Most often the memory did not suffice: lower batch or "
                            f"samples. {look}") from None
        except (RuntimeError, TimeoutError) as error:
            what = f"stopped answering in cell {log.where}" if log.number else f"did not start; try {sys.executable} -m ipykernel --version"
            raise Stop(3, f"The kernel of {name} {what} ({error}). {look}") from None
    for cell in executed.cells:
        for out in cell.get("outputs", []):
            if out.output_type == "error":  # papermill lets sys.exit(0) pass, though the cells after it never ran
                raise _stop(name, cell.execution_count, out.ename, out.evalue, out.traceback, look)
    if not (step.folder / "done.json").exists():
        raise Stop(4, f"{name} ran to its end but never called run.finish(), so nothing says that its results are complete. {look}")


def _stop(name: str, cell: int | None, ename: str, evalue: str, traceback: list[str], look: str) -> Stop:
    """A failed cell as a paragraph: which, at what line, why."""
    line = re.search(r"^-+> *(\d+) (.*)$", re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(traceback)), re.MULTILINE)
    at = f", line {line[1]} ({line[2].strip()})" if line else ""
    refused = re.match(rf"\[Errno ({'|'.join(str(e) for e in (errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EDQUOT))})\]", evalue)
    code = {"ParameterError": 2, "ModuleNotFoundError": 3, "SetupError": 3}.get(ename, 3 if refused else 4)
    hint = f" {_extra(evalue)}" if ename == "ModuleNotFoundError" else f"\n{advice()}" if code == 4 and advice() else ""
    return Stop(code, f"{name} failed in cell {cell}{at}.\n{ename}: {evalue}{hint}\n{look}")


@contextmanager
def _some_home() -> Iterator[None]:
    """A home folder for the kernel where the user has none (a container's user id without an entry, HOME not set): jupyter does not start without."""
    if os.path.expanduser("~") != "~":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="unimod-home-", ignore_cleanup_errors=True) as folder:
        os.environ["HOME"] = folder
        try:
            yield
        finally:
            del os.environ["HOME"]


def _this_python() -> type:
    """A kernel manager that starts sys.executable, whatever kernels the user has installed under the name python3."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            quiet = get_kernel_dict(extra_arguments=["--IPKernelApp.log_level=ERROR"])
            return KernelSpec(**quiet, env={"PLOTLY_RENDERER": "plotly_mimetype"})  # no plotly.js in the notebook

    return ThisPython


class _Log:
    """What a running notebook says, on the terminal and in log.txt, with a sign of life every few seconds."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.start = self.cell_start = time.monotonic()
        self.number, self.where, self.rest, self.over = 0, "?", "", threading.Event()

    def __enter__(self) -> _Log:
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.rest:
            self.write("\n")
        self.file.close()

    def write(self, text: str) -> None:
        """A piece of output; of a bar that redraws itself only the last state of the line is kept."""
        *lines, self.rest = (self.rest + text).split("\n")
        self.rest = self.rest.rsplit("\r", 1)[-1]
        for line in lines:
            said = line.rstrip("\r").rsplit("\r", 1)[-1]
            _say(f"    {said}")
            self.file.write(f"[{time.monotonic() - self.start:7.1f}] {said}\n")

    def flush(self) -> None:
        """Called by papermill after each piece."""
        self.file.flush()

    def cell(self, cell: dict, cell_index: int) -> None:
        """A cell is about to run; it is named by its first line of code."""
        lines = [line for line in cell["source"].splitlines() if line.strip() and not line.lstrip().startswith("#")]
        self.number, self.cell_start = self.number + 1, time.monotonic()
        self.where = f"{self.number} ({(lines or ['only comments'])[0][:80]})"
        self.file.write(f"[{time.monotonic() - self.start:7.1f}] --- cell {self.where}\n")

    def _beat(self) -> None:
        while not self.over.wait(HEARTBEAT):
            now = time.monotonic()
            _say(f"    ... {now - self.start:.0f} s, in cell {self.where} for {now - self.cell_start:.0f} s")


def _say(line: str) -> None:
    """A line on the terminal; one that is gone, or a closed pipe, ends no run: what notebooks say is in log.txt, too."""
    with suppress(OSError):
        print(line, flush=True)


def _environment() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Stop(3, f"Notebooks cannot run without {', '.join(missing)}. " + _extra(missing[0]))


def _extra(package: str) -> str:
    """Which extra of this package installs a missing one (named, possibly within a sentence)."""
    for need in importlib.metadata.requires("unimod") or []:
        name, extra = re.match(r"[\w.-]+", need)[0], re.search(r"extra == ['\"](\w+)", need)
        if re.search(rf"\b{name.replace('-', '[-_]')}\b", package):
            return f"Install it with: pip install -e '.[{extra[1]}]'" if extra else "Install it with: pip install -e ."
    return "Install what the notebooks need with: pip install -e '.[notebooks]'"


def _short(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
