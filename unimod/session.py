"""What a notebook works with: one model, the pictures it sees and their codes, loaded from the workbook's parameters.

    session = load(params, "showo-tiny")
    session.model, session.image_tokenizer, session.data, session.batches
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import ParameterError, Params
from .data import open_data
from .data.batches import Batches
from .data.sources import Dataset
from .files import runs_folder
from .models.checkpoint import from_pretrained, shipped
from .models.image_tokenizer import ImageTokenizer
from .models.unified import UnifiedModel
from .tiny import fit_image_tokenizer


@dataclass(frozen=True)
class Session:
    """A loaded model (in eval mode, on its device) with data in its own layout."""

    name: str
    model: UnifiedModel
    image_tokenizer: ImageTokenizer
    data: Dataset
    batches: Batches


def load(params: Params, name: str) -> Session:
    """Load `params.checkpoint`, or the shipped checkpoint of that name, with the data of `params`.

    The shipped picture tokenizer knows the default scenes. For other data, levels or tokenizers one is fitted here, so the
    model's codes get a new meaning and it has to be trained before its figures say anything about that data.
    Raises `ParameterError` for a checkpoint of another model or a device that is not there.
    """
    data = open_data(params.data, level=params.level, folder=params.folder, strict=params.strict)
    if params.data == "folder":
        print(data.report())
    model, image_tokenizer = from_pretrained(params.checkpoint or shipped(name))
    if f"{model.layout.kind}-tiny" != name:
        raise ParameterError(f"checkpoint={params.checkpoint!r} holds a {model.layout.kind} model, not {name}. Set models to match it.")
    if not fits(params):
        image_tokenizer = fit_image_tokenizer(data, params.image_tokenizer, cache=runs_folder(params.runs) / "image_tokenizers")
    model.to(device_of(params))
    return Session(name, model, image_tokenizer, data, Batches(data, image_tokenizer, model.layout, rows_of(params), params.seed))


def rows_of(params: Params) -> tuple[int, int, int]:
    """Sequences of t2i, mmu and lm in a training step: `params.batch` of the first two, an eighth as many of the third."""
    return params.batch, params.batch, max(1, params.batch // 8)


def fits(params: Params) -> bool:
    """Whether the shipped checkpoints know this data: the default scenes through the exact dictionary, or the user's own checkpoint."""
    return bool(params.checkpoint) or (params.data, params.level, params.image_tokenizer) == ("scenes", "default", "dictionary")


def device_of(params: Params) -> str:
    """cpu or cuda. Raises `ParameterError` when CUDA is asked for and missing."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ParameterError("device='cuda', but torch sees no CUDA device here. Use device=auto or device=cpu.")
    return "cuda" if params.device != "cpu" and torch.cuda.is_available() else "cpu"
