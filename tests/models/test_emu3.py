"""Emu3 against transformers: files, packed forward, sequences, and generation with a cache."""

import json

import pytest
import torch
from tiny_emu3 import CODES, OFFSET, SHORT, SPECIAL, Letters, as_baai, as_baai_vision, as_split, stock_emu3, written
from transformers import Emu3ForCausalLM

from unimod.batch import IGNORE, pack
from unimod.config import RouterConfig
from unimod.generate import answer, calibrate, draw
from unimod.layers import apply_mod, record_routing
from unimod.losses import losses
from unimod.models import emu3
from unimod.models.checkpoint import from_pretrained, inspect, save_pretrained
from unimod.models.emu3_vq import Emu3VQConfig
from unimod.models.image_tokenizer import load_image_tokenizer
from unimod.models.weights import CheckpointError
from unimod.plan import CapacityPlan

GRID = (3, 4)
CAPTIONS = ["a red circle", "two", ""]


@pytest.fixture(scope="module")
def stock():
    return stock_emu3()


@pytest.fixture(scope="module")
def folder(stock, tmp_path_factory):
    folder = tmp_path_factory.mktemp("current")
    stock.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    model, _ = from_pretrained(folder, text=Letters(), text_budget=42)
    model.layout = model.layout.resized(GRID)
    return model


def make_rows(layout):
    g = torch.Generator().manual_seed(1)
    codes = [torch.randint(CODES, shape, generator=g) for shape in ((3, 4), (2, 5), (4, 2), (3, 4), (3, 3))]
    return [layout.t2i("a red circle", codes[0]), layout.t2i("", codes[1]),
            layout.mmu(codes[2], [("is it?", "yes"), ("red?", "no")]),
            layout.mmu(codes[3], [("what", "")], open_ended=True), layout.t2i("x" * 30, codes[4]),
            layout.lm("plain text")]


def padded(rows, side):
    """What transformers takes: ids, mask and positions of a padded batch, and where the real tokens are."""
    longest = max(len(r.ids) for r in rows)
    ids, mask = torch.full((len(rows), longest), 100), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row.ids), None) if side == "left" else slice(0, len(row.ids))
        ids[i, where], mask[i, where] = row.ids, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, mask.bool()


# files


@torch.no_grad()
def test_all_three_file_layouts_give_the_same_logits(stock, folder, tmp_path):
    as_split(stock, tmp_path / "split")
    as_baai(stock, tmp_path / "baai")
    logits, kinds = [], []
    for where in (folder, tmp_path / "split", tmp_path / "baai"):
        model, tokenizer = from_pretrained(where, text=Letters(), text_budget=42)
        assert model.layout.special == {name[1:-1]: i for i, name in SHORT.items()}
        assert model.layout.codes_at == slice(OFFSET, OFFSET + CODES)
        assert (tokenizer is None) == (where.name == "baai") and inspect(where).loads
        logits.append(model.head(model(pack(make_rows(model.layout.resized(GRID))))))
        kinds.append(inspect(where).kind)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2]) and kinds == ["emu3"] * 3


