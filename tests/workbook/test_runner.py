"""The runner on tiny notebooks: what it leaves behind when all goes well, and every way it can go wrong."""

import json
import sys
import time

import nbformat
import pytest
import yaml

from unimod.workbook import runner
from unimod.workbook.run_folder import latest

WRITE = "run.result('answer', params.seed + 41, unit='points', n=3, seed=params.seed)"


def test_done_is_skipped_and_force_runs_again(bench):
    bench.notebook("00_first", "print('step 1 of 2')", WRITE)
    assert bench.call("run", "00", "-p", "seed=1") == 0, bench.err
    folder = bench.folder("00_first")
    answer = {"name": "answer", "value": 42, "unit": "points", "n": 3, "seed": 1}
    assert json.loads((folder / "results.json").read_text()) == [answer]
    assert yaml.safe_load((folder / "params.yaml").read_text()) == {"seed": 1, "steps": 60}
    record = bench.record("00_first")
    assert record["status"] == "ok" and record["exit"] == 0 and record["seed"] == 1 and record["versions"]["torch"]
    assert "step 1 of 2" in (folder / "log.txt").read_text() and "    step 1 of 2" in bench.out
    assert "about 0.1 min" in bench.out and bench.out.rstrip().endswith(f"report: {folder / 'report.html'}")
    cells = nbformat.read(folder / "00_first.ipynb", 4).cells
    assert "".join(cells[3].source).startswith("from unimod")
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code")

    first = (folder / "done.json").read_text()
    (folder / "left.txt").touch()
    assert bench.call("run", "00", "-p", "seed=1") == 0
    assert "done before" in bench.out and (folder / "done.json").read_text() == first
    assert bench.call("run", "00", "-f", folder / "params.yaml", "--force") == 0
    assert (folder / "done.json").read_text() != first and not (folder / "left.txt").exists()
    assert latest("runs", "00_first") == folder


def test_a_half_written_folder_is_done_again_and_keeps_its_checkpoints(bench):
    bench.notebook("00_first", WRITE, "assert run.dir.joinpath('checkpoint').exists()")
    bench.call("check", "00")
    folder = bench.root / "runs" / "00_first" / bench.out.split()[3].rsplit("/", 1)[-1]
    folder.mkdir(parents=True)
    for name, text in (("checkpoint", ""), ("done.json", "{}"), ("run.json", '{"status": "running"}'),
                       ("results.json", "[1]")):
        (folder / name).write_text(text)
    assert bench.call("run", "00") == 0, bench.err
    assert len(json.loads((folder / "results.json").read_text())) == 1 and bench.record("00_first")["status"] == "ok"


