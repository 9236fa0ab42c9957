"""Make `explorer.png`, the picture of the README: `python notebooks/pictures/explorer.py`.

The figures are the explorer's own (`unimod.views.panels`), of the shipped Show-o-tiny: one picture in text-to-image and
in understanding, and understanding again with untrained routers in the last half of the layers. Needs playwright and
chromium.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image

from unimod import RouterConfig, apply_mod, make_plan
from unimod.batch import Task
from unimod.experiment import load
from unimod.gallery import Gallery
from unimod.params import Params
from unimod.views.panels import Selection, heads, picture, text

LAYER, SAMPLE = 4, 2
CELLS = (("tasks", picture, 590), ("routed", picture, 590), ("tasks", heads, 400), ("tasks", text, 400))
"""Sides, figure and height, in reading order, two in a line."""


def figures():
    """Each cell of the picture as HTML."""
    torch.manual_seed(0)                                    # of the untrained routers
    params = Params(models=["showo-tiny"])
    routed = load(params, "showo-tiny").model
    apply_mod(routed, make_plan("last_half", layers=len(routed.layers), saving=0.3), RouterConfig())
    gallery = Gallery({"showo-tiny": load(params, "showo-tiny")}, also={"showo-tiny, routed": routed})
    sides = {"tasks": [gallery.side("showo-tiny", task, SAMPLE) for task in (Task.T2I, Task.MMU)],
             "routed": [gallery.side(name, Task.MMU, SAMPLE) for name in ("showo-tiny", "showo-tiny, routed")]}
    for name, view, height in CELLS:
        fig = view.figure(sides[name], Selection(LAYER))
        fig.update_layout(width=760, height=height, paper_bgcolor="white")
        yield fig.to_html(full_html=False, include_plotlyjs=False, config={"staticPlot": True})


def main():
    """Draw all cells on one page, take its screenshot and write it with few colours."""
    from playwright.sync_api import sync_playwright
    from plotly.offline import get_plotlyjs

    out = Path(__file__).with_suffix(".png")
    cells = "".join(f"<div>{cell}</div>" for cell in figures())
    style = "body{margin:0;background:white}#all{display:grid;grid-template-columns:auto auto;width:max-content}"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "page.html"
        head = f"<meta charset=utf-8><style>{style}</style><script>{get_plotlyjs()}</script>"
        page.write_text(f"{head}<div id=all>{cells}</div>", encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                                             args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1540, "height": 1000})
        tab.goto(page.as_uri())
        tab.wait_for_timeout(1500)                          # plotly draws after the page has loaded
        tab.locator("#all").screenshot(path=out)
        browser.close()
    Image.open(out).convert("RGB").quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    main()
