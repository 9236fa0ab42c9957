"""A reader opens a notebook in JupyterLab and runs it: all is drawn, nothing complains, in light and in dark."""


PLOTLY = "application/vnd.plotly.v1+json"


def test_a_notebook_runs_and_its_figures_are_drawn(lab, shoot):
    lab.open("00_start_here", models=["showo-tiny"])
    lab.run_all()
    said = "".join(out["text"] for out in lab.outputs("stream") if out["name"] == "stderr")
    assert not said, said                       # which backends run is said as ordinary output; no library warns
    assert len(lab.figures()) == len(lab.outputs(PLOTLY)) > 0
    for dark in (False, True):
        lab.theme(dark)
        assert lab.figures()                    # each drawn, or it raises
        lab.whole(shoot, f"lab-00-{'dark' if dark else 'light'}")
