"""What a run of the workbook may be asked: one flat, frozen dataclass that refuses nonsense.

Every notebook's `parameters` cell, every key of a file in `params/` and every `-p name=value` is a field of `Params`; the
same checks serve all three. No torch here: the runner checks a call in well under two seconds, before any kernel starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

TASKS = ("t2i", "mmu", "lm")
MODELS = ("showo-tiny", "emu3-tiny")
DATA = ("scenes", "digits", "folder")
LEVELS = ("default", "jitter", "sizes", "backgrounds", "free", "hard")
IMAGE_TOKENIZERS = ("dictionary", "magvit", "emu3vq")
ARMS = ("dense", "mod", "unimod", "unimod-last-half")
ROUTERS = ("separate", "shared", "mod", "gamma-mod", "p-mod", "a-mod", "router-tuning", "random", "tread", "early-exit", "layer-drop")
"""Routers of an arm of the grid: one per task or one for all, with the package's own gate, or a published method (`baselines.PRESETS`)."""
LAYERS = ("last_half", "last_half_per_task", "middle", "interleaved", "random", "cosine_decay", "lowest_arank", "highest_arank", "learned")
"""Plans of an arm of the grid: a maker, the two made from the model's own ARank, or capacities learned in a training of `steps` before the arm's
own. An arm is written ROUTER.LAYERS, such as shared.last_half."""
DEVICES = ("auto", "cpu", "cuda")
PATHS = {"folder", "checkpoint", "routed", "plan", "compare", "runs", "run_dir"}
"""Parameters that are, or may be, paths."""


class ParameterError(ValueError):
    """A parameter that cannot be used: the message names the value, what is allowed and the fix."""


class SetupError(RuntimeError):
    """Something about the machine or the installation that no parameter mends: the message says what, and what to do."""

    code = 3


def expanded(path: str | Path) -> str:
    """A path with ~ and ~user resolved: a shell does that for a word of its own only, not behind `folder=` or in a file.

    Raises `ParameterError` for a ~ that stands for no home folder here, where it would silently become a folder of that name.
    """
    found = os.path.expanduser(path)
    if found.startswith("~") and not os.path.lexists(found.split(os.sep)[0]):
        raise ParameterError(f"{str(path)!r}: there is no home folder for {found.split(os.sep)[0]!r} here (HOME is not set, or nobody has that name). "
                             "Write the path out.")
    return found
RULES = ("topk", "keep", "threshold")
"""How a routed layer chooses among the tokens of a segment.

topk: the k best of the segment, k known on the host; every token of the segment must be known when the layer runs.
keep: all of them; text that is generated one token at a time, so that decoding sees what training saw.
threshold: each token for itself against a calibrated score; causal, for pictures that are generated token by token.
"""


KINDS = ("image", "text", "special", "question", "labelled")
"""Kinds of tokens that a router may be told never to drop: of a modality, the text of an mmu row, or those that have a target."""
GATES = ("tanh", "sigmoid", "raw", "none", "straight-through")
BRANCHES = ("update", "mlp")
SCORES = ("learned", "random", "attention")
COMPETE = ("segment", "batch", "rows")
REACH = ("layer", "run", "exit")


