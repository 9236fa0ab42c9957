"""What the explorer shows, live and in the report: one side, or two and their difference, at one place of the model.

    a, b = Side("drawing", overview_t2i), Side("answering", overview_mmu, record, row=0)
    place = Place(layer=3, head=None, query=OWN)
    drawing.figure([a, b], place)                       # one of views.drawings, as it stands
    drawing.frames([a, b], place)                       # the same with a slider over layers and a button that plays them: it needs no kernel
    drawing.fill([a, b], place)                         # what changes when the place does: the explorer updates its widget with it

A panel that has nothing to show stays blank, and `notes` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from ..analysis.attention import NAMES, Overview
from ..batch import Modality, Task
from ..capture import AttentionRecord
from .style import FIGURE_BYTES, slider

OWN = "own"
"""Query: picture tokens while drawing, text tokens while answering or writing."""
KINDS = {Modality.IMAGE: "picture tokens", Modality.TEXT: "text tokens", Modality.SPECIAL: "special tokens"}


@dataclass(frozen=True)
class Place:
    """Where one looks. head None: mean over heads. query: OWN, a kind of tokens, or one token of side A's row (its place)."""

    layer: int
    head: int | None = None
    query: str | Modality | int = OWN
    value: str = "to_image"


@dataclass(frozen=True)
class Side:
    """One row of one model. With the record behind it, a single token's row is exact; without, as its bin of the pooled map."""

    title: str
    overview: Overview
    record: AttentionRecord | None = None
    row: int = 0

    def looks(self, place: Place, query: Modality | int) -> Tensor:
        """What the tokens of a kind, or one token, look at: float32 [n] over the whole row, nan for a token that the layer skipped."""
        found, layer = self.overview, place.layer
        if isinstance(query, Modality) or self.record is None or layer not in self.record.captured:
            return found.attention_from(layer, place.head, query)
        kept = found.kept[found.layers.index(layer)]
        out = torch.full((len(kept),), torch.nan)
        if kept[query]:
            out[kept] = self.record.row_weights(self.row, layer, place.head, int(kept[:query].sum())).cpu()
        return out

    def head_values(self, value: str) -> np.ndarray:
        """One of `attention.HEAD_VALUES`, [L, H]."""
        p = self.overview.patterns
        found = p.received[..., NAMES.index(value.removeprefix("to_"))] if value.startswith("to_") else getattr(p, value)
        return found[:, 0].numpy()


def asked(side: Side, first: Side, query: str | Modality | int) -> Modality | int | None:
    """Who asks on this side: a kind of tokens, or the token that answers to side A's: the same cell of the picture, or the same word at the same place."""
    if query == OWN:
        return Modality.IMAGE if side.overview.task == Task.T2I else Modality.TEXT
    if isinstance(query, Modality) or side is first:
        return query
    mine, theirs = (x.overview.modality == Modality.IMAGE for x in (side, first))
    if theirs[query] and side.overview.grid == first.overview.grid:
        return int(mine.nonzero()[int(theirs[:query].sum())])
    same = query < len(mine) and side.overview.tokens[query] == first.overview.tokens[query] and not theirs[query]
    return query if same else None


def known(side: Side, place: Place) -> bool:
    """Whether a side has this layer and head."""
    return place.layer in side.overview.layers and (place.head or 0) < side.overview.heads


def token(who: Modality | int | None) -> int | None:
    """The place of the one token that asks, or None for a kind of tokens."""
    return None if isinstance(who, Modality) else who


def notes(sides: Sequence[Side], place: Place) -> list[str]:
    """What is shown, in words, and for every panel without data the reason."""
    head = "mean over heads" if place.head is None else f"head {place.head}"
    said = []
    for side in sides:
        who, found = asked(side, sides[0], place.query), side.overview
        if not known(side, place):
            first, last = found.layers[0], found.layers[-1]
            layers = f"{first} to {last}" if len(found.layers) == last - first + 1 else ", ".join(map(str, found.layers))
            said.append(f"{side.title} has layers {layers} and {found.heads} heads: nothing to show at layer {place.layer}, {head}.")
            continue
        if who is None:
            said.append(f'{side.title} has no token that answers to "{sides[0].overview.tokens[place.query]}" at place {place.query}.')
            continue
        values, kept, one = side.looks(place, who), found.kept[found.layers.index(place.layer)], token(who)
        line = f"{side.title}: {KINDS[who] if one is None else repr(found.tokens[one]) + f' (token {one})'}, layer {place.layer}, {head}"
        if values.isnan().all():
            line += ": no such token in this layer" if one is None else ": the router skips this token here"
        elif not math.prod(found.grid):
            line += ": a row without a picture"
        elif not (values[found.modality == Modality.IMAGE] > 0).any():
            line += ": no attention on the picture (the mask hides it)"
        said.append(line + (f"; {int(kept.sum())} of {len(kept)} tokens go through" if not kept.all() else ""))
    return said


