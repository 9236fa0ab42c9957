"""Pictures to tokens and back: one interface, three members.

    dictionary  PatchDictionary (patches.py)  the distinct 8x8 patches themselves: lossless where they fit, fitted in seconds
    magvit      MagVitV2 (magvit.py)          lookup-free quantiser, the structure of Show-o's tokenizer at any width
    emu3vq      Emu3VQ (emu3_vq.py)           learned codebook, transformers' Emu3VQVAE at any width

    tokenizer = build_image_tokenizer("magvit")
    report = tokenizer.fit(pictures, seconds=180)          # pictures: uint8 [B, 3, H, W], H and W multiples of tokenizer.downsample
    codes = tokenizer.encode(pictures)                     # int64 [B, h, w]
    tokenizer.save("runs/magvit"); tokenizer = load_image_tokenizer("runs/magvit")

Fit and measure on pictures of your own, kept in one .npz with uint8 arrays `train` and `test` [N, H, W, 3]; prints one JSON line:

    python -m unimod.models.image_tokenizer magvit pictures.npz --steps 1000 --out runs/magvit

B pictures, H x W pixels, h x w tokens, D latent channels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import expanded
from .weights import CheckpointError, Weights, fill, read_json

MEMBERS = {
    "dictionary": ("unimod.models.patches", "PatchDictionary"),
    "magvit": ("unimod.models.magvit", "MagVitV2"),
    "emu3vq": ("unimod.models.emu3_vq", "Emu3VQ"),
}
CONFIG_FILE, WEIGHTS_FILE = "tokenizer.json", "tokenizer.safetensors"
Log = Callable[[str], object]
PIXELS_AT_ONCE = 1 << 19  # encode and decode walk the batch in pieces of about this many pixels: bounded memory
MEASURED = 256  # pictures a FitReport is measured on


@dataclass(frozen=True)
class ReconstructionReport:
    """What encode and decode lose."""

    psnr_db: float
    """10 log10(255^2 / mean squared error over all pictures), decibels; inf when nothing is lost."""
    exact_fraction: float
    """Share of the pictures that come back bit for bit."""
    codes_used: int
    """Distinct codes these pictures need."""


@dataclass(frozen=True)
class FitReport(ReconstructionReport):
    """What a fit did, measured on the first 256 of the pictures it was fitted on."""

    name: str
    pictures: int
    seconds: float
    steps: int
    """Optimiser steps; 0 for the dictionary."""
    parameters: int
    distinct_patches: int | None = None
    """Distinct patches in the fitting pictures; None for the learned tokenizers."""
    warning: str = ""
    """Plain words when the result is not what one would hope for; empty otherwise."""


class ImageTokenizer(nn.Module, ABC):
    """Base of the three: checks, batching, files. A member gives `Config`, `fit`, `_codes` and `_pixels`.

    One that was released in a layout of its own also gives `config_of` and `key_of`.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    codebook_size: int
    """Codes are 0 .. codebook_size - 1."""
    downsample: int
    """Pixels along one side of a token."""

    @classmethod
    def config_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> object | None:
        """The config that a released file of these shapes has; None when it is not of this member."""
        return None

    @staticmethod
    def key_of(key: str) -> str:
        """The entry of `stored().state_dict()` that a key of a released file fills."""
        return key

    @abstractmethod
    def fit(self, images: Tensor, *, steps: int | None = None, seconds: float | None = None, seed: int = 0, log: Log | None = None) -> FitReport:
        """Learn from uint8 pictures [N, 3, H, W] within the budget; `seed` settles every draw; `log` gets a line of progress now and then."""

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> int64 [B, h, w] with h = H / downsample, on the device of `images`. ValueError for any other input."""
        self.check_images(images)
        return self._in_pieces(self._codes, images, images[0, 0].numel())

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [B, h, w] -> uint8 [B, 3, H, W], on the device of `codes`. ValueError for codes outside 0 .. codebook_size - 1."""
        if codes.dtype != torch.int64 or codes.dim() != 3 or not codes.numel():
            raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}: give torch.int64 [B, h, w], none of them 0")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(f"codes span {low}..{high}: '{self.name}' decodes 0..{self.codebook_size - 1}; take the vocabulary's offset off")
        return self._in_pieces(self._pixels, codes, codes[0].numel() * self.downsample**2)

    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(encode(images)): uint8 [B, 3, H, W] -> the same."""
        return self.decode(self.encode(images))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json (name and config) and tokenizer.safetensors into `folder`, made if missing."""
        folder = Path(expanded(folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)                 # written last: half a folder does not load
        save_file({key: value.contiguous() for key, value in self.stored().state_dict().items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps({"name": self.name, "config": asdict(self.config)}, indent=1) + "\n", encoding="utf-8")

    def stored(self) -> nn.Module:
        """The module whose state dict is the file."""
        return self

    def check_images(self, images: Tensor) -> None:
        side = self.downsample
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"images are {images.dtype} {list(images.shape)}: give torch.uint8 [B, 3, H, W], none of them 0")
        if images.shape[2] % side or images.shape[3] % side:
            raise ValueError(f"images are {images.shape[2]} x {images.shape[3]} pixels: both must be multiples of {side}; crop or pad them")

    def _in_pieces(self, function: Callable[[Tensor], Tensor], batch: Tensor, pixels_each: int) -> Tensor:
        device = next(iter(self.state_dict().values())).device
        self.eval()
        with torch.no_grad():
            pieces = batch.split(max(1, PIXELS_AT_ONCE // pixels_each))
            return torch.cat([function(piece.to(device)).to(batch.device) for piece in pieces])


class Forward(NamedTuple):
    """One training forward of a learned tokenizer."""

    loss: Tensor  # scalar: L1 + L2 of the reconstruction, in units of [-1, 1], + the quantiser's loss
    images: Tensor  # float [B, 3, H, W] in about [-1, 1]
    latents: Tensor  # float [B, D, h, w] before quantisation
    codes: Tensor  # int64 [B, h, w]


class LearnedTokenizer(ImageTokenizer):
    """Encoder, quantiser, decoder, trained together. A member gives these five functions:

    latents(x)                float [B, 3, H, W] in [-1, 1] -> [B, D, h, w] before quantisation
    nearest(z)                [B, D, h, w] -> codes, int64 [B, h, w]
    codewords(codes)          int64 [B, h, w] -> [B, D, h, w]
    images_of(q)              codewords [B, D, h, w] -> float [B, 3, H, W] in about [-1, 1]
    quantiser_loss(z, codes)  the scalar that keeps latents and codewords together
    """

    learning_rate: ClassVar[float]
    batch_size: ClassVar[int]

    def after_step(self, z: Tensor, codes: Tensor) -> None:
        """Called after every training step with the step's latents and codes."""

    def forward(self, images: Tensor) -> Forward:
        """uint8 [B, 3, H, W], through the quantiser and back, with gradients."""
        x = images.float() / 127.5 - 1
        z = self.latents(x)
        codes = self.nearest(z)
        y = self.images_of(z + (self.codewords(codes) - z).detach())  # straight-through: d y / d z as if q were z
        return Forward(F.l1_loss(y, x) + F.mse_loss(y, x) + self.quantiser_loss(z, codes), y, z, codes)

    def _codes(self, images: Tensor) -> Tensor:
        return self.nearest(self.latents(images.float() / 127.5 - 1))

    def _pixels(self, codes: Tensor) -> Tensor:
        return ((self.images_of(self.codewords(codes)) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def fit(self, images: Tensor, *, steps: int | None = None, seconds: float | None = None, seed: int = 0, log: Log | None = None) -> FitReport:
        """Train on `images` (uint8 [N, 3, H, W]) until `steps` or `seconds` is used up, from the present weights.

        AdamW, 30 steps of warm-up, cosine to zero over the budget. With `steps` alone the result is the same for the same seed on one machine.
        """
        self.check_images(images)
        budget = [number for number in (steps, seconds) if number is not None]
        if not budget or min(budget) <= 0:
            raise ValueError(f"steps={steps}, seconds={seconds}: give at least one of them, positive")
        device = next(self.parameters()).device
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        self.train()
        started, step, done = time.perf_counter(), 0, 0.0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            while done < 1:
                optimizer.param_groups[0]["lr"] = self.learning_rate * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * done))
                loss, _, z, codes = self(images[torch.randint(len(images), (self.batch_size,))].to(device))
                if not loss.isfinite():
                    raise FloatingPointError(f"{self.name}: the loss is {loss.item()} at step {step}; fit a fresh tokenizer with another seed")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), 1.0)
                optimizer.step()
                self.after_step(z.detach(), codes)
                step += 1
                elapsed = time.perf_counter() - started
                done = max(step / steps if steps else 0.0, elapsed / seconds if seconds else 0.0)
                if log and (step % 50 == 0 or done >= 1):
                    log(f"{self.name} step {step} ({elapsed:.0f} s): loss {loss.item():.4f}, {codes.unique().numel()} codes in the batch")
        self.eval()
        return fit_report(self, images, started, step)


def fit_report(tokenizer: ImageTokenizer, images: Tensor, started: float, steps: int, **more) -> FitReport:
    """The report of a fit that began at `started` (time.perf_counter)."""
    seconds = time.perf_counter() - started
    measured = asdict(reconstruction_report(tokenizer, images[:MEASURED]))
    parameters = sum(p.numel() for p in tokenizer.parameters())
    return FitReport(**measured, name=tokenizer.name, pictures=len(images), seconds=seconds, steps=steps, parameters=parameters, **more)


def reconstruction_report(tokenizer: ImageTokenizer, images: Tensor) -> ReconstructionReport:
    """Encode and decode `images` (uint8 [B, 3, H, W]) and measure what is lost."""
    codes = tokenizer.encode(images)
    error = (tokenizer.decode(codes).short() - images.short()).flatten(1).double()
    mse, exact = error.square().mean().item(), (error == 0).all(1).double().mean().item()
    return ReconstructionReport(10 * math.log10(255**2 / mse) if mse else math.inf, exact, codes.unique().numel())


def build_image_tokenizer(name: str, *, seed: int = 0, **options) -> ImageTokenizer:
    """A new tokenizer: `name` is a key of MEMBERS, `options` are fields of that member's config; `seed` draws the first weights."""
    if name not in MEMBERS:
        raise ValueError(f"unknown image tokenizer {name!r}: choose one of {', '.join(MEMBERS)}")
    module, member = MEMBERS[name]
    cls = getattr(importlib.import_module(module), member)
    allowed = [field.name for field in fields(cls.Config)]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"unknown option {unknown[0]!r} for image tokenizer '{name}': it takes {', '.join(allowed)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(cls.Config(**options))


def load_image_tokenizer(folder: str | Path) -> ImageTokenizer:
    """The tokenizer in a folder: one that `save` wrote, Show-o's MAGVIT-v2 or Emu3's vision tokenizer as they were released.

    Raises `CheckpointError` that names the file, what was found and what was expected.
    """
    folder = Path(expanded(folder))
    if (folder / CONFIG_FILE).is_file():
        config = read_json(folder / CONFIG_FILE)
        try:
            options = {key: tuple(value) if isinstance(value, list) else value for key, value in config["config"].items()}
            tokenizer = build_image_tokenizer(config["name"], **options)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f'{folder / CONFIG_FILE}: expected {{"name": ..., "config": {{...}}}} as ImageTokenizer.save writes it; {error}') from error
        fill(tokenizer.stored(), Weights(folder), lambda key: key)
        return tokenizer.eval()
    weights = Weights(folder)
    found = stock_image_tokenizer(weights)
    if found is None:
        raise CheckpointError(f"{folder} is not a picture tokenizer: it has no {CONFIG_FILE}, and its weights ({', '.join(sorted(weights.shapes)[:3])}, ...) "
                              "are neither MAGVIT-v2's (quantize.power_vals) nor Emu3's (quantize.embedding.weight and temporal convolutions).")
    return found


