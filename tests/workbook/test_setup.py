"""The machine and the installation: homes, working folders, disks and terminals as users have them.

Exit code 3 is for what no parameter mends.
"""

import ast
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from unimod import __main__, files
from unimod.config import ParameterError, SetupError, expanded
from unimod.params import Params
from unimod.plan import CapacityPlan, last_half
from unimod.workbook import request, run_folder, runner

ROOT = Path(__file__).parents[2]
WRITE = "run.result('answer', 42)"


def command(*args, cwd, env=None, **more):
    """`python -m unimod <args>` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "unimod", *map(str, args)], cwd=cwd, capture_output=True,
                          encoding="utf-8", errors="replace",
                          env={**os.environ, **(env or {})}, **more)


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """A home folder with pictures, a plan and a saved model's folder."""
    home = tmp_path / "home"
    (home / "pictures").mkdir(parents=True)
    lines = []
    for i in range(4):
        Image.new("RGB", (48, 48), (60 * i, 0, 0)).save(home / "pictures" / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"number {i}",
                                 "questions": [{"question": "which?", "answer": str(i)}]}))
    (home / "pictures" / "data.jsonl").write_text("\n".join(lines))
    last_half(8).save(home / "plan.yaml")
    (home / "run").mkdir()
    (home / "run" / "done.json").write_text("{}")
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.mark.parametrize(("name", "value"), [("folder", "~/pictures"), ("checkpoint", "~/pictures"),
                                             ("routed", "~/pictures"), ("plan", "~/plan.yaml"),
                                             ("compare", ["~/run"]), ("runs", "~/runs")])
def test_a_tilde_is_the_home_folder_in_every_parameter_that_is_a_path(at_home, name, value):
    found = getattr(Params.of(**{name: value}), name)
    assert found == ([str(at_home / "run")] if name == "compare" else value.replace("~", str(at_home)))


def test_a_tilde_from_the_command_line_and_from_a_file(at_home, bench, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert bench.call("check", "01", "-p", "data=folder", "-p", "folder=~/pictures") == 0, bench.err
    assert f"folder = {str(at_home / 'pictures')!r}" in bench.out
    (at_home / "own.yaml").write_text("data: folder\nfolder: ~/pictures\nsamples: 1\n")
    assert bench.call("check", "01", "-f", "~/own.yaml", "--runs", "~/runs") == 0, bench.err
    assert str(at_home / "runs") in bench.out
    shutil.copy(ROOT / "notebooks" / "01_attention_patterns.ipynb", at_home / "01_mine.ipynb")
    assert bench.call("check", "~/01_mine.ipynb") == 0, bench.err


def test_a_tilde_wherever_a_path_is_taken(at_home, capsys):
    from unimod import from_pretrained, inspect, save_pretrained, shipped

    shutil.copytree(shipped("showo-tiny"), at_home / "model")
    model, tokenizer = from_pretrained("~/model")
    save_pretrained("~/again", model, tokenizer)
    assert inspect("~/again").loads and CapacityPlan.load("~/plan.yaml") == last_half(8)
    last_half(8).save("~/again/plan2.yaml")
    assert (at_home / "again" / "plan2.yaml").is_file()
    assert __main__.main(["inspect", "~/model"]) == 0
    assert __main__.main(["plan", "~/plan.yaml", "--model", "~/model"]) == 0, capsys.readouterr().err


def test_a_home_that_nobody_has_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match="no home folder for '~nobody-at-all'"):
        expanded("~nobody-at-all/pictures")
    (tmp_path / "~odd").mkdir()
    assert expanded("~odd/x") == "~odd/x", "a folder that is really called so"


