"""What a run of the workbook may be asked: one flat, frozen dataclass that refuses nonsense.

Every notebook's `parameters` cell, every key of a file in `params/` and every `-p name=value` is a field of `Params`;
the same checks serve all three. No torch here: a call is checked in well under two seconds, before any kernel starts.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import config
from .config import ARMS, MODELS, ParameterError, did_you_mean, expanded, one_of

BOOL = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
EXAMPLE = {bool: "true", int: "8", float: "1e-4", str: "name"}


@dataclass(frozen=True)
class Params:
    """Every parameter of the workbook, with its default. Raises `ParameterError` on a value outside its range."""

    models: list[str] = field(default_factory=lambda: list(MODELS))     # tiny models to run, one after the other
    data: str = "scenes"        # scenes (drawn, exact truth), digits (real handwriting), folder (your pictures)
    folder: str = ""            # with data=folder: the folder that holds data.jsonl and the pictures
    strict: bool = False        # with data=folder: refuse it for a broken entry instead of naming and skipping that
    level: str = "default"      # with data=scenes: how hard the pictures are
    image_tokenizer: str = "dictionary"     # what turns pictures into codes
    checkpoint: str = ""        # folder of a saved model to start from; empty: the shipped checkpoint of each model
    routed: str = ""            # 01: folder of a saved routed model, such as 07 leaves per arm; empty: fresh routers
    seed: int = 0               # of data order, noise and sampling
    seeds: list[int] = field(default_factory=lambda: [0])   # 02 draws, 04 competes and 07 trains once per seed
    samples: int = 16           # sequences per task in the analyses, and behind the plans that 07 makes by ARank
    layer: int = 4              # layer shown first (0 is the first layer)
    head: int = 0               # head shown first
    tolerance: float = 1.0e-2   # ARank: singular values below tolerance * the largest do not count
    plan: str = "last_half"     # capacity plan of the UniMoD arm: a maker's name or a YAML file written by notebook 03
    saving: float = 0.3         # share of the stack's token computations that a maker's plan saves (0.3 = 30 %)
    arms: list[str] = field(default_factory=lambda: list(ARMS[:3]))     # 07 compares these: `ARMS`, or ROUTER.LAYERS
    steps: int = 60             # 04: of the one router; 07: of the dense arm, others get what the same FLOPs pay for
    batch: int = 16             # sequences per task in a training step
    lr: float = 8.0e-4          # peak learning rate; routers get router_lr times it
    router_lr: float = 5.0      # factor on the learning rate for the routers
    eval_samples: int = 48      # held-out pictures per evaluation
    resume: bool = True         # 07: go on from the last checkpoint of an interrupted run in the same folder
    compare: list[str] = field(default_factory=list)    # 08: run folders of 07; empty: the newest finished in `runs`
    device: str = "auto"        # auto takes CUDA when there is one
    interactive: bool = True    # live widgets in JupyterLab; false: the same figures, sliders need no kernel
    runs: str = "runs"          # folder of all run folders
    run_dir: str = ""           # folder this run writes; empty: <runs>/<notebook>/interactive. The runner sets it

    def __post_init__(self) -> None:
        for name, allowed in (("data", config.DATA), ("level", config.LEVELS),
                              ("image_tokenizer", config.IMAGE_TOKENIZERS), ("device", config.DEVICES)):
            one_of(name, getattr(self, name), allowed)
        for name, allowed in (("models", MODELS), ("arms", ARMS)):
            if not getattr(self, name):
                raise ParameterError(f"{name} is empty: name at least one of {', '.join(allowed)}.")
            for value in getattr(self, name):
                router, dot, layers = value.partition(".")
                if name == "arms" and dot:
                    one_of("arms, before the dot", router, config.ROUTERS)
                    one_of("arms, behind the dot", layers, config.LAYERS)
                else:
                    one_of(name, value, allowed)
        here = f"is not a folder (looked in {Path.cwd()})."
        model = f"{here} Give the folder of a saved model, or leave it empty for"
        self._refuse(("samples", "steps", "batch", "eval_samples"), lambda value: value < 1, "must be at least 1.")
        self._refuse(("layer", "head", "seed", "seeds"), lambda value: value < 0, "must be at least 0.")
        self._refuse(("lr", "router_lr"), lambda value: not 0 < value < math.inf, "must be a number greater than 0.")
        self._refuse(("saving", "tolerance"), lambda value: not 0 < value < 1,
                     "must lie between 0 and 1 (both excluded).")
        if not self.seeds:
            raise ParameterError("seeds is empty: give at least one whole number, such as seeds=[0].")
        for name in ("models", "arms", "seeds", "compare"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ParameterError(f"{name}={values!r} names the same thing twice, which would count it twice. Name "
                                     "each once.")
        if self.data == "folder" and not self.folder:
            raise ParameterError("data=folder needs folder=<path>: a folder that holds data.jsonl and the pictures it "
                                 "names.")
        if self.data == "folder":
            self._refuse(("folder",), _no_folder, f"{here} Give the path of one that holds data.jsonl and the pictures "
                                                  "it names.")
        self._refuse(("checkpoint",), _no_folder, f"{model} the shipped one.")
        self._refuse(("routed",), _no_folder, f"{model} fresh routers.")
        self._refuse(("compare",), lambda folder: not (Path(folder) / "done.json").is_file(),
                     "is not the folder of a finished run (it holds no done.json). Give run folders of notebook 07, or "
                     "leave it empty for the newest.")

    def _refuse(self, names: Iterable[str], wrong: Callable[[object], bool], rule: str) -> None:
        for name in names:
            value = getattr(self, name)
            for item in value if isinstance(value, list) else [value]:
                if wrong(item):
                    raise ParameterError(f"{name}={item!r} {rule}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all parameters."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def refuse_unknown(cls, names: Iterable[str]) -> None:
        """Raise `ParameterError` for a name that no parameter has."""
        known = sorted(cls.names())
        for name in names:
            if name not in known:
                raise ParameterError(f"There is no parameter {name!r}.{did_you_mean(name, known)} "
                                     f"Known: {', '.join(known)}.")

    @classmethod
    def of(cls, **values: object) -> Params:
        """Build from loosely typed values (YAML, command line, a notebook): each is coerced to its field's type first.

        Raises `ParameterError` for an unknown name or a value of the wrong type.
        """
        hints = typing.get_type_hints(cls)
        cls.refuse_unknown(values)
        found = {name: coerce(name, value, hints[name]) for name, value in values.items()}
        for name in config.PATHS & found.keys():
            found[name] = [*map(expanded, found[name])] if isinstance(found[name], list) else expanded(found[name])
        return cls(**found)

    @classmethod
    def declared(cls, namespace: Mapping[str, object]) -> Params:
        """The parameters among a notebook's names: `Params.declared(globals())` stands below its parameters cell."""
        return cls.of(**{name: namespace[name] for name in cls.names() if name in namespace})


def coerce(name: str, value: object, kind: object) -> object:
    """`value` as `kind` (bool, int, float, str or a list of one): '1e-4' is a float, 'false' a bool, 'a,b' a list.

    Raises `ParameterError` when the value cannot mean that.
    """
    if isinstance(kind, types.GenericAlias):
        items = value
        if not isinstance(value, list | tuple):
            items = [item for item in str(value).strip("[] ").split(",") if item.strip()]
        items = [item.strip(" '\"") if isinstance(item, str) else item for item in items]
        return [coerce(name, item, typing.get_args(kind)[0]) for item in items]
    if kind is str and isinstance(value, str | Path):
        return str(value)
    if kind is bool and str(value).lower() in BOOL:
        return BOOL[str(value).lower()]
    if kind in (int, float) and not isinstance(value, bool):
        with suppress(TypeError, ValueError):
            number = float(value)
            if kind is float or number.is_integer():
                return kind(number)
    raise ParameterError(f"{name}={value!r} is not {config.ARTICLE[kind]}. Example: {name}={EXAMPLE[kind]}.")


def _no_folder(path: str) -> bool:
    return bool(path) and not Path(path).is_dir()