def stock_kind(shapes: Mapping[str, tuple[int, ...]]) -> tuple[type[ImageTokenizer], object] | None:
    """The member that released weights of these shapes are of, and its config; None when they are of no known kind."""
    for module, member in MEMBERS.values():
        cls = getattr(importlib.import_module(module), member)
        config = cls.config_of(shapes)
        if config is not None:
            return cls, config
    return None


def stock_image_tokenizer(weights: Weights) -> ImageTokenizer | None:
    """The tokenizer that released weights are of, its sizes read off their shapes; None when they are of no known kind."""
    found = stock_kind(weights.shapes)
    if found is None:
        return None
    cls, config = found
    tokenizer = cls(config)
    fill(tokenizer.stored(), weights, cls.key_of)
    return tokenizer.eval()


def at_least_one(**values: int) -> None:
    """Refuse any value that is not a whole number >= 1: the check every config shares."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fit one image tokenizer and print what was measured as one JSON line.")
    parser.add_argument("name", choices=list(MEMBERS))
    parser.add_argument("pictures", help=".npz with uint8 arrays train and test, [N, H, W, 3]")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of a learned tokenizer")
    parser.add_argument("--seconds", type=float, help="train for so long instead, by the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder to save the tokenizer in")
    args = parser.parse_args(argv)
    with np.load(args.pictures) as file:
        train, test = (torch.from_numpy(file[part]).permute(0, 3, 1, 2) for part in ("train", "test"))
    tokenizer = build_image_tokenizer(args.name, seed=args.seed)
    budget = {"seconds": args.seconds} if args.seconds else {"steps": args.steps}
    report = tokenizer.fit(train, **budget, seed=args.seed, log=lambda line: print(line, file=sys.stderr))
    if args.out:
        tokenizer.save(args.out)
    line = {"fit": asdict(report), "test": asdict(reconstruction_report(tokenizer, test))}
    for part in line.values():  # JSON has no infinity: null is "lossless"
        part["psnr_db"] = part["psnr_db"] if math.isfinite(part["psnr_db"]) else None
    print(json.dumps(line))


if __name__ == "__main__":
    importlib.import_module("unimod.models.image_tokenizer").main()  # the imported twin: the base class of the members
