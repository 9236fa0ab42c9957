"""JupyterLab and Chromium for the tests that look and click as a reader does: `pytest -m browser`.

Everything stays on this machine: the server works on a copy of the notebooks, asks no one for news, and every request
of a page that would leave 127.0.0.1 is refused and fails the test. With UNIMOD_SCREENSHOTS=<folder> the pictures that
the tests take are kept there.
"""

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from lab import Lab

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MISSING = [what for what, there in {
    "no chromium (apt-get install chromium)": CHROMIUM,
    "no playwright (pip install -e .[test])": importlib.util.find_spec("playwright"),
    "no jupyterlab (pip install -e .[notebooks])": importlib.util.find_spec("jupyterlab"),
}.items() if not there]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
ELSEWHERE = re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1[:/])")
SIZE = {"width": 1500, "height": 1100}
QUIET = """{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}"""
SERVER = ["--no-browser", "--allow-root", "--expose-app-in-browser", "--LabApp.extension_manager=readonly",
          "--LabApp.news_url=None",
          "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--ServerApp.ip=127.0.0.1",
          "--ServerApp.port_retries=0"]


def pytest_collection_modifyitems(items):
    """Every test of this folder is a browser test, and is skipped with the reason where there is no browser."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason="; ".join(MISSING)))


@pytest.fixture(scope="package")
def chromium():
    """The browser, closed when this folder's tests are over: its event loop would break papermill's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Watch:
    """What pages print and ask for.

    `said`: console lines as (type, text), uncaught errors as type "uncaught"; `asked`: addresses elsewhere.
    """

    def __init__(self, context):
        self.said, self.asked = [], []
        context.on("console", lambda line: self.said.append((line.type, line.text)))
        context.on("weberror", lambda error: self.said.append(("uncaught", str(error.error))))
        context.route(ELSEWHERE, self._refuse)
        context.route_web_socket(ELSEWHERE, lambda socket: self.asked.append(socket.url))

    def _refuse(self, route):
        self.asked.append(route.request.url)
        route.abort()

    def errors(self):
        """Console errors and uncaught errors."""
        return [line for line in self.said if line[0] in ("error", "uncaught")]


@pytest.fixture(scope="package")
def pages(chromium):
    """with pages() as browse: browse(**options) gives a page in a context of its own, with its `page.watch`.

    At the end all must have been quiet.
    """

    @contextlib.contextmanager
    def watched():
        watches = []
        with contextlib.ExitStack() as stack:
            def browse(**options):
                context = chromium.new_context(viewport=SIZE, **options)
                stack.callback(context.close)
                page = context.new_page()
                page.set_default_timeout(20_000)
                page.watch = Watch(context)
                watches.append(page.watch)
                return page

            yield browse
        for watch in watches:
            assert not watch.errors() and not watch.asked, (watch.errors(), watch.asked)

    return watched


@pytest.fixture
def browse(pages):
    """browse(**options) gives a page; see `pages`."""
    with pages() as browse:
        yield browse


@pytest.fixture
def shoot(tmp_path):
    """shoot(page or locator, name) takes a picture, into UNIMOD_SCREENSHOTS or the test's own folder."""
    folder = Path(os.environ.get("UNIMOD_SCREENSHOTS") or tmp_path)
    return lambda what, name, **options: what.screenshot(path=folder / f"{name}.png", **options)


@pytest.fixture(scope="package")
def server(tmp_path_factory):
    """JupyterLab on copies of notebooks/ and params/, importing this checkout; yields address, token and folder."""
    root = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "params"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    config = root / "jupyter" / "config" / "labconfig"
    config.mkdir(parents=True)
    (config / "default_setting_overrides.json").write_text(QUIET)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    own = {"JUPYTER_CONFIG_DIR": config.parent, "JUPYTER_DATA_DIR": root / "jupyter" / "data",
           "JUPYTER_RUNTIME_DIR": root / "jupyter" / "runtime",
           "JUPYTERLAB_SETTINGS_DIR": root / "jupyter" / "settings",
           "JUPYTERLAB_WORKSPACES_DIR": root / "jupyter" / "workspaces",
           "IPYTHONDIR": root / "ipython", "JUPYTER_TOKEN": token,
           "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    log = root / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *SERVER, f"--ServerApp.port={port}",
                                    f"--ServerApp.root_dir={root}"],
                                   cwd=root, env=os.environ | {name: str(value) for name, value in own.items()},
                                   stdout=out, stderr=out)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not answers(f"{address}/api?token={token}"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield address, token, root
    finally:
        process.terminate()
        process.wait(20)


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


@pytest.fixture
def lab(server, browse):
    """A JupyterLab page that nobody used before; its kernels end with the test."""
    lab = Lab(browse(), *server)
    yield lab
    lab.shut_down()
