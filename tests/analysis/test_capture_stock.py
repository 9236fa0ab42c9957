"""Any transformers model: its own outputs bit for bit, and the maps of its own eager attention."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)

from unimod.batch import Modality, Task
from unimod.capture import CaptureError, capture_stock

SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "grouped heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)),
    "learned positions": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "bidirectional": lambda: BertModel(BertConfig(**SIZES)),
}
IDS = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(0))
PADS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [1] * 7 + [0, 0]])


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_bit_equal_and_maps_are_the_eager_ones(name, padded):
    torch.manual_seed(0)
    model, mask = MODELS[name]().eval(), PADS if padded else torch.ones_like(IDS)
    with torch.no_grad():
        plain = model(IDS, attention_mask=mask)[0]
        with capture_stock(model) as record:
            captured = model(input_ids=IDS, attention_mask=mask)[0]
        assert torch.equal(plain, captured) and torch.equal(plain, model(IDS, attention_mask=mask)[0])
        model.set_attn_implementation("eager")
        dense = model(IDS, attention_mask=mask, output_attentions=True).attentions
    assert record.layers == (0, 1) and record.whole.lengths == tuple(mask.sum(1).tolist())
    assert set(record.whole.tasks) == {Task.LM}
    for layer, maps in enumerate(dense):
        for row, (a, real) in enumerate(zip(maps, mask.bool())):
            torch.testing.assert_close(record.map(row, layer), a[:, real][:, :, real], atol=1e-5, rtol=1e-4)


def test_what_the_model_does_on_another_thread_is_not_recorded():
    model = MODELS["grouped heads"]().eval()
    with torch.no_grad(), capture_stock(model) as record, ThreadPoolExecutor(1) as other:
        model(input_ids=IDS)
        other.submit(model.generate, IDS[:1, :4], max_new_tokens=2).result()
    assert record.whole.lengths == (9, 9, 9)


def test_image_tokens_of_a_vision_language_model_have_that_modality():
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
             "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model", "projection_dim": 16}
    config = LlavaConfig(vision_config=tower, text_config={**SIZES, "model_type": "llama"}, image_token_index=99)
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 99, 99, 99, 99, 7, 8]])
    with torch.no_grad(), capture_stock(model) as record:
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16))
    assert record.layers == (0, 1) and record.whole.tasks == (Task.MMU,)
    assert (record.whole.modality == Modality.IMAGE).tolist() == [False, True, True, True, True, False, False]
    model.model.vision_tower.set_attn_implementation("eager")
    with torch.no_grad(), capture_stock(model):
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16))
        assert model.config.vision_config._attn_implementation == "eager"
    assert (model.config._attn_implementation, model.config.vision_config._attn_implementation) == ("sdpa", "eager")


def test_two_models_in_one_block_and_nothing_is_held_after_it():
    one, other = MODELS["grouped heads"]().eval(), MODELS["learned positions"]().eval()
    with torch.no_grad(), capture_stock(one) as a, capture_stock(other) as b:
        one(IDS)
        other(IDS[:1])
        with pytest.raises(CaptureError, match="is being recorded already"), capture_stock(one):
            pass
    assert a.whole.lengths == (9, 9, 9) and b.whole.lengths == (9,) and a.about["model"] == "llama"
    held = weakref.ref(a.layer(1).q)
    del a
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("lowest", (torch.finfo(torch.float16).min, -1e4, -torch.inf))
def test_masks_of_numbers_hide_and_add_nothing(lowest):
    model = MODELS["grouped heads"]().eval()
    mask = torch.zeros(3, 1, 9, 9).masked_fill(~torch.ones(9, 9).tril().bool(), lowest)
    with torch.no_grad():
        with capture_stock(model) as record:
            model(IDS, attention_mask=mask)
        with capture_stock(model) as want:
            model(IDS)
        for row in range(3):
            torch.testing.assert_close(record.map(row, 1), want.map(row, 1))
        with pytest.raises(CaptureError, match="adds numbers to the logits"), capture_stock(model):
            model(IDS, attention_mask=mask - torch.arange(9.0) / 2)


def test_what_cannot_be_recorded_is_refused_with_the_reason():
    both = BartForConditionalGeneration(BartConfig(
        vocab_size=100, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16))
    with pytest.raises(CaptureError, match="has an encoder beside its decoder"), capture_stock(both):
        pass
    model = MODELS["grouped heads"]().eval()
    with pytest.raises(CaptureError, match="No layer of this LlamaForCausalLM attended"), capture_stock(model):
        pass
    with torch.no_grad(), pytest.raises(CaptureError, match="1 queries for 10 keys"), capture_stock(model):
        cache = model(IDS, use_cache=True).past_key_values
        model(IDS[:, :1], past_key_values=cache)
    holes = torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()
    holes[:, :, 5:, 2] = False
    with torch.no_grad(), pytest.raises(CaptureError, match="do not lie side by side"), capture_stock(model):
        model(IDS, attention_mask=holes)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    message = "has 'eager'. Load it with attn_implementation='sdpa'"
    with pytest.raises(CaptureError, match=message), capture_stock(model):
        pass
