"""Chameleon and Janus against transformers and in everything the package does with a model."""

import copy
import json

import pytest
import torch
from tiny_emu3 import LETTERS, Letters
from tiny_more import (
    CODES,
    KINDS,
    NAMED,
    ORDER,
    PLACEHOLDER,
    SIDE,
    N,
    inner,
    load,
    make_rows,
    padded,
    pictures_of,
    pixels,
    save_stock,
    stock_model,
)
from transformers import AutoModelForImageTextToText
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from unimod.batch import IGNORE, pack
from unimod.capture import capture_batch
from unimod.config import RouterConfig
from unimod.data.batches import Batches
from unimod.flops import count
from unimod.generate import answer, calibrate, draw
from unimod.layers import MoDLayer, apply_mod, record_routing, remove_mod
from unimod.losses import losses
from unimod.models import chameleon, janus
from unimod.models.checkpoint import inspect, save_pretrained
from unimod.models.weights import CheckpointError
from unimod.plan import CapacityPlan
from unimod.seam import ATTENTION

PLAN = CapacityPlan({"t2i": [1, .5, .6], "mmu": [.7, .5, 1]})


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def stock(kind):
    return stock_model(kind)


@pytest.fixture(scope="module")
def folder(stock, tmp_path_factory):
    return save_stock(stock, tmp_path_factory.mktemp("stock"))


@pytest.fixture
def model(folder):
    return load(folder)


@pytest.fixture
def rows(kind, stock, model):
    return make_rows(model, pictures_of(kind, stock))


# the forward


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_logits_equal_transformers_on_a_padded_batch(kind, stock, model, rows, side):
    if kind == "janus":
        rows = rows[2:]                                     # what is understood; generation is the next test
        batch, real = padded(rows, side, PLACEHOLDER["janus"])
        theirs = stock(**batch, pixel_values=pixels(kind)).logits[real]
        ours = model.head(model(pack(rows)))
    else:
        batch, real = padded(rows, side, -1)
        theirs, ours = stock(**batch).logits[real], model.head(model(pack(rows)))
        text = torch.ones(theirs.shape[1], dtype=torch.bool)
        text[model.layout.code_ids] = False                 # transformers takes picture codes out of the logits
        codes = stock.lm_head(stock.model(**batch).last_hidden_state[real])[:, [N + 7 + at for at in ORDER]]
        torch.testing.assert_close(model.code_logits(model(pack(rows))), codes, atol=2e-5, rtol=0)
        theirs, ours = theirs[:, text], ours[:, text]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert theirs.std() > 0.5, "the comparison says something"


