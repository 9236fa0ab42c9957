"""Training steps replayed as CUDA graphs learn what steps kernel by kernel learn."""

import pytest
import torch

from unimod.baselines import PRESETS
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.graph import StaticStep
from unimod.layers import apply_mod
from unimod.models.checkpoint import from_pretrained, shipped
from unimod.models.unified import compile_layers
from unimod.plan import last_half
from unimod.train import Objective, TrainConfig, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STEPS = 12


def built(name, router):
    model, tokenizer = from_pretrained(shipped(name), device="cuda")
    if router != "dense":
        torch.manual_seed(0)
        apply_mod(model, last_half(8), PRESETS[router])
    return model, Batches(open_data("scenes"), tokenizer, model.layout, (8, 8, 1))


@pytest.mark.parametrize("router, accumulate", [("dense", 1), ("unimod", 1), ("unimod", 2), ("gamma-mod", 1),
                                                ("p-mod", 1), ("a-mod", 1), ("early-exit", 1)])
@pytest.mark.parametrize("name", ["showo-tiny", "emu3-tiny"])
def test_replayed_training_is_training(name, router, accumulate):
    curves = []
    for graph in (False, True):
        model, batches = built(name, router)
        config = TrainConfig(steps=STEPS, device="cuda", graph=graph, accumulate=accumulate)
        curves.append([[r["loss"], r["grad_norm"]] for r in train(model, batches, config)])
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_are_recorded_and_replayed(compiled, capsys):
    """Not only equal: there are graphs, one per signature that came twice, and nothing is said about a fallback."""
    model, batches = built("showo-tiny", "unimod")
    if compiled:
        compile_layers(model)
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "peak": 1e-4}], lr=1e-4, fused=True, capturable=True)
    step = StaticStep(Objective(model).train(), optimizer, 1.0)
    found = [step([batches.train(i)], 1.0)[0].clone() for i in range(STEPS)]
    assert step.records and step._graphs and len(step._graphs) <= len(step._memory) <= 6
    assert all(x[0].isfinite() for x in found) and found[-1][0] < found[0][0] * 1.5
    assert "kernel at a time" not in "".join(capsys.readouterr())
