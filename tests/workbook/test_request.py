"""What is asked of the runner: merging, coercion and every refusal, all without a kernel."""

import subprocess
import sys

import pytest

from unimod.workbook.request import Request

FIRST = "seed = 0\nlr = 8.0e-4\nresume = True\nseeds = [0]\ndata = 'scenes'\nfolder = ''"
HEAVY = {"torch", "transformers", "papermill", "nbclient", "plotly", "pandas"}


@pytest.fixture
def books(bench):
    bench.notebook("00_first", parameters=FIRST)
    bench.notebook("07_training", parameters="steps = 60\nplan = 'last_half'\nsaving = 0.3")
    return bench


def values(which, **kwargs):
    return Request(which, **kwargs).steps()[0].params


def test_own_values_then_files_then_command_line(books):
    (books.root / "a.yaml").write_text("seed: 1\nlr: 1e-4\n")  # YAML reads this lr as a text
    (books.root / "b.yaml").write_text("seed: 2\n")
    assert values("0").seed == 0
    assert values("0", files=["a.yaml"]).lr == 1e-4
    assert values("00", files=["a.yaml", "b.yaml"]).seed == 2
    params = values("00_first", files=["a.yaml"], sets=["seed=3", "resume=false", "seeds=0,1"])
    assert (params.seed, params.lr, params.resume, params.seeds) == (3, 1e-4, False, [0, 1])
    assert params.interactive is False and params.run_dir.startswith(str(books.root / "runs" / "00_first"))


def test_notebook_by_number_name_and_path(books):
    for which in ("7", "07", "07_training", "notebooks/07_training.ipynb"):
        assert [book.name for book in Request(which).books] == ["07_training"]
    assert [book.name for book in Request("all").books] == ["00_first", "07_training"]


def test_key_follows_what_matters(books):
    def key(*sets):
        return Request("00", sets=sets).steps()[0].folder.name

    before = key()
    assert key("seed=0") == before != key("seed=1")
    books.notebook("00_first", "1 + 1", parameters=FIRST)
    assert key() != before
    pictures = books.root / "pictures"
    pictures.mkdir()
    (pictures / "data.jsonl").write_text("{}\n")
    before = key("data=folder", "folder=pictures")
    assert key("data=folder", f"folder={pictures}") == before  # the same folder, named otherwise
    (pictures / "data.jsonl").write_text("{}\n{}\n")
    assert key("data=folder", "folder=pictures") != before


def test_one_file_serves_all_notebooks(books):
    (books.root / "all.yaml").write_text("seed: 1\nsteps: 5\n")
    assert values("07", files=["all.yaml"]).steps == 5
    assert [step.params.seed for step in Request("all", files=["all.yaml"]).steps()] == [1, 0]


def test_list_and_check_start_nothing(books):
    assert books.call("list") == 0 and "07_training" in books.out and "What is it?" in books.out
    assert books.call("check", "all", "-p", "steps=5") == 0
    assert "steps = 5" in books.out and "07_training: to run" in books.out
    assert not (books.root / "runs").exists()


@pytest.mark.parametrize(("args", "words"), [
    (["00", "-p", "sede=1"], ["'sede'", "Did you mean 'seed'"]),
    (["00", "-p", "seed=many"], ["seed='many'", "whole number", "seed=8"]),
    (["00", "-p", "seed"], ["'seed'", "name=value"]),
    (["00", "-p", "steps=3"], ["00_first does not declare 'steps'", "belongs to 07_training"]),
    (["all", "-p", "batch=3"], ["No notebook declares 'batch'"]),
    (["all", "-p", "run_dir=x"], ["run_dir is set by the runner"]),
    (["00", "-f", "none.yaml"], ["'none.yaml'", "params/"]),
    (["00", "-f", "list.yaml"], ["'list.yaml'", "steps: 60"]),
    (["00", "-f", "typo.yaml"], ["'stesp'", "Did you mean 'steps'"]),
    (["00", "-f", "broken.yaml"], ["'broken.yaml'", "cannot be read"]),
    (["00", "-p", "data=folder"], ["folder=<path>"]),
    (["00", "-p", "data=folder", "-p", "folder=nowhere"], ["folder='nowhere' is not a folder", "data.jsonl"]),
    (["00", "-p", "data=scene"], ["data='scene'", "Did you mean 'scenes'", "digits"]),
    (["07", "-p", "plan=nowhere.yaml"], ["nowhere.yaml", "last_half"]),
    (["07", "-p", "plan=zero.yaml"], ["Capacity 0", "(0, 1]"]),
    (["07", "-p", "plan=large.yaml"], ["Capacity 1.2", "(0, 1]"]),
    (["07", "-p", "plan=layer.yaml"], ["layer 9", "does not exist"]),
    (["07", "-p", "plan=three.yaml"], ["plans 3 layers, the model has 8"]),
    (["07", "-p", "saving=0.6"], ["saving=0.6 is more than 4 of 8 layers can save"]),
    (["07", "-p", "plan=last_half_per_task", "-p", "saving=0.4"], ["saving=0.4", "ask for 0 to 0.356"]),
    (["9"], ["no notebook '9'", "00_first"]),
    (["7_trainng"], ["Did you mean '07_training'"]),
    (["nowhere/x.ipynb"], ["cannot be read as a notebook"]),
])
def test_bad_input_stops_before_any_kernel(books, args, words):
    (books.root / "list.yaml").write_text("- seed\n")
    (books.root / "typo.yaml").write_text("stesp: 1\n")
    (books.root / "broken.yaml").write_text("seed: [1\n")
    (books.root / "three.yaml").write_text("layers: 3\ncapacity: {t2i: {1: 0.5}}\n")
    for name, layer, capacity in (("zero", 4, 0), ("large", 4, 1.2), ("layer", 9, 0.5)):
        (books.root / f"{name}.yaml").write_text(f"layers: 8\ncapacity:\n  t2i: {{{layer}: {capacity}}}\n")
    assert books.call("run", *args) == 2
    assert all(word in books.err for word in words), books.err
    assert "Traceback" not in books.err and books.err.count("\n") <= 8
    assert not (books.root / "runs").exists()


@pytest.mark.parametrize(("parameters", "words"), [
    ("seed = 0\nhalf = seed // 2", ["`half = seed // 2`", "goes stale"]),
    ("seeed = 0", ["'seeed'", "'seed'"]),
    ("seed = ", ["not Python"]),
])
def test_a_parameters_cell_holds_known_literals(bench, parameters, words):
    bench.notebook("00_first", parameters=parameters)
    assert bench.call("check", "00") == 2
    assert all(word in bench.err for word in words), bench.err


def test_08_alone_compares_the_newest_training(bench):
    bench.notebook("08_compare_runs", parameters="compare = []")
    assert bench.call("check", "08") == 2
    assert "no finished run of 07_training" in bench.err and "python -m unimod run 07_training" in bench.err


def test_cuda_where_there_is_none(bench):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    bench.notebook("00_first", parameters="device = 'auto'")
    assert bench.call("check", "00", "-p", "device=cuda") == 2
    assert "device=cpu" in bench.err


def test_check_imports_nothing_heavy(books):
    code = ("import sys; from unimod.__main__ import main; code = main(['check', 'all']); "
            f"sys.exit(code or ', '.join({HEAVY!r} & set(sys.modules)) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