@torch.no_grad()
def test_pixels_through_transformers_are_the_codes_and_features_of_a_row(kind, stock, model, rows):
    row = rows[2]
    picture = torch.isin(row.ids, model.layout.code_ids) | (row.ids < 0)
    assert picture.sum() == SIDE * SIDE
    ids = torch.where(picture, PLACEHOLDER[kind.split()[0]], row.ids)[None]
    theirs = stock(ids, pixel_values=pixels(kind)[:1]).logits[0]
    ours, seen = model.head(model(pack([row]))), theirs > torch.finfo(torch.float32).min
    torch.testing.assert_close(ours[seen], theirs[seen], atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_vision_parts_keep_their_own_attention(kind, stock, model):
    assert model.decoder.config._attn_implementation == ATTENTION
    if kind == "janus":
        assert (model.lm.model.vision_model.config._attn_implementation
                == stock.model.vision_model.config._attn_implementation == "sdpa")
        assert torch.equal(torch.stack(pictures_of(kind, model.lm)), torch.stack(pictures_of(kind, stock)))
        assert model.lm.model.vqmodel.decode(torch.zeros(1, 9, dtype=torch.long)).shape == (1, 3, 6, 6)
    else:
        assert all(torch.equal(a, b) for a, b in zip(pictures_of(kind, model.lm), pictures_of(kind, stock)))


@torch.no_grad()
def test_captured_maps_are_those_of_eager_attention(stock, model, rows):
    eager = copy.deepcopy(inner(stock))
    eager.set_attn_implementation("eager")
    before, record = model(pack(rows)), capture_batch(model, pack(rows))
    assert record.layers == (0, 1, 2) and record.heads == 4 and torch.equal(before, model(pack(rows)))
    for b, row in enumerate(rows):
        theirs = eager(inputs_embeds=model.embed(pack([row]))[None], output_attentions=True).attentions
        for layer in record.layers:
            torch.testing.assert_close(record.map(b, layer), theirs[layer][0], atol=1e-5, rtol=0)


# sequences


def written(layout, ids):
    names = {v: f"<{k}>" for k, v in layout.special.items()}
    return "".join(
        names.get(i) or (LETTERS[i] if 0 <= i < N else layout.token(i).replace("code ", "[") + "]" if i >= 0 else "*")
        for i in ids.tolist()
    )


def test_sequences(kind, stock, model):
    layout, codes = model.layout, torch.arange(9)
    drawn, picture = "".join(f"[{c}]" for c in range(9)), "*" * 9
    if kind == "janus":
        begin, ask, end = "<bos><|User|>: a dog\n\n<|Assistant|>:<boi>", "\nis it?\n\n<|Assistant|>:", ""
        head = f"<bos>{janus.SYSTEM}<|User|>: <boi>{picture}<eoi>"
        given = pictures_of(kind, stock)[0]
        assert janus.SYSTEM == DEFAULT_SYSTEM_PROMPT
    else:
        begin, ask, end, head, given = ("<bos>a dog<sep><boi>", "is it?<sep>", "<eoi><eos>", f"<bos><boi>{drawn}<eoi>",
                                        codes)
        assert layout.special == {"bos": N, "pad": N + 1, "eos": N + 2, "boi": N + 3, "eoi": N + 4, "sep": N + 5}
        assert isinstance(layout.codes_at, torch.Tensor)
    row = layout.t2i("a dog", codes)
    assert written(layout, row.ids) == f"{begin}{drawn}{end}"
    assert torch.equal(row.target[row.target != IGNORE], layout.code_ids[codes])
    assert written(layout, layout.t2i("a dog", codes[:2], prompt=True).ids) == f"{begin}[0][1]"
    row = layout.mmu(given, [("is it?", "yes")])
    assert written(layout, row.ids) == f"{head}{ask} yes<eos>"
    assert written(layout, row.target[row.target != IGNORE]) == " yes<eos>"
    assert written(layout, layout.mmu(given, [("is it?", "")], open_ended=True).ids) == f"{head}{ask}"
    assert written(layout, layout.lm("hm").ids) == "<bos>hm<eos>" and layout.stop == layout.eos


# generation


@torch.no_grad()
def test_drawing_equals_a_loop_without_cache(kind, stock, model):
    captions = ["a red circle", ""]
    drawn = draw(model, captions, guidance=0, top_k=1)
    assert drawn.shape == (2, 9) and len(drawn.unique()) > 2
    codes = torch.zeros(2, 0, dtype=torch.long)
    for _ in range(9):
        packed = pack([model.layout.t2i(text, c, prompt=True) for text, c in zip(captions, codes)])
        codes = torch.cat(
            [codes, model.code_logits(model(packed)[torch.tensor(packed.lengths).cumsum(0) - 1]).argmax(-1)[:, None]], 1
        )
    assert torch.equal(drawn, codes)
    sampled = draw(model, captions, seed=3, guidance=1.0, negative="no")
    assert torch.equal(sampled, draw(model, captions, seed=3, guidance=1.0, negative="no"))
    assert 0 <= int(sampled.min()) <= int(sampled.max()) < CODES


@torch.no_grad()
def test_answers_equal_transformers_generate_on_a_left_padded_batch(kind, stock, model):
    theirs = copy.deepcopy(stock)
    if kind != "janus":  # a picture code is never said, however likely: as transformers has it
        for head in (theirs.lm_head, model.head):
            head.weight[model.layout.code_ids] *= 50
    rows = [model.layout.mmu(p, [(q, "")], open_ended=True)
            for p, q in zip(pictures_of(kind, stock), ("what is it?", "red?"))]
    batch, _ = padded(rows, "left", PLACEHOLDER["janus"])
    more = {"pixel_values": pixels(kind)} if kind == "janus" else {}
    said = theirs.generate(batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False,
                           max_new_tokens=8, pad_token_id=1, eos_token_id=model.layout.stop, **more)
    said = [ids[len(batch["input_ids"][0]):] if len(ids) > 8 else ids for ids in said.tolist()]
    stop = model.layout.stop
    assert answer(model, rows, max_new=8) == [
        Letters().decode(ids[: ids.index(stop)] if stop in ids else ids) for ids in said
    ]


# routing, training, cost, files

def test_training_rows_are_written_and_lose_their_caption_now_and_then(model):
    codes = torch.arange(9).repeat(200, 1) % CODES
    rows = Batches(None, None, model.layout).t2i(["a"] * 200, codes, torch.Generator().manual_seed(0))
    empty = sum(torch.equal(row.ids, model.layout.t2i("", codes[0]).ids) for row in rows)
    assert 0.4 < empty / 200 / model.layout.drop_caption < 1.8



@torch.no_grad()
def test_routers_come_and_go_and_route_every_task(model, rows):
    batch = pack(rows)
    before, keys = model(batch), set(model.state_dict())
    apply_mod(model, PLAN, RouterConfig(std=0.5))
    with record_routing() as log:
        routed = model(batch)
    assert set(log) == {0, 1, 2} and all(len(r.index) < len(batch) for r in log.values())
    assert not torch.equal(routed, before)
    calibrate(model, batch)
    assert draw(model, ["a", ""], guidance=1.0).shape == (2, 9) and len(answer(model, [rows[3]], max_new=3)) == 1
    assert torch.equal(remove_mod(model)(batch), before) and set(model.state_dict()) == keys


@pytest.mark.parametrize("routed", [False, True])
def test_a_few_steps_lower_both_losses(model, rows, routed):
    if routed:
        apply_mod(model, PLAN)
    batch = pack(rows)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    seen = []
    for _ in range(8):
        loss = losses(model, batch)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.per_task)
    assert (seen[-1] < 0.8 * seen[0])[:2].all(), (seen[0], seen[-1])


