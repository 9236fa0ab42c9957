"""What is installed here against what was tested, what will be used and why, what is missing and what that costs.

    python -m unimod doctor            # exit code 0: ready for everything but what is named as missing; 3: not
"""

from __future__ import annotations

import os
import platform
import shutil
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


def diagnose(runs: str = "runs") -> dict:
    """Examine this machine and installation; nothing is written.

    versions: by library installed, locked (None: not in a lock), tested (a range) and fits; backends: by family of ops
    name and not (the reason for each preferred one that cannot run here); missing: what is not here and what that
    costs, and wrong: what has to be mended before the package can be relied on, in sentences.
    """
    found = {"python": platform.python_version(), "platform": platform.platform(), "versions": {}, "device": "",
             "backends": {}, "missing": [], "wrong": []}
    for name in (*CORE, *NOTEBOOKS, "triton"):
        found["versions"][name] = {
            "installed": installed(name), "locked": locked().get(name),
            "tested": str(tested()[name].specifier) if name in tested() else "", "fits": fits(name)}
    core, notebooks = ([name for name in names if installed(name) is None] for names in (CORE, NOTEBOOKS))
    if core:
        found["wrong"].append(f"{', '.join(core)} not installed, and nothing runs without. Install: {remedy()}.")
    if advice():
        found["wrong"].append(advice())
    try:
        writable(runs_folder(runs))
    except (SetupError, ParameterError) as error:
        found["wrong"].append(str(error))
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
            found["missing"].append(sentence)
    if found["versions"]["torch"]["installed"]:
        _examine_device(found)
    return found


def _examine_device(found: dict) -> None:
    import torch

    from ..ops.backend import FAMILIES, choice

    cuda, missing = torch.cuda.is_available(), found["missing"]
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    found["device"] = f"cuda, {torch.cuda.get_device_name()}" if cuda else describe_cpu()
    if "OMP_NUM_THREADS" in os.environ:
        found["device"] += f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
    if not cuda:
        also = "" if torch.backends.cuda.is_built() else " and a torch with CUDA"
        missing.append(f"a CUDA device{also}: everything runs on the CPU, which is enough for the tiny models.")
    elif find_spec("triton") is None:
        missing.append("triton: routed layers gather and scatter in plain torch, slower and with more memory.")
    try:
        for family in FAMILIES:
            name, reasons = choice(family, device, dtype)
            found["backends"][family] = {"name": name, "not": reasons}
    except ParameterError as error:                             # UNIMOD_BACKEND names one that cannot run here
        found["wrong"].append(str(error))


def in_words(found: dict) -> str:
    """A diagnosis as a table and sentences."""
    lines = [f"Python {found['python']} on {found['platform']}", f"{'':15s}{'installed':>14s}{'locked':>12s}  tested"]
    for name, row in found["versions"].items():
        version, locked, mark = row["installed"], row["locked"], ""
        if version is None:
            mark = "not installed"
        elif not row["fits"]:
            mark = "<- outside the tested range"
        elif locked not in (None, version.split("+")[0]):
            mark = "not the lock's, but tested"
        lines.append(f"{name:15s}{version or '-':>14s}{locked or '-':>12s}  {row['tested']:22s} {mark}".rstrip())
    lines.append(f"device: {found['device']}")
    for family, row in found["backends"].items():
        why = "; ".join(f"{name}: {reason}" for name, reason in row["not"].items())
        lines.append(f"{family}: {row['name']}" + (f" ({why})" if why else ""))
    lines += [f"{kind}: {line}" for kind in ("missing", "wrong") for line in found[kind]]
    return "\n".join([*lines, "Not ready." if found["wrong"] else "Ready."])
