"""What the README and RESULTS.md say is what the records, the package and the notebooks say."""

import json
import pkgutil
import re
import runpy
import tomllib
from pathlib import Path

import pytest

import unimod
from unimod.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECORDS = ROOT / "notebooks" / "records"
TEMPLATE = (RECORDS / "RESULTS.template.md").read_text()
TREE = re.search(r"## The house\n.*?```\n(.*?)```", README, re.S)[1]
PAPER = {"51.1", "43.3", "89.0", "53.5"}
"""TFLOPs of the paper's own tables."""
ARITHMETIC = {"0.02", "0.08", "0.5"}
"""A capacity; what a ratio of times and a realised share differ by; how near two checkpoints are."""


def test_the_files_are_what_make_results_writes():
    results = pytest.importorskip("unimod.workbook.results", reason="tables are made with pandas")
    assert (RECORDS / "RESULTS.md").read_text() == results.results(RECORDS), "run make results"
    assert results.readme(README, RECORDS) == README, "run make results"
    assert results.TABLE.search(README)


def test_every_record_is_in_the_results_and_no_figure_is_typed():
    for path in RECORDS.glob("*.json"):
        assert f"{{{path.stem}[table]}}" in TEMPLATE and f"{{{path.stem}[source]}}" in TEMPLATE, path.name
    prose = re.sub(r"\{[^{}]*\}|`[^`]*`", "", TEMPLATE)
    assert set(re.findall(r"(?<![\w.])\d+\.\d+", prose)) <= PAPER | ARITHMETIC | {"1.7"}      # million parameters


def test_figures_of_the_readme_are_in_the_results():
    prose = README.split("## Start")[0] + README.split("## Results")[1].split("## The house")[0]
    made = (RECORDS / "RESULTS.md").read_text()
    found = set(re.findall(r"(?<![\w.])\d\.\d+", prose))
    assert found and not {figure for figure in found if figure not in made}


def test_a_plan_saves_what_its_record_says(capsys):
    row = json.loads((RECORDS / "plans.json").read_text())["rows"][0]
    assert main([*row["command"].split()[3:], "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)["savings"]
    assert {f"saved_{name}": value for name, value in saved.items()} == pytest.approx(
        {name: value for name, value in row.items() if name.startswith("saved_")}, abs=1e-5)


def test_lines_fit():
    for path in (README, (RECORDS / "RESULTS.md").read_text()):
        assert not [line for line in path.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert len(README.splitlines()) < 250


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_code_runs_as_written(block):
    exec(compile(block, "README.md", "exec"), {})


def test_commands_are_the_makefiles_and_the_packages(capsys):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    shown = "".join(re.findall(r"```\n.*?```|`make .*?`", README, re.S))
    assert set(re.findall(r"\bmake ([a-z]+)\b", shown)) <= targets
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    ([a-z-]+) ", capsys.readouterr().out, re.M))
    assert set(re.findall(r"python -m unimod ([\w-]+)", README)) <= commands
    for path in re.findall(r"-f (params/\S+\.yaml)", README):
        assert (ROOT / path).is_file(), path


def test_names_that_the_package_hands_out_exist():
    for name in unimod.__all__:
        assert getattr(unimod, name) is not None
    for names in re.findall(r"^from unimod import (.+)$", README, re.M):
        assert set(names.split(", ")) <= set(unimod.__all__)


def test_docstrings_that_it_points_to_say_how_to_add():
    pointer = README.split("- How to add")[1].split("\n\n")[0]
    paths = re.findall(r"`(unimod/[\w./]+)`", pointer)
    assert len(paths) == 4
    for path in paths:
        assert "how to add" in (ROOT / path).read_text().lower(), path


def test_the_tree_names_every_file():
    """Folders end with a slash and are described by their `__init__.py`; Triton kernels by the op beside them."""
    named, folders = set(), []
    for line in TREE.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            named.add("".join(folders) + name)
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "unimod").rglob("*.py")}
    assert named == {path for path in there if not path.endswith(("__init__.py", "_triton.py"))}
    assert all(len(line.split()) > 1 for line in TREE.splitlines()), "each with what it is for"


def prose():
    """All text for readers outside of the package: README, results, parameter files, notebooks' prose."""
    yield README + TEMPLATE
    for path in (ROOT / "params").glob("*.yaml"):
        yield path.read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        yield "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_every_path_link_and_name_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    paths = [path for text in prose() for path in re.findall(r"`((?:notebooks|unimod|params|tests)/[\w./-]+)`", text)]
    for path in (*paths, *links):
        assert (ROOT / path).exists(), path
    for name in {name for text in prose() for name in re.findall(r"`(unimod(?:\.\w+)+)", text)}:
        pkgutil.resolve_name(name)
    for picture in (ROOT / "notebooks" / "pictures").iterdir():
        assert picture.stat().st_size < 300_000


def test_the_pictures_figures_can_be_made():
    pytest.importorskip("plotly")
    path = ROOT / "notebooks" / "pictures" / "explorer.py"
    assert all("Plotly.newPlot" in cell for cell in runpy.run_path(str(path))["figures"]())


def test_every_notebook_is_listed_with_its_question():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        title = "".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines()[0].lstrip("# ")
        assert f"| `{path.stem}` | {title} |" in README


def test_versions_are_the_locks():
    lock = dict(re.findall(r"^(torch|transformers)==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.M))
    assert f"torch {lock['torch']}, transformers {lock['transformers']}" in README
    bounds = "\n".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    oldest = re.search(r"on transformers ([\d.]*\d), .* on torch ([\d.]*\d)", " ".join(README.split()))
    assert f"transformers>={oldest[1]}," in bounds and f"torch>={oldest[2]}," in bounds
