"""What the README says is what the records and the code say."""

import json
import re
from pathlib import Path

from unimod.bench.record import table
from unimod.views.runs import table_of_findings, table_of_record

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_generated_from_their_records():
    tables = re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- /table -->", README, re.S)
    assert tables
    for path, shown in tables:
        made_by = table_of_findings if Path(path).name == "findings.json" else table if Path(path).name.startswith("bench-") else table_of_record
        expected = made_by(json.loads((ROOT / path).read_text()))
        assert shown == expected, f"put this into the README between the markers of {path}:\n{expected}"


def test_the_example_runs():
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README.md", "exec"), {})


def test_every_path_it_names_exists():
    for path in re.findall(r"`((?:notebooks|unimod|params|tests)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path


def test_every_notebook_is_listed_with_its_question():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        title = json.loads(path.read_text())["cells"][0]["source"]
        title = (title if isinstance(title, str) else "".join(title)).splitlines()[0].lstrip("# ")
        row = next(line for line in README.splitlines() if line.startswith(f"| `{path.stem}`"))
        assert title.split("?")[0] in row, (title, row)