def test_cost_is_counted(model, rows):
    batch = pack(rows)
    cost, layer = count(model, batch), model.layers[0]
    weights = sum(p.numel() for n, p in layer.named_parameters() if n.endswith("proj.weight"))
    assert cost.stack == cost.dense_stack == 3 * (2 * weights * len(batch) + 4 * 64 * sum(n * n for n in batch.lengths))
    assert 0.1 < count(apply_mod(model, PLAN), batch).saved < 0.6


@torch.no_grad()
def test_saved_models_load_bit_for_bit_here_and_in_transformers(stock, folder, model, rows, tmp_path):
    batch = pack(rows)
    found = inspect(folder)
    assert found.kind == model.layout.kind and found.loads and found.layers == 3 and found.width == 64
    assert found.codebook == CODES
    dense = model(batch)
    again = load(save_pretrained(tmp_path / "dense", model))
    assert torch.equal(again(batch), dense) and again.layout.special == model.layout.special
    assert again.layout.grid == (SIDE, SIDE)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense").eval()
    assert type(theirs) is type(stock) and theirs.config._attn_implementation == "sdpa"
    assert all(torch.equal(v, stock.state_dict()[k]) for k, v in theirs.state_dict().items())
    assert torch.equal(theirs(rows[-1].ids[None]).logits, stock(rows[-1].ids[None]).logits)
    routed = apply_mod(model, PLAN, RouterConfig(std=0.5))(batch)
    again = load(save_pretrained(tmp_path / "routed", model))
    assert torch.equal(again(batch), routed) and all(isinstance(layer, MoDLayer) for layer in again.layers)
    assert inspect(tmp_path / "routed").routed.startswith("3 of 3")


@torch.no_grad()
def test_every_part_gets_the_dtype_that_is_asked_for(stock, folder, rows, tmp_path):
    save_stock(copy.deepcopy(stock).bfloat16(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config", "vq_config"):
        if part in config:
            config[part]["dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    for where, dtype in ((folder, torch.bfloat16), (tmp_path, torch.float32), (tmp_path, None)):
        model = load(where, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
        assert torch.isfinite(losses(model, pack(rows)).total)


# what config.json may say


def test_chameleons_names_count_and_gaps_are_refused():
    config = {**stock_model("chameleon").config.to_dict()}
    assert config["bos_token_id"] == 1 and config["pad_token_id"] is None
    layout = chameleon.FAMILY.layout(config, Letters())
    assert layout.bos == NAMED["<s>"] and torch.equal(layout.code_ids, N + 7 + torch.tensor(ORDER))
    assert layout.token(N + 7 + ORDER[5]) == "code 5"
    words = config["vocabulary_map"]
    for wrong, message in ((None, "no 'vocabulary_map'"),
                           ({k: v for k, v in words.items() if k != "IMGIMGDZ"}, "23 picture codes"),
                           ({k: v for k, v in words.items() if "IMG" not in k}, "0 picture codes"),
                           ({k: v for k, v in words.items() if k != "<eoss>"}, "eoi")):
        with pytest.raises(CheckpointError, match=message):
            chameleon.FAMILY.layout({**config, "vocabulary_map": wrong}, Letters())
