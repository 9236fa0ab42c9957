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
    versions: dict[str, dict] = field(default_factory=dict)     # by library: installed, locked, tested (a range), fits
    device: str = ""
    backends: dict[str, dict] = field(default_factory=dict)     # by family of ops: name; not: why preferred ones cannot
    missing: list[str] = field(default_factory=list)            # what is not here and what that costs, a sentence each
    wrong: list[str] = field(default_factory=list)              # what has to be mended first, a sentence each

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
        found.versions[name] = {"installed": installed(name), "locked": locked().get(name),
                                "tested": str(tested()[name].specifier) if name in tested() else "", "fits": fits(name)}
    core, notebooks = ([name for name in names if installed(name) is None] for names in (CORE, NOTEBOOKS))
    if core:
        found.wrong.append(f"{', '.join(core)} not installed, and nothing runs without. Install: {remedy()}.")
    if advice():
        found.wrong.append(advice())
    try:
        writable(runs_folder(runs))
    except (SetupError, ParameterError) as error:
        found.wrong.append(str(error))
    for lacks, sentence in (
        (notebooks, f"{', '.join(notebooks)}: no notebooks and no report; models, training and benchmarks run without. "
                    "Install: pip install 'unimod[notebooks]', in a checkout pip install -e '.[notebooks]'."),
        (not any(folder.is_dir() for folder in notebook_folders()),
         "the notebooks: this installation carries none. They lie in the folder notebooks/ of a checkout; call from "
         "there."),
        (not locked(), f"requirements.lock: not in {CHECKOUT}, so versions are held against the tested ranges alone."),
        (not any(map(shutil.which, BROWSERS)),
         "a Chromium browser: only the tests that drive JupyterLab and the report are skipped."),
    ):
        if lacks:
            found.missing.append(sentence)
    if found.versions["torch"]["installed"]:
        _examine_device(found)
    return found


def _examine_device(found: Diagnosis) -> None:
    import torch

    from ..ops.backend import FAMILIES, choice

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    found.device = f"cuda, {torch.cuda.get_device_name()}" if cuda else describe_cpu()
    if "OMP_NUM_THREADS" in os.environ:
        found.device += f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
    if not cuda:
        also = "" if torch.backends.cuda.is_built() else " and a torch with CUDA"
        found.missing.append(f"a CUDA device{also}: everything runs on the CPU, which is enough for the tiny models.")
    elif find_spec("triton") is None:
        found.missing.append("triton: routed layers gather and scatter in plain torch, slower and with more memory.")
    try:
        found.backends = {family: dict(zip(("name", "not"), choice(family, device, dtype))) for family in FAMILIES}
    except ParameterError as error:                             # UNIMOD_BACKEND names one that cannot run here
        found.wrong.append(str(error))
