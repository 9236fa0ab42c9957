"""What a router can be asked: one frozen configuration, and published methods as its presets.

    RouterConfig(shared=True, gate="raw")        # Mixture-of-Depths
    PRESETS["early-exit"]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .config import ParameterError
from .tokens import KINDS

GATES = ("tanh", "sigmoid", "raw", "none", "straight-through")
BRANCHES = ("update", "mlp")
SCORES = ("learned", "random", "attention")
COMPETE = ("segment", "batch", "rows")
REACH = ("layer", "run", "exit")
_ARTICLE = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


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
    """Tokens that are never dropped: any of `tokens.KINDS`. The capacity is of the others."""
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


PRESETS = {
    "unimod": RouterConfig(),
    "mod": RouterConfig(shared=True, gate="raw", std=0.02),
    "gamma-mod": RouterConfig(shared=True, across=True, gate="sigmoid", branch="mlp", keep=("question",)),
    "p-mod": RouterConfig(shared=True, branch="mlp", keep=("text", "special"), scale_skipped=True),
    "a-mod": RouterConfig(score="attention", gate="none"),
    "router-tuning": RouterConfig(shared=True, alone=True),
    "random": RouterConfig(score="random", gate="none"),
    "tread": RouterConfig(score="random", gate="none", reach="run"),
    "early-exit": RouterConfig(reach="exit"),
    "layer-drop": RouterConfig(score="random", gate="none", compete="rows"),
    "competitive": RouterConfig(shared=True, gate="straight-through", noise=1.0, compete="batch"),
}
"""Published methods: UniMoD (arXiv 2502.06474), Mixture-of-Depths (2404.02258), gamma-MoD (2410.13859; its softmax over two logits is a sigmoid of
their difference), p-MoD (2412.04449), A-MoD (2412.20875), Router-Tuning (2410.13184), random routing in one layer and over a span of layers
(TREAD, 2501.04765), early exit of tokens, layer dropping (LayerDrop, 1909.11556), and UniMoD's competitive experiment. The plan is chosen apart."""
