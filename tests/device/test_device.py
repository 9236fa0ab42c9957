"""The package on a device that is not the CPU, for which no GPU is needed: see pretend.py.

In a process of its own, because the device is registered with torch.
"""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def on_pretend(work):
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "on_pretend.py")]
    return ["env", f"PYTHONPATH={path}", *command]


@pytest.mark.background.with_args(on_pretend)
@pytest.mark.timeout(900)
def test_on_a_device(background):
    out = background(on_pretend).out
    assert " passed" in out and "skipped" not in out, out[-8000:]
