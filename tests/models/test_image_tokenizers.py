"""The three image tokenizers: codes by hand, files, refusals, real configurations on the meta device, training."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unimod.data import open_data
from unimod.models.emu3_vq import EMU3, Emu3VQ
from unimod.models.image_tokenizer import (
    MEMBERS,
    build_image_tokenizer,
    load_image_tokenizer,
    main,
    reconstruction_report,
)
from unimod.models.magvit import SHOWO, MagVitV2
from unimod.models.weights import CheckpointError

TINY = {
    "dictionary": {},
    "magvit": {"ch": 8, "groups": 4, "bits": 6},
    "emu3vq": {"multipliers": (1, 1, 1, 1), "codebook_size": 64, "temporal": 4},
}
LEARNED = ("magvit", "emu3vq")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes():
    data = open_data("scenes")
    return (
        torch.from_numpy(np.stack([data.sample("train", i).image for i in range(300)])).permute(0, 3, 1, 2).contiguous()
    )


@pytest.fixture(scope="module", params=MEMBERS)
def tokenizer(request, scenes):
    """Each of the three, hardly trained, shared by the tests that do not change it."""
    return fitted(request.param, scenes)


def fitted(name, images):
    tokenizer = build_image_tokenizer(name, **TINY[name])
    tokenizer.fit(images[:16], steps=2)
    return tokenizer


# the interface


@pytest.mark.parametrize("shape", [(48, 48), (16, 40)])
def test_shapes_and_types(tokenizer, shape, scenes):
    pictures = scenes[:3, :, : shape[0], : shape[1]]
    codes = tokenizer.encode(pictures)
    assert codes.dtype == torch.int64 and codes.shape == (3, shape[0] // 8, shape[1] // 8) and tokenizer.downsample == 8
    assert codes.min() >= 0 and codes.max() < tokenizer.codebook_size
    back = tokenizer.decode(codes)
    assert back.dtype == torch.uint8 and back.shape == pictures.shape


def test_pieces_do_not_change_the_result(tokenizer, scenes, monkeypatch):
    whole = tokenizer.encode(scenes[:5]), tokenizer.decode(tokenizer.encode(scenes[:5]))
    monkeypatch.setattr("unimod.models.image_tokenizer.PIXELS_AT_ONCE", 2 * 48 * 48)
    assert torch.equal(tokenizer.encode(scenes[:5]), whole[0])
    assert (
        tokenizer.decode(whole[0]).short() - whole[1].short()
    ).abs().max() <= 1  # another batch size may round another way


def test_refuses_what_it_cannot_read(tokenizer, scenes):
    with pytest.raises(ValueError, match=r"torch.uint8 \[B, 3, H, W\]"):
        tokenizer.encode(scenes[:2].float())
    with pytest.raises(ValueError, match=r"torch.uint8 \[B, 3, H, W\]"):
        tokenizer.encode(scenes[0])
    with pytest.raises(ValueError, match=r"48 x 44 pixels: both must be multiples of 8"):
        tokenizer.encode(scenes[:2, :, :, :44])
    with pytest.raises(ValueError, match=r"torch.int64 \[B, h, w\]"):
        tokenizer.decode(torch.zeros(1, 36, dtype=torch.int64))
    for bad in (-1, tokenizer.codebook_size):
        with pytest.raises(ValueError, match=rf"decodes 0\.\.{tokenizer.codebook_size - 1}"):
            tokenizer.decode(torch.full((1, 2, 2), bad))


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="image tokenizer='vqgan' is not known. Allowed: dictionary, magvit, emu3vq"):
        build_image_tokenizer("vqgan")
    with pytest.raises(ValueError, match=r"tokenizer 'magvit'='width' is not known.* Allowed: ch, encoder_multipliers"):
        build_image_tokenizer("magvit", width=3)
    for name, options, words in [
        ("dictionary", {"patch": 0}, "patch is 0"),
        ("magvit", {"bits": 30}, "at most 18"),
        ("magvit", {"ch": 30}, "multiple of groups"),
        ("magvit", {"encoder_blocks": (1, 1)}, "the same number"),
        ("emu3vq", {"base_channels": 48}, "multiple of 32"),
        ("emu3vq", {"temporal": 3}, "power of two"),
        ("emu3vq", {"attention_levels": (0,)}, "last multiplier"),
    ]:
        with pytest.raises(ValueError, match=words):
            build_image_tokenizer(name, **options)


# files


def test_saved_and_loaded_is_the_same(tokenizer, scenes, tmp_path):
    tokenizer.save(tmp_path / "deep" / "folder")
    again = load_image_tokenizer(tmp_path / "deep" / "folder")
    assert type(again) is type(tokenizer) and again.config == tokenizer.config
    for key, value in tokenizer.stored().state_dict().items():
        assert torch.equal(value, again.stored().state_dict()[key]), key
    assert torch.equal(again.encode(scenes[:4]), tokenizer.encode(scenes[:4]))
    codes = tokenizer.encode(scenes[:4])
    assert torch.equal(again.decode(codes), tokenizer.decode(codes))


def test_bad_files_are_refused_by_name(tokenizer, tmp_path):
    config, weights = tmp_path / "tokenizer.json", tmp_path / "tokenizer.safetensors"
    with pytest.raises(CheckpointError, match=r"holds no weights. Expected one of .*; found nothing"):
        load_image_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    good_config, good_weights = config.read_text(), weights.read_bytes()

    for text in ("{", "[]", '{"name": "magvit"}', '{"name": "vqgan", "config": {}}',
                 json.dumps({"name": tokenizer.name, "config": {"width": 1}})):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer.json(: expected| cannot be read| holds a list)"):
            load_image_tokenizer(tmp_path)
    config.write_text(good_config)

    for data in (good_weights[: len(good_weights) // 2], b"", b"not a safetensors file"):
        weights.write_bytes(data)
        with pytest.raises(ValueError, match=r"tokenizer.safetensors cannot be read .* damaged or cut short"):
            load_image_tokenizer(tmp_path)
    weights.write_bytes(good_weights)

    tensors = load_file(weights)
    key, value = tensors.popitem()
    for wrong in (tensors, {**tensors, key: value, "stray": torch.zeros(1)}, {**tensors, key: torch.zeros(7)}):
        save_file(wrong, weights)
        with pytest.raises(ValueError, match=r"do not fit its config.json: 1 (missing|unexpected|of another shape)"):
            load_image_tokenizer(tmp_path)
    save_file({"anything": torch.zeros(1)}, weights)
    config.unlink()
    with pytest.raises(
        CheckpointError, match=r"is not a picture tokenizer: it has no tokenizer.json, and its weights \(anything"
    ):
        load_image_tokenizer(tmp_path)
    config.write_text(good_config)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights"):
        load_image_tokenizer(tmp_path)


def test_the_command_prints_one_json_line(scenes, tmp_path, capsys):
    pictures = scenes.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "pictures.npz", train=pictures[:200], test=pictures[200:])
    main(["dictionary", str(tmp_path / "pictures.npz"), "--out", str(tmp_path / "out")])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["fit"]["name"] == "dictionary" and line["fit"]["psnr_db"] is None and line["fit"]["exact_fraction"] == 1
    assert load_image_tokenizer(tmp_path / "out").used == line["fit"]["distinct_patches"]


# the dictionary


def test_dictionary_is_lossless_on_scenes(scenes):
    tokenizer = build_image_tokenizer("dictionary")
    report = tokenizer.fit(scenes)
    assert report.psnr_db == math.inf and report.exact_fraction == 1 and report.warning == ""
    assert report.distinct_patches == tokenizer.used
    test = torch.from_numpy(np.stack([open_data("scenes").sample("test", i).image for i in range(100)])).permute(
        0, 3, 1, 2
    )
    assert asdict(reconstruction_report(tokenizer, test))["exact_fraction"] == 1
    assert (tokenizer.counts.diff() <= 0).all() and tokenizer.counts.sum() == 300 * 36
    assert torch.equal(
        tokenizer.patches[0], torch.full((3, 8, 8), 245, dtype=torch.uint8)
    )  # the white background is code 0


def test_dictionary_codes_are_stable(scenes):
    tokenizer = build_image_tokenizer("dictionary")
    tokenizer.fit(scenes)
    codes = torch.randint(tokenizer.used, (4, 3, 5))
    assert torch.equal(tokenizer.encode(tokenizer.decode(codes)), codes)
    other = build_image_tokenizer("dictionary")
    other.fit(scenes.flip(0))
    assert torch.equal(other.patches, tokenizer.patches)  # the order of the pictures does not matter
    other.fit(scenes[:1])
    assert (
        other.used < tokenizer.used and (other.counts[other.used :] == 0).all()
    )  # a second fit leaves nothing of the first


def test_dictionary_by_kmeans():
    pictures = torch.randint(0, 256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tokenizer, twin = (build_image_tokenizer("dictionary", codebook_size=16, patch=4) for _ in range(2))
    report = tokenizer.fit(pictures, seed=3)
    twin.fit(pictures, seed=3)
    assert torch.equal(tokenizer.patches, twin.patches) and torch.equal(tokenizer.counts, twin.counts)
    assert report.distinct_patches == 20 * 64 and "1280 distinct patches do not fit 16 codes" in report.warning
    assert 0 < report.psnr_db < 20 and tokenizer.counts.sum() == 20 * 64
    difference = (
        tokenizer._cut(pictures[:2])[:, None].double() - tokenizer.patches[: tokenizer.used].flatten(1).double()
    )
    by_hand = difference.square().sum(2).argmin(1)
    assert torch.equal(tokenizer.encode(pictures[:2]).flatten(), by_hand)


def test_dictionary_unused_and_unfitted():
    tokenizer = build_image_tokenizer("dictionary")
    with pytest.raises(RuntimeError, match="call fit"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    tokenizer.fit(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    magenta = tokenizer.decode(torch.full((1, 1, 1), 255))[0]
    assert tokenizer.used == 1 and set(map(tuple, magenta.flatten(1).T.tolist())) == {(0, 0, 0), (255, 0, 255)}


# MAGVIT-v2


def test_lookup_free_codes_by_hand():
    tokenizer = build_image_tokenizer("magvit", ch=8, groups=4, bits=3)
    z = torch.tensor([[0.5, -1.0, -0.1], [-0.2, -3.0, 2.0], [0.0, 0.0, 0.0], [1e-6, 0.0, 9.0]]).T.reshape(1, 3, 2, 2)
    codes = tokenizer.nearest(z)
    assert codes.tolist() == [
        [[0b100, 0b001], [0b000, 0b101]]
    ]  # channel 0 is the most significant bit; zero counts as 0
    assert tokenizer.codewords(codes)[0, :, 1, 1].tolist() == [1, -1, 1]
    assert tokenizer.quantize.power_vals.tolist() == [4, 2, 1]
    everything = torch.arange(8).view(1, 2, 4)
    assert torch.equal(tokenizer.nearest(tokenizer.codewords(everything)), everything)


def test_magvit_entropy_is_a_product_over_bits():
    tokenizer = build_image_tokenizer("magvit", ch=8, groups=4, bits=3)
    tokenizer.commitment = 0.0
    z = torch.randn(1, 3, 1, 1)  # one latent: its own entropy and the batch's cancel
    assert tokenizer.quantiser_loss(z, tokenizer.nearest(z)).abs() < 1e-6
    z = torch.randn(2, 3, 4, 4).double()
    p = torch.sigmoid(4 * z)
    sure = -(p * p.log() + (1 - p) * (1 - p).log()).sum(1).mean()
    bits = tokenizer.quantize.embedding.double()[:, :, None] > 0
    joint = torch.where(bits, p.permute(1, 0, 2, 3).flatten(1), 1 - p.permute(1, 0, 2, 3).flatten(1)).prod(1).mean(1)
    expected = tokenizer.entropy * (sure + (joint * joint.log()).sum())
    assert torch.allclose(tokenizer.quantiser_loss(z.float(), tokenizer.nearest(z)).double(), expected, atol=1e-5)
    extreme = torch.tensor([200.0, -200, 200]).view(1, 3, 1, 1).requires_grad_()
    tokenizer.quantiser_loss(extreme, tokenizer.nearest(extreme)).backward()
    assert extreme.grad.isfinite().all()


def test_real_magvit_is_showos():
    with torch.device("meta"):
        model = MagVitV2(SHOWO)
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 95_387_004 and len(state) == 382
    assert model.codebook_size == 8192 and model.downsample == 16
    assert state["quantize.embedding"] == (8192, 13) and state["quantize.power_vals"] == (13,)
    assert model.quantize.embedding.dtype == torch.float32 and model.quantize.power_vals.dtype == torch.int64

    def pairs(*modules):
        return {f"{module}.{part}" for module in modules for part in ("weight", "bias")}

    def block(path):
        return pairs(*(f"{path}.{part}" for part in ("norm1", "conv1", "norm2", "conv2")))

    expected = {"quantize.embedding", "quantize.power_vals"} | pairs("encoder.quant_conv", "decoder.post_quant_conv")
    for half in ("encoder", "decoder"):
        expected |= pairs(*(f"{half}.{part}" for part in ("conv_in", "conv_out", "norm_out")))
        expected |= block(f"{half}.mid.block_1") | block(f"{half}.mid.block_2")
        expected |= pairs(*(f"{half}.mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")))
    for i, (down, up) in enumerate(zip((4, 3, 4, 3, 4), (4, 4, 3, 4, 3))):
        expected |= {key for j in range(down) for key in block(f"encoder.down.{i}.block.{j}")}
        expected |= {key for j in range(up) for key in block(f"decoder.up.{i}.block.{j}")}
    expected |= pairs(*(f"encoder.down.{i}.downsample.conv" for i in range(4)),
                      *(f"decoder.up.{i}.upsample.conv" for i in range(1, 5)))
    expected |= pairs(*(f"{path}.{i}.block.0.nin_shortcut" for path in ("encoder.down", "decoder.up") for i in (1, 3)))
    assert set(state) == expected
    assert state["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert state["decoder.up.3.block.0.nin_shortcut.weight"] == (256, 512, 1, 1)
    assert state["encoder.conv_out.weight"] == (13, 512, 3, 3) and state["decoder.conv_out.weight"] == (3, 128, 3, 3)


# Emu3


def test_real_emu3_builds():
    with torch.device("meta"):
        tokenizer = Emu3VQ(EMU3)
    assert sum(p.numel() for p in tokenizer.parameters()) == 270_740_287
    assert tokenizer.codebook_size == 32768 and tokenizer.downsample == 8
    assert tokenizer.model.quantize.embedding.weight.shape == (32768, 4)


def test_emu3_is_the_stock_model(scenes):
    tokenizer = fitted("emu3vq", scenes)
    pictures = scenes[:3, :, :, :40]
    with torch.no_grad():
        stock = tokenizer.model.encode(
            pictures.float() / 127.5 - 1, image_sizes=torch.tensor([[48, 40]] * 3)
        ).image_tokens
        codes = tokenizer.encode(pictures)
        assert torch.equal(torch.stack(stock), codes)
        assert torch.allclose(tokenizer.images_of(tokenizer.codewords(codes)), tokenizer.model.decode(codes), atol=1e-5)


def test_emu3_moves_dead_codes():
    tokenizer = build_image_tokenizer("emu3vq", **TINY["emu3vq"])
    z, codes = torch.full((1, 4, 2, 2), 7.0), torch.zeros(1, 2, 2, dtype=torch.int64)
    before = tokenizer.model.quantize.embedding.weight.detach().clone()
    for _ in range(tokenizer.patience - 1):
        tokenizer.after_step(z, codes)
    assert torch.equal(tokenizer.model.quantize.embedding.weight, before)
    tokenizer.after_step(z, codes)
    after = tokenizer.model.quantize.embedding.weight
    assert torch.equal(after[0], before[0]) and (after[1:] == 7).all()


# training


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_reach_everything(name, scenes):
    tokenizer = build_image_tokenizer(name, **TINY[name]).train()
    forward = tokenizer(scenes[:4])
    assert forward.images.shape == (4, 3, 48, 48) and forward.codes.shape == (4, 6, 6)
    forward.loss.backward()
    without = [key for key, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(key.endswith((".k.bias", ".k_proj.bias")) for key in without), without  # a bias on keys moves no softmax
    tokenizer.zero_grad()
    x = scenes[:4].float() / 127.5 - 1
    z = tokenizer.latents(x)
    tokenizer.images_of(z + (tokenizer.codewords(tokenizer.nearest(z)) - z).detach()).sub(x).abs().mean().backward()
    assert tokenizer.get_parameter(
        "encoder.conv_in.weight" if name == "magvit" else "model.encoder.conv_in.weight"
    ).grad.any()


@pytest.mark.parametrize("name", LEARNED)
def test_training_lowers_the_loss_and_is_repeatable(name, scenes):
    untrained = reconstruction_report(build_image_tokenizer(name, **TINY[name]), scenes[:32])
    lines = []
    tokenizers = [build_image_tokenizer(name, seed=1, **TINY[name]) for _ in range(2)]
    reports = [tokenizer.fit(scenes[:32], steps=10, seed=5, log=lines.append) for tokenizer in tokenizers]
    assert reports[0].psnr_db > untrained.psnr_db + 1 and reports[0].steps == 10 and not tokenizers[0].training
    assert lines[0].startswith(f"{name} step 10")
    assert reports[0].psnr_db == reports[1].psnr_db
    with torch.no_grad():
        fresh = build_image_tokenizer(name, seed=1, **TINY[name])
        assert tokenizers[0](scenes[:32]).loss < fresh(scenes[:32]).loss


@pytest.mark.parametrize("name", LEARNED)
def test_fit_wants_a_budget(name, scenes):
    tokenizer = build_image_tokenizer(name, **TINY[name])
    for budget in ({}, {"steps": 0}, {"seconds": -1.0}):
        with pytest.raises(ValueError, match="give at least one of them, positive"):
            tokenizer.fit(scenes[:16], **budget)
    assert tokenizer.fit(scenes[:16], seconds=0.5).steps > 0