@dataclass(frozen=True)
class Drawing:
    """One kind of figure: how it is laid out, and what fills it at a place."""

    name: str
    lay: Callable[[Sequence[Side], Place], go.Figure]
    """The figure without data: panels, axes, and empty traces."""
    fill: Callable[[Sequence[Side], Place], tuple[list[dict], dict]]
    """What changes with the place: properties of every trace, and the layout that goes with them."""
    caption: str
    """What to see."""
    alt: str
    """What is drawn."""

    def figure(self, sides: Sequence[Side], place: Place, filled: tuple[list[dict], dict] | None = None) -> go.Figure:
        """The figure at one place; `filled`: what `fill` gave for it, where that is known."""
        fig = self.lay(sides, place)
        data, layout = filled or self.fill(sides, place)
        for trace, found in zip(fig.data, data, strict=True):
            trace.update(found)
        return fig.update_layout(layout)

    def frames(self, sides: Sequence[Side], place: Place) -> go.Figure:
        """The figure with a slider over layers (where they change it), which also plays: it needs no kernel. Colour ranges follow the layer. What would be
        too heavy for a report gets its colours as bytes, and then, if it must, fewer layers."""
        layers = sides[0].overview.layers
        fig = self._frames(sides, place, layers, coarse=False)
        if _weight(fig) > FIGURE_BYTES:
            fig = self._frames(sides, place, layers, coarse=True)
        while _weight(fig) > FIGURE_BYTES and len(fewer := tuple(sorted({*layers[::2], place.layer}))) < len(layers):
            layers, fig = fewer, self._frames(sides, place, fewer, coarse=True)
        return fig

    def _frames(self, sides: Sequence[Side], place: Place, layers: Sequence[int], coarse: bool) -> go.Figure:
        fig, found = self.lay(sides, place), {layer: self.fill(sides, replace(place, layer=layer)) for layer in layers}
        if coarse:
            axes = [getattr(trace, "coloraxis", None) for trace in fig.data]
            found = {layer: _as_bytes(*one, axes) for layer, one in found.items()}
            for trace in fig.select_traces({"type": "heatmap"}):
                trace.hovertemplate = trace.hovertemplate.partition(": %{z")[0] + "<extra></extra>"     # a byte is no share
        data, layout = found[place.layer]
        for trace, part in zip(fig.data, data, strict=True):
            trace.update(part)
        moving = [{key for key in part if not all(same(one[n][key], part[key]) for one, _ in found.values())} for n, part in enumerate(data)]
        at = [n for n, keys in enumerate(moving) if keys]
        if not at:
            return fig.update_layout(layout)
        frames = [go.Frame(name=str(layer), data=[type(fig.data[n])(**{key: parts[n][key] for key in moving[n]}) for n in at], traces=at, layout=there)
                  for layer, (parts, there) in found.items()]
        return slider(fig.update_layout(layout), frames, "layer", list(layers).index(place.layer), play=True)


def _weight(fig: go.Figure) -> int:
    return len(fig.to_json().encode())


def same(a: object, b: object) -> bool:
    """Whether two properties of a trace are equal, unknown values included."""
    return np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b


def _as_bytes(data: list[dict], layout: dict, axes: Sequence[str | None]) -> tuple[list[dict], dict]:
    """Heat maps on a colour axis as uint8 from its lower to its upper end; what is unknown becomes no attention, or no difference."""
    ends = {axis: (layout[axis]["cmin"], layout[axis]["cmax"]) for axis in ("coloraxis", "coloraxis2") if axis in layout}
    coarse = []
    for part, axis in zip(data, axes):
        if axis in ends and "z" in part:
            low, high = ends[axis]
            z = np.nan_to_num(part["z"], nan=max(low, 0.0))
            part = part | {"z": (255 * np.clip((z - low) / ((high - low) or 1.0), 0, 1)).round().astype(np.uint8)}
        coarse.append(part)
    ticks = {axis: {"tickvals": [0, 127.5, 255], "ticktext": [f"{low + f * (high - low):.2g}" for f in (0, 0.5, 1)]} for axis, (low, high) in ends.items()}
    return coarse, layout | {axis: {"cmin": 0, "cmax": 255, "colorbar": bar} for axis, bar in ticks.items()}
