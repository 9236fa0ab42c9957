"""The report: one page for one run or for a whole workbook, with one plotly.min.js beside it, that needs no network.

    python -m unimod report runs          writes runs/report/index.html from the newest finished run of each notebook

A figure is drawn from its JSON in the run folder, in the light or dark colours of the reader's system. A figure that would be blank
is an error. Everything that comes from a run is escaped; the page's own policy forbids it to load anything from elsewhere.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import shutil
import string
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..files import runs_folder, write
from .run_folder import RunError, drawable, latest

ROWS = 200
"""Rows of a table shown on the page; all of them are in the parquet file."""


class ReportError(RuntimeError):
    """A report that would not show what it promises."""


def write_report(runs: str | Path) -> Path:
    """The page of one finished run folder, or of the newest finished run of every notebook in a folder of runs."""
    folder = runs_folder(runs)
    if (folder / "done.json").exists():
        return write_page([folder], folder / "report.html")
    names = sorted({done.parts[-3] for done in folder.glob("*/*/done.json")})
    if not names:
        raise RunError(f"There is no finished run in {folder}. Make some with: python -m unimod run all -f params/default.yaml")
    return write_page([latest(folder, name) for name in names], folder / "report" / "index.html")


def write_page(folders: Sequence[Path], page: Path) -> Path:
    """Write the page of these finished run folders. Raises `ReportError` when a figure would be blank."""
    sections, contents, figures = [], [], []
    for folder in folders:
        part = _Part(folder, page.parent)
        sections.append(part.section())
        figures += part.figures
        entries = "".join(f'<li><a href="#{part.id(fig)}">{_words(fig["name"])}</a></li>' for fig in part.figures)
        contents.append(f'<li><a href="#{part.name}"><span>{_text(part.number)}</span>{_text(part.title)}</a><ol>{entries}</ol></li>')
    facts = _read(folders[0] / "run.json", {})
    about = [_count(len(folders), "notebook") + ", " + _count(len(figures), "figure"), facts.get("start", "")[:10]]
    if facts:
        sha = (facts["git"]["sha"] or "")[:10]
        about += [f"commit {sha}{' with changes' * facts['git']['dirty']}"] if sha else []
        about += [f"{name} {version}" for name, version in facts["versions"].items() if version and name in ("torch", "transformers")]
    data = json.dumps([fig["figure"] for fig in figures], separators=(",", ":"))
    for char in "<>&":  # nothing in the data can end the script element
        data = data.replace(char, f"\\u{ord(char):04x}")
    page.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(str(importlib.resources.files("plotly") / "package_data" / "plotly.min.js"), page.parent / "plotly.min.js")
    write(page, PAGE.substitute(style=STYLE, script=SCRIPT, about=_text(" · ".join(filter(None, about))), contents="".join(contents),
                                sections="".join(sections), figures=data))
    return page


class _Part:
    """One run on the page."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.done = folder, _read(folder / "done.json")
        self.beside = folder == base  # only then do links to the run's own files survive moving the folder
        self.name = self.done["notebook"]
        self.number, _, words = self.name.partition("_")
        self.title = _read(folder / "run.json", {}).get("title") or words.replace("_", " ").capitalize()
        self.figures = [_read(folder / "figures" / f"{name}.json") for name in self.done["figures"]]
        for figure in self.figures:
            if not drawable(figure["figure"]):
                raise ReportError(f"Figure {figure['name']!r} of {self.name} would be blank: none of its visible traces holds data.")

    def id(self, figure: dict) -> str:
        """The anchor of a figure."""
        return f"{self.name}-{figure['name']}"

    def section(self) -> str:
        """Everything this run has to show."""
        facts = f"{self.done['seconds']:.0f} s on {self.done['device']} · finished {self.done['finished'][:16].replace('T', ' ')} UTC"
        return (f'<section id="{self.name}"><header><p class="number">{_text(self.number)}</p><h2>{_text(self.title)}</h2>'
                f'<p class="facts">{_text(facts)}</p></header>{self._intro()}{self._parameters()}{self._results()}'
                + "".join(self._figure(number, fig) for number, fig in enumerate(self.figures, 1))
                + "".join(self._table(name) for name in self.done["tables"]) + self._files() + "</section>")

    def _intro(self) -> str:
        """The first cell of the notebook, below its title."""
        path = self.folder / f"{self.name}.ipynb"
        cells = _read(path, {"cells": []})["cells"]
        text = next(("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown" and "#" in "".join(cell["source"])), "")
        _, _, rest = text.partition("\n")
        return f'<div class="intro">{_markdown(rest)}</div>' if rest else ""

    def _parameters(self) -> str:
        path = self.folder / "params.yaml"
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(json.dumps(value, ensure_ascii=False))}</td></tr>"
                       for name, value in values.items())
        return f'<details><summary>Parameters</summary><div class="scroll"><table>{rows}</table></div></details>' if rows else ""

    def _results(self) -> str:
        rows = _read(self.folder / "results.json", [])
        shown = [key for key in ("unit", "n", "seed") if any(row[key] not in ("", None) for row in rows)]
        columns = {key: key != "unit" for key in ("value", *shown)}
        body = [[_cell(row["name"], False), *(_cell(row[key], numeric) for key, numeric in columns.items())] for row in rows]
        return f"<h3>Results</h3>{_grid({'result': False} | columns, body)}" if rows else ""

    def _figure(self, number: int, figure: dict) -> str:
        alt = f"{self.id(figure)}-alt"
        return (f'<figure id="{self.id(figure)}" aria-describedby="{alt}"><div class="plot">'
                f'<p class="waiting" id="{alt}">{_text(figure["alt"])}</p></div>'
                f'<figcaption><b>Figure {_text(self.number)}.{number}</b> {_text(figure["caption"])}</figcaption></figure>')

    def _table(self, name: str) -> str:
        import pandas

        frame = pandas.read_parquet(self.folder / "tables" / f"{name}.parquet")
        columns = {str(name): kind.kind in "iuf" for name, kind in frame.dtypes.items()}
        body = [list(map(_cell, row, columns.values())) for row in frame.head(ROWS).itertuples(index=False)]
        note = f'<p class="facts">The first {ROWS} of {len(frame)} rows.</p>' if len(frame) > ROWS else ""
        return f"<h3>{_words(name).capitalize()}</h3>{_grid(columns, body)}{note}"

    def _files(self) -> str:
        if not self.beside:
            return f'<p class="facts">Run folder: {_text(self.name)}/{_text(self.folder.name)}</p>'
        names = [f"{self.name}.ipynb", "results.json", "run.json", "params.yaml", "log.txt", *self.done["files"]]
        links = ", ".join(f'<a href="{_text(name)}">{_text(name)}</a>' for name in names if (self.folder / name).exists())
        return f'<p class="facts">Files: {links}</p>'