@torch.no_grad()
def test_the_vision_tokenizer_gives_transformers_codes_and_pictures_from_every_layout(stock, folder, tmp_path):
    as_split(stock, tmp_path / "split")
    keys = as_baai_vision(stock, tmp_path / "vision")
    assert {"encoder.down.3.attn.0.norm.weight", "encoder.mid.attn_1.q.weight",
            "decoder.up.3.attn.1.norm.conv_y.weight", "decoder.mid.attn_1.norm.norm_layer.weight",
            "encoder.down.0.downsample.conv.weight", "encoder.time_conv.1.conv.conv.weight",
            "encoder.time_res_stack.0.norm1.running_var", "quant_conv.conv.weight"} <= keys.keys()
    assert keys["decoder.mid.attn_1.proj_out.weight"].shape == (64, 64, 1, 1)
    assert not [k for k in keys if "_proj" in k or "_block" in k]
    pictures = torch.randint(0, 256, (3, 3, 24, 40), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    vq = stock.model.vqmodel
    codes = torch.stack(vq.encode(pictures / 127.5 - 1, image_sizes=torch.tensor([[24, 40]] * 3)).image_tokens)
    assert codes.shape == (3, 3, 5) and len(codes.unique()) > 8
    back = ((vq.decode(codes) + 1) * 127.5).round().clamp(0, 255)
    for tokenizer in (from_pretrained(folder, text=Letters())[1],
                      from_pretrained(tmp_path / "split", text=Letters())[1], load_image_tokenizer(tmp_path / "vision"),
                      from_pretrained(folder, text=Letters(), image_tokenizer=tmp_path / "vision")[1]):
        assert tokenizer.config == Emu3VQConfig(CODES, 4, 32, (1, 1, 1, 2), 1, (3,), 4)
        assert torch.equal(tokenizer.encode(pictures), codes)
        assert (tokenizer.decode(codes).float() - back).abs().max() <= 1


@torch.no_grad()
def test_a_saved_model_is_read_again_by_us_and_by_transformers(tmp_path):
    apart = {**SPECIAL, "<image>": 108, "<|image end|>": 101}           # the visual tokens do not follow <|image end|>
    stock = stock_emu3(apart)
    stock.save_pretrained(tmp_path / "theirs")
    model, tokenizer = from_pretrained(tmp_path / "theirs", text=Letters(), text_budget=17)
    assert model.layout.eoi == 101 and model.layout.image_offset == 109
    batch = pack(make_rows(model.layout))
    before = model(batch)
    routed = apply_mod(model, CapacityPlan({"t2i": [1, .5, 1, .5], "mmu": [1, 1, .4, 1]}))(batch)
    again, inside = from_pretrained(save_pretrained(tmp_path / "ours", model, tokenizer), text=Letters())
    assert torch.equal(again(batch), routed) and not torch.equal(routed, before)
    assert again.layout.special == model.layout.special
    assert again.layout.image_offset == 109 and again.layout.text_budget == 17 and again.layout.codebook_size == CODES
    assert torch.equal(inside.model.quantize.embedding.weight, tokenizer.model.quantize.embedding.weight)
    row = make_rows(model.layout)[0]
    theirs = Emu3ForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(row.ids[None]).logits, stock(row.ids[None]).logits)


