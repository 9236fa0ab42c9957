"""LoRA (peft) on routed models: in both orders, trained by `train`, taken out and merged."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from unimod.baselines import PRESETS
from unimod.config import RouterConfig
from unimod.data import open_data
from unimod.data.batches import Batches
from unimod.flops import count
from unimod.layers import apply_mod, remove_mod
from unimod.models.checkpoint import from_pretrained, shipped
from unimod.plan import last_half
from unimod.train import TrainConfig, train

PLAN = last_half(8)
LORA = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj"])


class Same(Batches):
    """One batch again and again."""

    def train(self, step):
        return super().train(0)


def routed(model, config=None):
    torch.manual_seed(0)
    return apply_mod(model, PLAN, config or RouterConfig())


def lora_first(model, config=None):
    torch.manual_seed(1)
    inject_adapter_in_model(LORA, model.lm)
    return routed(model, config)


def lora_last(model, config=None):
    routed(model, config)
    torch.manual_seed(1)
    inject_adapter_in_model(LORA, model.lm)
    for name, p in model.named_parameters():                # peft freezes all that it finds
        if ".router." in name:
            p.requires_grad_(True)
    return model


def moved(model, seed=2):
    """The model with LoRA weights that do something."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    return model


@torch.no_grad()
def logits(model, packed):
    return model.text_logits(model(packed)[packed.labelled])


@pytest.fixture(params=["showo-tiny", "emu3-tiny"])
def fresh(request):
    """Makes copies of a shipped model in eval mode; `batches` of it."""
    def make():
        return from_pretrained(shipped(request.param))[0].eval()
    make.batches = Same(open_data("scenes"), from_pretrained(shipped(request.param))[1], make().layout, (2, 2, 1))
    return make


@pytest.fixture
def packed(fresh):
    return fresh.batches.train(0)


@pytest.mark.parametrize("order", [lora_first, lora_last])
def test_new_lora_changes_no_bit_and_both_orders_are_one_model(fresh, packed, order):
    plain, model = routed(fresh()), order(fresh())
    assert torch.equal(logits(model, packed), logits(plain, packed))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains and trains == {n for n in model.state_dict() if (".lora_" in n or ".router." in n)
                                 and not n.endswith("threshold")}
    with_lora, without, dense = count(model, packed), count(plain, packed), count(fresh(), packed)
    assert without.stack < with_lora.stack < 1.2 * without.stack and with_lora.stack < dense.stack
    assert torch.equal(logits(moved(model), packed), logits(moved(lora_first(fresh())), packed))
    assert not torch.equal(logits(model, packed), logits(plain, packed))


@pytest.mark.parametrize("config", [RouterConfig(), PRESETS["gamma-mod"]], ids=["unimod", "gamma-mod"])
@pytest.mark.parametrize("order", [lora_first, lora_last])
def test_only_lora_and_routers_train(fresh, packed, order, config):
    model = order(fresh(), config)
    before = {n: p.clone() for n, p in model.named_parameters()}
    records = train(model, fresh.batches, TrainConfig(steps=8, lr=3e-3))
    assert records[-1]["loss"] < 0.8 * records[0]["loss"] and all(r["flops"] < r["dense_flops"] for r in records)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert all(".lora_" in n or ".router." in n for n in changed)
    assert any(".router." in n for n in changed) and {n for n in before if ".lora_B." in n} <= changed


@pytest.mark.parametrize("order", [lora_first, lora_last])
def test_without_routers_it_is_the_dense_model_with_lora(fresh, packed, order):
    model = order(fresh())
    train(model, fresh.batches, TrainConfig(steps=2, lr=3e-3))
    trained = {n: w for n, w in model.state_dict().items() if ".router." not in n}
    dense = fresh()
    inject_adapter_in_model(LORA, dense.lm)
    dense.load_state_dict(trained)
    routed_logits = logits(model, packed)
    assert torch.equal(logits(remove_mod(model), packed), logits(dense, packed))
    assert not torch.equal(routed_logits,
                           logits(dense, packed)) and model.state_dict().keys() == dense.state_dict().keys()


@pytest.mark.parametrize("first", [True, False], ids=["lora-first", "lora-last"])
def test_a_peft_model_is_a_handle_on_the_same_layers(fresh, packed, first):
    plain = routed(fresh())
    model = fresh() if first else routed(fresh())
    handle = get_peft_model(model.lm, LORA)
    if first:
        routed(model)
    moved(model)
    adapted = logits(model, packed)
    assert not torch.equal(adapted, logits(plain, packed))
    with handle.disable_adapter():
        assert torch.equal(logits(model, packed), logits(plain, packed))
    assert handle.merge_and_unload() is model.lm
    torch.testing.assert_close(logits(model, packed), adapted, rtol=1e-3, atol=1e-3)
    assert model.state_dict().keys() == plain.state_dict().keys(), "merged, it saves like any routed model"


def test_unloading_gives_the_frozen_model_back(fresh, packed):
    model = fresh()
    handle = get_peft_model(model.lm, LORA)
    routed(model)
    train(model, fresh.batches, TrainConfig(steps=2, lr=3e-3))
    handle.unload()
    assert torch.equal(logits(remove_mod(model), packed), logits(fresh(), packed))
