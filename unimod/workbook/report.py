"""The report: one page for one run or for a whole workbook, with one plotly.min.js beside it, that needs no network.

    python -m unimod report runs          writes runs/report/index.html from the newest finished run of each notebook

A figure is drawn from its JSON in the run folder, in the light or dark colours of the reader's system; one that would
be blank is an error. `page.html` escapes all that comes from a run, and its policy forbids to load anything from
elsewhere. """

from __future__ import annotations

import html
import importlib.resources
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ..files import read_json, runs_folder, write
from .run_folder import RunError, drawable, latest

ROWS = 200              # rows of a table shown on the page; all of them are in the parquet file


def write_report(runs: str | Path) -> Path:
    """The page of one finished run folder, or of the newest finished run of every notebook in a folder of runs.

    Raises `RunError` when nothing is finished there or a figure would be blank.
    """
    folder = runs_folder(runs)
    if (folder / "done.json").exists():
        return write_page([folder], folder / "report.html")
    names = sorted({done.parts[-3] for done in folder.glob("*/*/done.json")})
    if not names:
        raise RunError(f"There is no finished run in {folder}. Make some with: "
                       "python -m unimod run all -f params/default.yaml")
    return write_page([latest(folder, name) for name in names], folder / "report" / "index.html")


def write_page(folders: Sequence[Path], page: Path) -> Path:
    """Write the page of these finished run folders. Raises `RunError` when a figure would be blank."""
    import jinja2  # comes with nbconvert, as does mistune

    runs = [_run(folder, page.parent) for folder in folders]
    figures = [figure["figure"] for run in runs for figure in run["figures"]]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {"cell": _cell, "words": _words, "markdown": _markdown,
                            "literal": lambda value: json.dumps(value, ensure_ascii=False)}
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    text = template.render(runs=runs, figures=figures, ROWS=ROWS)
    page.parent.mkdir(parents=True, exist_ok=True)
    plotly = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    shutil.copyfile(str(plotly), page.parent / "plotly.min.js")
    write(page, text)
    return page


def _run(folder: Path, base: Path) -> dict[str, object]:
    """What the page shows of one run. Raises `RunError` when one of its figures would be blank."""
    done = read_json(folder / "done.json")
    name = done["notebook"]
    number, _, words = name.partition("_")
    figures = [read_json(folder / "figures" / f"{figure}.json") for figure in done["figures"]]
    for figure in figures:
        if not drawable(figure["figure"]):
            raise RunError(f"Figure {figure['name']!r} of {name} would be blank: none of its visible traces holds "
                           "data.", 4)
    record, params = read_json(folder / "run.json", {}), folder / "params.yaml"     # a run in JupyterLab has no record
    files = [f"{name}.ipynb", "results.json", "run.json", "params.yaml", "log.txt", *done["files"]]
    return {
        "name": name, "number": number, "title": record.get("title") or words.replace("_", " ").capitalize(),
        "folder": folder, "done": done, "record": record, "figures": figures,
        "intro": _intro(read_json(folder / f"{name}.ipynb", {"cells": []})["cells"]),
        "params": yaml.safe_load(params.read_text(encoding="utf-8")) if params.exists() else {},
        "results": _results(read_json(folder / "results.json", [])),
        "tables": [_table(folder / "tables" / f"{table}.parquet") for table in done["tables"]],
        "beside": folder == base,           # only then links to the run's own files survive moving the folder
        "files": [file for file in files if (folder / file).exists()],
    }


def _intro(cells: Sequence[Mapping]) -> str:
    """The first cell of a notebook with a heading, below that heading."""
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return next((text for text in texts if "#" in text), "").partition("\n")[2]


def _results(rows: Sequence[Mapping]) -> dict[str, object] | None:
    """The table of results, without columns that nothing was noted in."""
    shown = ["value", *(key for key in ("unit", "n", "seed") if any(row[key] not in ("", None) for row in rows))]
    return {"title": "Results", "columns": [("result", False), *((key, key != "unit") for key in shown)],
            "rows": [[row["name"], *(row[key] for key in shown)] for row in rows]} if rows else None


def _table(path: Path) -> dict[str, object]:
    """A saved data frame; columns are pairs of a name and whether it is numeric, which right-aligns it."""
    import pandas

    frame = pandas.read_parquet(path)
    return {"title": _words(path.stem).capitalize(), "all": len(frame),
            "columns": [(str(column), kind.kind in "iuf") for column, kind in frame.dtypes.items()],
            "rows": list(frame.head(ROWS).itertuples(index=False))}


def _cell(value: object) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")


def _markdown(text: str):
    """Prose of a notebook, with raw HTML escaped, pictures as their alt text and outside links as text."""
    import markupsafe
    import mistune

    class Prose(mistune.HTMLRenderer):
        def image(self, text: str, url: str, title: str | None = None) -> str:
            return f"[{text}]"

        def link(self, text: str, url: str, title: str | None = None) -> str:
            return text if text == url else f"{text} ({html.escape(url)})"

    return markupsafe.Markup(mistune.create_markdown(renderer=Prose(escape=True), plugins=["table"])(text))
