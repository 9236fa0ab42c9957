"""`notebooks/records/RESULTS.md` and the README's table, made from the records: `make results`.

`RESULTS.template.md` beside them holds the prose as a text for `str.format`: every measured figure is a field that
names a record, one of its rows and a column, and this module puts the value there.

    {tiny-grid[showo-tiny shared.last_half][pictures/all]:.3f}     a figure, mean over the seeds of the row
    {tiny-grid[table]}                                             all rows of the record as a Markdown table
    {tiny-grid[source]}                                            file, commit, device, versions and command

A figure without a record raises `KeyError`: no number in the prose outlives the record that it came from.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import mean

import pandas

from ..bench.record import commit_of, table
from ..files import read_json, write
from ..models.checkpoint import inspect, shipped
from ..views.runs import markdown, summary, table_of_findings, table_of_record
from .run_folder import records_folder

KEYS = (("model", "arm"), ("model", "finding"), ("preset", "way"), ("model", "plan"), ("name",), ("what",))
# columns that name a row: the first of these that all rows have; their values, joined by spaces, are the row's key
BENCH_KEYS = {"layer": ("preset", "tokens", "capacity", "backend"), "step": ("preset", "tokens", "way", "capacity"),
              "decode": ("preset", "what", "batch", "capacity"), "attention": ("preset", "tokens", "backend"),
              "counts": ("preset",)}
# the same for a benchmark's rows of one kind
WORDS = {"drawing": "T2I", "answering": "MMU"}      # in records made before these words were used
README_COLUMNS = ["model", "arm", "seeds", "tokens", "step FLOPs", "step time", "questions right", "pictures right"]
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- /table -->)", re.S)    # in the README, with its record


def results(folder: Path) -> str:
    """The text of RESULTS.md. Raises `KeyError` for a figure that no record in `folder` has."""
    template = (folder / "RESULTS.template.md").read_text(encoding="utf-8")
    records = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
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
    return table_of_record(record) if "timing" in record else _table(record["rows"])


def source(name: str, record: dict) -> str:
    """One line that says where the figures of a record come from."""
    versions = ", ".join(f"{library} {version}" for library, version in record["versions"].items() if version)
    parts = (f"Record: `{name}.json`, commit {_cell(commit_of(name, record))}", record["device"], versions,
             f"`{record['command']}`", record.get("source"))
    return "; ".join(filter(None, parts)) + "."


def cards() -> dict[str, object]:
    """The shipped checkpoints: figures of their card.json by name, and two tables, of the models and by kind."""
    read = {name: read_json(Path(shipped(name)) / "card.json") for name in ("showo-tiny", "emu3-tiny")}
    found = {name: {f"{kind}/{what}": value for kind, values in card["quality"].items()
                    for what, value in values.items()} for name, card in read.items()}
    models = [{"checkpoint": name, "parameters": f"{inspect(shipped(name)).parameters / 1e6:.1f} M",
               "steps": " + ".join(str(stage["steps"]) for stage in card["stages"])} for name, card in read.items()]
    kinds = [{"metric/kind": kind, "samples": found["showo-tiny"][f"counts/{kind}"]}
             | {name: f"{found[name][kind]:.3f}" for name in read}
             for kind in found["showo-tiny"] if not kind.startswith(("losses/", "counts/"))]
    return found | {"table": _table(models), "kinds": _table(kinds)}


def readme(text: str, folder: Path) -> str:
    """The README with its tables made anew from the records that their marks name, ranges over seeds left out."""
    def made(mark: re.Match) -> str:
        record = read_json(folder.parents[1] / mark[2])
        full = summary(pandas.DataFrame(record["rows"]), pandas.DataFrame(record["timing"]))
        return mark[1] + markdown(full[README_COLUMNS].replace(r" [\[(].*", "", regex=True)) + mark[4]

    return TABLE.sub(made, text)


def _table(rows: list[dict]) -> str:
    return markdown(pandas.DataFrame(rows, columns=list(rows[0]), dtype=object).map(_cell))


def _cell(value: object) -> str:
    """A value in a table; a commit's name is shortened."""
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
