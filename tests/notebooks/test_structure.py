"""What every notebook of the workbook promises, checked without a kernel."""

import ast
import json
import re
from pathlib import Path

import pytest

from unimod.params import Params

BOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9][0-9]_*.ipynb"))
LINES = 13
"""Lines of code in a cell, about."""
FOLDED = {"source_hidden": True}
"""What JupyterLab folds away at first: code that knows the answers (`test_lessons.py`)."""


def cells(path, kind=None):
    return [c for c in json.loads(path.read_text())["cells"] if kind in (None, c["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def tree(cell):
    return ast.parse(source(cell))


def setup_of(path):
    """The cell right behind the parameters."""
    code = cells(path, "code")
    return code[next(i for i, c in enumerate(code) if "parameters" in c["metadata"].get("tags", [])) + 1]


@pytest.fixture(params=BOOKS, ids=lambda p: p.stem)
def book(request):
    return request.param


def test_there_are_notebooks():
    assert BOOKS


def test_format_and_no_traces_of_a_run(book):
    content = json.loads(book.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [c["id"] for c in content["cells"]]
    assert len(set(ids)) == len(ids)
    assert "papermill" not in content["metadata"] and 0 < content["metadata"]["unimod"]["minutes"] < 30
    for cell in content["cells"]:
        assert set(cell["metadata"]) <= {"tags", "jupyter"}, cell["id"]
        assert cell["metadata"].get("jupyter", FOLDED) == FOLDED, cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]


def test_it_opens_with_a_question_and_what_to_expect(book):
    first = source(cells(book)[0])
    assert first.startswith("# ") and first.splitlines()[0].endswith("?")
    for word in ("you know", "**Minutes:**", "**Hardware:**", "**Writes:**"):
        assert word in first, word


def test_one_cell_of_typed_commented_literals(book):
    tagged = [c for c in cells(book) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    values = {}
    for node in tree(tagged[0]).body:
        assert isinstance(node, ast.AnnAssign), ast.unparse(node)
        values[node.target.id] = ast.literal_eval(node.value)
        assert re.search(r"  # \S", source(tagged[0]).splitlines()[node.lineno - 1]), node.target.id
        assert ast.unparse(node.annotation) == str(Params.__dataclass_fields__[node.target.id].type), node.target.id
    assert {"interactive", "run_dir"} <= set(values) <= set(Params.names())
    if values.get("data") != "folder":
        assert Params.of(**values)


def test_short_cells_without_classes(book):
    setup = setup_of(book)
    for cell in cells(book, "code"):
        if "parameters" in cell["metadata"].get("tags", []):
            continue
        lines = [line for line in source(cell).splitlines() if line.strip()]
        assert len(lines) <= LINES or cell["id"] == setup["id"], f"{cell['id']}: {len(lines)} lines"
        for node in ast.walk(tree(cell)):
            assert not isinstance(node, ast.ClassDef), cell["id"]
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 3 + bool(ast.get_docstring(node)), f"{cell['id']}: {node.name}"


def test_every_figure_has_a_caption_and_alt_text(book):
    for cell in cells(book, "code"):
        for node in ast.walk(tree(cell)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "run.figure":
                given = {k.arg for k in node.keywords}
                assert {"caption", "alt"} <= given or len(node.args) >= 4, f"{cell['id']}: {ast.unparse(node)[:80]}"
    for cell in cells(book, "markdown"):
        assert not re.search(r"!\[\s*\]|<img(?![^>]*alt=)", source(cell)), f"{cell['id']}: a picture without alt text"


def test_it_finishes_last_and_asks(book):
    code = cells(book, "code")
    assert source(code[-1]).strip().endswith("run.finish()")
    assert source(setup_of(book)).startswith("# Setup: no need to read.")
    prose = "\n".join(source(c) for c in cells(book, "markdown"))
    assert "## Questions to take along" in prose or "## Questionnaire" in prose
    assert prose.count("## Exercise") == prose.count("<summary>Solution</summary>")
