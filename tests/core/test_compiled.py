"""Layers compiled one by one: the same numbers, and nothing is compiled anew when lengths change."""

import copy

import pytest
import torch
from tiny_rows import make_rows
from torch._dynamo.testing import CompileCounter

from unimod.baselines import PRESETS
from unimod.batch import pack
from unimod.config import RouterConfig
from unimod.generate import answer
from unimod.graph import filled
from unimod.layers import apply_mod, remove_mod
from unimod.losses import losses
from unimod.models.unified import compile_layers
from unimod.plan import last_half

ROWS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Whether batches may differ in their number of rows: older compilers look at all that a batch is made of, and begin
anew with each number of segments."""


def batches(layout, count=5):
    """Other lengths each time, and other numbers of rows."""
    return [pack([*make_rows(layout, seed)[slice(seed % 3, 4 + seed) if ROWS else slice(4)],
                  layout.lm("a red " * (seed + 1))]) for seed in range(count)]


@pytest.mark.parametrize("name", ["dense", "unimod", "p-mod"])
def test_other_lengths_compile_nothing_anew(model, name):
    if name != "dense":
        apply_mod(model, last_half(8), PRESETS[name])
    torch.compiler.reset()
    built = []

    def backend(graph, example):
        built.append(graph)
        return graph.forward
    plain = copy.deepcopy(model)
    compile_layers(model, backend=backend)
    counts = []
    with torch.no_grad():
        for packed in batches(model.layout):
            torch.testing.assert_close(model(packed), plain(packed))
            counts.append(len(built))
    # one frame for all layers and batches: a view where other layers get none, an attribute that some lack, or a length
    # that is no symbol would each make another
    assert counts[0] == 1 and counts[-1] <= 2, counts       # and one for rows of equal length, which are not padded
    row = model.layout.mmu(torch.arange(12), [("is there a circle", "")], open_ended=True)
    assert answer(model, [row, row], 3) == answer(plain, [row, row], 3)


@pytest.mark.parametrize("name", ["dense", "unimod", "early-exit"])
def test_a_layer_is_one_graph(name, model, packed):
    """With its attention, forward and backward, on memory that stays where it is, too."""
    if name != "dense":
        apply_mod(model, last_half(8), PRESETS[name])
    torch.compiler.reset()
    counter = CompileCounter()
    compile_layers(model.train(), backend=counter, fullgraph=True)
    losses(model, packed).total.backward()
    new, plan, _ = filled(model, packed)
    losses(model, new, plan).total.backward()
    assert counter.frame_count == 1


def test_gradients_are_those_of_the_eager_model_and_remove_mod_still_works(model, packed):
    plain = copy.deepcopy(apply_mod(model, last_half(8), RouterConfig(std=0.5)).train())
    torch.compiler.reset()
    compile_layers(model, backend="aot_eager")
    found = []
    for m in (model, plain):
        losses(m, packed).total.backward()
        found.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1])
    with torch.no_grad():
        torch.testing.assert_close(remove_mod(model)(packed), remove_mod(plain)(packed))
