"""What is asked of the runner, read and checked without a kernel: notebooks, parameters, run folders.

    request = Request("all", files=["params/smoke.yaml"], sets=["seed=1"], runs="runs")
    for step in request.steps():
        print(step.book.name, step.folder, step.done)

A notebook's values are its own < files < -p, coerced and checked by `unimod.params.Params`. Its run folder is
<runs>/<notebook>/<key>/; the key is a hash of the notebook, its parameters, this package and the input files. No torch
here. """

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..config import ParameterError, SetupError, did_you_mean, expanded
from ..files import read_json, runs_folder, writable
from ..params import Params
from ..plan import maker_of
from .run_folder import RUN_PARAMS, latest, notebook_folders

PACKAGE = Path(__file__).parents[1]
WIRES = {"07_training": ("plan", "03_token_redundancy"), "08_compare_runs": ("compare", "07_training")}
# results handed on unless the user sets them: by notebook a parameter, and the notebook that makes it
INPUTS = ("plan", "checkpoint", "routed", "folder")     # may name a file or folder whose content belongs to the key


class Notebook:
    """What is known of a notebook without a kernel: title (its question), measured minutes, defaults of its parameters.

    Raises `ParameterError` when its parameters cell does not hold literals with known names.
    """

    def __init__(self, path: Path) -> None:
        cells, tagged, metadata = _parse(path)
        prose = "\n".join(text for kind, text in cells if kind == "markdown").splitlines()
        self.path, self.name = path, path.stem
        self.title = next((line.lstrip("# ") for line in prose if line.startswith("#")), path.stem)
        self.minutes: float = metadata.get("unimod", {}).get("minutes", 1.0)
        self.source = json.dumps([cells, tagged])
        if len(tagged) != 1:
            raise ParameterError(f"{path.name} has {len(tagged)} cells tagged 'parameters'; a notebook of the "
                                 "workbook has exactly one.")
        self.defaults = _literals(tagged[0], path.name)
        missing = [name for name in ("interactive", "run_dir") if name not in self.defaults]
        if missing:
            raise ParameterError(f"{path.name} has no {' and no '.join(missing)} in its parameters cell, and the "
                                 "runner has to set them.")


@dataclass(frozen=True)
class Step:
    """One notebook of a call: its parameters, and its run folder; None while it waits for another notebook's result."""

    book: Notebook
    params: Params
    folder: Path | None = None

    @property
    def done(self) -> bool:
        """Whether this very run is finished already."""
        marked = self.folder is not None and (self.folder / "done.json").exists()
        return marked and read_json(self.folder / "run.json", {}).get("status") == "ok"

    @property
    def asked(self) -> dict[str, object]:
        """What it computes: all its parameters but those that the runner sets."""
        return {name: getattr(self.params, name) for name in self.book.defaults if name not in RUN_PARAMS}


class Request:
    """One call of the runner: its notebooks (`books`), the values that are `given`, and the folder of all `runs`.

    Raises `ParameterError` for a name that no notebook declares, `SetupError` where there are no notebooks or runs
    cannot be written; `steps` checks the values.
    """

    def __init__(self, which: str, files: Sequence[str] = (), sets: Sequence[str] = (),
                 runs: str | Path = "runs") -> None:
        self.books = find(which)
        known = self.books if which.endswith(".ipynb") else notebooks()     # one given by its path needs no others
        from_files = {name: value for file in files for name, value in _read_yaml(file).items()}
        from_line = dict(map(_assignment, sets))
        for values, allowed in ((from_files, known), (from_line, self.books)):      # one file serves all notebooks
            declared = {name for book in allowed for name in book.defaults} - set(RUN_PARAMS)
            for name in values:
                if name in RUN_PARAMS:
                    raise ParameterError(f"{name} is set by the runner. To choose the folder of all runs use --runs "
                                         "DIR.")
                Params.refuse_unknown([name])
                if name not in declared:
                    one = len(self.books) == 1
                    who = f"{self.books[0].name} does not declare" if one else "No notebook declares"
                    owners = ", ".join(book.name for book in known if name in book.defaults)
                    belongs = f" It belongs to {owners}." if owners else ""
                    raise ParameterError(f"{who} {name!r}.{belongs} Declared: {', '.join(sorted(declared))}.")
        self.given, self.runs = from_files | from_line, runs_folder(runs)
        writable(self.runs)

    def step(self, book: Notebook, made: Mapping[str, Path]) -> Step:
        """A notebook with its resolved parameters; `made`: by name, the folders of this call's finished runs."""
        values = {name: self.given.get(name, value) for name, value in book.defaults.items()}
        parameter, source = WIRES.get(book.name, ("", ""))
        waits = False
        if parameter in book.defaults and not self.given.get(parameter):
            waits = source not in made and any(other.name == source for other in self.books)
            if parameter == "plan" and source in made:
                values["plan"] = str(made[source] / "plan.yaml")
            elif parameter == "compare" and not waits:                  # a plan has a default, a comparison has none
                values["compare"] = [str(made.get(source) or latest(self.runs, source))]
        try:
            params = Params.of(**values | {"interactive": False, "runs": str(self.runs), "run_dir": ""})
            if "plan" in book.defaults or "saving" in book.defaults:
                make, layers = maker_of(params.plan), _layers(params)
                if layers:
                    make(layers, params.saving)
        except ParameterError as error:
            raise ParameterError(f"{book.name}: {error}") from None
        if waits:
            return Step(book, params)
        folder = self.runs / book.name / _key(Step(book, params))
        return Step(book, dataclasses.replace(params, run_dir=str(folder)), folder)

    def steps(self, force: bool = False) -> list[Step]:
        """All notebooks as far as known before the first one runs. Raises `ParameterError`, also for a missing GPU."""
        made: dict[str, Path] = {}
        steps = []
        for book in self.books:
            steps.append(self.step(book, made))
            if steps[-1].done and not force:
                made[book.name] = steps[-1].folder
        if any(step.params.device == "cuda" for step in steps):
            import torch  # over a second: only for a call that names CUDA

            if not torch.cuda.is_available():
                raise ParameterError("device='cuda', but torch sees no CUDA device here. Use device=auto or "
                                     "device=cpu.")
        return steps