@dataclass(frozen=True)
class RouterConfig:
    """How tokens are scored, which of them may be dropped, for how long, and how the score enters the layer's update."""

    shared: bool = False
    """One router for all tasks (MoD) instead of one per task (UniMoD)."""
    across: bool = False
    """The same weights in all routed layers (gamma-MoD) instead of each layer's own."""
    score: str = "learned"
    """learned; random: no weights, a fresh draw at every training step and every token kept in evaluation (TREAD); or attention: no weights,
    the attention that a token received in the layer before (A-MoD)."""
    hidden: int = 0
    """Width of a hidden layer (SiLU); 0 scores by a linear map."""
    normalised: bool = False
    """Score the layer-normalised input instead of the raw one."""
    noise: float = 0.0
    """Scale of logistic noise on the scores in training: at 1 the difference of two Gumbel variables, one for keeping and one for dropping."""
    gate: str = "tanh"
    """What multiplies the update: tanh 1 + gain * tanh(score) (p-MoD; the identity at the start), sigmoid(score), the raw score (MoD), none: 1,
    or straight-through: 1 forward and sigmoid(score) backward."""
    branch: str = "update"
    """What the gate multiplies: the whole update of the layer, or its MLP's part of it (gamma-MoD, p-MoD)."""
    gain: float = 0.2
    """Reach of the tanh gate."""
    scale_skipped: bool = False
    """Multiply skipped tokens by their gate, too (p-MoD)."""
    std: float = 1.0e-3
    """Spread of the initial weights: exactly zero would tie in the top-k and keep the first tokens."""
    keep: tuple[str, ...] = ()
    """Tokens that are never dropped: any of `config.KINDS`. The capacity is of the others."""
    compete: str = "segment"
    """Who competes for the places: the tokens of a segment; batch: all tokens of all rows and tasks, whatever their rule (an experiment: it looks
    into other rows and ahead, so nothing can be generated with it); or rows: whole rows, drawn at random in training (layer dropping)."""
    reach: str = "layer"
    """How far a decision reaches: the layer; run: all routed layers that follow without a dense one between; exit: a dropped token never comes back."""
    predictor: bool = False
    """A second scorer that learns, on a stopped gradient, whether the first will keep a token; it decides where a token must be judged by itself
    (Mixture-of-Depths, section 3.5)."""
    alone: bool = False
    """Everything but the routers is frozen (Router-Tuning)."""

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):
            raise ParameterError(f"keep={self.keep!r} is a text; give a tuple, such as keep=({self.keep!r},).")
        object.__setattr__(self, "keep", tuple(self.keep))
        for f in fields(self):
            kind, value = type(f.default), getattr(self, f.name)
            if kind is not tuple and (not isinstance(value, (int, float) if kind is float else kind) or (kind in (int, float) and isinstance(value, bool))):
                raise ParameterError(f"{f.name}={value!r} must be {_ARTICLE[kind]}, such as {f.default!r}.")
            if kind is float and not 0 <= value < math.inf:
                raise ParameterError(f"{f.name}={value!r} is not a scale. Give a finite number that is not negative, such as {f.default!r}.")
        for name, allowed in (("gate", GATES), ("branch", BRANCHES), ("score", SCORES), ("compete", COMPETE), ("reach", REACH)):
            if getattr(self, name) not in allowed:
                raise ParameterError(f"{name}={getattr(self, name)!r} is not known. Allowed: {', '.join(allowed)}.")
        for kind in self.keep:
            if kind not in KINDS:
                raise ParameterError(f"keep={self.keep!r}: {kind!r} is not known. Allowed: {', '.join(KINDS)}.")
        if self.hidden < 0:
            raise ParameterError(f"hidden={self.hidden} is not a width. Give 0 for a linear map, or a positive number.")
        idle = [n for n in ("across", "hidden", "normalised", "noise", "scale_skipped", "alone") if getattr(self, n)] if self.score != "learned" else []
        if self.score != "learned" and (self.gate != "none" or idle):
            raise ParameterError(f"score={self.score!r} has nothing to learn, so it goes with gate='none' and without across, hidden, normalised, noise, "
                                 f"scale_skipped and alone; got gate={self.gate!r}{''.join(f', {n}={getattr(self, n)!r}' for n in idle)}.")
        if self.score == "random" and self.predictor:
            raise ParameterError("predictor=True cannot foresee score='random'. Use score='learned' or 'attention'.")
        if self.compete == "rows" and (self.score != "random" or self.reach != "layer" or self.keep):
            raise ParameterError("compete='rows' drops whole rows at random, anew in each layer: it goes with score='random', reach='layer' and no keep.")
        if self.compete == "batch" and (self.predictor or self.reach != "layer" or self.keep or self.score != "learned"):
            raise ParameterError("compete='batch' is an experiment on one layer's choice: it goes with score='learned', reach='layer', "
                                 "no predictor and no keep.")
        if self.gate == "none" and (self.scale_skipped or self.branch != "update"):
            raise ParameterError(f"scale_skipped={self.scale_skipped}, branch={self.branch!r} need a gate; allowed: tanh, sigmoid, raw, straight-through.")


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
    """01: folder of a saved routed model (07 leaves one per arm) to look at beside the dense one; empty: fresh routers."""
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
    """04: steps of the one router for both tasks. 07: steps of the dense arm; routed arms get as many as the same FLOPs pay for."""
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
        for name, allowed in (("data", DATA), ("level", LEVELS), ("image_tokenizer", IMAGE_TOKENIZERS), ("device", DEVICES)):
            _one_of(name, getattr(self, name), allowed)
        for name, allowed in (("models", MODELS), ("arms", ARMS)):
            if not getattr(self, name):
                raise ParameterError(f"{name} is empty: name at least one of {', '.join(allowed)}.")
            for value in getattr(self, name):
                router, at, layers = value.partition(".")
                if name == "arms" and at:
                    _one_of("arms, before the dot", router, ROUTERS)
                    _one_of("arms, behind the dot", layers, LAYERS)
                else:
                    _one_of(name, value, allowed)
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
                raise ParameterError(f"{name}={values!r} names the same thing twice, which would count it twice. Name each once.")
        if self.data == "folder" and not self.folder:
            raise ParameterError("data=folder needs folder=<path>: a folder that holds data.jsonl and the pictures it names.")
        if self.data == "folder" and not Path(self.folder).is_dir():
            raise ParameterError(f"folder={self.folder!r} is not a folder (looked in {Path.cwd()}). Give the path of one that holds "
                                 "data.jsonl and the pictures it names.")
        for name, instead in (("checkpoint", "the shipped one"), ("routed", "fresh routers")):
            if (value := getattr(self, name)) and not Path(value).is_dir():
                raise ParameterError(f"{name}={value!r} is not a folder (looked in {Path.cwd()}). Give the folder of a saved model, or leave "
                                     f"it empty for {instead}.")
        for folder in self.compare:
            if not (Path(folder) / "done.json").is_file():
                raise ParameterError(f"compare={folder!r} is not the folder of a finished run (it holds no done.json). Give run folders "
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
                raise ParameterError(f"There is no parameter {name!r}." + (f" Did you mean {near[0]!r}?" if near else "")
                                     + f" Known: {', '.join(sorted(hints))}.")
        found = {name: coerce(name, value, hints[name]) for name, value in values.items()}
        for name in PATHS & found.keys():
            found[name] = [*map(expanded, found[name])] if isinstance(found[name], list) else expanded(found[name])
        return cls(**found)

    @classmethod
    def declared(cls, namespace: Mapping[str, object]) -> Params:
        """The parameters among the names of `namespace`: below its parameters cell a notebook says `Params.declared(globals())`."""
        return cls.of(**{name: namespace[name] for name in cls.names() if name in namespace})


def coerce(name: str, value: object, kind: object) -> object:
    """`value` as `kind` (bool, int, float, str or a list of one of them): '1e-4' is a float, 'false' a bool, 'a,b' a list.

    Raises `ParameterError` when the value cannot mean that.
    """
    if isinstance(kind, types.GenericAlias):
        items = value if isinstance(value, (list, tuple)) else [v for v in str(value).strip("[] ").split(",") if v.strip()]
        return [coerce(name, v.strip(" '\"") if isinstance(v, str) else v, typing.get_args(kind)[0]) for v in items]
    wrong = ParameterError(f"{name}={value!r} is not {_ARTICLE[kind]}. Example: {name}={_EXAMPLE[kind]}.")
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
_ARTICLE = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_EXAMPLE = {bool: "true", int: "8", float: "1e-4", str: "name"}


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        raise ParameterError(f"{name}={value!r} is not known." + (f" Did you mean {near[0]!r}?" if near else "")
                             + f" Allowed: {', '.join(allowed)}.")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ParameterError(f"{name}={value!r} must be at least {least}.")
