"""`notebooks/records/RESULTS.md` and the README's table, made from the records: `make results`.

`RESULTS.template.md` beside them holds the prose as a text for `str.format`: every measured figure is a field that
names a record, one of its rows and a column, and this module puts the value there.

    {tiny-grid[showo-tiny shared.last_half][pictures/all]:.3f}     a figure, mean over the seeds of the row
    {tiny-grid[table]}                                             all rows of the record as a Markdown table
    {tiny-grid[source]}                                            file, commit, device, versions and command

A figure without a record raises `KeyError`: no number in the prose outlives the record that it came from.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from statistics import mean

from ..bench.record import commit_of, table
from ..files import write
from ..models.checkpoint import inspect, shipped
from ..views.runs import table_of_findings, table_of_record
from .run_folder import records_folder

KEYS = (("model", "arm"), ("model", "finding"), ("preset", "way"), ("model", "plan"), ("name",), ("what",))
"""Columns that name a row: the first of these that all rows have; their values, joined by spaces, are the row's key."""
BENCH_KEYS = {"layer": ("preset", "tokens", "capacity", "backend"), "step": ("preset", "tokens", "way", "capacity"),
              "decode": ("preset", "what", "batch", "capacity"), "attention": ("preset", "tokens", "backend")}
"""The same for a benchmark's rows of one kind."""
WORDS = {"drawing": "T2I", "answering": "MMU"}      # in records made before these words were used
README_COLUMNS = ("model", "arm", "seeds", "tokens", "step FLOPs", "step time", "questions right", "pictures right")
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- /table -->)", re.S)
"""A table of the README between marks, with the record that it is made from."""


def results(folder: Path) -> str:
    """The text of RESULTS.md. Raises `KeyError` for a figure that no record in `folder` has."""
    template = (folder / "RESULTS.template.md").read_text(encoding="utf-8")
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    fields = {name: figures(record) | {"table": shown(record), "source": source(name, record)}
              for name, record in records.items()}
    return "\n".join(_wrapped(template.format_map(fields | {"checkpoints": cards()}).split("\n")))


def _wrapped(lines: list[str]) -> Iterator[str]:
    """The lines with paragraphs filled to 120 columns; headings, tables and blank lines as they are."""
    for prose, part in groupby(lines, key=lambda line: bool(line) and line[0] not in "|#"):
        if not prose:
            yield from part
            continue
        for paragraph in re.split(r"\n(?=\d\. )", "\n".join(part)):     # an item of a list starts a paragraph
            indent = "   " if paragraph[1:3] == ". " else ""
            yield textwrap.fill(" ".join(paragraph.split()), 120, subsequent_indent=indent, break_on_hyphens=False,
                                break_long_words=False)


def figures(record: dict) -> dict[str, dict]:
    """The record by row and column. Numbers are means over the rows of one key (seeds), other values are the first."""
    keys = BENCH_KEYS.get(record["rows"][0].get("bench"))
    keys = keys or next(keys for keys in KEYS if all(key in row for key in keys for row in record["rows"]))
    rows: dict[str, list[dict]] = {}
    for row in (*record["rows"], *record.get("timing", ())):
        rows.setdefault(" ".join(str(row[key]) for key in keys), []).append(row)
    found = {}
    for key, same in rows.items():
        columns = {name: [row[name] for row in same if row.get(name) is not None] for row in same for name in row}
        found[key] = {name: mean(values) if isinstance(values[0], (int, float)) else values[0]
                      for name, values in columns.items() if values}
        for name in ("memory", "kept", "disk"):             # bytes; a layer's share in MiB is what prose compares
            if name in found[key] and "layers" in found[key]:
                found[key][f"{name} per layer"] = found[key][name] / found[key]["layers"] / 2**20
        if "saved_model" in found[key]:                     # full / model: the stack's share of the whole step's FLOPs
            found[key]["image tokenizer"] = 1 - found[key]["saved_full"] / found[key]["saved_model"]
    return found


def shown(record: dict) -> str:
    """All rows of a record as Markdown, by the kind of record."""
    first = record["rows"][0]
    if "bench" in first:
        return table(record)
    if "finding" in first:
        text = table_of_findings(record)
        for old, new in WORDS.items():
            text = text.replace(old, new)
        return text
    return table_of_record(record) if "timing" in record else markdown(first, (row.values() for row in record["rows"]))


def source(name: str, record: dict) -> str:
    """One line that says where the figures of a record come from."""
    versions = ", ".join(f"{library} {version}" for library, version in record["versions"].items() if version)
    entered = record.get("source", "")
    return "; ".join(filter(None, (f"Record: `{name}.json`, commit {_cell(commit_of(name, record))}", record["device"],
                                   versions,
                                   f"`{record['command']}`", entered))) + "."


def cards() -> dict[str, object]:
    """The shipped checkpoints: figures of their card.json by name, and two tables, of the models and by kind."""
    names = ("showo-tiny", "emu3-tiny")
    read = {name: json.loads((Path(shipped(name)) / "card.json").read_text(encoding="utf-8")) for name in names}
    found: dict[str, object] = {
        name: {f"{kind}/{what}": value for kind, values in card["quality"].items() for what, value in values.items()}
        for name, card in read.items()}
    found["table"] = markdown(("checkpoint", "parameters", "steps"), (
        (name, f"{inspect(shipped(name)).parameters / 1e6:.1f} M", " + ".join(str(s["steps"]) for s in card["stages"]))
        for name, card in read.items()))
    found["kinds"] = markdown(("metric/kind", "samples", *names), (
        (kind, found["showo-tiny"][f"counts/{kind}"], *(f"{found[name][kind]:.3f}" for name in names))
        for kind in found["showo-tiny"] if not kind.startswith(("losses/", "counts/"))))
    return found


def readme(text: str, folder: Path) -> str:
    """The README with its tables made anew from the records that their marks name."""
    return TABLE.sub(lambda mark: mark[1] + _columns(folder.parents[1] / mark[2], README_COLUMNS) + mark[4], text)


def _columns(path: Path, columns: Iterable[str]) -> str:
    """Some columns of a record of arms, with the ranges over seeds left out."""
    full = table_of_record(json.loads(path.read_text(encoding="utf-8")))
    head, _, *lines = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in full.splitlines())
    return markdown(columns, ([re.sub(r" [\[(].*", "", line[head.index(name)]) for name in columns] for line in lines))


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; None is an empty cell, a commit's name is shortened."""
    head = [str(name) for name in head]
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}\b", r"\1", str(value))


def main() -> None:
    """Write RESULTS.md, and the README where there is one."""
    folder = records_folder()
    write(folder / "RESULTS.md", results(folder))
    page = folder.parents[1] / "README.md"
    if page.exists():
        write(page, readme(page.read_text(encoding="utf-8"), folder))


if __name__ == "__main__":
    main()
