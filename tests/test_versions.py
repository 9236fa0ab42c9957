"""What was tested, locked, installed: one truth in pyproject.toml and requirements.lock, and what unimod says of it."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from unimod import versions
from unimod.__main__ import main
from unimod.config import SetupError
from unimod.workbook import doctor

ROOT = Path(__file__).parents[1]
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]


def test_the_lock_pins_every_direct_requirement_within_its_bounds():
    pins = {}
    for need in LOCK:
        (pin,) = need.specifier
        assert pin.operator == "==" and not Version(pin.version).local and not need.name.startswith(("nvidia-",
                                                                                                     "cuda-")), need
        pins.setdefault(need.name, []).append(pin.version)
    for name, need in versions.tested().items():
        if name != "flash-attn":
            assert pins.get(name), f"{name} is not in requirements.lock: make update"
            assert all(need.specifier.contains(pin) for pin in pins[name]), (need, pins[name])


def test_every_requirement_has_an_upper_bound():
    for need in versions.tested().values():
        assert {"<", ">="} == {part.operator for part in need.specifier}, f"{need}: an untested release resolves"


def test_the_lock_holds_for_every_supported_python():
    for python in ("3.11.7", "3.12.1", "3.13.0"):
        for system, platform in (("linux", "Linux"), ("darwin", "Darwin"), ("win32", "Windows")):
            where = {"python_full_version": python, "python_version": python[:4], "sys_platform": system,
                     "platform_system": platform}
            chosen = [need.name for need in LOCK if need.marker is None or need.marker.evaluate(where)]
            assert len(chosen) == len(set(chosen)), f"two versions of one package on Python {python}, {system}"
            assert set(versions.tested()) - {"flash-attn"} <= set(chosen)


@pytest.mark.parametrize(("name", "version", "said"), [
    ("transformers", "5.25.0", "transformers 5.25.0 (tested: "), ("torch", "2.10.0", "torch 2.10.0 (tested: "),
                                                       ("transformers", "5.24.3", ""),
    ("torch", "2.13.0+cpu", ""), ("torch", "2.14.0", "torch 2.14.0 (tested: ")])
def test_one_warning_outside_the_tested_range(monkeypatch, name, version, said):
    inside = {"torch": "2.12.1", "transformers": "5.20.0"} | {name: version}
    monkeypatch.setattr(versions, "installed", inside.get)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        versions.warn()
    assert [said in str(w.message) and "make install" in str(w.message) for w in caught] == [True] * bool(said)


def test_importing_a_model_warns_once_in_a_process():
    code = ("import warnings, importlib.metadata as m; real = m.version\n"
            "m.version = lambda n: '6.1.0' if n == 'transformers' else real(n)\n"
            "with warnings.catch_warnings(record=True) as found:\n"
            "    warnings.simplefilter('always'); import unimod; unimod.from_pretrained; unimod.answer; unimod.train\n"
            "print([str(w.message) for w in found if 'unimod was never run' in str(w.message)])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.count("never run with transformers 6.1.0") == 1, done.stdout + done.stderr


def test_without_a_checkout_the_remedy_names_ranges(monkeypatch):
    monkeypatch.setattr(versions, "locked", dict)
    assert re.fullmatch(r"pip install 'torch.*<2.*' 'transformers.*<5.*'", versions.remedy())


def test_doctor_says_versions_device_backends_and_what_is_missing(capsys, tmp_path):
    lacks = [name for name in doctor.CORE if not versions.fits(name)]
    assert main(["doctor", "--json", "--runs", str(tmp_path)]) == 0 or lacks
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]["locked"] and found["versions"]["torch"]["fits"] is versions.fits("torch")
    assert set(found["backends"]) == {"kernels", "attention"} and found["device"]
    assert set(found["backends"]["attention"]["not"]) <= {"flash", "varlen"}
    assert main(["doctor", "--runs", str(tmp_path)]) in (0, 3)
    text = capsys.readouterr().out
    assert "tested" in text and f"attention: {found['backends']['attention']['name']}" in text


def test_doctor_says_what_is_wrong_with_exit_3(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    assert main(["doctor", "--runs", str(tmp_path / "file" / "runs")]) == 3
    out, err = capsys.readouterr()
    assert "is not a folder" in err and "Not ready." in out
    known = {"papermill": None, "scipy": None, "plotly": "7.0.3"}
    real = versions.installed
    for module in (doctor, versions):
        monkeypatch.setattr(module, "installed", lambda name: known[name] if name in known else real(name))
    found = doctor.diagnose(str(tmp_path))
    said = doctor.in_words(found)
    assert "7.0.3" in said and "not the lock's, but tested" in said and "not installed" in said
    assert any("papermill: no notebooks" in line for line in found["missing"])
    assert any("scipy not installed" in line for line in found["wrong"])
    monkeypatch.setenv("UNIMOD_BACKEND", "varlen")
    monkeypatch.setattr(doctor, "writable", lambda runs: (_ for _ in ()).throw(SetupError("cannot be written")))
    found = doctor.diagnose(str(tmp_path))
    assert ("cannot be written" in found["wrong"]
            and any("'varlen'" in line for line in found["wrong"])) or found["device"].startswith("cuda")


def test_what_moved_between_two_locks(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    numpy = "numpy==2.4.6 ; python_full_version < '3.12'\nnumpy==2.5.5 ; python_full_version >= '3.12'\n"
    old.write_text(f"# made\ntorch==2.12.0\n{numpy}six==1.0\n")
    new.write_text(f"torch==2.13.0\n{numpy}six==2.0\n")
    def call(*files):
        return subprocess.run([sys.executable, ".ci/lock.py", "moved", *files], cwd=ROOT, capture_output=True,
                              text=True)
    done = call(old, new)
    assert done.returncode == 0
    assert done.stdout == "torch: 2.12.0 -> 2.13.0\n", "six is not asked for by pyproject.toml itself"
    assert call(old, old).returncode == 1
