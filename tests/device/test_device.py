"""The package on a device that is not the CPU, for which no GPU is needed: see pretend.py.

In a process of its own, because the device is registered with torch.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(600)
def test_on_a_device():
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "on_pretend.py")],
        cwd=HERE.parents[1],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout
    assert "skipped" not in done.stdout, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
