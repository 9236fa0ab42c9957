"""Model folders: the original layouts at tiny and real sizes, round trips bit for bit, refusals of wrong folders."""

import json
import pickle
import re
import shutil

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from unimod.__main__ import main
from unimod.batch import pack
from unimod.config import RouterConfig
from unimod.data.batches import Batches
from unimod.data.scenes import Scenes
from unimod.layers import apply_mod
from unimod.models import emu3, showo
from unimod.models.checkpoint import (
    CheckpointError,
    NoText,
    build_model,
    from_pretrained,
    inspect,
    plan_of,
    save_pretrained,
    shipped,
)
from unimod.models.emu3_vq import EMU3, Emu3VQ
from unimod.models.image_tokenizer import load_image_tokenizer
from unimod.models.unified import UnifiedModel
from unimod.models.weights import Weights
from unimod.plan import last_half

REAL_SHOWO = {"_class_name": "Showo", "_diffusers_version": "0.30.1", "codebook_size": 8192,
              "llm_model_path": "microsoft/phi-1_5", "llm_vocab_size": 50295, "mask_token_id": 58497,
              "num_vq_tokens": 256, "vocab_size": 58498, "w_clip_vit": False}
"""What the released folder's config.json says."""
NAMES = ["showo-tiny", "emu3-tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_image_tokenizer(shipped("showo-tiny") / "image_tokenizer")


@pytest.fixture
def original(tmp_path):
    """A small Show-o folder as the reference's training writes one."""
    torch.manual_seed(1)
    model = small()
    folder = tmp_path / "show-o"
    folder.mkdir()
    save_file({f"showo.{k}": v for k, v in model.lm.state_dict().items()}, folder / "pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(small_config()))
    return folder, model


def small_config(**more):
    return {"_class_name": "Showo", "codebook_size": 16, "llm_model_path": "microsoft/phi-1_5", "llm_vocab_size": 40,
            "mask_token_id": 66, "num_vq_tokens": 9, "vocab_size": 67, "w_clip_vit": False, "hidden_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, **more}


def small(features=0):
    config = small_config(w_clip_vit=bool(features))
    layout = showo.FAMILY.layout(config, NoText(40, 39, ""))
    return showo.FAMILY.build(config, layout, {"mm_projector.0.weight": (32, features)}).eval()


def row(layout):
    masked = torch.arange(9) % 2 == 0
    layout = showo.ShowoLayout(Letters(), 16, (3, 3), 12)
    return layout.t2i("ab", torch.arange(9), masked)


class Letters:
    """A text tokenizer of 40 letters."""

    size, eot = 40, 39

    def encode(self, text):
        return [ord(c) % 39 for c in text]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def token(self, i):
        return str(i)


# ---- original layouts ----

@pytest.mark.parametrize("how", ["pytorch_model.safetensors", "model.safetensors", "sharded", "sharded bin", "bin"])
def test_show_o_loads_from_every_file_form_and_is_bit_equal(original, how):
    folder, model = original
    state = load_file(folder / "pytorch_model.safetensors")
    (folder / "pytorch_model.safetensors").unlink()
    keys = sorted(state)
    halves = {"1": {k: state[k] for k in keys[::2]}, "2": {k: state[k] for k in keys[1::2]}}
    if how == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif how.startswith("sharded"):
        end = "bin" if how.endswith("bin") else "safetensors"
        for number, part in halves.items():
            torch.save(part, folder / f"pytorch_model-{number}.bin") if end == "bin" else save_file(
                part, folder / f"pytorch_model-{number}.safetensors"
            )
        index = {"weight_map": {k: f"pytorch_model-{number}.{end}" for number, part in halves.items() for k in part}}
        (folder / f"pytorch_model.{end}.index.json").write_text(json.dumps(index))
    else:
        save_file(state, folder / how)
    loaded, image_tokenizer = from_pretrained(folder, text=Letters())
    assert image_tokenizer is None and loaded.layout.mask == 66 and loaded.layout.grid == (3, 3)
    packed = pack([row(loaded.layout)])
    with torch.no_grad():
        assert torch.equal(loaded(packed), model(packed))
    save_pretrained(folder / "again", loaded)
    again = load_file(folder / "again" / "model.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


def test_the_clip_variant_has_its_projector(tmp_path):
    torch.manual_seed(0)
    model = small(features=24)
    save_pretrained(tmp_path, model)
    assert {k for k in Weights(tmp_path).shapes if not k.startswith("showo.")} == {
        f"mm_projector.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")
    }
    loaded, _ = from_pretrained(tmp_path, text=Letters())
    rows = [loaded.layout.mmu(picture, [("ab", "c")], system="be kind") for picture in torch.randn(2, 4, 24)]
    with torch.no_grad():
        assert torch.equal(loaded(pack(rows)), model(pack(rows)))
    plain, _ = from_pretrained(save_pretrained(tmp_path / "plain", small()), text=Letters())
    with pytest.raises(ValueError, match="no projector for vision features"):
        plain(pack(rows))


@pytest.mark.parametrize("name", NAMES)
def test_saved_models_load_bit_equal_with_their_routers(tmp_path, name, tokenizer):
    def fresh():
        return build_model(name, Scenes().words(), tokenizer.codebook_size)
    model = apply_mod(fresh(), last_half(8, 0.2), RouterConfig(shared=True, gate="sigmoid")).eval()
    save_pretrained(tmp_path, model, tokenizer)
    stock = set(fresh().lm.state_dict())
    assert set(load_file(tmp_path / "model.safetensors")) == (
        {f"showo.{k}" for k in stock} if name == "showo-tiny" else stock
    )
    loaded, pictures = from_pretrained(tmp_path)
    assert plan_of(loaded) == plan_of(model) and loaded.layers[7].router.config == model.layers[7].router.config
    packed = Batches(Scenes(), tokenizer, model.layout, (2, 2, 1)).train(0)
    with torch.no_grad():
        assert torch.equal(loaded(packed), model(packed))
    assert torch.equal(pictures.decode(torch.arange(4).view(1, 2, 2)), tokenizer.decode(torch.arange(4).view(1, 2, 2)))
    assert inspect(tmp_path).routed == "4 of 8 layers, routers.safetensors"
    (tmp_path / "routers.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"plan\.yaml but no routers\.safetensors"):
        from_pretrained(tmp_path)


def test_bf16_is_asked_for_and_cos_and_sin_stay_exact(original):
    folder, model = original
    loaded, _ = from_pretrained(folder, text=Letters(), dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    position = torch.arange(2000)[None]
    half = torch.arange(0, 8, 2) / 8                       # 16 dimensions a head, half of them rotated
    angle = position[0].double()[:, None] * 10000.0 ** -half.double()
    for m in (model, loaded, loaded.float()):
        cos, sin = m.rotary(torch.empty(0), position_ids=position)
        assert cos.dtype == torch.float32
        torch.testing.assert_close(cos[0, :, :4].double(), angle.cos(), atol=2e-4, rtol=0)
        assert torch.equal(cos, model.rotary(torch.empty(0), position_ids=position)[0])
        assert torch.equal(sin, model.rotary(torch.empty(0), position_ids=position)[1])


# ---- real sizes ----

def on_meta(config):
    layout = showo.FAMILY.layout(config, NoText(50295, 50256, ""))
    with torch.device("meta"):
        return showo.FAMILY.build(config, layout, {})


def test_the_real_show_o_has_the_notes_numbers():
    model = on_meta(REAL_SHOWO)
    shapes = {showo.FAMILY.theirs(k): tuple(v.shape) for k, v in model.state_dict().items()}
    pattern = {}
    for key, shape in shapes.items():
        pattern.setdefault(re.sub(r"\.\d+\.", ".N.", key), set()).add(shape)
    layer = {f"self_attn.{p}_proj": (2048, 2048) for p in "qkv"} | {
        "self_attn.dense": (2048, 2048), "self_attn.q_layernorm": (64,), "self_attn.k_layernorm": (64,),
        "mlp.fc1": (8192, 2048), "mlp.fc2": (2048, 8192), "input_layernorm": (2048,)
    }
    expected = {f"showo.model.layers.N.{name}.weight": {shape} for name, shape in layer.items()}
    expected |= {f"showo.model.layers.N.{name}.bias": {shape[:1]} for name, shape in layer.items()}
    expected |= {"showo.model.embed_tokens.weight": {(58498, 2048)}, "showo.model.final_layernorm.weight": {(2048,)},
                 "showo.model.final_layernorm.bias": {(2048,)}, "showo.lm_head.weight": {(58498, 2048)},
                 "showo.lm_head.bias": {(58498,)}}
    assert pattern == expected and len(pattern) == 23
    assert sum(p.numel() for p in model.parameters()) == 1_448_176_770
    layout = model.layout
    assert (layout.pad, layout.soi, layout.eoi, layout.t2i_task, layout.mmu_task, layout.lvg) == (
        50295, 50296, 50297, 50300, 50301, 50304
    )
    assert (layout.image_offset, layout.mask, layout.grid) == (50305, 58497, (16, 16))
    assert on_meta(REAL_SHOWO | {"num_vq_tokens": 1024}).layout.grid == (32, 32)
    clip = on_meta(REAL_SHOWO | {"w_clip_vit": True})
    assert [tuple(p.shape) for p in clip.projector.parameters()] == [(2048, 1024), (2048,), (2048, 2048), (2048,)]
    assert round(sum(p.numel() for p in clip.parameters()) * 4 / 1e9, 2) == 5.82, "the size of the published file"


def test_the_real_emu3_has_the_notes_numbers():
    config = {"model_type": "Emu3", "vocab_size": 184622}
    layout = emu3.FAMILY.layout(config, NoText(151643, 151643, ""))
    with torch.device("meta"):
        model, vision = emu3.FAMILY.build(config, layout, {}), Emu3VQ(EMU3)
    pattern = {}
    for key, value in model.state_dict().items():
        pattern.setdefault(re.sub(r"\.\d+\.", ".N.", emu3.FAMILY.theirs(key)), set()).add(tuple(value.shape))
    layer = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
             "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
             "mlp.down_proj": (4096, 14336), "input_layernorm": (4096,), "post_attention_layernorm": (4096,)}
    expected = {f"model.layers.N.{name}.weight": {shape} for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": {(184622, 4096)}, "model.norm.weight": {(4096,)},
                 "lm_head.weight": {(184622, 4096)}}
    assert pattern == expected, "BAAI's own names; the two others differ in their beginnings"
    for key in ("model.text_model.layers.3.mlp.up_proj.weight", "text_model.model.layers.3.mlp.up_proj.weight",
                "model.layers.3.mlp.up_proj.weight"):
        assert emu3.FAMILY.ours(key) == "lm.model.layers.3.mlp.up_proj.weight"
    assert len(model.layers) == 32 and round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 8.49
    assert Emu3VQ.config_of({k: tuple(v.shape) for k, v in vision.stored().state_dict().items()}) == EMU3
    assert round(sum(p.numel() for p in vision.parameters()) / 1e6) == 271


# ---- wrong folders ----

def test_bad_weights_are_named(original):
    folder, _ = original
    path = folder / "pytorch_model.safetensors"
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"not weights"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.safetensors cannot be read .* damaged or cut short"):
            from_pretrained(folder)
    path.write_bytes(whole)
    state = load_file(path)
    q, k = "showo.model.layers.0.mlp.fc1.weight", "showo.model.layers.0.mlp.fc2.weight"
    save_file(state | {q: state[k], k: state[q]}, path)
    with pytest.raises(
        CheckpointError,
        match=r"2 of another shape \(showo\S+fc1\.weight has shape \[32, 64\], config\.json asks for \[64, 32\]"
    ):
        from_pretrained(folder)
    save_file({key: v for key, v in state.items() if key != q} | {"showo.stray": torch.zeros(1)}, path)
    with pytest.raises(
        CheckpointError, match=r"1 missing \(showo\.model\.layers\.0\.mlp\.fc1\.weight\), 1 unexpected \(showo\.stray\)"
    ):
        from_pretrained(folder)
    assert not inspect(folder).loads and inspect(folder).unexpected == ("showo.stray",)
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"holds no weights\. Expected one of model\.safetensors, .* found config\.json"
    ):
        from_pretrained(folder)


def test_a_missing_shard_is_named(original):
    folder, _ = original
    (folder / "pytorch_model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    save_file({"a": torch.zeros(1)}, folder / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"names 2 shards, of which 1 are missing: model-2\.safetensors"):
        from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        from_pretrained(folder)


class Code:
    """Pickles to a call."""

    def __reduce__(self):
        return print, ("code from a pickle ran",)


def test_a_pickle_with_code_is_refused_and_does_not_run(original, capsys):
    folder, _ = original
    (folder / "pytorch_model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"showo.x": Code()}, path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than tensors and was refused"):
        from_pretrained(folder)
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin (holds more than tensors|cannot be read)"):
        from_pretrained(folder)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a state dict of named tensors"):
        from_pretrained(folder)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vocab_size": 99}, r"contradicts itself: vocab_size is 99, its other settings make it 67"),
        ({"mask_token_id": 5}, r"contradicts itself: mask_token_id is 5, its other settings make it 66"),
        ({"num_vq_tokens": 7}, r"contradicts itself: num_vq_tokens is 7, its other settings make it 4"),
        ({"num_hidden_layers": 3}, r"18 missing \(showo\.model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"18 unexpected \(showo\.model\.layers\.1\."),
        ({"hidden_size": 16},
         r"of another shape \(showo\.lm_head\.weight has shape \[67, 32\], config\.json asks for \[67, 16\]"),
        ({"w_clip_vit": True}, r"4 missing \(mm_projector\.0\.bias"),
        ({"codebook_size": None}, r"has no 'codebook_size'"),
        ({"codebook_size": "many"}, r"setting of the wrong kind"),
        ({"_class_name": "Showo2"},
         r"is not of a model that is known here: it says \{'_class_name': 'Showo2'\}\. Expected one of: Show-o"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_named(original, change, words):
    folder, _ = original
    (folder / "config.json").write_text(json.dumps(small_config(**change)))
    with pytest.raises(CheckpointError, match=words):
        from_pretrained(folder)


def test_other_folders_are_refused_with_what_was_found(tmp_path, original):
    with pytest.raises(CheckpointError, match="no such folder"):
        from_pretrained(tmp_path / "nowhere")
    (tmp_path / "photo.png").touch()
    with pytest.raises(
        CheckpointError, match=r"config\.json is missing; found: photo\.png, show-o\. Expected a model's folder: Show-o"
    ):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a picture tokenizer, not a model"):
        from_pretrained(shipped("showo-tiny") / "image_tokenizer")
    with pytest.raises(CheckpointError, match=r"text='.*nowhere' is not a tokenizer"):
        from_pretrained(original[0], text=tmp_path / "nowhere")


def test_without_a_text_tokenizer_the_model_still_loads(original):
    model, _ = from_pretrained(original[0])
    assert model.layout.token(3) == "#3"
    with pytest.raises(CheckpointError, match=r"has no text tokenizer, so 'a circle' cannot be written"):
        model.layout.t2i("a circle", torch.arange(9), torch.ones(9, dtype=torch.bool))


def test_too_large_a_model_is_refused_before_it_is_loaded(original, monkeypatch):
    class Little:
        available = 1000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Little)
    monkeypatch.setattr(UnifiedModel, "__init__", None)
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB in torch\.bfloat16, cpu has 0\.0 GB free"):
        from_pretrained(original[0], dtype=torch.bfloat16)


def test_a_half_written_folder_does_not_load(tmp_path, tokenizer, monkeypatch):
    model = build_model("showo-tiny", Scenes().words())
    save_pretrained(tmp_path, model, tokenizer)
    monkeypatch.setattr(type(tokenizer), "save", lambda self, folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tmp_path, model, tokenizer)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        from_pretrained(tmp_path)


# ---- the command ----

def test_inspect_prints_what_a_folder_is(original, capsys, tmp_path):
    assert main(["inspect", str(shipped("emu3-tiny"))]) == 0
    out = capsys.readouterr().out
    assert re.search(r"kind +emu3\n", out) and "1,726,592" in out and re.search(r"missing keys +0\n", out)
    assert main(["inspect", str(original[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "showo" and found["layers"] == 2 and found["vocabulary"] == 67 and found["routed"] == "none"
    assert found["text"] == "none"
    assert found["train_gb"] == pytest.approx(16 * found["parameters"] / 1e9)
    (original[0] / "config.json").write_text(json.dumps(small_config(num_hidden_layers=3)))
    assert main(["inspect", str(original[0])]) == 2
    captured = capsys.readouterr()
    assert re.search(r"missing keys +18: showo\.model\.layers\.2", captured.out) and "cannot be loaded" in captured.err
    shutil.rmtree(original[0])
    assert main(["inspect", str(original[0])]) == 2
    assert "no such folder" in capsys.readouterr().err
