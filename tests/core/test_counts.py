"""What routing adds in operations and uploads at released sizes, and how many sizes recorded steps have: the bounds."""

import json
from types import SimpleNamespace

import pytest
import torch

from unimod import router
from unimod.__main__ import main
from unimod.bench import counts
from unimod.bench.counts import Counter
from unimod.ops.backend import launch

BOUNDS = {"showo": {"device_ops": 12, "dispatches": 40}, "emu3": {"device_ops": 10, "dispatches": 35}}


@pytest.mark.timeout(600)
def test_counts_of_released_sizes_are_within_their_bounds(capsys):
    assert main(["bench", "counts", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["preset"] for row in rows] == ["showo-256", "showo-512", "emu3-4k", "emu3-8k"]
    for row in rows:
        for key, bound in BOUNDS[row["preset"].split("-")[0]].items():
            assert row[key] <= bound, (row["preset"], key, row[key])
        assert row["host_ops"] == row["uploads"] == 0 and row["uploads_per_step"] <= 2
        assert 0 < row["signatures"] <= 6 and row["filler"] < 0.1 and row["decode_ops"] <= 30
        assert row["routed"] > 0, "compared with itself, nothing would be added"


def test_every_kind_of_operation_is_counted_as_what_it_is():
    x, weight = torch.empty(4, 4, device="meta"), torch.empty(4, 4, device="meta", requires_grad=True)
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="some_kernel"))
    with Counter() as counter:
        y = x + 1                                           # one operation
        y.view(2, 8)[0].unsqueeze(0)                        # views
        torch.empty_like(x)                                 # an allocation
        torch.zeros(3, device="meta")                       # memory that is written
        torch.ones(3).to("meta")                            # the host's own, and a copy
        launch(kernel, (1,), x)
        (y @ weight).sum().backward()                       # and what its backward does
    assert counter.device_ops["add"] == 1 and counter.device_ops["some_kernel"] == 1
    assert counter.device_ops["mm"] == 2 and not {"view", "unsqueeze", "empty_like"} & set(counter.device_ops)
    assert counter.uploads == 1 and counter.host_ops == 1
    assert counter.dispatches > counter.device_ops.total()


def test_a_layer_that_uploads_is_seen(monkeypatch):
    """The bounds can fail: a router that asks the host in every layer."""
    monkeypatch.setattr(counts, "BATCHES", 2)
    kept = router.TaskRouter.forward

    def slow(self, h, *args):
        torch.ones(8).to(h.device)
        return kept(self, h, *args)

    monkeypatch.setattr(router.TaskRouter, "forward", slow)
    with counts.use_backend(), counts.meta_as("cuda"):
        row = counts._row("showo-256", counts.SIZES["showo-256"][0])
    assert row["uploads"] == row["host_ops"] == 1 and row["uploads_per_step"] == 2 + row["routed"]


def test_counts_are_of_four_sizes_and_no_others(capsys):
    assert main(["bench", "counts", "--preset", "cpu"]) == 2
    assert "--preset cpu: counts are always of showo-256, showo-512, emu3-4k, emu3-8k" in capsys.readouterr().err
