"""Commands that run beside the tests, in processes of their own, so that they take no time of their own on two cores.

def everything(work):                               # the words of a command line, for a working folder
    return unimod("run", "all", "--runs", work)

@pytest.mark.background.with_args(everything)                 # started with the session if this test is selected, once
for all def test_it(background):
    outcome = background(everything)                # waits for its end
"""

import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


def unimod(*words):
    """The words of a call of the command line."""
    return [sys.executable, "-m", "unimod", *map(str, words)]


@dataclass(frozen=True)
class Outcome:
    """A finished command: its working folder, exit code and output."""

    work: Path
    code: int
    out: str
    err: str


class Background:
    """Runs commands one after the other, each once, whoever asks for it."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="unimod-tests-", ignore_cleanup_errors=True)
        self.pool, self.started, self.process = ThreadPoolExecutor(max_workers=1), {}, None

    def start(self, command):
        """Queue a command unless it was before; returns its future `Outcome`."""
        if command not in self.started:
            self.started[command] = self.pool.submit(self._run, command)
        return self.started[command]

    def __call__(self, command):
        """The outcome of a command that ended with 0."""
        outcome = self.start(command).result()
        assert outcome.code == 0, f"{outcome.out[-8000:]}\n{outcome.err[-3000:]}"
        return outcome

    def _run(self, command):
        work = Path(tempfile.mkdtemp(dir=self.folder.name))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(command(work), cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        out, err = self.process.communicate()
        return Outcome(work, self.process.returncode, out, err)

    def stop(self):
        """End what is still running: the tests are over, or were interrupted."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)  # the runner then shuts its kernel down
            self.process.wait(60)
        self.folder.cleanup()