@pytest.mark.parametrize(("cells", "options", "code", "words"), [
    (["x = 1\ny = x.nothing"], {}, 4, ["cell 4", "line 2 (y = x.nothing)", "AttributeError", "'nothing'"]),
    ([WRITE, "run.finish()", "import sys; sys.exit(0)", WRITE], {"finish": False}, 4, ["cell 6", "SystemExit"]),
    ([WRITE], {"finish": False}, 4, ["never called run.finish()"]),
    ([], {}, 4, ["has written nothing"]),
    (["params.of(steps=0)"], {}, 2, ["steps=0 must be at least 1"]),
    (["import plotlyy", "import numpy"], {}, 3, ["plotlyy", "pip install -e '.[notebooks]'"]),
    (["import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], {}, 138,
     ["died in cell 4 (import os, signal;", "memory"]),
])
def test_failures(bench, cells, options, code, words):
    bench.notebook("00_first", *cells, **options)
    bench.notebook("01_second", WRITE)
    assert bench.call("run", "all" if code == 138 else "00") == code
    assert all(word in bench.err for word in ["00_first", *words]), bench.err
    folder, record = bench.folder("00_first"), bench.record("00_first")
    assert not (folder / "done.json").exists() and not (folder / "report.html").exists()
    assert record["exit"] == code and record["status"] == runner.STATUS[code] != "ok"
    assert (folder / "log.txt").exists() and not bench.folders("01_second")
    if code == 138:
        assert "Done: nothing. Failed: 00_first. Not run: 01_second." in bench.err
        assert not (bench.root / "runs" / "report").exists()


def test_timeout_and_heartbeat(bench, monkeypatch):
    monkeypatch.setattr(runner, "HEARTBEAT", 0.5)
    bench.notebook("00_first", "# a comment\nimport time\ntime.sleep(60)", setup=False)
    start = time.monotonic()
    assert bench.call("run", "00", "--timeout", "4") == 124
    assert time.monotonic() - start < 40
    assert "--timeout 4 s, in cell " in bench.err and " s, in cell " in bench.out   # the third, on a quick machine
    assert bench.record("00_first")["status"] == "timeout" and not (bench.folder("00_first") / "done.json").exists()


def test_kernel_is_this_python_whatever_is_installed(bench, monkeypatch):
    for name in ("python3", "mine"):
        spec = bench.root / "jupyter" / "kernels" / name
        spec.mkdir(parents=True)
        kernel = {"argv": ["/bin/false"], "display_name": "no", "language": "python"}
        (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(bench.root / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(bench.root / "jupyter"))
    path = bench.notebook("00_first", "import sys; run.result('python', sys.executable)")
    nb = nbformat.read(path, 4)
    nb.metadata.kernelspec = {"name": "mine", "display_name": "no", "language": "python"}
    nbformat.write(nb, path)
    assert bench.call("run", "00") == 0, bench.err
    assert json.loads((bench.folder("00_first") / "results.json").read_text())[0]["value"] == sys.executable


def test_all_wires_outputs_to_inputs(bench):
    plan = "layers: 8\ncapacity:\n  t2i: {4: 0.5}\n"
    bench.notebook("03_token_redundancy", f"run.path('plan.yaml').write_text({plan!r})")
    bench.notebook("07_training", "run.result('plan', params.plan)", parameters="plan = 'last_half'")
    bench.notebook("08_compare_runs", "run.result('compared', params.compare[0])", parameters="compare = []")
    assert bench.call("run", "all") == 0, bench.err
    folders = {name: bench.folder(name) for name in ("03_token_redundancy", "07_training", "08_compare_runs")}
    results = {name: json.loads((folder / "results.json").read_text()) for name, folder in folders.items()}
    assert results["07_training"][0]["value"] == str(folders["03_token_redundancy"] / "plan.yaml")
    assert results["08_compare_runs"][0]["value"] == str(folders["07_training"])
    assert bench.out.index("[1/3]") < bench.out.index("[2/3]") < bench.out.index("[3/3]")
    assert bench.out.rstrip().endswith(f"report: {bench.root / 'runs' / 'report' / 'index.html'}")

    assert bench.call("run", "all") == 0 and bench.out.count("done before") == 3 and "0 to run" in bench.out
    assert bench.call("check", "all", "-p", "plan=interleaved") == 0
    assert "plan = 'interleaved'" in bench.out and "08_compare_runs: waits" in bench.out


def test_missing_package(bench, monkeypatch):
    bench.notebook("00_first", WRITE)
    monkeypatch.setattr(runner, "NEEDED", ("papermill_is_not_here", "papermill"))
    assert bench.call("run", "00") == 3
    assert "papermill_is_not_here" in bench.err and "pip install" in bench.err and not (bench.root / "runs").exists()
    assert runner._extra("pyarrow") == "Install it with: pip install -e '.[notebooks]'"
    assert runner._extra("torch") == "Install it with: pip install -e ."


def test_bare_papermill_runs_the_same_notebook(bench):
    import papermill

    path = bench.notebook("00_first", WRITE)
    papermill.execute_notebook(str(path), "out.ipynb", parameters={"seed": 1}, kernel_name="python3",
                               progress_bar=False)
    folder = bench.folder("00_first")
    assert folder.name == "interactive" and latest("runs", "00_first") == folder
    assert yaml.safe_load((folder / "params.yaml").read_text())["seed"] == 1
    assert bench.call("report", "runs") == 0 and (bench.root / "runs" / "report" / "index.html").exists()
