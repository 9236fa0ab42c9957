"""Emu3's image tokenizer: transformers' own Emu3VQVAE at any width, and the training step that transformers lacks.

    tokenizer = build_image_tokenizer("emu3vq")              # small: 48x48 images -> 6x6 codes of a 256 x 4 codebook
    with torch.device("meta"): Emu3VQ(EMU3)                  # the real one: 8x down, codebook 32,768 x 4

The stock model is for video: an image is repeated `temporal` times and the first decoded frame is taken. Here the
frames, all equal, go through the 2-D convolutions once instead of `temporal` times; codes and images are those of the
stock encode and decode. The file has the stock keys (encoder., decoder., quantize., quant_conv., post_quant_conv.).

Measured on scenes (default level, 4,000 training and 400 test images), the small one, 1,092,543 parameters, 1,000 steps
(`python -m unimod.models.image_tokenizer emu3vq pictures.npz`), 170 s of one core: test images 27.3 dB, 255 codes, all
400 read fully right by unimod.evaluate after encode and decode.

D latent channels, K codes, t frames.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from .image_tokenizer import LearnedTokenizer, at_least_one


@dataclass(frozen=True)
class Emu3VQConfig:
    """Sizes; the defaults are the small tokenizer."""

    codebook_size: int = 256
    latent_channels: int = 4
    base_channels: int = 32  # channels at multiplier 1; 32-group norms need a multiple of 32
    multipliers: tuple[int, ...] = (1, 1, 2, 2)  # one per level, from the finest; each but the last halves the side
    res_blocks: int = 1
    attention_levels: tuple[int, ...] = (3,)
    # frames that one code plane stands for: a power of two. The real 4 passes images twice through swish in four
    # channels and learns far slower: 13.7 against 17.6 dB after 200 steps on scenes, without the quantiser
    temporal: int = 1

    def __post_init__(self):
        counts = ("codebook_size", "latent_channels", "res_blocks", "base_channels", "temporal")
        at_least_one(**{name: getattr(self, name) for name in counts})
        at_least_one(**{f"multipliers[{i}]": m for i, m in enumerate(self.multipliers)})
        if self.base_channels % 32:
            raise ValueError(f"base_channels is {self.base_channels}: give a multiple of 32, the norms' group count")
        if self.temporal & (self.temporal - 1):
            raise ValueError(f"temporal is {self.temporal}: give a power of two")
        last = self.multipliers[-1:]
        if not last or any(self.multipliers[i : i + 1] != last for i in self.attention_levels):
            raise ValueError(f"attention_levels {self.attention_levels} with multipliers {self.multipliers}: attention "
                             "works at the last level's width, so give only levels with the last multiplier")


EMU3 = Emu3VQConfig(32768, 4, 256, (1, 2, 2, 4), 2, (3,), 4)


BAAI_KEYS = ((r"^encoder\.down\.", "encoder.down_block.down."), (r"^decoder\.up\.", "decoder.up_block.up."),
             (r"^(encoder|decoder)\.mid\.", r"\1.middle_block."), (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
             (r"\.attn_1\.norm\.", ".attn_norm."), (r"(\.attn(?:_1|\.\d+)\.)([qkv])\.", r"\1\2_proj."),
             (r"(\.attn(?:_1|\.\d+)\.)proj_out\.", r"\1out_proj."))
"""Patterns in the keys of BAAI's file -> transformers' names, applied in order."""


class Emu3VQ(LearnedTokenizer):
    """Encoder, codebook of K vectors and decoder of transformers' Emu3VQVAE, which is `model`."""

    name = "emu3vq"
    Config = Emu3VQConfig
    learning_rate, batch_size = 4e-3, 4
    commitment = 0.25
    patience = 50  # steps that a code may go unused

    def __init__(self, config: Emu3VQConfig):
        super().__init__()
        self.config = config
        self.codebook_size, self.downsample = config.codebook_size, 2 ** (len(config.multipliers) - 1)
        self.model = Emu3VQVAE(Emu3VQVAEConfig(
            codebook_size=config.codebook_size, embed_dim=config.latent_channels,
            latent_channels=config.latent_channels, temporal_downsample_factor=config.temporal,
            base_channels=config.base_channels, channel_multiplier=list(config.multipliers),
            num_res_blocks=config.res_blocks, attn_resolutions=list(config.attention_levels),
            hidden_size=config.base_channels * config.multipliers[-1]))
        # steps since a code was last used
        self.register_buffer("idle", torch.zeros(config.codebook_size), persistent=False)

    def stored(self) -> nn.Module:
        return self.model

    @classmethod
    def config_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Emu3VQConfig | None:
        """Sizes from the shapes of a released file, in transformers' keys or BAAI's own; None for another model."""
        shapes = {cls.key_of(key): shape for key, shape in shapes.items()}
        if "quantize.embedding.weight" not in shapes or "encoder.time_conv.0.conv.conv.weight" not in shapes:
            return None
        codes, latent = shapes["quantize.embedding.weight"]
        base = shapes["encoder.conv_in.weight"][0]
        blocks = {}                                         # (level, block) -> channels
        for key, shape in shapes.items():
            if found := re.fullmatch(r"encoder\.down_block\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", key):
                blocks[int(found[1]), int(found[2])] = shape[0]
        levels = range(1 + max(level for level, _ in blocks))
        attention = "encoder.down_block.down.{}.attn.0.q_proj.weight"
        halvings = sum(bool(re.fullmatch(r"encoder\.time_conv\.\d+\.conv\.conv\.weight", key)) for key in shapes)
        return Emu3VQConfig(
            codes, latent, base, multipliers=tuple(blocks[level, 0] // base for level in levels),
            res_blocks=sum(level == 0 for level, _ in blocks),
            attention_levels=tuple(level for level in levels if attention.format(level) in shapes),
            temporal=2**halvings)

    @staticmethod
    def key_of(key: str) -> str:
        for pattern, name in BAAI_KEYS:
            key = re.sub(pattern, name, key)
        return key

    def latents(self, x: Tensor) -> Tensor:
        e = self.model.encoder
        h = e.conv_out(F.silu(e.norm_out(e.middle_block(e.down_block(e.conv_in(x))))))
        h = h[:, :, None].expand(-1, -1, self.config.temporal, -1, -1)  # equal frames, [B, D, t, h, w]
        for conv in e.time_conv:
            h = F.silu(conv(h))
        for block in e.time_res_stack:
            h = block(h)
        return self.model.quant_conv(h)[:, :, 0]  # one frame is left

    def nearest(self, z: Tensor) -> Tensor:
        return self.model.quantize(z[:, None])[:, 0]

    def codewords(self, codes: Tensor) -> Tensor:
        return self.model.quantize.embedding(codes).permute(0, 3, 1, 2)

    def images_of(self, q: Tensor) -> Tensor:
        d = self.model.decoder
        q = q[:, :, None]
        both = torch.cat((self.model.post_quant_conv(q), q))  # features, and the conditions of the spatial norms
        for block in d.time_res_stack:
            both = block(both)
        for conv in d.time_conv:
            both = F.silu(conv(both))
        h, condition = both[:, :, 0].chunk(2)  # the first frame
        h = d.up_block(d.middle_block(d.conv_in(h), condition), condition)
        return d.conv_out(F.silu(d.norm_out(h, condition)))

    def quantiser_loss(self, z: Tensor, codes: Tensor) -> Tensor:
        """|sg(z) - q|^2 + commitment * |z - sg(q)|^2, means over all entries (van den Oord et al., arXiv 1711.00937).

        The first term moves the codewords, the second the encoder.
        """
        q = self.codewords(codes)
        return F.mse_loss(q, z.detach()) + self.commitment * F.mse_loss(z, q.detach())

    def after_step(self, z: Tensor, codes: Tensor) -> None:
        """Replaces the codeword of every code unused for `patience` steps by a random latent of this step."""
        self.idle += 1
        self.idle[codes.unique()] = 0
        dead = (self.idle >= self.patience).nonzero().flatten()
        rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        chosen = torch.randint(len(rows), (len(dead),), device=z.device)
        with torch.no_grad():
            self.model.quantize.embedding.weight[dead] = rows[chosen]
        self.idle[dead] = 0