def _grid(columns: dict[str, bool], rows: list[list[str]]) -> str:
    """A table in a box that scrolls; numeric columns are right-aligned."""
    head = "".join(f"<th{' class=num' * numeric}>{_text(name)}</th>" for name, numeric in columns.items())
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
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


def _text(text: str) -> str:
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


STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d2129; --soft: #5d6673; --line: #dfe1e0; --panel: #f5f5f1; --link: #1c5d99;
  --grid: #e4e5e3 }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e4e6ea; --soft: #9aa3b0; --line: #2d333c; --panel: #1b1f26;
  --link: #86b8ec; --grid: #2d333c } }
* { box-sizing: border-box }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 78rem; padding: 0 clamp(1rem, 4vw, 3rem) 5rem; background: var(--paper); color: var(--ink);
  font: 1.0rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif }
h1, h2, h3 { font-family: Charter, "Iowan Old Style", "Source Serif 4", Georgia, "DejaVu Serif", serif; font-weight: 500; line-height: 1.2;
  text-wrap: balance; letter-spacing: -.005em }
h1 { font-size: clamp(1.8rem, 5vw, 2.6rem); margin: 3.5rem 0 .4rem }
h2 { font-size: clamp(1.4rem, 4vw, 1.9rem); margin: 0 }
h3 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: .18em }
.facts, .number { color: var(--soft); font-size: .86rem; margin: .3rem 0; overflow-wrap: anywhere }
.number { font-weight: 600; letter-spacing: .08em; margin: 0 0 .2rem }
.page { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem }
nav { font-size: .88rem; line-height: 1.4; margin: 1.5rem 0 0 }
nav > ol { list-style: none; margin: 0; padding: 0 0 0 2.1em }
nav span { display: inline-block; width: 2.1em; margin-left: -2.1em; color: var(--soft); font-variant-numeric: tabular-nums }
nav li { margin: .5rem 0 }
nav a { color: var(--ink); text-decoration: none }
nav a:hover, nav a:focus-visible { color: var(--link); text-decoration: underline }
nav ol ol { display: none }
section { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 2rem }
section > header { margin-bottom: 1.2rem }
.intro { max-width: 44rem }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; background: var(--panel); padding: .1em .3em;
  border-radius: 3px }
