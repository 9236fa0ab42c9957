"""The packed path against transformers' own forward, and the real sizes on the meta device."""

import pytest
import torch
from transformers import Emu3ForCausalLM, PhiForCausalLM

from unimod.batch import Task, pack
from unimod.losses import losses
from unimod.models.emu3 import emu3_config
from unimod.models.showo import showo_config
from unimod.seam import ATTENTION


def stock_logits(model, row):
    """transformers' eager forward on one row, with a dense additive mask and explicit positions: logits [n, V]."""
    n = len(row.ids)
    allow = torch.arange(n) < row.hi[:, None]
    mask = torch.zeros(1, 1, n, n).masked_fill(~allow, torch.finfo(torch.float32).min)
    model.lm.set_attn_implementation("eager")
    try:
        return model.lm(input_ids=row.ids[None], attention_mask=mask, position_ids=row.position[None]).logits[0]
    finally:
        model.lm.set_attn_implementation(ATTENTION)


@torch.no_grad()
def test_packed_logits_equal_the_stock_model_row_by_row(model, rows, packed):
    logits = model.head(model(packed))
    for row, where in zip(rows, packed.rows()):
        torch.testing.assert_close(logits[where], stock_logits(model, row), atol=2e-5, rtol=1e-4)


def test_gradients_equal_the_stock_model(model, rows, packed):
    loss = losses(model, packed).total
    ours = torch.autograd.grad(loss, model.lm.model.layers[0].self_attn.q_proj.weight)[0]
    total = 0.0
    for task, weight in ((Task.T2I, 1.0), (Task.MMU, 1.0), (Task.LM, 0.1)):
        pairs = [(stock_logits(model, r), r.target) for r in rows if r.task == task]
        logits, target = (torch.cat(x) for x in zip(*pairs))
        total = total + weight * torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(ours, torch.autograd.grad(total, model.lm.model.layers[0].self_attn.q_proj.weight)[0],
                               atol=1e-4, rtol=1e-3)


def test_a_task_without_targets_contributes_nothing(model, rows):
    only = losses(model, pack([r for r in rows if r.task == Task.T2I]))
    assert torch.isfinite(only.total) and only.per_task[Task.MMU].isnan() and only.targets[Task.MMU] == 0
    with pytest.raises(ValueError, match="No token of this batch has a target"):
        losses(model, pack([model.layout.mmu(torch.zeros(12, dtype=torch.long), [("a", "")], open_ended=True)]))


def test_unpacked_calls_of_the_registered_attention_are_refused(model):
    with pytest.raises(RuntimeError, match="works on packed tokens only"):
        model.lm(input_ids=torch.tensor([[1, 2, 3]]))


def test_real_sizes_have_the_published_parameter_counts():
    with torch.device("meta"):
        showo, emu = PhiForCausalLM(showo_config()), Emu3ForCausalLM(emu3_config())
    assert sum(p.numel() for p in showo.parameters()) == 1_448_176_770
    assert sum(p.numel() for p in showo.model.layers[0].parameters()) == 50_354_432
    assert len({k.replace(f".{i}.", ".N.") for k in showo.state_dict()
                for i in [next((int(p) for p in k.split(".") if p.isdigit()), -1)]}) == 23
    assert round(sum(p.numel() for p in emu.parameters()) / 1e9, 2) == 8.49
    assert round(sum(p.numel() for p in emu.model.layers[0].parameters()) / 1e6, 1) == 218.1