def test_without_a_home(tmp_path, bench):
    """No HOME, and a user id that has no entry: what needs none works, and a tilde is refused."""
    lost = ("import os, pwd, sys\nos.environ.pop('HOME', None)\ndef none(*_): raise KeyError('uid')\n"
            "pwd.getpwuid = none\nfrom unimod.__main__ import main\n")
    def call(*args, cwd=ROOT):
        return subprocess.run([sys.executable, "-c", lost + "sys.exit(main(sys.argv[1:]))", *args], capture_output=True,
                              text=True, cwd=cwd)
    done = call("check", "03", "--runs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    done = call("check", "03", "--runs", "~/runs")
    assert done.returncode == 2 and "no home folder for '~'" in done.stderr
    bench.notebook("00_first", "import os; run.result('home', os.environ['HOME'])")
    done = call("run", "notebooks/00_first.ipynb", cwd=bench.root)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((bench.folder("00_first") / "results.json").read_text())
    assert "unimod-home-" in result["value"] and not Path(result["value"]).exists(), "a kernel gets one for its time"


def test_an_installation_that_is_not_editable_runs_the_notebooks(tmp_path):
    source, target = tmp_path / "source", tmp_path / "elsewhere"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "build",
                                                                "__pycache__", "tests"))
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
                           f"--target={target}", source],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    place = tmp_path / "work"
    place.mkdir()
    done = command("list", cwd=place, env={"PYTHONPATH": str(target)})
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 9, done.stderr
    done = command("check", "03", cwd=place, env={"PYTHONPATH": str(target)})
    assert done.returncode == 0 and str(place / "runs") in done.stdout, done.stderr
    assert (target / "share" / "unimod" / "notebooks" / "records").is_dir()
    done = command("doctor", "--json", cwd=place, env={"PYTHONPATH": str(target)})
    found = json.loads(done.stdout)
    torch = found["versions"]["torch"]
    assert torch["locked"] is None and "<" in torch["tested"], "its own metadata hold the ranges"


def test_without_notebooks_it_says_where_they_are_to_be_had(bench, monkeypatch):
    monkeypatch.setattr(request, "notebook_folders", lambda: (bench.root / "nowhere",))
    for call in (["list"], ["run", "03"], ["check", "all"]):
        assert bench.call(*call) == 3, call
        assert "carries no notebooks" in bench.err and "checkout" in bench.err and not bench.out
    bench.notebook("00_first", WRITE)
    assert bench.call("check", "notebooks/00_first.ipynb") == 0, bench.err


def test_other_peoples_notebooks_are_passed_over(bench):
    foreign = bench.root / "notebooks" / "01_eda.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1",
                                                                             metadata={"tags": ["parameters"]})]),
                   foreign)
    (bench.root / "notebooks" / "02_broken.ipynb").write_text("{")
    assert bench.call("list") == 0 and "03_token_redundancy" in bench.out and "eda" not in bench.out, bench.err
    assert bench.call("check", "03") == 0 and str(bench.root / "runs") in bench.out
    bench.notebook("04_mine", WRITE)
    assert bench.call("list") == 2, "a broken one among the workbook's own is not passed over"
    assert "02_broken.ipynb cannot be read" in bench.err
    (bench.root / "notebooks" / "02_broken.ipynb").unlink()
    assert bench.call("list") == 0 and [line.split()[0] for line in bench.out.splitlines()] == ["04_mine"]


def test_runs_that_cannot_be_written_are_refused_before_a_kernel_starts(bench, monkeypatch):
    bench.notebook("00_first", WRITE)
    (bench.root / "file.txt").write_text("mine")
    for call in ("check", "run"):
        for runs in ("file.txt", "file.txt/below"):
            assert bench.call(call, "00", "--runs", runs) == 3
            assert "file.txt is not a folder" in bench.err and "--runs DIR" in bench.err
    assert (bench.root / "file.txt").read_text() == "mine"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert bench.call("check", "00") == 3 and "is read-only here" in bench.err and not (bench.root / "runs").exists()


def test_a_run_folder_that_is_taken_by_a_file(bench):
    bench.notebook("00_first", WRITE)
    (bench.root / "runs").mkdir()
    (bench.root / "runs" / "00_first").write_text("mine")
    assert bench.call("run", "00") == 3 and "cannot be written" in bench.err
    assert (bench.root / "runs" / "00_first").read_text() == "mine"