def test_a_config_that_names_no_special_tokens_is_refused_by_name(stock, tmp_path):
    as_baai(stock, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("eol", "boi"):
        del config[f"{name}_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="special tokens eol, boi have. Add eol_token_id to config.json"):
        from_pretrained(tmp_path, text=Letters())


def test_the_released_vocabulary():
    class Text(Letters):
        size = eot = 151643

    names = {**{emu3.NAMES[name]: i for name, i in emu3.RELEASED.items()},
             **{f"<|visual token {c:06d}|>": 151854 + c for c in range(32768)}}
    for config in ({"model_type": "Emu3"},
                   {"model_type": "emu3", "text_config": {"vocab_size": 184622}, "vocabulary_map": names}):
        layout = emu3.FAMILY.layout(config, Text())
        assert emu3.FAMILY.text(config) == (151643, 151643, "<|endoftext|>") and emu3.FAMILY.recognises(config)
        assert layout.special == emu3.RELEASED and layout.image_offset == 151854 and layout.vocab_size == 184622
        assert layout.codebook_size == 32768 and layout.grid == (90, 90) and layout.stop == 151850
    assert layout.token(151854 + 77) == "code 77" and layout.token(151846) == "<|eol|>"
    assert len(layout.t2i("", torch.zeros(8100, dtype=torch.long)).ids) == 1 + 1 + 5 + 1 + 90 * 91 + 2


# the forward


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_logits_equal_transformers_on_a_padded_batch(stock, model, side):
    rows = make_rows(model.layout)
    batch, real = padded(rows, side)
    packed = pack(rows)
    ours, theirs = model.head(model(packed)), stock(**batch).logits[real]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert theirs.std() > 0.5, "the comparison says something"


def test_gradients_equal_transformers(stock, model):
    rows = [make_rows(model.layout)[i] for i in (0, 1, 4)]
    batch, real = padded(rows, "right")
    labels = torch.where(real & (batch["input_ids"] >= OFFSET), batch["input_ids"], IGNORE)
    loss = stock(**batch, labels=labels).loss
    theirs = dict(stock.model.text_model.named_parameters())
    mine = dict(model.decoder.named_parameters())
    assert theirs.keys() == mine.keys()
    total = losses(model, pack(rows)).total
    torch.testing.assert_close(total, loss, atol=1e-5, rtol=1e-5)
    for (name, a), b in zip(zip(mine, torch.autograd.grad(total, [mine[k] for k in mine])),
                            torch.autograd.grad(loss, [theirs[k] for k in mine])):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


# sequences


def test_a_picture_row_is_caption_block_and_visual_targets_without_eos(model):
    layout, codes = model.layout, torch.arange(12)
    block = "<boi>3*4<img>[0][1][2][3]<eol>[4][5][6][7]<eol>[8][9][10][11]<eol><eof><eoi>"
    row = layout.t2i("a dog.", codes)
    assert written(row.ids) == f"<bos>a dog.{block}" and torch.equal(row.position, torch.arange(len(row.ids)))
    learned = row.target != IGNORE
    assert torch.equal(row.target[learned], codes + OFFSET) and torch.equal(row.ids[1:][learned[:-1]], codes + OFFSET)
    assert torch.equal(row.hi, torch.arange(1, len(row.ids) + 1)) and row.parts == ((len(row.ids), "topk"),)
    assert (written(layout.t2i("x" * 60, codes.view(2, 6)).ids)
            == f"<bos>{'x' * 42}<boi>2*6<img>[0][1][2][3][4][5]<eol>[6][7][8][9][10][11]<eol><eof><eoi>")
    for n, end in ((0, ""), (3, "[0][1][2]"), (4, "[0][1][2][3]<eol>"), (5, "[0][1][2][3]<eol>[4]")):
        prompt = layout.t2i("a dog.", codes[:n], prompt=True)
        assert written(prompt.ids) == f"<bos>a dog.<boi>3*4<img>{end}" and prompt.parts == (
            (len(prompt.ids), "threshold"),
        )


def test_an_understanding_row_is_the_released_template(model):
    block = "<boi>2*3<img>[0][1][2]<eol>[3][4][5]<eol><eof><eoi>"
    ask = model.layout.mmu(torch.arange(6).view(2, 3), [("Describe it", "")], open_ended=True)
    assert written(ask.ids) == f"<bos>You are a helpful assistant. USER: {block}Describe it. ASSISTANT:"
    assert (ask.target == IGNORE).all()
    row = model.layout.mmu(torch.arange(6).view(2, 3), [("A?", "yes"), ("B", "no")])
    assert (written(row.ids)
            == f"<bos>You are a helpful assistant. USER: {block}A?. ASSISTANT: yes<eos>USER: B. ASSISTANT: no<eos>")
    long = model.layout.mmu(torch.arange(6).view(2, 3), [("A?", "yes"), ("B", "noo"), ("C", "no")])
    assert written(long.ids) == f"<bos>You are a helpful assistant. USER: {block}A?. ASSISTANT: yes<eos>", (
        "it ends before the turn that does not fit"
    )
    whole = model.layout.mmu(torch.arange(6).view(2, 3), [("A?", "yes"), ("B", "noo"), ("C", "")], open_ended=True)
    assert written(whole.ids).endswith("USER: B. ASSISTANT: noo<eos>USER: C. ASSISTANT:"), (
        "but what is asked is never left out"
    )
    assert written(row.target[row.target != IGNORE]) == " yes<eos> no<eos>"
    assert [rule for _, rule in row.parts] == ["topk", "topk", "keep", "topk", "keep"]


@pytest.mark.parametrize(
    "ratio, grid", [("1:1", (90, 90)), ("4:3", (78, 104)), ("3:4", (104, 78)), ("16:9", (68, 120)), ("2:1", (64, 127))]
)
def test_grids_of_ratios(ratio, grid):
    assert emu3.grid_of(ratio) == grid


@pytest.mark.parametrize("ratio", ["1", "0:1", "-1:-1", "a:b", "1:-2", "", "nan:1"])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(ValueError, match="'width:height'"):
        emu3.grid_of(ratio)


# generation


def grid_rules(height, width):
    """What may follow, by the rules of the released processor: visual tokens in a grid, then its end."""
    def allowed(_, ids):
        n = len(ids) - int((ids == 106).nonzero()[0])
        if n % (width + 1) == 0:
            return [102]
        return {(width + 1) * height + 1: [103], (width + 1) * height + 2: [108], (width + 1) * height + 3: [105]}.get(
            n, range(OFFSET, OFFSET + CODES)
        )

    return allowed


@torch.no_grad()
@pytest.mark.parametrize("w", [0.0, 2.0])
@pytest.mark.parametrize("grid", [GRID, (2, 5)])
def test_drawing_equals_transformers_generate(stock, model, w, grid):
    layout, nothing = model.layout.resized(grid), torch.zeros(0, dtype=torch.long)
    codes = draw(model, CAPTIONS, guidance=w, top_k=1, negative="blurry", grid=grid)
    guided = ({"guidance_scale": 1 + w, "negative_prompt_ids": layout.t2i("blurry", nothing, prompt=True).ids[None]}
              if w else {})
    for caption, drawn in zip(CAPTIONS, codes):
        prompt = layout.t2i(caption, nothing, prompt=True).ids[None]
        theirs = stock.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                max_new_tokens=grid[0] * (grid[1] + 1) + 3, prefix_allowed_tokens_fn=grid_rules(*grid),
                                **guided)[0]
        assert theirs.tolist() == [*layout.t2i(caption, drawn).ids.tolist(), layout.eos]
    assert len(codes.unique()) > 4
    assert (w == 0 or not torch.equal(codes, draw(model, CAPTIONS, guidance=0, top_k=1, grid=grid)))


@torch.no_grad()
def test_answers_equal_transformers_generate_on_a_left_padded_batch(stock, model):
    g = torch.Generator().manual_seed(3)
    rows = [
        model.layout.mmu(torch.randint(CODES, grid, generator=g), [(q, "")], open_ended=True)
        for q, grid in (("what is it?", (3, 4)), ("red?", (2, 2)), ("is there a blue circle?", (4, 3)), ("", (1, 5)))
    ]
    batch, _ = padded(rows, "left")
    stop = int(stock(rows[0].ids[None]).logits[0, -1].argmax())  # what the first row says first ends an answer here
    model.layout.stop = stop
    theirs = stock.generate(batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False,
                            max_new_tokens=12, eos_token_id=stop, pad_token_id=100)[:, batch["input_ids"].shape[1] :]
    expected = [" ".join(map(str, ids[:ids.index(stop)] if stop in ids else ids)) for ids in theirs.tolist()]
    assert answer(model, rows, max_new=12) == expected and expected[0] == "" and len(set(expected)) > 2


@torch.no_grad()
def test_drawing_with_a_routed_model_and_its_cache_equals_the_loop_without(model):
    apply_mod(model.double(), CapacityPlan({"t2i": [1, .5, .3, .7], "mmu": [.5, 1, 1, .5]}), RouterConfig(std=0.5))
    calibrate(model, pack(make_rows(model.layout)))
    drawn, w = draw(model, CAPTIONS, guidance=1.0, top_k=1, negative="bad"), 1.0
    seen, kept = 0, 0
    codes = torch.zeros(3, 0, dtype=torch.long)
    for _ in range(model.layout.image_tokens):
        rows = [model.layout.t2i(text, codes[i % 3], prompt=True) for i, text in enumerate([*CAPTIONS, *["bad"] * 3])]
        packed = pack(rows)
        with record_routing() as log:
            hidden = model(packed)[torch.tensor(packed.lengths).cumsum(0) - 1]
        seen, kept = seen + sum(len(r.score) for r in log.values()), kept + sum(len(r.index) for r in log.values())
        logits = model.code_logits(hidden).log_softmax(-1)
        codes = torch.cat([codes, (logits[3:] + (1 + w) * (logits[:3] - logits[3:])).argmax(-1)[:, None]], 1)
    assert torch.equal(drawn, codes) and 0.2 < kept / seen < 0.9
