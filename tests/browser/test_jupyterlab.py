"""A reader opens a notebook in JupyterLab and runs it: everything is drawn, nothing complains, nobody is asked, in light and in dark."""

import pytest
from plots import drawn

PLOTLY = "application/vnd.plotly.v1+json"


@pytest.mark.parametrize("name", ["00_start_here", "01_attention_patterns"])
def test_a_notebook_runs_and_its_figures_are_drawn(lab, shoot, name):
    lab.open(name, models=["showo-tiny"], **({"samples": 2} if name != "00_start_here" else {}))
    lab.run_all()
    said = "".join(out["text"] for out in lab.outputs("stream") if out["name"] == "stderr")
    assert all(line.startswith("unimod: ") for line in said.splitlines()), said  # which backends run, said once; no library's warning
    assert len(lab.figures()) == len(lab.outputs(PLOTLY)) > 0
    for dark in (False, True):
        lab.theme(dark)
        assert all(drawn(plot) for plot in lab.figures())
        lab.whole(shoot, f"lab-{name[:2]}-{'dark' if dark else 'light'}")
