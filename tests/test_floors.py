"""A file imports from its own floor or from floors below, never in a circle, and heavy libraries have their own
rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    ("config", "params", "batch", "files", "mask", "recording", "upload", "versions"),
    ("ops",),
    ("baselines", "routing", "plan", "capacity", "router", "seam", "layers", "losses"),
    ("models",),
    ("data", "flops", "attention_record", "capture", "decode", "maskgit", "generate", "graph", "train", "evaluate",
     "analysis", "presets"),
    ("bench", "experiment", "gallery", "views"),
    ("workbook",),
    ("__main__",),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LOWEST = {"torch": 0, "transformers": 2, "accelerate": 4, "sklearn": 3, "scipy": 4}
ONLY_IN = {"triton": {"ops"}, "plotly": {"views", "workbook"}, "pandas": {"views", "workbook"},
           "papermill": {"workbook"},
           "nbclient": {"workbook"}, "ipywidgets": {"views", "workbook"}}


def modules():
    for path in sorted((ROOT / "unimod").rglob("*.py")):
        parts = path.relative_to(ROOT / "unimod").with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name, path):
    """Absolute names of everything a file imports, inside functions too."""
    package = ["unimod", *name.split(".")] if path.name == "__init__.py" else ["unimod", *name.split(".")][:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


ALL = {name: path for name, path in modules() if name}


def inside(imported):
    """The module of the package that an imported name lives in, or None."""
    parts = imported.split(".")[1:]
    while parts and ".".join(parts) not in ALL:
        parts.pop()
    return ".".join(parts) or None


@pytest.mark.parametrize("name", ALL)
def test_a_file_imports_from_its_floor_or_below(name):
    room = name.split(".")[0]
    assert room in FLOOR, f"{room} has no floor: give it one in this test"
    for imported in imports(name, ALL[name]):
        top = imported.split(".")[0]
        if top == "unimod" and inside(imported):
            other = inside(imported).split(".")[0]
            floors = FLOOR[other], FLOOR[room]
            assert floors[0] <= floors[1], f"{name} (floor {floors[1]}) imports {imported} (floor {floors[0]})"
        if top in LOWEST:
            assert FLOOR[room] >= LOWEST[top], f"{name} imports {top}"
        if top in ONLY_IN:
            assert room in ONLY_IN[top], f"{name} imports {top}"


def test_every_room_with_a_floor_exists():
    gone = sorted(set(FLOOR) - {name.split(".")[0] for name in ALL})
    assert not gone, f"{', '.join(gone)}: not in the package any more; take it out of FLOORS"


INSIDE = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj", "o_proj",
          "final_layernorm", "layer_idx",
          "rotary_emb", "embed_tokens", "variance_epsilon",
          "gradient_checkpointing", "_gradient_checkpointing_func", "_attn_implementation"}
"""Attributes of transformers' decoder layers and stacks."""


@pytest.mark.parametrize("name", ALL)
def test_one_file_knows_the_inside_of_transformers(name):
    """No other one names an attribute of a stock layer or imports from below transformers' public names.

    A routed layer is told to recompute by the attribute that stock layers have, and has it itself.
    """
    if name == "seam":
        return
    for node in ast.walk(ast.parse(ALL[name].read_text())):
        if isinstance(node, ast.Attribute) and node.attr in INSIDE and getattr(node.value, "id", "") != "seam":
            own = name == "layers" and node.attr == "gradient_checkpointing" and getattr(node.value, "id", "") == "self"
            assert own, f"{name}:{node.lineno} names .{node.attr}: give it a function in seam.py"
        if isinstance(node, ast.Constant) and node.value in INSIDE - {"mlp"}:     # the field's word for a gated branch
            raise AssertionError(f"{name}:{node.lineno} spells {node.value!r}: give it a function in seam.py")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            raise AssertionError(f"{name}:{node.lineno} imports from {node.module}: go through seam.py")


def test_no_circles():
    graph = {name: {inside(i) for i in imports(name, path) if i.startswith("unimod.")} - {None, name} for name,
             path in ALL.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name in done:
            return
        path.append(name)
        for other in graph[name]:
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_the_package_hands_out_few_names_and_costs_nothing_to_import():
    code = ("import sys, unimod; assert len(unimod.__all__) <= 15; assert 'torch' not in sys.modules; "
            "[getattr(unimod, n) for n in unimod.__all__]")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_core_runs_without_notebook_packages():
    """On a GPU machine there is no plotly, papermill, pandas or jupyter; on a laptop no triton."""
    core = [n for n in ALL if FLOOR[n.split(".")[0]] <= 5 and not n.startswith("views")
            and not n.endswith(("__main__", "_triton"))]
    code = ("import sys, importlib\n"
            "for name in ('triton', 'plotly', 'papermill', 'pandas', 'ipywidgets', 'nbformat', 'nbclient', "
            "'nbconvert', 'jupyterlab', 'IPython'):\n"
            "    sys.modules[name] = None\n"
            f"for name in {core!r}:\n    importlib.import_module('unimod.' + name)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
