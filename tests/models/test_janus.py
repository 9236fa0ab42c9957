"""Janus alone: its two ways in and out, its guidance, and what its config.json leaves unsaid."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from tiny_emu3 import Letters
from tiny_more import JANUS_IDS, N, inner, load, make_rows, pictures_of, save_stock, stock_model
from transformers import JanusConfig, JanusForConditionalGeneration

from unimod.batch import pack
from unimod.generate import draw
from unimod.losses import losses
from unimod.models import janus
from unimod.models.checkpoint import inspect, save_pretrained
from unimod.models.weights import CheckpointError

NOTHING = torch.zeros(0, dtype=torch.long)


def janus_in_memory(stock):
    """The same weights in our model, without a file."""
    config = {**stock.config.to_dict(), **{f"{name}_token_id": i for name, i in JANUS_IDS.items()}}
    return janus.Janus(copy.deepcopy(stock), janus.FAMILY.layout({**config, "text_budget": 60}, Letters())).eval()


@torch.no_grad()
def test_janus_generation_rows_equal_its_parts_run_by_hand():
    stock = stock_model("janus")
    model = janus_in_memory(stock)
    rows = make_rows(model, pictures_of("janus", stock))[:2]
    ids = rows[0].ids
    start = int((ids >= N + 5).nonzero()[0])
    assert start == len(ids) - 9 and (ids[start:] >= N + 5).all()
    h = torch.cat(
        [inner(stock).embed_tokens(ids[:start]), stock.prepare_embeddings_for_image_generation(ids[start:] - N - 5)]
    )[None]
    theirs = stock.model.generation_head(inner(stock)(inputs_embeds=h).last_hidden_state)[0]
    both = model(pack(rows))
    torch.testing.assert_close(model.code_logits(both[: len(ids)]), theirs, atol=2e-5, rtol=0)
    expected = torch.nn.functional.cross_entropy(theirs[start - 1:-1], ids[start:] - N - 5)
    torch.testing.assert_close(losses(model, pack(rows[:1])).total, expected)


@torch.no_grad()
def test_janus_draws_what_transformers_draws():
    """Its unguided branch is the prompt with pads in place of all text, which is written here."""
    class Padded(janus.JanusLayout):
        def t2i(self, caption, codes, *, prompt=False):
            row = super().t2i(caption or "a red circle", codes, prompt=prompt)
            keep = torch.isin(row.ids, torch.tensor([self.bos, self.boi])) | (row.ids > self.boi)
            return row if caption else replace(row, ids=row.ids.where(keep, 1))

    stock = stock_model("janus")
    model = janus_in_memory(stock)
    model.layout.__class__ = Padded
    prompt = model.layout.t2i("a red circle", NOTHING, prompt=True).ids[None]
    stock.generation_config.pad_token_id, stock.generation_config.generation_kwargs = 1, {"boi_token_id": N + 2}
    stock.generation_config.bos_token_id = N
    for w in (0.5, 4.0):
        try:
            theirs = stock.generate(prompt, attention_mask=torch.ones_like(prompt), generation_mode="image",
                                    do_sample=False, guidance_scale=1 + w)
        except TypeError as error:  # 5.17 calls a method of its own with an argument too few
            if "prefill_chunk_size" not in str(error):
                raise
            pytest.skip(f"Janus of transformers {transformers.__version__} cannot draw by itself: {error}")
        assert torch.equal(draw(model, ["a red circle"], guidance=w, top_k=1), theirs)


@torch.no_grad()
def test_janus_head_is_never_tied_to_its_embedding(tmp_path):
    stock = stock_model("janus")
    save_stock(stock, tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    del config["tie_word_embeddings"]                       # as released; transformers' own default is to tie
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    assert JanusConfig(**config).tie_word_embeddings
    model = load(tmp_path / "hub")
    assert torch.equal(model.head.weight, stock.lm_head.weight)
    assert torch.equal(model.decoder.embed_tokens.weight, inner(stock).embed_tokens.weight)
    assert inspect(tmp_path / "hub").parameters == sum(p.numel() for p in stock.parameters())
    save_pretrained(tmp_path / "again", model)
    assert torch.equal(
        JanusForConditionalGeneration.from_pretrained(tmp_path / "again").lm_head.weight, stock.lm_head.weight
    )
    save_stock(stock_model("janus", tie_word_embeddings=True), tmp_path / "tied")
    with pytest.raises(CheckpointError, match="1 missing .*lm_head.weight"):
        load(tmp_path / "tied")


def test_the_released_vocabulary_of_janus():
    config = JanusConfig(
        text_config={"model_type": "llama", "vocab_size": 102400, "bos_token_id": 100000, "eos_token_id": 100001}
    ).to_dict()
    layout = janus.FAMILY.layout(config, Letters())
    assert layout.special == janus.RELEASED and layout.image_offset == 102400 and layout.codebook_size == 16384
    assert layout.grid == (24, 24)
