"""What a run of the workbook may be asked: one flat, frozen dataclass that refuses nonsense.

Every notebook's `parameters` cell, every key of a file in `params/` and every `-p name=value` is a field of `Params`;
the same checks serve all three. No torch here: the runner checks a call in well under two seconds, before any kernel
starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .config import (  # fmt: skip
    ARMS,
    ARTICLE,
    DATA,
    DEVICES,
    IMAGE_TOKENIZERS,
    LAYERS,
    LEVELS,
    MODELS,
    PATHS,
    ROUTERS,
    ParameterError,
    expanded,
    one_of,
)


@dataclass(frozen=True)
class Params:
    """Every parameter of the workbook, with its default. Raises `ParameterError` on a value outside its range."""

    models: list[str] = field(default_factory=lambda: list(MODELS))
    """Tiny models to run, one after the other."""
    data: str = "scenes"
    """Data set: scenes (drawn, exact truth), digits (real handwriting), folder (your pictures, see `folder`)."""
    folder: str = ""
    """With data=folder: the folder that holds data.jsonl and the pictures."""
    strict: bool = False
    """With data=folder: refuse the folder on the first broken entry instead of naming and skipping it."""
    level: str = "default"
    """With data=scenes: how hard the pictures are."""
    image_tokenizer: str = "dictionary"
    """What turns pictures into codes."""
    checkpoint: str = ""
    """Folder of a saved model to start from; empty: the shipped checkpoint of each model."""
    routed: str = ""
    """01: folder of a saved routed model (07 leaves one per arm) to look at beside the dense one; empty: fresh
    routers."""
    seed: int = 0
    """Seed of data order, noise and sampling."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """02: batches are drawn, 04: the competition is run, and 07: every arm is trained, once per seed."""
    samples: int = 16
    """Sequences per task in the analyses, and behind the ARank of 07's lowest_arank and highest_arank."""
    layer: int = 4
    """Layer shown first (0 is the first layer)."""
    head: int = 0
    """Head shown first."""
    tolerance: float = 1.0e-2
    """ARank: singular values below tolerance * the largest do not count."""
    plan: str = "last_half"
    """Capacity plan of the UniMoD arm: a maker's name or a YAML file written by notebook 03."""
    saving: float = 0.3
    """Share of the layer stack's token computations that a plan made by a maker saves (0.3 = 30 %)."""
    arms: list[str] = field(default_factory=lambda: list(ARMS[:3]))
    """07: what is trained and compared: any of `ARMS`, or ROUTER.LAYERS."""
    steps: int = 60
    """04: steps of the one router for both tasks. 07: steps of the dense arm; routed arms get as many as the same FLOPs
    pay for."""
    batch: int = 16
    """Sequences per task in a training step."""
    lr: float = 8.0e-4
    """Peak learning rate; routers get router_lr times it."""
    router_lr: float = 5.0
    """Factor on the learning rate for the routers."""
    eval_samples: int = 48
    """Held-out pictures per evaluation."""
    resume: bool = True
    """07: go on from the last checkpoint of an interrupted run in the same folder."""
    compare: list[str] = field(default_factory=list)
    """08: run folders of notebook 07 to compare; empty: the newest finished one under `runs`."""
    device: str = "auto"
    """auto takes CUDA when there is one."""
    interactive: bool = True
    """Live widgets in JupyterLab; false: the same figures with sliders that need no kernel."""
    runs: str = "runs"
    """Folder of all run folders."""
    run_dir: str = ""
    """Folder this run writes; empty: <runs>/<notebook>/interactive. The runner sets it."""

    def __post_init__(self) -> None:
        for name, allowed in (("data", DATA), ("level", LEVELS), ("image_tokenizer", IMAGE_TOKENIZERS),
                              ("device", DEVICES)):
            one_of(name, getattr(self, name), allowed)
        for name, allowed in (("models", MODELS), ("arms", ARMS)):
            if not getattr(self, name):
                raise ParameterError(f"{name} is empty: name at least one of {', '.join(allowed)}.")
            for value in getattr(self, name):
                router, at, layers = value.partition(".")
                if name == "arms" and at:
                    one_of("arms, before the dot", router, ROUTERS)
                    one_of("arms, behind the dot", layers, LAYERS)
                else:
                    one_of(name, value, allowed)
        for name in ("samples", "steps", "batch", "eval_samples"):
            _at_least(name, getattr(self, name), 1)
        for name in ("layer", "head", "seed"):
            _at_least(name, getattr(self, name), 0)
        for seed in self.seeds:
            _at_least("seeds", seed, 0)
        for name in ("lr", "router_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ParameterError(f"{name}={getattr(self, name)!r} must be a number greater than 0.")
        for name in ("saving", "tolerance"):
            if not 0 < getattr(self, name) < 1:
                raise ParameterError(f"{name}={getattr(self, name)!r} must lie between 0 and 1 (both excluded).")
        if not self.seeds:
            raise ParameterError("seeds is empty: give at least one whole number, such as seeds=[0].")
        for name in ("models", "arms", "seeds", "compare"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ParameterError(f"{name}={values!r} names the same thing twice, which would count it twice. Name "
                                     f"each once.")
        if self.data == "folder" and not self.folder:
            raise ParameterError("data=folder needs folder=<path>: a folder that holds data.jsonl and the pictures it "
                                 "names.")
        if self.data == "folder" and not Path(self.folder).is_dir():
            raise ParameterError(f"folder={self.folder!r} is not a folder (looked in {Path.cwd()}). Give the path of "
                                 f"one that holds "
                                 "data.jsonl and the pictures it names.")
        for name, instead in (("checkpoint", "the shipped one"), ("routed", "fresh routers")):
            if (value := getattr(self, name)) and not Path(value).is_dir():
                raise ParameterError(f"{name}={value!r} is not a folder (looked in {Path.cwd()}). Give the folder of a "
                                     f"saved model, or leave "
                                     f"it empty for {instead}.")
        for folder in self.compare:
            if not (Path(folder) / "done.json").is_file():
                raise ParameterError(f"compare={folder!r} is not the folder of a finished run (it holds no done.json). "
                                     f"Give run folders "
                                     "of notebook 07, or leave it empty for the newest.")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all parameters."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def of(cls, **values: object) -> Params:
        """Build from loosely typed values (YAML, command line, a notebook): each is coerced to its field's type first.

        Raises `ParameterError` for an unknown name (with the nearest known one) or a value of the wrong type.
        """
        hints = typing.get_type_hints(cls)
        for name in values:
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                raise ParameterError(f"There is no parameter {name!r}."
                                     + (f" Did you mean {near[0]!r}?" if near else "")
                                     + f" Known: {', '.join(sorted(hints))}.")
        found = {name: coerce(name, value, hints[name]) for name, value in values.items()}
        for name in PATHS & found.keys():
            found[name] = [*map(expanded, found[name])] if isinstance(found[name], list) else expanded(found[name])
        return cls(**found)

    @classmethod
    def declared(cls, namespace: Mapping[str, object]) -> Params:
        """The parameters among the names of `namespace`: below its parameters cell a notebook says
        `Params.declared(globals())`."""
        return cls.of(**{name: namespace[name] for name in cls.names() if name in namespace})


def coerce(name: str, value: object, kind: object) -> object:
    """`value` as `kind` (bool, int, float, str or a list of one of them): '1e-4' is a float, 'false' a bool, 'a,b' a
    list.

    Raises `ParameterError` when the value cannot mean that.
    """
    if isinstance(kind, types.GenericAlias):
        items = value if isinstance(value, (list, tuple)) else [v for v in str(value).strip("[] ").split(",")
                                                                if v.strip()]
        return [coerce(name, v.strip(" '\"") if isinstance(v, str) else v, typing.get_args(kind)[0]) for v in items]
    wrong = ParameterError(f"{name}={value!r} is not {ARTICLE[kind]}. Example: {name}={_EXAMPLE[kind]}.")
    if kind is bool:
        word = str(value).lower()
        if word not in _BOOL:
            raise wrong
        return _BOOL[word]
    if kind is str:
        if not isinstance(value, (str, Path)):
            raise wrong
        return str(value)
    if isinstance(value, bool):
        raise wrong
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise wrong from None
    if kind is float:
        return number
    if not number.is_integer():
        raise wrong
    return int(number)


_BOOL = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_EXAMPLE = {bool: "true", int: "8", float: "1e-4", str: "name"}


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ParameterError(f"{name}={value!r} must be at least {least}.")
