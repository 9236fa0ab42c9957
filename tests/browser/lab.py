"""JupyterLab as a reader uses it: open a notebook, run it, look at it in light and dark, use its widgets."""

import json
import re
import urllib.request

from plots import drawn, wait_until

CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === "code").map(c => ({
  source: c.model.sharedModel.source, count: c.model.executionCount, state: c.model.executionState,
  outputs: c.model.outputs ? c.model.outputs.toJSON() : [] }))"""
READY = """() => window.jupyterapp?.shell.currentWidget?.context?.isReady
  && jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === "idle" """
STATUS = "() => jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status"


class Lab:
    """One JupyterLab page."""

    def __init__(self, page, address, token, root):
        self.page, self.address, self.token, self.root = page, address, token, root

    def open(self, name, **parameters):
        """Open a fresh copy of notebooks/<name>.ipynb with these values as parameters, and wait for its kernel."""
        path = self.root / "notebooks" / f"{name}.ipynb"
        book = json.loads(path.read_text(encoding="utf-8"))
        cell = next(cell for cell in book["cells"] if "parameters" in cell["metadata"].get("tags", []))
        for key, value in parameters.items():
            source, found = re.subn(rf"^({key}: .*?) = .*?(  #.*)?$", lambda m, v=value: f"{m[1]} = {v!r}{m[2] or ''}",
                                    "".join(cell["source"]), flags=re.M)
            assert found == 1, f"{name} has no parameter {key}"
            cell["source"] = source.splitlines(keepends=True)
        path.write_text(json.dumps(book), encoding="utf-8")
        self.page.goto(f"{self.address}/lab/tree/notebooks/{name}.ipynb?reset&token={self.token}")
        self.page.wait_for_function(READY, timeout=60_000)
        self.page.locator("#jupyterlab-splash").wait_for(state="detached")

    def run_all(self, seconds=300):
        """Run > Run All Cells, and wait for the last. Raises AssertionError with the traceback of a cell that fails."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        wait_until(self.page, self._finished, "all cells have run and the kernel is idle", seconds, every=200)

    def _finished(self):
        cells = self.page.evaluate(CELLS)
        failed = [(cell["source"], "\n".join(out["traceback"])) for cell in cells for out in cell["outputs"]
                  if out["output_type"] == "error"]
        assert not failed, "\n".join(failed[0])
        return all(cell["count"] and cell["state"] != "running"
                   for cell in cells) and self.page.evaluate(STATUS) == "idle"

    def outputs(self, kind):
        """All outputs of one MIME type, or of one kind such as "stream", in order."""
        outs = [out for cell in self.page.evaluate(CELLS) for out in cell["outputs"]]
        return [out for out in outs if kind in out.get("data", ()) or kind == out["output_type"]]

    def figures(self):
        """The notebook's plotly figures as locators, each scrolled to and drawn."""
        self.page.mouse.move(5, 5)  # out of menus
        plots = self.page.locator(".jp-Notebook .js-plotly-plot").all()
        for plot in plots:
            plot.scroll_into_view_if_needed()
            wait_until(self.page, lambda plot=plot: drawn(plot), "the figure is drawn")
        return plots

    def theme(self, dark):
        """Settings > Theme."""
        self.page.evaluate("name => jupyterapp.commands.execute('apputils:change-theme', { theme: name })",
                           f"JupyterLab {'Dark' if dark else 'Light'}")
        self.page.locator(f"body[data-jp-theme-light={'false' if dark else 'true'}]").wait_for(state="attached")

    def whole(self, shoot, name):
        """A picture of the whole notebook: the window is made as high as the notebook for it."""
        size, outer = self.page.viewport_size, self.page.locator(".jp-WindowedPanel-outer")
        self.page.set_viewport_size(size | {"height": outer.evaluate("outer => outer.scrollHeight") + 150})
        self.page.wait_for_timeout(500)  # cells and figures settle
        outer.evaluate("outer => outer.scrollTo(0, 0)")
        self.page.wait_for_timeout(500)
        shoot(self.page, name)
        self.page.set_viewport_size(size)

    def shut_down(self):
        """End this server's kernels."""
        for kernel in json.load(self._ask("GET", "kernels")):
            self._ask("DELETE", f"kernels/{kernel['id']}").close()

    def _ask(self, method, path):
        return urllib.request.urlopen(urllib.request.Request(f"{self.address}/api/{path}", method=method,
                                                             headers={"Authorization": f"token {self.token}"}))