def notebooks() -> tuple[Notebook, ...]:
    """The workbook's numbered notebooks, of the first of `notebook_folders` that holds any; others are left out.

    Raises `SetupError` where there are none.
    """
    for place in notebook_folders():
        found = {path: _of_the_workbook(path) for path in sorted(place.glob("[0-9][0-9]_*.ipynb"))}
        if True in found.values():
            return tuple(Notebook(path) for path, ours in found.items() if ours is not False)
    raise SetupError("This installation of unimod carries no notebooks, and there are none in the folder notebooks/ "
                     "here. They come with a checkout of the project, and with an installation made from one (pip "
                     "install PATH/TO/CHECKOUT): call from the checkout, or install anew. A notebook of your own runs "
                     "by its path.")


def find(which: str) -> tuple[Notebook, ...]:
    """Notebooks by number (3 or 03), name, path, or all of them. Raises `ParameterError` when there is none such."""
    if which.endswith(".ipynb"):
        return (Notebook(Path(expanded(which))),)
    books = notebooks()
    number = f"{int(which):02d}_" if which.isdecimal() else None
    found = tuple(book for book in books if which in ("all", book.name) or (number and book.name.startswith(number)))
    if not found:
        names = [book.name for book in books]
        raise ParameterError(f"There is no notebook {which!r}.{did_you_mean(which, names, 0.4)} "
                             f"Known: all, {', '.join(names)}.")
    return found


def _parse(path: Path) -> tuple[list[tuple[str, str]], list[str], dict]:
    """Type and source of every cell, the sources of those tagged 'parameters', and the notebook's metadata."""
    try:
        content = read_json(path)                       # nbformat's import alone takes 0.3 s
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]
        tags = [cell["metadata"].get("tags", []) for cell in content["cells"]]
        return cells, [text for (_, text), own in zip(cells, tags) if "parameters" in own], content["metadata"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParameterError(f"{path} cannot be read as a notebook ({type(error).__name__}: {error}).") from None


def _of_the_workbook(path: Path) -> bool | None:
    """Whether a notebook is one of the workbook's by its own account; None when it cannot be read."""
    try:
        _, tagged, metadata = _parse(path)
    except ParameterError:
        return None
    return "unimod" in metadata or any("run_dir" in text for text in tagged)


def _literals(source: str, where: str) -> dict[str, object]:
    """The assignments of a parameters cell by name. Raises `ParameterError` for anything else in it."""
    values = {}
    try:
        for node in ast.parse(source).body:
            try:
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                values[target.id] = ast.literal_eval(node.value)
            except (AttributeError, ValueError):
                raise ParameterError(f"`{ast.unparse(node)}` in the parameters cell is not a name with a plain value. "
                                     "What is computed there goes stale when a parameter is set; move it into the "
                                     "next cell.") from None
        Params.refuse_unknown(values)
    except SyntaxError as error:
        raise ParameterError(f"{where}: the parameters cell is not Python ({error}).") from None
    except ParameterError as error:
        raise ParameterError(f"{where}: {error}") from None
    return values


def _read_yaml(path: str) -> dict[str, object]:
    try:
        values = yaml.safe_load(Path(expanded(path)).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ParameterError(f"The parameter file {path!r} cannot be read: {error}. The folder params/ holds "
                             "examples.") from None
    if not isinstance(values, dict | None):
        raise ParameterError(f"The parameter file {path!r} must hold lines such as 'steps: 60'.")
    return values or {}


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ParameterError(f"-p {text!r} must have the form name=value, such as -p steps=60.")
    return name.strip(), value


def _layers(params: Params) -> int | None:
    """Layers of the model that a run starts from; None where its config.json does not say."""
    folder = Path(params.checkpoint or PACKAGE / "checkpoints" / params.models[0])
    try:
        return read_json(folder / "config.json").get("num_hidden_layers")
    except (OSError, ValueError):
        return None


def _key(step: Step) -> str:
    """The same for the same computation wherever it lies on the disk: inputs count by what they hold."""
    values = step.asked
    for name in INPUTS:
        if values.get(name) and Path(values[name]).exists():
            values[name] = _fingerprint(Path(values[name]))
    if "compare" in values:
        values["compare"] = [_fingerprint(Path(folder) / "done.json") for folder in values["compare"]]
    return _hash([step.book.source, values, _package()])[:10]


def _fingerprint(path: Path) -> str:
    """A file by its content; a folder, which may hold gigabytes, by the names, sizes and times of its files."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = [(file, file.stat()) for file in sorted(path.rglob("*")) if file.is_file()]
    return _hash([(str(file.relative_to(path)), stat.st_size, stat.st_mtime_ns) for file, stat in found])


@functools.cache
def _package() -> str:
    """All of this package's files, the shipped checkpoints included, by content."""
    files = [path for path in sorted(PACKAGE.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return _hash([(str(path.relative_to(PACKAGE)), _fingerprint(path)) for path in files])


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
