"""The report: one page for one run or for a whole workbook, with one plotly.min.js beside it, that needs no network.

    python -m unimod report runs          writes runs/report/index.html from the newest finished run of each notebook

A figure is drawn from its JSON in the run folder, in the light or dark colours of the reader's system; one that would
be blank is an error. All that comes from a run is escaped; the page's own policy forbids it to load anything from
elsewhere. """

from __future__ import annotations

import html
import importlib.resources
import json
import shutil
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ..files import runs_folder, write
from .run_folder import RunError, drawable, latest

ROWS = 200
"""Rows of a table shown on the page; all of them are in the parquet file."""
NOT_GIVEN = ("", None)


class ReportError(RuntimeError):
    """A report that would not show all that it holds."""


def write_report(runs: str | Path) -> Path:
    """The page of one finished run folder, or of the newest finished run of every notebook in a folder of runs.

    Raises `RunError` when nothing is finished there, `ReportError` when a figure would be blank.
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
    """Write the page of these finished run folders. Raises `ReportError` when a figure would be blank."""
    runs = [_Section(folder, page.parent) for folder in folders]
    figures = [figure["figure"] for run in runs for figure in run.figures]
    data = json.dumps(figures, separators=(",", ":"))
    for char in "<>&":                                  # nothing in the data can end the script element
        data = data.replace(char, f"\\u{ord(char):04x}")
    page.parent.mkdir(parents=True, exist_ok=True)
    plotly = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    shutil.copyfile(str(plotly), page.parent / "plotly.min.js")
    template = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    about = _about(_read(folders[0] / "run.json", {}), len(folders), len(figures))
    write(page, template.substitute(about=_text(about), figures=data, contents="".join(run.contents() for run in runs),
                                    sections="".join(run.section() for run in runs)))
    return page


def _about(facts: Mapping, notebooks: int, figures: int) -> str:
    """The line below the page's title, from a run.json (a run in JupyterLab has none)."""
    parts = [f"{_count(notebooks, 'notebook')}, {_count(figures, 'figure')}", facts.get("start", "")[:10]]
    if facts:
        sha = (facts["git"]["sha"] or "")[:10]
        parts.append(f"commit {sha}{' with changes' * facts['git']['dirty']}" if sha else "")
        versions = [(name, facts["versions"].get(name)) for name in ("torch", "transformers")]
        parts += [f"{name} {version}" for name, version in versions if version]
    return " · ".join(filter(None, parts))


