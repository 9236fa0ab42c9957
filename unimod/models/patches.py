"""The patch dictionary: a code is a patch of pixels.

    tokenizer = build_image_tokenizer("dictionary", codebook_size=256)
    report = tokenizer.fit(images)              # seconds; report.warning is empty when the dictionary is lossless

When the fitting images have at most `codebook_size` distinct patches, those are the codes and nothing is lost on images
made of them (the scenes' default level: 89). Otherwise the codes are made by k-means and the report has a warning. Code
0 is the most frequent patch.

Measured on 4,000 scenes: default level 89 codes in 0.3 s, none of 400 test images changed. Hard level, 2,000 scenes:
12,508 distinct patches, 256 codes in 2 s, 22.2 dB, .27 of 200 test images still read fully right by
unimod.evaluate.

N patches or images, K codes, p pixels along one side of a patch, P = 3 p p values in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from .image_tokenizer import FitReport, ImageTokenizer, Log, at_least_one, fit_report


@dataclass(frozen=True)
class PatchConfig:
    codebook_size: int = 256
    patch: int = 8  # pixels along one side

    def __post_init__(self):
        at_least_one(codebook_size=self.codebook_size, patch=self.patch)


class PatchDictionary(ImageTokenizer):
    """Buffers: `patches` uint8 [K, 3, p, p]; `counts` int64 [K], how often each was nearest in fitting, descending.

    A code with count 0 is unused: encode never gives it, and it decodes to a magenta and black check, so that a model
    that generates it shows in its images.
    """

    name = "dictionary"
    Config = PatchConfig

    def __init__(self, config: PatchConfig):
        super().__init__()
        self.config = config
        self.codebook_size, self.downsample = config.codebook_size, config.patch
        self.register_buffer("patches", _missing_patch(config.patch).repeat(config.codebook_size, 1, 1, 1))
        self.register_buffer("counts", torch.zeros(config.codebook_size, dtype=torch.int64))

    @property
    def used(self) -> int:
        """Codes that stand for a patch: 0 .. used - 1."""
        return int((self.counts > 0).sum())

    def fit(self, images: Tensor, *, steps: int | None = None, seconds: float | None = None, seed: int = 0,
            log: Log | None = None) -> FitReport:
        """As the base's; `steps` and `seconds`, which learned tokenizers need, change nothing."""
        self.check_images(images)
        started = time.perf_counter()
        rows = self._cut(images).cpu().numpy()
        # a row as one value of P bytes: np.unique sorts those far faster than np.unique(axis=0) sorts rows
        as_bytes, counts = np.unique(rows.view(np.dtype((np.void, rows.shape[1]))), return_counts=True)
        codes = as_bytes.view(np.uint8).reshape(-1, rows.shape[1])
        distinct, warning = len(codes), ""
        if distinct > self.codebook_size:
            codes, counts = _cluster(codes, counts, self.codebook_size, seed)
            warning = (f"{distinct} distinct patches do not fit {self.codebook_size} codes: k-means made the codes and "
                       f"detail is lost; raise codebook_size, or align the objects to the {self.downsample}-pixel grid")
        order = np.argsort(-counts, kind="stable")  # ties keep the order of their bytes
        self.patches.copy_(_missing_patch(self.downsample).expand_as(self.patches))
        self.counts.zero_()
        self.patches[: len(order)] = torch.from_numpy(codes[order]).view(-1, *self.patches.shape[1:])
        self.counts[: len(order)] = torch.from_numpy(counts[order])
        if log:
            log(f"dictionary: {self.used} codes for {distinct} distinct patches. {warning}")
        return fit_report(self, images, started, steps=0, distinct_patches=distinct, warning=warning)

    def _cut(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B h w, P], raster order."""
        return F.pixel_unshuffle(images, self.downsample).permute(0, 2, 3, 1).flatten(0, 2).contiguous()

    def _codes(self, images: Tensor) -> Tensor:
        if not self.used:
            raise RuntimeError("this patch dictionary is empty: call fit(images), or load a fitted one with "
                               "load_image_tokenizer")
        height, width = (side // self.downsample for side in images.shape[2:])
        return _nearest(self._cut(images), self.patches[: self.used].flatten(1)).view(-1, height, width)

    def _pixels(self, codes: Tensor) -> Tensor:
        return F.pixel_shuffle(self.patches[codes].flatten(3).permute(0, 3, 1, 2), self.downsample)


def _nearest(rows: Tensor, table: Tensor) -> Tensor:
    """uint8 [N, P], uint8 [K, P] -> int64 [N]: the nearest in squared distance, the lowest index where several are.

    |r - t|^2 = |r|^2 - 2 r.t + |t|^2, in float64, where these integers are exact: the same patch is at distance 0,
    always.
    """
    table = table.double()
    return (table.square().sum(1) - 2 * rows.double() @ table.T).argmin(1)


def _cluster(rows: np.ndarray, counts: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """k-means of distinct rows uint8 [N, P] that occur `counts` [N] times.

    Returns at most k centres (uint8, sorted by bytes) and how often each is the nearest.
    """
    # reassignment moves rare codes to random patches: 0.8 dB lost on hard scenes and 27 of 256 codes left unused
    means = MiniBatchKMeans(k, batch_size=4096, n_init=1, reassignment_ratio=0.0, random_state=seed)
    means.fit(rows.astype(np.float32), sample_weight=counts)
    centres = np.unique(means.cluster_centers_.round().clip(0, 255).astype(np.uint8), axis=0)
    table = torch.from_numpy(centres)
    nearest = torch.cat([_nearest(piece, table) for piece in torch.from_numpy(rows).split(1 << 14)]).numpy()
    met = np.bincount(nearest, weights=counts, minlength=len(centres)).astype(np.int64)
    return centres[met > 0], met[met > 0]


def _missing_patch(p: int) -> Tensor:
    """uint8 [3, p, p]: magenta and black squares of two pixels."""
    step = torch.arange(p) // 2
    return ((step[:, None] + step) % 2 * torch.tensor([255, 0, 255])[:, None, None]).to(torch.uint8)
