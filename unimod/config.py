"""What is refused with words: the errors, the allowed values, and what a router can be asked (`RouterConfig`). No torch
here."""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

TASKS = ("t2i", "mmu", "lm")
MODELS = ("showo-tiny", "emu3-tiny")
DATA = ("scenes", "digits", "folder")
LEVELS = ("default", "jitter", "sizes", "backgrounds", "free", "hard")
IMAGE_TOKENIZERS = ("dictionary", "magvit", "emu3vq")
ARMS = ("dense", "mod", "unimod", "unimod-last-half")
ROUTERS = ("separate", "shared", "mod", "gamma-mod", "p-mod", "a-mod", "router-tuning", "random", "tread", "early-exit",
           "layer-drop")
"""Routers of an arm of the grid: one per task or one for all, with the package's own gate, or a published method
(`baselines.PRESETS`)."""
LAYERS = ("last_half", "last_half_per_task", "middle", "interleaved", "random", "cosine_decay", "lowest_arank",
          "highest_arank", "learned")
"""Plans of an arm of the grid: a maker, the two made from the model's own ARank, or capacities learned in a training of
`steps` before the arm's own. An arm is written ROUTER.LAYERS, such as shared.last_half."""
DEVICES = ("auto", "cpu", "cuda")
PATHS = {"folder", "checkpoint", "routed", "plan", "compare", "runs", "run_dir"}
"""Parameters that are, or may be, paths."""


class ParameterError(ValueError):
    """A parameter that cannot be used: the message names the value, what is allowed and the fix."""


class SetupError(RuntimeError):
    """Something about the machine or the installation that no parameter mends: the message says what, and what to
    do."""

    code = 3


def expanded(path: str | Path) -> str:
    """A path with ~ and ~user resolved: a shell does that for a word of its own only, not behind `folder=` or in a
    file.

    Raises `ParameterError` for a ~ that stands for no home folder here, where it would silently become a folder of that
    name.
    """
    found = os.path.expanduser(path)
    if found.startswith("~") and not os.path.lexists(found.split(os.sep)[0]):
        raise ParameterError(f"{str(path)!r}: there is no home folder for {found.split(os.sep)[0]!r} here (HOME is not "
                             f"set, or nobody has that name). "
                             "Write the path out.")
    return found


RULES = ("topk", "keep", "threshold")
"""How a routed layer chooses among the tokens of a segment.

topk: the k best of the segment, k known on the host; every token of the segment must be known when the layer runs.
keep: all of them; text that is generated one token at a time, so that decoding sees what training saw.
threshold: each token for itself against a calibrated score; causal, for images that are generated token by token.
"""
KINDS = ("image", "text", "special", "question", "labelled")
"""Kinds of tokens that a router may always keep: of a modality, the text of an understanding (mmu) sequence, or those
that have a target."""
GATES = ("tanh", "sigmoid", "raw", "none", "straight-through")
BRANCHES = ("update", "mlp")
SCORES = ("learned", "random", "attention")
TOPK_SCOPES = ("segment", "batch", "sequences")
DECISION_SCOPES = ("layer", "span", "exit")