class _Section:
    """One run on the page. Raises `ReportError` when one of its figures would be blank."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.done = folder, _read(folder / "done.json")
        self.beside = folder == base            # only then links to the run's own files survive moving the folder
        self.name = self.done["notebook"]
        self.number, _, words = self.name.partition("_")
        self.title = _read(folder / "run.json", {}).get("title") or words.replace("_", " ").capitalize()
        self.figures = [_read(folder / "figures" / f"{name}.json") for name in self.done["figures"]]
        for figure in self.figures:
            if not drawable(figure["figure"]):
                raise ReportError(f"Figure {figure['name']!r} of {self.name} would be blank: none of its visible "
                                  "traces holds data.")

    def contents(self) -> str:
        """Its entry in the table of contents."""
        entries = "".join(f'<li><a href="#{self._id(fig)}">{_words(fig["name"])}</a></li>' for fig in self.figures)
        title = f"<span>{_text(self.number)}</span>{_text(self.title)}"
        return f'<li><a href="#{self.name}">{title}</a><ol>{entries}</ol></li>'

    def section(self) -> str:
        """All of the run."""
        finished = self.done["finished"][:16].replace("T", " ")
        facts = f"{self.done['seconds']:.0f} s on {self.done['device']} · finished {finished} UTC"
        parts = [f'<section id="{self.name}"><header><p class="number">{_text(self.number)}</p>'
                 f'<h2>{_text(self.title)}</h2><p class="facts">{_text(facts)}</p></header>',
                 self._intro(), self._parameters(), self._results(),
                 *(self._figure(number, figure) for number, figure in enumerate(self.figures, 1)),
                 *map(self._table, self.done["tables"]), self._files(), "</section>"]
        return "".join(parts)

    def _id(self, figure: Mapping) -> str:
        return f"{self.name}-{figure['name']}"

    def _intro(self) -> str:
        """The first cell of the notebook with a heading, below that heading."""
        cells = _read(self.folder / f"{self.name}.ipynb", {"cells": []})["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        _, _, rest = next((text for text in texts if "#" in text), "").partition("\n")
        return f'<div class="intro">{_markdown(rest)}</div>' if rest else ""

    def _parameters(self) -> str:
        path = self.folder / "params.yaml"
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(json.dumps(value, ensure_ascii=False))}</td></tr>"
                       for name, value in values.items())
        table = f'<div class="scroll"><table>{rows}</table></div>'
        return f"<details><summary>Parameters</summary>{table}</details>" if rows else ""

    def _results(self) -> str:
        rows = _read(self.folder / "results.json", [])
        shown = ["value", *(key for key in ("unit", "n", "seed") if any(row[key] not in NOT_GIVEN for row in rows))]
        columns = {"result": False} | {key: key != "unit" for key in shown}
        body = [[row["name"], *(row[key] for key in shown)] for row in rows]
        return f"<h3>Results</h3>{_grid(columns, body)}" if rows else ""

    def _figure(self, number: int, figure: Mapping) -> str:
        alt = f"{self._id(figure)}-alt"
        return (f'<figure id="{self._id(figure)}" aria-describedby="{alt}"><div class="plot">'
                f'<p class="waiting" id="{alt}">{_text(figure["alt"])}</p></div>'
                f'<figcaption><b>Figure {_text(self.number)}.{number}</b> {_text(figure["caption"])}</figcaption>'
                "</figure>")

    def _table(self, name: str) -> str:
        import pandas

        frame = pandas.read_parquet(self.folder / "tables" / f"{name}.parquet")
        columns = {str(column): kind.kind in "iuf" for column, kind in frame.dtypes.items()}
        grid = _grid(columns, frame.head(ROWS).itertuples(index=False))
        note = f'<p class="facts">The first {ROWS} of {len(frame)} rows.</p>' if len(frame) > ROWS else ""
        return f"<h3>{_words(name).capitalize()}</h3>{grid}{note}"

    def _files(self) -> str:
        if not self.beside:
            return f'<p class="facts">Run folder: {_text(self.name)}/{_text(self.folder.name)}</p>'
        names = [f"{self.name}.ipynb", "results.json", "run.json", "params.yaml", "log.txt", *self.done["files"]]
        links = [f'<a href="{_text(name)}">{_text(name)}</a>' for name in names if (self.folder / name).exists()]
        return f'<p class="facts">Files: {", ".join(links)}</p>'


def _grid(columns: Mapping[str, bool], rows) -> str:
    """A table in a box that scrolls, of rows of values; `columns`: whether each is numeric, which right-aligns it."""
    head = "".join(f"<th{' class=num' * numeric}>{_text(name)}</th>" for name, numeric in columns.items())
    body = "".join(f"<tr>{''.join(map(_cell, row, columns.values()))}</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object, numeric: bool) -> str:
    empty = value is None or value != value
    shown = "–" if empty else f"{value:.4g}" if isinstance(value, float) else str(value)
    kind = " class=num" if numeric else " class=short" if len(shown) < 32 else ""
    return f"<td{kind}>{_text(shown)}</td>"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _words(name: str) -> str:
    return _text(name.replace("_", " ").replace("-", " "))


def _text(text: object) -> str:
    return html.escape(str(text))


def _markdown(text: str) -> str:
    """Prose of a notebook, with raw HTML escaped, pictures as their alt text and outside links as text."""
    import mistune

    class Prose(mistune.HTMLRenderer):
        def image(self, text: str, url: str, title: str | None = None) -> str:
            return f"[{text}]"

        def link(self, text: str, url: str, title: str | None = None) -> str:
            return text if text == url else f"{text} ({_text(url)})"

    return str(mistune.create_markdown(renderer=Prose(escape=True), plugins=["table"])(text))


def _read(path: Path, default: object = None):
    if default is not None and not path.exists():
        return default
    return json.loads(path.read_text(encoding="utf-8"))
