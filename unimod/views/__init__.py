"""Figures: every function takes data (a frame, a record, tensors) and returns one plotly figure.

How to add a figure: write a function into the file of its subject, with `facets` for lines, bars and marks or
`heat_maps` for maps; both give it the shared colours, axes and panels. `require` names the columns that a frame lacks.

    import plotly.express as px
    from unimod.views.style import facets, frame, require

    def entropy_by_layer(data):
        '''Entropy over depth, mean and spread over heads, a panel per model. data: `Patterns.table`.'''
        data = require(data, "model", "task", "layer", "entropy")
        shown = data.groupby(["model", "task", "layer"], sort=False)["entropy"].agg(["mean", "std"]).reset_index()
        return facets(px.line, shown, "layer", "mean", panel="model", color="task", sd="std", markers=True,
                      title="Entropy of attention", labels={"mean": "entropy (nats)"})

In a notebook: run.figure(entropy_by_layer(frame(stats)), "entropy", caption="What to see.", alt="What is drawn."). In
tests/views/test_views.py: a line in VIEWS, which checks that it draws, its size and its style.
"""
