"""MAGVIT-v2 against the plain reference in tests/reference, and from files in the layout it was released in."""

import pytest
import torch
from reference import magvit as ref
from safetensors.torch import save_file

from unimod.models.image_tokenizer import load_image_tokenizer
from unimod.models.magvit import SHOWO, MagVitConfig, MagVitV2

SMALL = MagVitConfig(32, (1, 2, 2, 4, 4), (1, 1, 2, 2, 4), (2, 1, 1, 2, 1), (1, 2, 1, 1, 2), bits=7, groups=32)
"""The original's five levels, multipliers and groups at a quarter of its width."""
SIZES = [(16, 16), (32, 48), (64, 16)]


def pictures(height, width):
    return torch.randint(
        0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(height + width), dtype=torch.uint8
    )


@pytest.fixture(scope="module")
def tokenizer():
    """Random weights, the norms' gains and biases too; latents are moved to about zero, so that all bits are in use."""
    torch.manual_seed(0)
    tokenizer = MagVitV2(SMALL).eval()
    with torch.no_grad():
        for p in tokenizer.parameters():
            p.mul_(1.5) if p.ndim > 1 else p.add_(0.2 * torch.randn_like(p))
        last = tokenizer.encoder.quant_conv
        z = (torch.cat([tokenizer.latents(pictures(*size).float() / 127.5 - 1).flatten(2) for size in SIZES], 2)
             .transpose(0, 1) .flatten(1))
        last.weight.div_(z.std(1)[:, None, None, None])
        last.bias.sub_(z.mean(1)).div_(z.std(1))
    return tokenizer


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_codes_are_the_references(tokenizer, size):
    images, state = pictures(*size), tokenizer.state_dict()
    x = (images.float() / 255 - 0.5) / 0.5
    z = ref.latents(state, x)
    torch.testing.assert_close(tokenizer.latents(x), z, atol=1e-4, rtol=0)
    assert z.abs().min() > 1e-3, "no sign is a matter of rounding here"
    codes = tokenizer.encode(images)
    assert codes.shape == (2, size[0] // 16, size[1] // 16) and codes.unique().numel() > codes.numel() / 2
    assert torch.equal(codes, ref.encode(state, x))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_pictures_are_the_references(tokenizer, size):
    codes = torch.randint(2**SMALL.bits, (2, size[0] // 16, size[1] // 16), generator=torch.Generator().manual_seed(3))
    y = ref.decode(tokenizer.state_dict(), codes)
    assert y.shape == (2, 3, *size) and y.std() > 0.02
    torch.testing.assert_close(tokenizer.images_of(tokenizer.codewords(codes)), y, atol=1e-4, rtol=0)
    off = tokenizer.decode(codes).short() - ref.to_bytes(y).short()
    assert set(off.unique().tolist()) <= {0, 1}, "ours are rounded to the nearest level, the reference's cut off"


@pytest.mark.parametrize("file", ["model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin"])
def test_the_released_layout_is_read_off_its_shapes(tokenizer, tmp_path, file):
    state = tokenizer.state_dict()
    torch.save(state, tmp_path / file) if file.endswith("bin") else save_file(state, tmp_path / file)
    (tmp_path / "config.json").write_text('{"_class_name": "MAGVITv2"}')
    loaded = load_image_tokenizer(tmp_path)
    assert type(loaded) is MagVitV2 and loaded.config == SMALL and not loaded.training
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    assert torch.equal(loaded.encode(pictures(32, 48)), tokenizer.encode(pictures(32, 48)))


def test_the_real_configuration_is_read_off_the_real_shapes():
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in MagVitV2(SHOWO).state_dict().items()}
    assert MagVitV2.config_of(shapes) == SHOWO
    assert MagVitV2.config_of({key: shape for key, shape in shapes.items() if key != "quantize.power_vals"}) is None
