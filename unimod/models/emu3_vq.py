"""Emu3's image tokenizer: transformers' own Emu3VQVAE at any width, with the training step that transformers leaves out.

    tokenizer = build_image_tokenizer("emu3vq")                  # small: 48x48 pictures -> 6x6 codes of a 256 x 4 codebook
    with torch.device("meta"): Emu3VQ(EMU3)                      # the real one: 8x down, codebook 32,768 x 4

The stock model is for video: a picture is repeated `temporal` times and the first decoded frame is taken. Here the frames, all equal, go
through the 2-D convolutions once instead of `temporal` times; codes and pictures are those of the stock encode and decode.
The file holds the stock key layout (encoder., decoder., quantize., quant_conv., post_quant_conv.).

Measured on scenes (default level, 4,000 training and 400 test pictures), the small one, 1,092,543 parameters, 1,000 steps (`python -m
unimod.models.image_tokenizer emu3vq pictures.npz`), 170 s of one core: test pictures 27.3 dB, 255 codes, all 400 read fully right by
unimod.evaluate after encode and decode.

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

from unimod.models.image_tokenizer import LearnedTokenizer, at_least_one


@dataclass(frozen=True)
class Emu3VQConfig:
    """Defaults are the small tokenizer."""

    codebook_size: int = 256
    latent_channels: int = 4
    base_channels: int = 32
    """Channels at multiplier 1; 32-group norms need a multiple of 32."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2)
    """One per level, from the finest; each level but the last halves the side."""
    res_blocks: int = 1
    attention_levels: tuple[int, ...] = (3,)
    temporal: int = 1
    """Frames that one code plane stands for: a power of two. The real 4 squeezes pictures twice through swish in four channels and learns
    far slower: 13.7 against 17.6 dB after 200 steps on scenes, without the quantiser."""

    def __post_init__(self):
        numbers = {f"multipliers[{i}]": m for i, m in enumerate(self.multipliers)}
        at_least_one(codebook_size=self.codebook_size, latent_channels=self.latent_channels, res_blocks=self.res_blocks, **numbers)
        at_least_one(base_channels=self.base_channels, temporal=self.temporal)
        if self.base_channels % 32:
            raise ValueError(f"base_channels is {self.base_channels}: give a multiple of 32, the group count of every norm")
        if self.temporal & (self.temporal - 1):
            raise ValueError(f"temporal is {self.temporal}: give a power of two")
        if not self.multipliers or any(self.multipliers[i : i + 1] != self.multipliers[-1:] for i in self.attention_levels):
            raise ValueError(
                f"attention_levels {self.attention_levels} with multipliers {self.multipliers}: attention works at the last level's width, "
                "so give only levels with the last multiplier"
            )


EMU3 = Emu3VQConfig(32768, 4, 256, (1, 2, 2, 4), 2, (3,), 4)


class Emu3VQ(LearnedTokenizer):
    name = "emu3vq"
    Config = Emu3VQConfig
    learning_rate, batch_size = 4e-3, 4
    commitment = 0.25
    patience = 50  # steps that a code may go unused

    def __init__(self, config: Emu3VQConfig):
        super().__init__()
        self.config = config
        self.codebook_size, self.downsample = config.codebook_size, 2 ** (len(config.multipliers) - 1)
        self.model = Emu3VQVAE(
            Emu3VQVAEConfig(
                codebook_size=config.codebook_size,
                embed_dim=config.latent_channels,
                latent_channels=config.latent_channels,
                temporal_downsample_factor=config.temporal,
                base_channels=config.base_channels,
                channel_multiplier=list(config.multipliers),
                num_res_blocks=config.res_blocks,
                attn_resolutions=list(config.attention_levels),
                hidden_size=config.base_channels * config.multipliers[-1],
            )
        )
        self.register_buffer("idle", torch.zeros(config.codebook_size), persistent=False)  # steps since a code was last used

    def stored(self) -> nn.Module:
        return self.model

    @classmethod
    def config_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Emu3VQConfig | None:
        """Sizes as a released file shows them, in transformers' key layout or BAAI's own."""
        shapes = {cls.key_of(key): shape for key, shape in shapes.items()}
        if "quantize.embedding.weight" not in shapes or "encoder.time_conv.0.conv.conv.weight" not in shapes:
            return None
        codes, latent = shapes["quantize.embedding.weight"]
        base = shapes["encoder.conv_in.weight"][0]
        down = {tuple(map(int, re.findall(r"\d+", key)[:2])): shape[0] for key, shape in shapes.items()
                if re.fullmatch(r"encoder\.down_block\.down\.\d+\.block\.\d+\.conv1\.weight", key)}
        levels = range(1 + max(level for level, _ in down))
        return Emu3VQConfig(
            codes, latent, base, tuple(down[level, 0] // base for level in levels), sum(level == 0 for level, _ in down),
            tuple(level for level in levels if f"encoder.down_block.down.{level}.attn.0.q_proj.weight" in shapes),
            2 ** sum(bool(re.fullmatch(r"encoder\.time_conv\.\d+\.conv\.conv\.weight", key)) for key in shapes))

    @staticmethod
    def key_of(key: str) -> str:
        """BAAI's names as transformers': down, up and mid have longer ones, attention's norm stands beside it, its 1 x 1 convolutions are linear."""
        key = re.sub(r"^encoder\.down\.", "encoder.down_block.down.", re.sub(r"^decoder\.up\.", "decoder.up_block.up.", key))
        key = re.sub(r"^(encoder|decoder)\.mid\.", r"\1.middle_block.", key)
        key = re.sub(r"\.attn_1\.norm\.", ".attn_norm.", re.sub(r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1.", key))
        key = re.sub(r"(\.attn(?:_1|\.\d+)\.)([qkv])\.", r"\1\2_proj.", key)
        return re.sub(r"(\.attn(?:_1|\.\d+)\.)proj_out\.", r"\1out_proj.", key)

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
        """|sg(z) - q|^2 moves the codewords, commitment * |z - sg(q)|^2 the encoder (van den Oord et al., arXiv 1711.00937)."""
        q = self.codewords(codes)
        return F.mse_loss(q, z.detach()) + self.commitment * F.mse_loss(z, q.detach())

    def after_step(self, z: Tensor, codes: Tensor) -> None:
        """A code unused for `patience` steps is put on a random latent of this step."""
        self.idle += 1
        self.idle[codes.unique()] = 0
        dead = (self.idle >= self.patience).nonzero().flatten()
        rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        chosen = torch.randint(len(rows), (len(dead),), device=z.device)
        with torch.no_grad():
            self.model.quantize.embedding.weight[dead] = rows[chosen]
        self.idle[dead] = 0
