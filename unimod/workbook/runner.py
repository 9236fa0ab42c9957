"""The runner: notebooks in fresh kernels, one folder per run that says how it went, and a report.

    python -m unimod run 03 -p data=digits -p samples=8
    python -m unimod run all -f params/default.yaml

What is asked is checked by `unimod.workbook.request` before any kernel starts; what is done is not done again.
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
from ..files import facts, read_json, write, writing
from ..versions import advice
from . import report
from .request import Request, Step
from .run_folder import RunError

HEARTBEAT = 15.0        # seconds between two signs of life of a running cell
START = 180             # seconds a kernel may take to start
STATUS = {0: "ok", 1: "error", 2: "parameters", 3: "environment", 4: "notebook", 124: "timeout", 130: "interrupted",
          138: "kernel died"}   # by exit code
NEEDED = ("papermill", "nbclient", "ipykernel", "plotly", "pandas", "pyarrow", "mistune", "jinja2")
DISK = "|".join(map(str, (errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EDQUOT)))


def exit_code(error: BaseException) -> int:
    """The exit code that an error ends the command line with, 1 for one that nobody foresaw."""
    if isinstance(error, RunError):
        return error.code
    codes = {ParameterError: 2, SetupError: 3, OSError: 3, KeyboardInterrupt: 130}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def in_words(error: BaseException, place: object = "A file") -> str:
    """What the command line says of an error; `place`: what could not be read where the error does not say."""
    if isinstance(error, OSError):
        return f"{error.filename or place} cannot be read or written ({error.strerror or error})."
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted. The notebook under way counts as not done; the same command goes on from there."
    return str(error)


def run(request: Request, force: bool = False, timeout: float | None = None) -> Path:
    """Run what is not done yet, in order, and write the report; returns its page.

    Stops at the first failure with `RunError`, whose message says what was done and what was not run. `timeout`:
    seconds per notebook.
    """
    steps = request.steps(force)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(f"Notebooks cannot run without {', '.join(missing)}. {_extra(missing[0])}")
    todo = [step.book for step in steps if force or not step.done]
    _print(f"{len(steps)} notebook{'s' * (len(steps) > 1)}, {len(todo)} to run: about "
           f"{sum(book.minutes for book in todo):.2g} min at the default parameters on 2 CPU cores. Runs go to "
           f"{_short(request.runs)}.")
    whole = len(steps) > 1
    page = request.runs / "report" / "index.html"
    if whole:
        page.unlink(missing_ok=True)                    # a report of an earlier call must not pass for this one's
    made: dict[str, Path] = {}
    for number, book in enumerate(request.books, 1):
        place = f"[{number}/{len(steps)}] {book.name}"
        try:
            step = request.step(book, made)
            if step.done and not force:
                _print(f"{place}: done before, {_short(step.folder)}")
            else:
                _print(f"{place}: {book.title} (about {book.minutes:g} min)")
                _run_one(step, force, timeout)
        except (RunError, ParameterError, SetupError, OSError) as error:
            message = in_words(error, request.runs)
            if isinstance(error, OSError):
                message = f"{book.name}: {message} Make room there, or choose another folder with --runs DIR."
            if whole:
                left = ", ".join(other.name for other in request.books[number:]) or "nothing"
                message += f"\nDone: {', '.join(made) or 'nothing'}. Failed: {book.name}. Not run: {left}."
            raise RunError(message, exit_code(error)) from None
        made[book.name] = step.folder
    return report.write_page(list(made.values()), page) if whole else step.folder / "report.html"


def _run_one(step: Step, force: bool, timeout: float | None) -> None:
    """One notebook from start to report. Whatever goes wrong, what stays behind says so and is not taken for done."""
    folder, start = step.folder, time.monotonic()
    done = folder / "done.json"
    if force:
        shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)       # files of an interrupted run stay: training resumes from them
        for old in (done, folder / "report.html"):
            old.unlink(missing_ok=True)
    write(folder / "params.yaml", yaml.safe_dump(step.asked, sort_keys=False, allow_unicode=True))
    record = {"notebook": step.book.name, "title": step.book.title, "key": folder.name, "status": "running",
              "exit": None, "start": _now(), "seed": step.asked.get("seed"), **facts()}
    write(folder / "run.json", json.dumps(record, indent=1))
    code = 0
    try:
        with _some_home():
            _execute(step, timeout)
        report.write_page([folder], folder / "report.html")
    except BaseException as error:
        code = exit_code(error)
        raise
    finally:
        record["device"] = read_json(done, {"device": step.params.device})["device"]
        if code:
            done.unlink(missing_ok=True)
        record |= {"end": _now(), "seconds": round(time.monotonic() - start, 1), "status": STATUS[code], "exit": code}
        write(folder / "run.json", json.dumps(record, indent=1))
    _print(f"    done in {time.monotonic() - start:.0f} s: {_short(folder)}")


def _execute(step: Step, timeout: float | None) -> None:
    """Run the notebook in a fresh kernel of this interpreter. Raises `RunError` unless it ran to its run.finish()."""
    import papermill  # 1 s, and only here: `check` and `list` do without
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    name, output = step.book.name, step.folder / f"{step.book.name}.ipynb"
    where = f"As far as it got: {_short(output)}; what it printed: {_short(step.folder / 'log.txt')}."
    end = time.monotonic() + timeout if timeout else None
    with _Log(step.folder / "log.txt") as log:
        try:
            executed = papermill.execute_notebook(
                str(step.book.path), str(output), parameters={n: getattr(step.params, n) for n in step.book.defaults},
                kernel_name="python3", language="python", kernel_manager_class=_this_python(), start_timeout=START,
                iopub_timeout=60, progress_bar=False, stdout_file=log, stderr_file=log, on_cell_execute=log.cell,
                shutdown_kernel="immediate",
                timeout_func=(lambda cell: max(0.1, end - time.monotonic())) if end else None)
        except papermill.exceptions.PapermillExecutionError as error:
            raise _failed(name, error.exec_count, error, where) from None
        except CellTimeoutError:
            message = f"{name} took longer than --timeout {timeout:g} s, in cell {log.where}. {where}"
            raise RunError(message, 124) from None
        except DeadKernelError:
            raise RunError(f"The kernel of {name} died in cell {log.where}. Most often the memory did not suffice: "
                           f"lower batch or samples. {where}", 138) from None
        except (RuntimeError, TimeoutError) as error:
            what = (f"stopped answering in cell {log.where}" if log.number
                    else f"did not start; try {sys.executable} -m ipykernel --version")
            raise SetupError(f"The kernel of {name} {what} ({error}). {where}") from None
    for cell in executed.cells:
        for out in cell.get("outputs", []):
            if out.output_type == "error":              # papermill lets sys.exit(0) pass, though later cells never ran
                raise _failed(name, cell.execution_count, out, where)
    if not (step.folder / "done.json").exists():
        raise RunError(f"{name} ran to its end but never called run.finish(), so nothing tells that its results are "
                       f"complete. {where}", 4)


def _failed(name: str, cell: int | None, error, where: str) -> RunError:
    """A failed cell as a paragraph: which, at what line, why, and what helps; `error` is the cell's or papermill's."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    line = re.search(r"^-+> *(\d+) (.*)$", plain, re.MULTILINE)
    at = f", line {line[1]} ({line[2].strip()})" if line else ""
    code = {"ParameterError": 2, "ModuleNotFoundError": 3, "SetupError": 3}.get(error.ename, 4)
    if re.match(rf"\[Errno ({DISK})\]", error.evalue):  # a disk that refuses is the machine's fault, not the notebook's
        code = 3
    hint = f"\n{advice()}" if code == 4 and advice() else ""
    if error.ename == "ModuleNotFoundError":
        hint = f" {_extra(error.evalue)}"
    return RunError(f"{name} failed in cell {cell}{at}.\n{error.ename}: {error.evalue}{hint}\n{where}", code)