@pytest.mark.parametrize("cell", [WRITE, "open(run.path('big'), 'wb').write(bytes(10**7))",
                                  "run.result('words', 'x' * 10**6)"],
                         ids=["the runner's own files", "a notebook's file", "a result"])
def test_a_full_disk_ends_a_run_with_3(bench, cell):
    bench.notebook("00_first", cell)
    room = 200 if cell is WRITE else 100_000
    done = command("run", "00", cwd=bench.root,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    assert done.returncode == 3 and "Traceback" not in done.stderr and done.stderr.startswith("unimod: "), done.stderr
    assert not list(bench.root.glob("runs/00_first/*/done.json"))


def test_a_notebook_that_fails_says_when_the_releases_are_untested(bench, monkeypatch):
    bench.notebook("00_first", "raise TypeError('unexpected keyword')")
    assert bench.call("run", "00") == 4 and "never run with" not in bench.err
    monkeypatch.setattr(runner, "advice", lambda: "unimod was never run with transformers 9.0.0.")
    assert bench.call("run", "00") == 4 and "never run with transformers 9.0.0" in bench.err


def test_in_a_notebook_a_refused_run_folder_says_how_to_choose_another(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="cannot be written .* choose another folder of runs"):
        run_folder.Run.open("03_token_redundancy", Params(runs=str(tmp_path / "file")))


def test_two_processes_that_write_one_file_leave_a_whole_one(tmp_path):
    script = "import sys; from pathlib import Path; from unimod.files import write\nfor _ in range(300): " \
             "write(Path(sys.argv[1]), sys.argv[2] * 20000)"
    both = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "a.json", letter], stderr=subprocess.PIPE,
                             cwd=ROOT) for letter in "ab"]
    assert [process.communicate()[1] for process in both] == [b"", b""]
    text = (tmp_path / "a.json").read_text()
    assert text in ("a" * 20000, "b" * 20000) and len(list(tmp_path.iterdir())) == 1


def test_what_was_measured_is_kept_where_there_is_no_home_too(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert files.cache_folder() == Path.home() / ".cache" / "unimod"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)       # as for a user whom the system does not know
    assert files.cache_folder() == Path(tempfile.gettempdir()) / "unimod"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert files.cache_folder() == Path("/elsewhere/unimod")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_replaced(bench, encoding):
    bench.notebook("00_first", "print('bars \\u2588\\u2581 \\u00e9 \\U0001F600')", WRITE, title="Wer war \\u2603?")
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for args in (("plan", "last_half", "--model", "showo-tiny"), ("run", "00"), ("list",), ("doctor",)):
        done = command(*args, cwd=bench.root, env=env)
        assert done.returncode == 0, (args, done.stderr)
    assert command("run", "--help", cwd=bench.root, env=env).returncode == 0
    folder = bench.folder("00_first")
    assert "\u2588\u2581" in (folder / "log.txt").read_text(encoding="utf-8"), "what is kept is kept whole"


def test_a_reader_that_has_gone_ends_no_run(bench):
    bench.notebook("00_first", "for i in range(50):\n    print('line', i)", WRITE)
    reader, writer = os.pipe()
    os.close(reader)
    subprocess.run([sys.executable, "-m", "unimod", "run", "00"], cwd=bench.root, stdout=writer,
                   stderr=subprocess.DEVNULL)
    os.close(writer)
    assert bench.record("00_first")["status"] == "ok"
    assert "line 49" in (bench.folder("00_first") / "log.txt").read_text()


def test_every_text_file_is_read_and_written_as_utf8():
    """Without an encoding Python takes the machine's."""
    for path in sorted((ROOT / "unimod").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[1:])
                opens = name in ("read_text", "write_text") or (name == "open" and isinstance(node.func, ast.Name)
                                                                and not binary)
                assert not opens or any(k.arg == "encoding" for k in node.keywords), f"{path.name}:{node.lineno}"