pre { overflow-x: auto; background: var(--panel); padding: .8rem 1rem; border-radius: 6px }
pre code { padding: 0; background: none }
figure { margin: 2.2rem 0; scroll-margin-top: 1rem }
.plot { box-sizing: content-box; overflow-x: auto; overflow-y: hidden; min-height: 12rem; border: 1px solid var(--line); border-radius: 8px; padding: .4rem }
.waiting { color: var(--soft); font-size: .9rem; margin: 1rem }
.drawn .waiting { position: absolute; width: 1px; height: 1px; margin: -1px; overflow: hidden; clip-path: inset(50%) }
.updatemenu-item-rect[style*="rgb(244, 250, 255)"] { fill: var(--line) !important }
figcaption { max-width: 46rem; margin-top: .6rem; font-size: .93rem; color: var(--soft) }
figcaption b { color: var(--ink); margin-right: .4em }
.scroll { overflow: auto; max-height: 30rem; border: 1px solid var(--line); border-radius: 8px; width: fit-content; max-width: 100% }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; line-height: 1.35 }
th, td { padding: .38rem .9rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
tbody tr:last-child > *, details tr:last-child > * { border-bottom: 0 }
thead th { position: sticky; top: 0; background: var(--panel); color: var(--soft); font-weight: 600; white-space: nowrap }
.num { text-align: right }
.short { white-space: nowrap }
.intro table { border: 1px solid var(--line) }
details { margin: 1rem 0 }
details th { font-weight: 400; color: var(--soft) }
details td { overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; margin-bottom: .5rem }
@media (min-width: 64rem) {
  .page { grid-template-columns: 15rem minmax(0, 1fr); gap: 4rem }
  nav { position: sticky; top: 2rem; align-self: start; max-height: calc(100vh - 4rem); overflow-y: auto; margin-top: 5rem }
  nav ol ol { display: block; list-style: none; padding: 0 0 0 .8rem; margin: .3rem 0 .9rem; border-left: 1px solid var(--line) }
  nav ol ol li { margin: .2rem 0 }
  nav ol ol a { color: var(--soft) }
}
@media print { nav { display: none } .scroll { max-height: none } figure, tr { break-inside: avoid } }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = [...document.querySelectorAll(".plot")];
const root = document.documentElement;
const colour = name => getComputedStyle(root).getPropertyValue(name).trim();
function template(figure) {   // the figure's own template in the colours of this page
  const t = structuredClone(figure.layout.template || {}), l = t.layout = t.layout || {};
  const axis = { gridcolor: colour("--grid"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
  const box = { bgcolor: colour("--panel"), bordercolor: colour("--line") };
  Object.assign(l, { paper_bgcolor: colour("--paper"), plot_bgcolor: colour("--paper"),
    font: { ...l.font, family: getComputedStyle(document.body).fontFamily },
    xaxis: { ...l.xaxis, ...axis }, yaxis: { ...l.yaxis, ...axis },
    updatemenudefaults: { ...l.updatemenudefaults, ...box },
    sliderdefaults: { ...l.sliderdefaults, ...box, bgcolor: colour("--soft"), activebgcolor: colour("--ink"), tickcolor: colour("--soft") },
    modebar: { ...l.modebar, bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--ink") } });
  for (const bar of (t.data || {}).bar || []) {
    bar.marker = { ...bar.marker, line: { width: 0 } };
    bar.error_x = bar.error_y = { color: colour("--ink") };
  }
  return t;
}
async function draw() {
  let drawn = 0;
  for (const [i, plot] of plots.entries()) {
    const { data, frames } = figures[i], font = { ...figures[i].layout.font, color: colour("--ink") };
    const layout = { height: 420, ...figures[i].layout, font, template: template(figures[i]) };
    const config = { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "" };
    plot.style.height = layout.height + "px";   // a resized window keeps it
    try {
      await Plotly.newPlot(plot, { data, layout, frames, config });
      plot.classList.add("drawn");
      drawn += 1;
    } catch (error) {
      plot.querySelector(".waiting").prepend("This figure could not be drawn (" + error + "). ");
    }
    root.dataset.drawn = drawn + " of " + plots.length;
    await new Promise(next => setTimeout(next));
  }
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  plots.forEach((plot, i) => plot.classList.contains("drawn")
    && Plotly.relayout(plot, { template: template(figures[i]), "font.color": colour("--ink") })));
"""

PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'self' file: 'unsafe-inline' 'unsafe-eval';
 style-src 'unsafe-inline'; img-src data: blob:; font-src data:">
<title>UniMoD workbook</title>
<style>$style</style>
<h1>UniMoD workbook</h1>
<p class="facts">$about</p>
<div class="page">
<nav aria-label="Contents"><ol>$contents</ol></nav>
<main>$sections</main>
</div>
<noscript><p>The figures need JavaScript; each one is described in words in its place.</p></noscript>
<script src="plotly.min.js"></script>
<script type="application/json" id="figures">$figures</script>
<script>$script</script>
</html>
""")
