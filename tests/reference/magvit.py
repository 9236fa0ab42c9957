"""MAGVIT-v2 tokenizer, plain reference: functions of a flat state dict whose keys are the published ones.

The widths, the number of levels, the residual blocks of each level and the number of code bits are all read off the
state dict, so the same code serves the published file and a toy one. Nothing is trained or cached here.
"""

import math

import torch
import torch.nn.functional as F

EPS = 1e-6


def swish(x):
    return x * torch.sigmoid(x)


def group_norm(state, name, x, groups):
    """GroupNorm with gain and bias: x [B, C, H, W] -> same shape; biased variance per group of C / groups channels."""
    b, c, h, w = x.shape
    g = x.reshape(b, groups, (c // groups) * h * w)
    centred = g - g.mean(-1, keepdim=True)
    g = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + EPS)
    return (g.reshape(b, c, h, w) * state[f"{name}.weight"][None, :, None, None]
            + state[f"{name}.bias"][None, :, None, None])


def conv(state, name, x, stride=1, padding=None):
    """2-D convolution; unless told otherwise the zero padding keeps the size (1 for a 3x3 kernel, 0 for a 1x1)."""
    weight = state[f"{name}.weight"]
    return F.conv2d(
        x, weight, state[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2 if padding is None else padding
    )


def res_block(state, name, x, groups):
    """Norm, swish, conv, twice, plus the input; the input goes through a 1x1 conv where the channels change."""
    h = conv(state, f"{name}.conv1", swish(group_norm(state, f"{name}.norm1", x, groups)))
    h = conv(state, f"{name}.conv2", swish(group_norm(state, f"{name}.norm2", h, groups)))
    if f"{name}.nin_shortcut.weight" in state:
        x = conv(state, f"{name}.nin_shortcut", x)
    return x + h


def attention(state, name, x, groups):
    """Single-head attention over all H * W places of each image, with a residual: x [B, C, H, W] -> same shape."""
    b, c, h, w = x.shape
    y = group_norm(state, f"{name}.norm", x, groups)
    q, k, v = (conv(state, f"{name}.{part}", y).reshape(b, c, h * w) for part in "qkv")
    out = torch.zeros_like(v)
    for i in range(b):
        scores = q[i].T @ k[i] / math.sqrt(c)                                  # [HW queries, HW keys]
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        out[i] = (weights @ v[i].T).T
    return x + conv(state, f"{name}.proj_out", out.reshape(b, c, h, w))


def middle(state, name, x, groups):
    x = res_block(state, f"{name}.block_1", x, groups)
    x = attention(state, f"{name}.attn_1", x, groups)
    return res_block(state, f"{name}.block_2", x, groups)


def level_blocks(state, name, x, groups):
    """Every residual block of one level, block.0 upwards, as many as the state dict has."""
    j = 0
    while f"{name}.block.{j}.norm1.weight" in state:
        x = res_block(state, f"{name}.block.{j}", x, groups)
        j += 1
    return x


def count_levels(state, name):
    i = 0
    while f"{name}.{i}.block.0.norm1.weight" in state:
        i += 1
    return i


def latents(state, x, groups=32):
    """Encoder up to the quantiser: images x [B, 3, H, W] in [-1, 1] -> z [B, bits, h, w]."""
    y = conv(state, "encoder.conv_in", x)
    for i in range(count_levels(state, "encoder.down")):
        y = level_blocks(state, f"encoder.down.{i}", y, groups)
        if f"encoder.down.{i}.downsample.conv.weight" in state:
            y = F.pad(y, (0, 1, 0, 1))  # one column of zeros right, one row below
            y = conv(state, f"encoder.down.{i}.downsample.conv", y, stride=2, padding=0)
    y = middle(state, "encoder.mid", y, groups)
    y = conv(state, "encoder.conv_out", swish(group_norm(state, "encoder.norm_out", y, groups)))
    return conv(state, "encoder.quant_conv", y)


def encode(state, x, groups=32):
    """Images x [B, 3, H, W] in [-1, 1] -> codes, int64 [B, h, w]: bit i is (z_i > 0) and channel 0 weighs most."""
    z = latents(state, x, groups)
    codes = torch.zeros(z.shape[0], z.shape[2], z.shape[3], dtype=torch.long)
    for i in range(z.shape[1]):
        codes = codes * 2 + (z[:, i] > 0).long()
    return codes


def decode(state, codes, groups=32):
    """Codes [B, h, w] -> images [B, 3, H, W], about [-1, 1] and not clamped; every bit becomes +1 or -1."""
    weight = state["decoder.post_quant_conv.weight"]
    bits = weight.shape[1]
    z = torch.stack([(codes // 2 ** (bits - 1 - i)) % 2 * 2 - 1 for i in range(bits)], dim=1).to(weight.dtype)
    y = conv(state, "decoder.conv_in", conv(state, "decoder.post_quant_conv", z))
    y = middle(state, "decoder.mid", y, groups)
    for i in reversed(range(count_levels(state, "decoder.up"))):
        y = level_blocks(state, f"decoder.up.{i}", y, groups)
        if f"decoder.up.{i}.upsample.conv.weight" in state:
            y = y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)      # nearest neighbour, twice the size
            y = conv(state, f"decoder.up.{i}.upsample.conv", y)
    return conv(state, "decoder.conv_out", swish(group_norm(state, "decoder.norm_out", y, groups)))


def to_bytes(y):
    """Decoder output [B, 3, H, W] -> uint8, same shape; clamped to [0, 255], the fraction cut off."""
    return (((y + 1) / 2).clamp(0, 1) * 255).to(torch.uint8)