@contextmanager
def _some_home() -> Iterator[None]:
    """A home folder for the kernel where the user has none (a container's bare user id): jupyter needs one."""
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
            return KernelSpec(**quiet, env={"PLOTLY_RENDERER": "plotly_mimetype"})  # no 4 MB of plotly.js in a notebook

    return ThisPython


class _Log:
    """What a running notebook prints, on the terminal and in log.txt, with a sign of life every `HEARTBEAT` seconds."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.flush = self.file.flush                    # papermill calls it after each piece
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
            shown = line.rstrip("\r").rsplit("\r", 1)[-1]
            _print(f"    {shown}")
            self._note(shown)

    def cell(self, cell: dict, cell_index: int) -> None:
        """Called before each cell; it is named by its first line of code."""
        lines = [line for line in cell["source"].splitlines() if line.strip() and not line.lstrip().startswith("#")]
        self.number, self.cell_start = self.number + 1, time.monotonic()
        self.where = f"{self.number} ({(lines or ['only comments'])[0][:80]})"
        self._note(f"--- cell {self.where}")

    def _note(self, line: str) -> None:
        self.file.write(f"[{time.monotonic() - self.start:7.1f}] {line}\n")

    def _beat(self) -> None:
        while not self.over.wait(HEARTBEAT):
            now = time.monotonic()
            _print(f"    ... {now - self.start:.0f} s, in cell {self.where} for {now - self.cell_start:.0f} s")


def _print(line: str) -> None:
    """A line on the terminal; a closed pipe ends no run: what notebooks print is in log.txt, too."""
    with suppress(OSError):
        print(line, flush=True)


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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
