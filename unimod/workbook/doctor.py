"""What is installed here against what was tested, what will be used and why, what is missing and what that costs.

    python -m unimod doctor            # exit code 0: ready for everything but what is named as missing; 3: not
"""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec

from ..config import ParameterError, SetupError
from ..files import describe_cpu, runs_folder, writable
from ..versions import CHECKOUT, advice, fits, installed, locked, remedy, tested
from .run_folder import notebook_folders

CORE = ("torch", "transformers", "accelerate", "safetensors", "numpy", "scipy", "scikit-learn", "pillow", "pyyaml",
        "psutil", "packaging")
NOTEBOOKS = ("jupyterlab", "ipykernel", "ipywidgets", "anywidget", "plotly", "papermill", "nbformat", "nbconvert",
             "pandas", "pyarrow")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Diagnosis:
    """What `python -m unimod doctor` says."""

    python: str
    platform: str
    versions: dict[str, dict[str, object]] = field(default_factory=dict)
    """By library: installed, locked (None: no lock or not in it), tested (a range), fits."""
    device: str = ""
    backends: dict[str, dict[str, object]] = field(default_factory=dict)
    """By family of ops: name, and for each preferred one that cannot run here the reason."""
    missing: list[str] = field(default_factory=list)
    """What is not here and what that costs, a sentence each."""
    wrong: list[str] = field(default_factory=list)
    """What has to be mended before the package can be relied on, a sentence each."""

    def __str__(self) -> str:
        lines = [f"Python {self.python} on {self.platform}", f"{'':15s}{'installed':>14s}{'locked':>12s}  tested"]
        for name, row in self.versions.items():
            version, locked, mark = row["installed"], row["locked"], ""
            if version is None:
                mark = "not installed"
            elif not row["fits"]:
                mark = "<- outside the tested range"
            elif locked not in (None, version.split("+")[0]):
                mark = "not the lock's, but tested"
            lines.append(f"{name:15s}{version or '-':>14s}{locked or '-':>12s}  {row['tested']:22s} {mark}".rstrip())
        lines.append(f"device: {self.device}")
        for family, row in self.backends.items():
            why = "; ".join(f"{name}: {reason}" for name, reason in row["not"].items())
            lines.append(f"{family}: {row['name']}" + (f" ({why})" if why else ""))
        lines += [f"missing: {line}" for line in self.missing] + [f"wrong: {line}" for line in self.wrong]
        return "\n".join([*lines, "Ready." if not self.wrong else "Not ready."])


def diagnose(runs: str = "runs") -> Diagnosis:
    """Examine this machine and installation; nothing is written."""
    found = Diagnosis(platform.python_version(), platform.platform())
    for name in (*CORE, *NOTEBOOKS, "triton"):
        need = tested().get(name)
        found.versions[name] = {"installed": installed(name), "locked": locked().get(name),
                                "tested": str(need.specifier) if need else "", "fits": fits(name)}
    lacking = [name for name in CORE if installed(name) is None]
    if lacking:
        found.wrong.append(f"{', '.join(lacking)} not installed, and nothing runs without. Install: {remedy()}.")
    if advice():
        found.wrong.append(advice())
    lacking = [name for name in NOTEBOOKS if installed(name) is None]
    if lacking:
        found.missing.append(f"{', '.join(lacking)}: no notebooks and no report; models, training and benchmarks run "
                             "without. Install: pip install 'unimod[notebooks]', in a checkout "
                             "pip install -e '.[notebooks]'.")
    if not any(folder.is_dir() for folder in notebook_folders()):
        found.missing.append("the notebooks: this installation carries none. They lie in the folder notebooks/ of a "
                             "checkout; call from there.")
    if not locked():
        found.missing.append(f"requirements.lock: not in {CHECKOUT}, so versions are held against the tested ranges "
                             "alone.")
    if not any(map(shutil.which, BROWSERS)):
        found.missing.append("a Chromium browser: only the tests that drive JupyterLab and the report are skipped.")
    try:
        writable(runs_folder(runs))
    except (SetupError, ParameterError) as error:
        found.wrong.append(str(error))
    if found.versions["torch"]["installed"]:
        _examine_device(found)
    return found


def _examine_device(found: Diagnosis) -> None:
    import torch

    from ..ops.backend import FAMILIES, choice

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    found.device = f"cuda, {torch.cuda.get_device_name()}" if cuda else describe_cpu()
    if not cuda:
        found.missing.append("a CUDA device" + ("" if torch.backends.cuda.is_built() else " and a torch with CUDA")
                             + ": everything runs on the CPU, which is enough for the tiny models.")
    try:
        for family in FAMILIES:
            name, reasons = choice(family, "cuda" if cuda else "cpu", dtype)
            found.backends[family] = {"name": name, "not": reasons}
    except ParameterError as error:                             # UNIMOD_BACKEND names one that cannot run here
        found.wrong.append(str(error))
    if cuda and find_spec("triton") is None:
        found.missing.append("triton: routed layers gather and scatter in plain torch, slower and with more memory.")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        found.device += f", OMP_NUM_THREADS={threads}"