ARTICLE = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class RouterConfig:
    """How tokens are scored, which may be dropped, for how long, and how the score enters the layer's update.

    Raises `ParameterError` for a value or a combination that no router carries out.
    """

    shared: bool = False
    """One router for all tasks (MoD) instead of one per task (UniMoD)."""
    shared_layers: bool = False
    """The same weights in all routed layers (gamma-MoD) instead of each layer's own."""
    score: str = "learned"
    """learned; random: no weights, a fresh draw at every training step and every token kept in evaluation (TREAD); or
    attention: no weights, the attention that a token received in the layer before (A-MoD)."""
    hidden: int = 0
    """Width of a hidden layer (SiLU); 0 scores by a linear map."""
    normalised: bool = False
    """Score the layer-normalised input instead of the raw one."""
    noise: float = 0.0
    """Scale of logistic noise on the scores in training: at 1 the difference of two Gumbel variables, one for keeping
    and one for dropping."""
    gate: str = "tanh"
    """What multiplies the update: tanh 1 + gain * tanh(score) (p-MoD; the identity at the start), sigmoid(score), the
    raw score (MoD), none: 1, or straight-through: 1 forward and sigmoid(score) backward."""
    branch: str = "update"
    """What the gate multiplies: the whole update of the layer, or its MLP's part of it (gamma-MoD, p-MoD)."""
    gain: float = 0.2
    """Amplitude of the tanh gate."""
    scale_skipped: bool = False
    """Multiply skipped tokens by their gate, too (p-MoD)."""
    std: float = 1.0e-3
    """Standard deviation of the initial weights: exactly zero would tie in the top-k and keep the first tokens."""
    always_keep: tuple[str, ...] = ()
    """Tokens that are never dropped: any of `config.KINDS`. The capacity is of the others."""
    topk_scope: str = "segment"
    """Who competes for the places: the tokens of a segment; batch: all tokens of all sequences and tasks, whatever
    their rule (an experiment: it looks into other sequences and ahead, so nothing can be generated with it); or
    sequences: whole ones, drawn at random in training (layer dropping)."""
    decision_scope: str = "layer"
    """How far a decision holds: in the layer; span: in all routed layers that follow without a dense one between; exit:
    a dropped token never comes back."""
    predictor: bool = False
    """A second scorer that learns, on a stopped gradient, whether the first will keep a token; it makes the per-token
    causal decision where a token has to be judged by itself (Mixture-of-Depths, section 3.5)."""
    freeze_backbone: bool = False
    """Everything but the routers is frozen (Router-Tuning)."""

    def __post_init__(self) -> None:
        if isinstance(self.always_keep, str):
            raise ParameterError(f"always_keep={self.always_keep!r} is a text; "
                                 f"give a tuple, such as always_keep=({self.always_keep!r},).")
        object.__setattr__(self, "always_keep", tuple(self.always_keep))
        for f in fields(self):
            self._check_type(f.name, type(f.default), f.default)
        for name, allowed in (("gate", GATES), ("branch", BRANCHES), ("score", SCORES), ("topk_scope", TOPK_SCOPES),
                              ("decision_scope", DECISION_SCOPES)):
            one_of(name, getattr(self, name), allowed)
        for kind in self.always_keep:
            if kind not in KINDS:
                raise ParameterError(f"always_keep={self.always_keep!r}: {kind!r} is not known. "
                                     f"Allowed: {', '.join(KINDS)}.")
        if self.hidden < 0:
            raise ParameterError(f"hidden={self.hidden} is not a width. Give 0 for a linear map, or a positive number.")
        self._check_combination()

    def _check_type(self, name: str, kind: type, default: object) -> None:
        value = getattr(self, name)
        number = kind in (int, float)
        fits = isinstance(value, (int, float) if kind is float else kind) and not (number and isinstance(value, bool))
        if kind is not tuple and not fits:
            raise ParameterError(f"{name}={value!r} must be {ARTICLE[kind]}, such as {default!r}.")
        if kind is float and not 0 <= value < math.inf:
            raise ParameterError(f"{name}={value!r} is not a scale. Give a finite number that is not negative, "
                                 f"such as {default!r}.")

    def _check_combination(self) -> None:
        learned_only = ("shared_layers", "hidden", "normalised", "noise", "scale_skipped", "freeze_backbone")
        idle = [name for name in learned_only if getattr(self, name)]
        if self.score != "learned" and (self.gate != "none" or idle):
            given = "".join(f", {name}={getattr(self, name)!r}" for name in idle)
            raise ParameterError(f"score={self.score!r} has nothing to learn, so it goes with gate='none' and without "
                                 f"{', '.join(learned_only)}; got gate={self.gate!r}{given}.")
        if self.score == "random" and self.predictor:
            raise ParameterError("predictor=True cannot foresee score='random'. Use score='learned' or 'attention'.")
        plain = self.decision_scope == "layer" and not self.always_keep
        if self.topk_scope == "sequences" and not (plain and self.score == "random"):
            raise ParameterError("topk_scope='sequences' drops whole sequences at random, anew in each layer: it goes "
                                 "with score='random', decision_scope='layer' and no always_keep.")
        if self.topk_scope == "batch" and not (plain and self.score == "learned" and not self.predictor):
            raise ParameterError("topk_scope='batch' is an experiment on one layer's choice: it goes with "
                                 "score='learned', decision_scope='layer', no predictor and no always_keep.")
        if self.gate == "none" and (self.scale_skipped or self.branch != "update"):
            raise ParameterError(f"scale_skipped={self.scale_skipped}, branch={self.branch!r} need a gate; "
                                 "allowed: tanh, sigmoid, raw, straight-through.")

    @classmethod
    def stored(cls, values: Mapping[str, object]) -> RouterConfig:
        """The configuration of a file (router.json of a saved model), which may have names of before this release."""
        renamed = {"across": "shared_layers", "keep": "always_keep", "compete": "topk_scope",
                   "reach": "decision_scope", "alone": "freeze_backbone"}
        values_renamed = {"rows": "sequences", "run": "span"}
        old = [name for name in values if name in renamed]
        if old:
            print(f"unimod: {', '.join(f'{name} is now {renamed[name]}' for name in old)}; "
                  "save the model again, the old names end with the next release.", file=sys.stderr)
        found = {renamed.get(name, name): value for name, value in values.items()}
        for name in ("topk_scope", "decision_scope"):
            if name in found:
                found[name] = values_renamed.get(found[name], found[name])
        return cls(**found)


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `ParameterError` for a value that is not allowed, naming the nearest that is."""
    if value not in allowed:
        raise ParameterError(f"{name}={value!r} is not known.{did_you_mean(str(value), allowed)} "
                             f"Allowed: {', '.join(allowed)}.")


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A question with the nearest known word, behind a space; empty where none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
