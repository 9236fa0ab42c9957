"""What the explorer can show: every model in both tasks on every sample, one's own picture and prompt, and what was saved elsewhere.

    gallery = Gallery(sessions, also={"showo-tiny, routed": routed})
    gallery.side("showo-tiny", Task.T2I, 0)
    gallery.side("showo-tiny", Task.MMU, gallery.add(picture_bytes, "what color is it?"))
    gallery.open("a folder that Overview.save or AttentionRecord.save wrote")

A side is made when it is asked for and kept; everything that cannot be shown is refused with the reason.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..analysis.attention import Overview, overview
from ..batch import Task, pack
from ..capture import AttentionRecord, CaptureError, capture_batch
from ..config import ParameterError
from ..data.sources import read_picture
from ..models.unified import UnifiedModel
from ..session import Session
from .looking import Side
from .style import words

LONGEST = 1000
"""Characters of a prompt, which may be as many tokens."""
KEPT = 32
"""Sides held at a time."""
TASKS = (Task.T2I, Task.MMU)


class Gallery:
    """Sides by model, task and sample. `also`: further models of a session, by names that begin with its own ("showo-tiny, routed")."""

    def __init__(self, sessions: Mapping[str, Session], also: Mapping[str, UnifiedModel] | None = None, samples: int = 16, split: str = "validation") -> None:
        self.sessions, self.samples, self.split = dict(sessions), samples, split
        self.models = {name: (session, session.model) for name, session in sessions.items()}
        for name, model in (also or {}).items():
            found = [sessions[n] for n in sorted(sessions, key=len, reverse=True) if name.startswith(n)]
            if not found:
                raise ParameterError(f"model {name!r} belongs to no session; begin its name with one of {', '.join(sessions)}.")
            mine, theirs = (x.layout for x in (found[0].model, model))
            if (mine.kind, mine.vocab_size, mine.grid) != (theirs.kind, theirs.vocab_size, theirs.grid):
                raise ParameterError(f"model {name!r} is a {theirs.kind} model of {theirs.vocab_size} tokens and pictures of {theirs.grid}; the data of "
                                     f"{found[0].name} is for {mine.kind}, {mine.vocab_size} and {mine.grid}. Give one that was trained from it.")
            self.models[name] = found[0], model
        self.own: list[tuple[bytes, str]] = []
        self.saved: dict[str, Side] = {}
        self._sides: dict[tuple, Side] = {}

    def side(self, model: str, task: Task, sample: int) -> Side:
        """One row. sample: from 0 to `samples` - 1, behind them one's own in the order in which they were added. Raises `ParameterError`."""
        if model in self.saved:
            return self.saved[model]
        if model not in self.models:
            raise ParameterError(f"model {model!r} is not here; there are {', '.join([*self.models, *self.saved])}.")
        if not 0 <= sample < self.samples + len(self.own):
            raise ParameterError(f"sample {sample} does not exist; there are 0 to {self.samples + len(self.own) - 1}.")
        key = model, task, sample
        if key not in self._sides:
            while len(self._sides) >= KEPT:
                self._sides.pop(next(iter(self._sides)))
            self._sides[key] = self._made(model, task, sample)
        return self._sides[key]

    def add(self, data: bytes, prompt: str) -> int:
        """Take one's own picture (the bytes of a picture file) and prompt: a caption to draw, or a question to answer. Returns the number of the sample.
        Raises `ParameterError` for a picture that is none and a prompt of nothing, or of too much."""
        if not prompt.strip():
            raise ParameterError("The prompt is empty: write a caption to draw, or a question about the picture.")
        if len(prompt) > LONGEST:
            raise ParameterError(f"The prompt has {len(prompt)} characters: shorten it to at most {LONGEST}.")
        if not data:
            raise ParameterError("There is no picture: choose a picture file first (PNG, JPEG, WebP, ...).")
        try:
            read_picture(io.BytesIO(data), 8)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ParameterError("This file is not a picture that can be read. Choose a PNG, JPEG or WebP file.") from error
        self.own.append((data, prompt.strip()))
        return self.samples + len(self.own) - 1

    def open(self, folder: str) -> str:
        """Take what `Overview.save` or `AttentionRecord.save` wrote. Returns the name under which it is shown. Raises `CaptureError` for a folder that holds
        neither, and for a record of a model that is not here."""
        path = Path(os.path.expanduser(folder)).resolve()       # which leaves the name of nobody as it is
        if not folder.strip() or not path.is_dir():
            raise CaptureError(f"{folder!r} is not a folder; give one that Overview.save or AttentionRecord.save wrote.")
        name = f"saved: {'/'.join(path.parts[-2:])}"            # folders of several runs have one name
        if not any((path / f"attention.{suffix}").exists() for suffix in ("safetensors", "npz")):
            side = Side(name, Overview.load(path))
        else:
            record = AttentionRecord.load(path)
            kind = record.about.get("model")
            layouts = {s.model.layout.kind: s for s in self.sessions.values()}
            if kind not in layouts:
                raise CaptureError(f"{path} is a record of a {kind} model, and its tokens cannot be named by {', '.join(self.sessions)}. "
                                   "Open it beside its own model, or save an Overview, which names its tokens itself.")
            layout = layouts[kind].model.layout
            top = int(record.whole.ids.max())
            if top >= layout.vocab_size or (record.whole.modality[record.whole.rows()[0]] == 1).sum() % layout.image_tokens:
                raise CaptureError(f"{path} is a record of another {kind} model: it has token {top} and its own picture size; this one has {layout.vocab_size} "
                                   f"tokens and pictures of {layout.image_tokens}. Save an Overview instead, which names its tokens itself.")
            side = Side(name, overview(record, 0, layout.token, layout.grid), record)
        self.saved[side.title] = side
        return side.title

    def about(self, sample: int) -> str:
        """A sample in words."""
        if sample >= self.samples:
            return f"your own: {self.own[sample - self.samples][1]}"
        return self._sample(next(iter(self.sessions.values())), sample)[1]

    def _sample(self, session: Session, sample: int) -> tuple[np.ndarray, str]:
        if sample >= self.samples:
            data, prompt = self.own[sample - self.samples]
            return read_picture(io.BytesIO(data), session.data.image_size), prompt
        found = session.batches.samples(self.split, sample, 1, seed=0)[0]
        return found.image, found.caption

    def _made(self, model: str, task: Task, sample: int) -> Side:
        session, lm = self.models[model]
        picture, text = self._sample(session, sample)
        if sample < self.samples:
            packed = session.batches.single_task(task, self.split, 1, start=sample)
        else:
            codes = session.image_tokenizer.encode(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]).flatten(1)
            drawn = task == Task.T2I
            packed = pack(session.batches.t2i([text], codes, torch.Generator().manual_seed(0), drop=False) if drawn
                          else [lm.layout.mmu(codes[0], [(text, "")], open_ended=True)])
        with torch.random.fork_rng():
            torch.manual_seed(0)                                # routers that draw lots
            record = capture_batch(lm, packed)
        return Side(f"{model}, {words(task.name.lower())}", overview(record, 0, lm.layout.token, lm.layout.grid, picture), record)
