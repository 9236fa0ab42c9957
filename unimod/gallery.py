"""The sequences that the explorer can show: every model in both tasks on every sample, a user's own picture and prompt,
and saved ones.

    gallery = Gallery(sessions, also={"showo-tiny, routed": routed})
    gallery.side("showo-tiny", Task.T2I, 0)             # one forward pass when it is first asked for
    gallery.side("showo-tiny", Task.MMU, gallery.add(picture_bytes, "what color is it?"))
    gallery.open("a folder that Overview.save or AttentionRecord.save wrote")
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .analysis.attention import NAMES, Overview, overview
from .batch import Modality, Task, pack
from .capture import AttentionRecord, CaptureError, capture_batch
from .config import ParameterError
from .data.sources import read_picture
from .experiment import Session
from .models.unified import UnifiedModel

LONGEST = 1000
"""Characters of a prompt, which may be as many tokens."""
HELD = 32
"""Sides in memory at a time."""
TASKS = (Task.T2I, Task.MMU)
OWN = "own"
"""Query: the tokens that a task predicts, image tokens for T2I and text tokens for the others."""


@dataclass(frozen=True)
class Side:
    """One sequence of one model. With the record behind it, one token's attention is exact; without, it is that of its
    bin of the pooled map."""

    model: str
    overview: Overview
    record: AttentionRecord | None = None

    def has(self, layer: int, head: int | None) -> bool:
        """Whether there are this layer and head (None: mean over heads)."""
        return layer in self.overview.layers and (head or 0) < self.overview.heads

    @property
    def text_places(self) -> list[int]:
        """The indices of the tokens that are not image tokens."""
        return (self.overview.modality != Modality.IMAGE).nonzero()[:, 0].tolist()

    def query_from(self, first: Side, query: str | Modality | int) -> Modality | int | None:
        """The query on this side for one on side `first`: the same kind of tokens, or the token of the same image patch
        or of the same word at the same index; None where there is none."""
        if query == OWN:
            return Modality.IMAGE if self.overview.task == Task.T2I else Modality.TEXT
        if isinstance(query, Modality) or self is first:
            return query
        mine, theirs = (side.overview.modality == Modality.IMAGE for side in (self, first))
        if theirs[query] and self.overview.grid == first.overview.grid:
            return int(mine.nonzero()[int(theirs[:query].sum())])
        tokens, other = self.overview.tokens, first.overview.tokens
        return query if query < len(mine) and tokens[query] == other[query] and not theirs[query] else None

    def attention(self, layer: int, head: int | None, query: Modality | int) -> Tensor:
        """Attention from the tokens of a kind (mean), or from one token, to every token of the sequence: float32 [n],
        nan where the layer skipped it."""
        found = self.overview
        if isinstance(query, Modality) or self.record is None or layer not in self.record.captured:
            return found.attention_from(layer, head, query)
        kept = found.kept[found.layers.index(layer)]
        out = torch.full((len(kept),), torch.nan)
        if kept[query]:
            out[kept] = self.record.row_weights(0, layer, head, int(kept[:query].sum())).cpu()
        return out

    def head_values(self, value: str) -> np.ndarray:
        """A statistic of every head, [L, H]: "to_image", "to_text", or a field of `Patterns` such as "entropy"."""
        patterns, name = self.overview.patterns, value.removeprefix("to_")
        found = patterns.received[..., NAMES.index(name)] if name in NAMES else getattr(patterns, value)
        return found[:, 0].numpy()


class Gallery:
    """Sides by model, task and sample. `also`: further models of a session, by names that begin with its own
    ("showo-tiny, routed")."""

    def __init__(self, sessions: Mapping[str, Session], also: Mapping[str, UnifiedModel] | None = None,
                 samples: int = 16, split: str = "validation") -> None:
        self.sessions, self.samples, self.split = dict(sessions), samples, split
        self.models = {name: (session, session.model) for name, session in sessions.items()}
        for name, model in (also or {}).items():
            found = [sessions[n] for n in sorted(sessions, key=len, reverse=True) if name.startswith(n)]
            if not found:
                raise ParameterError(f"model {name!r} belongs to no session; begin its name with one of "
                                     f"{', '.join(sessions)}.")
            mine, theirs = found[0].model.layout, model.layout
            if (mine.kind, mine.vocab_size, mine.grid) != (theirs.kind, theirs.vocab_size, theirs.grid):
                raise ParameterError(f"model {name!r} is a {theirs.kind} model of {theirs.vocab_size} tokens and "
                                     f"pictures of {theirs.grid}; the data of {found[0].name} is for {mine.kind}, "
                                     f"{mine.vocab_size} and {mine.grid}. Give one that was trained from it.")
            self.models[name] = found[0], model
        self.own: list[tuple[bytes, str]] = []
        self.saved: dict[str, Side] = {}
        self._sides: dict[tuple, Side] = {}

    def side(self, model: str, task: Task, sample: int) -> Side:
        """One sequence. sample: from 0 to `samples` - 1, then a user's own in the order in which they were added.
        Raises `ParameterError`."""
        if model in self.saved:
            return self.saved[model]
        if model not in self.models:
            raise ParameterError(f"model {model!r} is not here; there are {', '.join([*self.models, *self.saved])}.")
        if not 0 <= sample < self.samples + len(self.own):
            raise ParameterError(f"sample {sample} does not exist; there are 0 to {self.samples + len(self.own) - 1}.")
        key = model, task, sample
        if key not in self._sides:
            while len(self._sides) >= HELD:
                self._sides.pop(next(iter(self._sides)))
            self._sides[key] = self._computed(model, task, sample)
        return self._sides[key]

    def add(self, data: bytes, prompt: str) -> int:
        """Take a user's picture (the bytes of a picture file) and prompt: a caption for T2I, a question for MMU.
        Returns the number of the sample. Raises `ParameterError` for bytes that are no picture, and for an empty prompt
        or one above `LONGEST` characters."""
        if not prompt.strip():
            raise ParameterError("The prompt is empty: write a caption to draw, or a question about the picture.")
        if len(prompt) > LONGEST:
            raise ParameterError(f"The prompt has {len(prompt)} characters: shorten it to at most {LONGEST}.")
        if not data:
            raise ParameterError("There is no picture: choose a picture file first (PNG, JPEG, WebP, ...).")
        try:
            read_picture(io.BytesIO(data), 8)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ParameterError("This file is not a picture that can be read. "
                                 "Choose a PNG, JPEG or WebP file.") from error
        self.own.append((data, prompt.strip()))
        return self.samples + len(self.own) - 1

    def open(self, folder: str) -> str:
        """Take what `Overview.save` or `AttentionRecord.save` wrote. Returns the name under which it is shown. Raises
        `CaptureError` for a folder that holds neither, and for a record of a model that is not here."""
        path = Path(os.path.expanduser(folder)).resolve()       # Path.expanduser raises for an unknown user
        if not folder.strip() or not path.is_dir():
            raise CaptureError(f"{folder!r} is not a folder; give one that Overview.save or AttentionRecord.save "
                               "wrote.")
        name = f"saved: {'/'.join(path.parts[-2:])}"    # the last part is the same in many run folders
        if any((path / f"attention.{suffix}").exists() for suffix in ("safetensors", "npz")):
            record = AttentionRecord.load(path)
            layout = self._layout_for(record, path)
            self.saved[name] = Side(name, overview(record, 0, layout.token, layout.grid), record)
        else:
            self.saved[name] = Side(name, Overview.load(path))
        return name

    def about(self, sample: int) -> str:
        """A sample in words."""
        if sample >= self.samples:
            return f"your own: {self.own[sample - self.samples][1]}"
        return self._sample(next(iter(self.sessions.values())), sample)[1]

    def _layout_for(self, record: AttentionRecord, path: Path):
        """The layout that names a record's tokens. Raises `CaptureError` where no session has it."""
        kind = record.about.get("model")
        layouts = {s.model.layout.kind: s.model.layout for s in self.sessions.values()}
        if kind not in layouts:
            raise CaptureError(f"{path} is a record of a {kind} model, and its tokens cannot be named by "
                               f"{', '.join(self.sessions)}. Open it beside its own model, or save an Overview, which "
                               "names its tokens itself.")
        layout, whole = layouts[kind], record.whole
        top, images = int(whole.ids.max()), int((whole.modality[whole.rows()[0]] == Modality.IMAGE).sum())
        if top >= layout.vocab_size or images % layout.image_tokens:
            raise CaptureError(f"{path} is a record of another {kind} model: it has token {top} and its own picture "
                               f"size; this one has {layout.vocab_size} tokens and pictures of {layout.image_tokens}. "
                               "Save an Overview instead, which names its tokens itself.")
        return layout

    def _sample(self, session: Session, sample: int) -> tuple[np.ndarray, str]:
        if sample >= self.samples:
            data, prompt = self.own[sample - self.samples]
            return read_picture(io.BytesIO(data), session.data.image_size), prompt
        found = session.batches.samples(self.split, sample, 1, seed=0)[0]
        return found.image, found.caption

    def _computed(self, model: str, task: Task, sample: int) -> Side:
        session, lm = self.models[model]
        picture, text = self._sample(session, sample)
        if sample < self.samples:
            batch = session.batches.single_task(task, self.split, 1, start=sample)
        else:
            codes = session.image_tokenizer.encode(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]).flatten(1)
            if task == Task.T2I:
                batch = pack(session.batches.t2i([text], codes, torch.Generator().manual_seed(0), drop=False))
            else:
                batch = pack([lm.layout.mmu(codes[0], [(text, "")], open_ended=True)])
        with torch.random.fork_rng():
            torch.manual_seed(0)                                # a random router must choose the same tokens every time
            record = capture_batch(lm, batch)
        return Side(model, overview(record, 0, lm.layout.token, lm.layout.grid, picture), record)
