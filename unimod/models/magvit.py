"""MAGVIT-v2 for images: convolutional encoder, lookup-free quantiser and decoder, as Show-o's image tokenizer.

    tokenizer = build_image_tokenizer("magvit")              # small: 48x48 images -> 6x6 codes of 8 bits
    with torch.device("meta"): MagVitV2(SHOWO)               # the real one: 16x down, 13 bits, 95,387,004 parameters

A code is the signs of the latent's channels read as a binary number, channel 0 first (the most significant bit); zero
counts as 0. Modules are named as in the checkpoint showlab/magvitv2, so its 382 entries load as they are. Quantiser: Yu
et al., arXiv 2310.05737.

Measured on scenes (default level, 4,000 training and 400 test images), the small one, 621,723 parameters, 1,000 steps
(`python -m unimod.models.image_tokenizer magvit pictures.npz`), 90 to 111 s of one core: test images 28.2 dB, 206
codes, all 400 read fully right by unimod.evaluate after encode and decode.

N latent vectors, D bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .image_tokenizer import LearnedTokenizer, at_least_one


@dataclass(frozen=True)
class MagVitConfig:
    """Tuples run from the finest level to the coarsest; the defaults are the small tokenizer."""

    ch: int = 16  # channels at multiplier 1
    encoder_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    decoder_multipliers: tuple[int, ...] = (1, 1, 2, 4)
    encoder_blocks: tuple[int, ...] = (1, 1, 1, 1)  # residual blocks per level
    decoder_blocks: tuple[int, ...] = (1, 1, 1, 1)
    bits: int = 8
    groups: int = 8  # of every GroupNorm

    def __post_init__(self):
        levels = (self.encoder_multipliers, self.decoder_multipliers, self.encoder_blocks, self.decoder_blocks)
        numbers = {f"level {i}": n for row in levels for i, n in enumerate(row)}
        at_least_one(ch=self.ch, bits=self.bits, groups=self.groups, **numbers)
        lengths = [len(row) for row in levels]
        if not self.encoder_blocks or len(set(lengths)) > 1:
            raise ValueError(f"multipliers and blocks have {lengths} levels: give all four the same number")
        if self.bits > 18:
            raise ValueError(f"bits is {self.bits}: give at most 18, the codebook is held as a table of 2^bits rows")
        if self.ch % self.groups:
            raise ValueError(f"ch is {self.ch} and groups {self.groups}: ch must be a multiple of groups")


SHOWO = MagVitConfig(128, (1, 2, 2, 4, 4), (1, 1, 2, 2, 4), (4, 3, 4, 3, 4), (4, 4, 3, 4, 3), bits=13, groups=32)


class ResBlock(nn.Module):
    """norm, swish, conv, norm, swish, conv, plus the input; a 1x1 conv on the input where the channels change."""

    def __init__(self, inside: int, outside: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inside, eps=1e-6)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outside, eps=1e-6)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all places: x + proj_out(softmax(q k^T / sqrt(C)) v)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def named(**modules: nn.Module) -> nn.Sequential:
    """The modules one after the other, under these names."""
    return nn.Sequential(OrderedDict(modules))


def middle(channels: int, groups: int) -> nn.Sequential:
    return named(block_1=ResBlock(channels, channels, groups), attn_1=Attention(channels, groups),
                 block_2=ResBlock(channels, channels, groups))


def level(inside: int, outside: int, blocks: int, groups: int, then: str | None) -> nn.Sequential:
    """Residual blocks at one resolution, then the change to the next: "downsample", "upsample" or None."""
    block = nn.Sequential(*(ResBlock(inside if i == 0 else outside, outside, groups) for i in range(blocks)))
    if then == "downsample":
        return named(block=block, downsample=named(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                                                   conv=nn.Conv2d(outside, outside, 3, stride=2)))
    if then == "upsample":
        return named(block=block, upsample=named(nearest=nn.Upsample(scale_factor=2.0),
                                                 conv=nn.Conv2d(outside, outside, 3, padding=1)))
    return named(block=block)


class FromCoarsest(nn.ModuleList):
    """Levels in the encoder's order, from the finest on, applied in the other."""

    def forward(self, x: Tensor) -> Tensor:
        for one in reversed(self):
            x = one(x)
        return x


def encoder(c: MagVitConfig) -> nn.Sequential:
    """[B, 3, H, W] in [-1, 1] -> [B, D, h, w]."""
    widths, last = [c.ch * m for m in (1, *c.encoder_multipliers)], len(c.encoder_blocks) - 1
    return named(
        conv_in=nn.Conv2d(3, c.ch, 3, padding=1),
        down=nn.Sequential(*(level(widths[i], widths[i + 1], n, c.groups, "downsample" if i < last else None)
                             for i, n in enumerate(c.encoder_blocks))),
        mid=middle(widths[-1], c.groups), norm_out=nn.GroupNorm(c.groups, widths[-1], eps=1e-6), swish=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], c.bits, 3, padding=1), quant_conv=nn.Conv2d(c.bits, c.bits, 1))


