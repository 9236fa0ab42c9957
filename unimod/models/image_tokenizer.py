"""Image tokenizers: uint8 images to codes and back. One interface, three members:

    dictionary  PatchDictionary (patches.py)  the distinct 8x8 patches: lossless where they fit, fitted in seconds
    magvit      MagVitV2 (magvit.py)          lookup-free quantiser, the structure of Show-o's tokenizer at any width
    emu3vq      Emu3VQ (emu3_vq.py)           learned codebook, transformers' Emu3VQVAE at any width

    tokenizer = build_image_tokenizer("magvit")
    report = tokenizer.fit(images, seconds=180)     # uint8 [B, 3, H, W], H and W multiples of tokenizer.downsample
    codes = tokenizer.encode(images)                # int64 [B, h, w]
    tokenizer.save("runs/magvit"); tokenizer = load_image_tokenizer("runs/magvit")

    python -m unimod.models.image_tokenizer magvit pictures.npz --steps 1000 --out runs/magvit

fits and measures on one's own images, uint8 arrays `train` and `test` [N, H, W, 3], and prints one JSON line.

B images, H x W pixels, h x w codes, D latent channels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import pkgutil
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

from ..config import expanded, one_of
from .weights import CheckpointError, Weights, fill, read_json

# name -> class, imported when first used
MEMBERS = {"dictionary": "unimod.models.patches:PatchDictionary", "magvit": "unimod.models.magvit:MagVitV2",
           "emu3vq": "unimod.models.emu3_vq:Emu3VQ"}
CONFIG_FILE, WEIGHTS_FILE = "tokenizer.json", "tokenizer.safetensors"
Log = Callable[[str], object]
PIXELS_AT_ONCE = 1 << 19  # encode and decode work on about this many pixels at once, which bounds their memory
MEASURED = 256  # images a FitReport is measured on


@dataclass(frozen=True)
class ReconstructionReport:
    """What encode and decode lose."""

    psnr_db: float  # 10 log10(255^2 / mean squared error over all images), decibels; inf when nothing is lost
    exact_fraction: float  # share of the images that come back bit for bit
    codes_used: int  # distinct codes these images need


@dataclass(frozen=True)
class FitReport(ReconstructionReport):
    """What a fit did, measured on the first 256 of the images it was fitted on."""

    name: str
    pictures: int
    seconds: float
    steps: int  # of the optimiser; 0 for the dictionary
    parameters: int
    distinct_patches: int | None = None  # in the fitting images; None for the learned tokenizers
    warning: str = ""  # why the result is worse than it could be; empty otherwise


class ImageTokenizer(nn.Module, ABC):
    """Base of the three: checks, batching, files. A member gives `Config`, `fit`, `_codes` (uint8 [B, 3, H, W] -> int64
    [B, h, w], checked and on its device) and `_pixels` (back); one that was released also `config_of` and `key_of`.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    codebook_size: int  # codes are 0 .. codebook_size - 1
    downsample: int  # pixels along one side of a code

    @classmethod
    def config_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> object | None:
        """The config that a released file of these shapes has; None when it is not of this member."""
        return None

    @staticmethod
    def key_of(key: str) -> str:
        """The entry of `stored().state_dict()` that a key of a released file fills."""
        return key

    @abstractmethod
    def fit(self, images: Tensor, *, steps: int | None = None, seconds: float | None = None, seed: int = 0,
            log: Log | None = None) -> FitReport:
        """Learn from uint8 images [N, 3, H, W] within the budget. `seed` sets every draw; `log` gets progress lines."""

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> int64 [B, h, w] with h = H / downsample, on the device of `images`.

        Raises ValueError for any other input.
        """
        self.check_images(images)
        return self._in_pieces(self._codes, images, images[0, 0].numel())

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [B, h, w] -> uint8 [B, 3, H, W], on the device of `codes`.

        Raises ValueError for codes outside 0 .. codebook_size - 1.
        """
        if codes.dtype != torch.int64 or codes.dim() != 3 or not codes.numel():
            raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}: give torch.int64 [B, h, w], none of them 0")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(f"codes span {low}..{high}: '{self.name}' decodes 0..{self.codebook_size - 1}; take the "
                             "vocabulary's offset off")
        return self._in_pieces(self._pixels, codes, codes[0].numel() * self.downsample**2)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json (name and config) and tokenizer.safetensors into `folder`, made if missing."""
        folder = Path(expanded(folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)                 # written last: half a folder does not load
        save_file({k: v.contiguous() for k, v in self.stored().state_dict().items()}, folder / WEIGHTS_FILE)
        config = {"name": self.name, "config": asdict(self.config)}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    def stored(self) -> nn.Module:
        """The module whose state dict is the file."""
        return self

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError for anything but uint8 [B, 3, H, W] with sides that are multiples of `downsample`."""
        side, given = self.downsample, list(images.shape)
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"images are {images.dtype} {given}: give torch.uint8 [B, 3, H, W], none of them 0")
        if given[2] % side or given[3] % side:
            raise ValueError(f"images are {given[2]} x {given[3]} pixels: both must be multiples of {side}; "
                             "crop or pad them")

    def _in_pieces(self, function: Callable[[Tensor], Tensor], batch: Tensor, pixels_each: int) -> Tensor:
        device, size = next(iter(self.state_dict().values())).device, max(1, PIXELS_AT_ONCE // pixels_each)
        self.eval()
        with torch.no_grad():
            return torch.cat([function(piece.to(device)).to(batch.device) for piece in batch.split(size)])


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

    def fit(self, images: Tensor, *, steps: int | None = None, seconds: float | None = None, seed: int = 0,
            log: Log | None = None) -> FitReport:
        """Train on `images` (uint8 [N, 3, H, W]) until `steps` or `seconds` is used up, from the present weights.

        AdamW, 30 steps of warm-up, cosine to zero over the budget. With `steps` alone the result is the same for the
        same seed on one machine. Raises ValueError without a budget, FloatingPointError when the loss is not finite.
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
                cosine = 0.5 * (1 + math.cos(math.pi * done))
                optimizer.param_groups[0]["lr"] = self.learning_rate * min(1.0, (step + 1) / 30) * cosine
                loss, _, z, codes = self(images[torch.randint(len(images), (self.batch_size,))].to(device))
                if not loss.isfinite():
                    raise FloatingPointError(f"{self.name}: the loss is {loss.item()} at step {step}; fit a fresh "
                                             "tokenizer with another seed")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), 1.0)
                optimizer.step()
                self.after_step(z.detach(), codes)
                step += 1
                elapsed = time.perf_counter() - started
                done = max(step / steps if steps else 0.0, elapsed / seconds if seconds else 0.0)
                if log and (step % 50 == 0 or done >= 1):
                    used = codes.unique().numel()
                    log(f"{self.name} step {step} ({elapsed:.0f} s): loss {loss.item():.4f}, {used} codes in the batch")
        self.eval()
        return fit_report(self, images, started, step)


def fit_report(tokenizer: ImageTokenizer, images: Tensor, started: float, steps: int, **more) -> FitReport:
    """The report of a fit that began at `started` (time.perf_counter)."""
    seconds = time.perf_counter() - started
    measured = asdict(reconstruction_report(tokenizer, images[:MEASURED]))
    parameters = sum(p.numel() for p in tokenizer.parameters())
    return FitReport(**measured, name=tokenizer.name, pictures=len(images), seconds=seconds, steps=steps,
                     parameters=parameters, **more)


def reconstruction_report(tokenizer: ImageTokenizer, images: Tensor) -> ReconstructionReport:
    """Encode and decode `images` (uint8 [B, 3, H, W]) and measure what is lost."""
    codes = tokenizer.encode(images)
    error = (tokenizer.decode(codes).short() - images.short()).flatten(1).double()
    mse, exact = error.square().mean().item(), (error == 0).all(1).double().mean().item()
    psnr = 10 * math.log10(255**2 / mse) if mse else math.inf
    return ReconstructionReport(psnr, exact, codes.unique().numel())


def build_image_tokenizer(name: str, *, seed: int = 0, **options) -> ImageTokenizer:
    """A new tokenizer: `name` is a key of MEMBERS, `options` are fields of its config; `seed` draws the first weights.

    Raises `ParameterError` for an unknown name or option.
    """
    one_of("image tokenizer", name, tuple(MEMBERS))
    cls = pkgutil.resolve_name(MEMBERS[name])
    for option in options:
        one_of(f"option of image tokenizer '{name}'", option, tuple(field.name for field in fields(cls.Config)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(cls.Config(**options))


def load_image_tokenizer(folder: str | Path) -> ImageTokenizer:
    """The tokenizer in a folder: one that `save` wrote, Show-o's MAGVIT-v2 or Emu3's vision tokenizer as released.

    Raises `CheckpointError` that names the file, what was found and what was expected.
    """
    folder = Path(expanded(folder))
    path = folder / CONFIG_FILE
    if path.is_file():
        config = read_json(path)
        try:
            options = {k: tuple(v) if isinstance(v, list) else v for k, v in config["config"].items()}
            tokenizer = build_image_tokenizer(config["name"], **options)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f'{path}: expected {{"name": ..., "config": {{...}}}} as ImageTokenizer.save writes '
                                  f"it; {error}") from error
        fill(tokenizer.stored(), Weights(folder), lambda key: key)
        return tokenizer.eval()
    weights = Weights(folder)
    if found := stock_image_tokenizer(weights):
        return found
    keys = ", ".join(sorted(weights.shapes)[:3])
    raise CheckpointError(f"{folder} is not a picture tokenizer: it has no {CONFIG_FILE}, and its weights ({keys}, "
                          "...) are neither MAGVIT-v2's (quantize.power_vals) nor Emu3's "
                          "(quantize.embedding.weight and temporal convolutions).")


def stock_kind(shapes: Mapping[str, tuple[int, ...]]) -> tuple[type[ImageTokenizer], object] | None:
    """The member that released weights of these shapes are of, and its config; None when they are of no known kind."""
    for cls in map(pkgutil.resolve_name, MEMBERS.values()):
        if config := cls.config_of(shapes):
            return cls, config
    return None


def stock_image_tokenizer(weights: Weights) -> ImageTokenizer | None:
    """The tokenizer of released weights, its sizes taken from their shapes; None when they are of no known kind."""
    if found := stock_kind(weights.shapes):
        cls, config = found
        tokenizer = cls(config)
        fill(tokenizer.stored(), weights, cls.key_of)
        return tokenizer.eval()
    return None


def at_least_one(**values: int) -> None:
    """Raises ValueError for any value that is not a whole number >= 1: the check that every config shares."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")



def main(argv: list[str] | None = None) -> None:
    """The command `python -m unimod.models.image_tokenizer`."""
    parser = argparse.ArgumentParser(description="Fit one image tokenizer and print what was measured, one JSON line.")
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
    # the imported module, not this one: the members' base class lives there
    importlib.import_module("unimod.models.image_tokenizer").main()