def decoder(c: MagVitConfig) -> nn.Sequential:
    """[B, D, h, w] -> [B, 3, H, W] in about [-1, 1]."""
    widths = [c.ch * m for m in (*c.decoder_multipliers, c.decoder_multipliers[-1])]
    return named(
        post_quant_conv=nn.Conv2d(c.bits, c.bits, 1), conv_in=nn.Conv2d(c.bits, widths[-1], 3, padding=1),
        mid=middle(widths[-1], c.groups),
        up=FromCoarsest(level(widths[i + 1], widths[i], n, c.groups, "upsample" if i else None)
                        for i, n in enumerate(c.decoder_blocks)),
        norm_out=nn.GroupNorm(c.groups, widths[0], eps=1e-6), swish=nn.SiLU(),
        conv_out=nn.Conv2d(widths[0], 3, 3, padding=1))


class LookupFree(nn.Module):
    """Codes are signs. Buffers: `power_vals` int64 [D] = 2^(D-1) .. 1; `embedding` [2^D, D], the codewords of -1 and
    +1."""

    def __init__(self, bits: int):
        super().__init__()
        powers = 2 ** torch.arange(bits - 1, -1, -1)
        codes = torch.arange(2**bits)
        self.register_buffer("embedding", (codes[:, None] & powers).ne(0).float() * 2 - 1)
        self.register_buffer("power_vals", powers)


class MagVitV2(LearnedTokenizer):
    """Encoder, lookup-free quantiser and decoder."""

    name = "magvit"
    Config = MagVitConfig
    learning_rate, batch_size = 3e-3, 8
    commitment, entropy = 0.1, 0.1  # weights of the quantiser's losses; 0.5 and 0.02 leave 4 codes in use

    def __init__(self, config: MagVitConfig):
        super().__init__()
        self.config = config
        self.codebook_size, self.downsample = 2**config.bits, 2 ** (len(config.encoder_blocks) - 1)
        self.encoder, self.decoder, self.quantize = encoder(config), decoder(config), LookupFree(config.bits)

    @classmethod
    def config_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> MagVitConfig | None:
        """Widths, levels and bits from the shapes of a released file, whose norms have 32 groups; None for another
        model."""
        if "quantize.power_vals" not in shapes or "encoder.conv_in.weight" not in shapes:
            return None
        ch = shapes["encoder.conv_in.weight"][0]
        levels = range(1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.down.")))

        def blocks(part: str, i: int) -> int:
            return sum(key.startswith(f"{part}.{i}.block.") and key.endswith(".conv1.weight") for key in shapes)

        def multiplier(part: str, i: int) -> int:
            return shapes[f"{part}.{i}.block.0.conv2.weight"][0] // ch

        def both(of: Callable[[str, int], int]) -> list[tuple[int, ...]]:
            return [tuple(of(part, i) for i in levels) for part in ("encoder.down", "decoder.up")]

        return MagVitConfig(ch, *both(multiplier), *both(blocks), bits=shapes["quantize.power_vals"][0], groups=32)

    def latents(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def nearest(self, z: Tensor) -> Tensor:
        return ((z > 0) * self.quantize.power_vals[:, None, None]).sum(1)  # code = sum of bit_i 2^(D-1-i)

    def codewords(self, codes: Tensor) -> Tensor:
        return self.quantize.embedding[codes].permute(0, 3, 1, 2)          # of -1 and +1

    def images_of(self, q: Tensor) -> Tensor:
        return self.decoder(q)

    def quantiser_loss(self, z: Tensor, codes: Tensor) -> Tensor:
        """commitment * |z - q|^2 + entropy * (mean H(p) - H(mean p)), entropies in nats (Yu et al., arXiv 2310.05737).

        p(code | z) = softmax(2 z . q), a product of sigmoid(4 z_i) over the bits. The entropy term makes each latent
        sure of its code and uses all codes.
        """
        rows = z.permute(0, 2, 3, 1).reshape(-1, self.config.bits)
        log_p = (2 * rows @ self.quantize.embedding.T).log_softmax(-1)  # [N, 2^D]
        p = log_p.exp()
        mean_p = p.mean(0)
        # clamped, since the log of an underflown 0 would be a nan
        entropy = -(p * log_p).sum(-1).mean() + (mean_p * mean_p.clamp_min(1e-12).log()).sum()
        return self.commitment * F.mse_loss(z, self.codewords(codes)) + self.entropy * entropy
