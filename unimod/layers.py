"""Routed layers: wrap any decoder layer so that only the kept tokens go through it.

    apply_mod(model, plan, RouterConfig(shared=False))    # UniMoD; shared=True is MoD
    remove_mod(model)                                     # the stock layers again, untouched

The state dict keeps the backbone's stock keys; router keys stand beside them (`layers.5.router.proj.weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .capacity import LearnedCapacity
from .config import TASKS, ParameterError
from .methods import RouterConfig
from .ops.backend import backend
from .ops.gather import gather_norm, known_norm
from .ops.scatter import scatter, scatter_
from .plan import CapacityPlan
from .router import ForwardState, Routing, TaskRouter

_LOG: ContextVar[dict[int, Routing] | None] = ContextVar("routing_log", default=None)


class MoDLayer(nn.Module):
    """A decoder layer behind a router.

    The wrapped layer's children are registered under their own names and the layer itself is not, so that a wrapped layer
    saves like an unwrapped one. With y = layer(x) on the kept tokens, the output is

        x + w * (y - x)  =  y + (w - 1) * (y - x)      (UniMoD, section 3; the second form is exact at w = 1)

    for kept tokens and x for all others (w * x where the router scales those that it skips). A router whose gate is for the MLP branch puts the
    output of `layer.mlp` in place of y - x.
    """

    def __init__(self, layer: nn.Module, router: TaskRouter, number: int) -> None:
        super().__init__()
        if hasattr(layer, "router"):
            raise ParameterError(f"{type(layer).__name__} already has a 'router'; call remove_mod before routing it again.")
        self.__dict__["layer"] = layer
        self._parameters, self._buffers = layer._parameters, layer._buffers
        self._modules = {**layer._modules, "router": router}
        self.number = number
        self.checkpointing_of(layer)
        layer.gradient_checkpointing = False                # it is this layer, gate included, that is recomputed
        self._mlp: Tensor | None = None
        self._normed: tuple[Tensor, Tensor] | None = None
        norm = getattr(layer, "input_layernorm", None)
        self._hands = known_norm(norm) is not None and "forward" not in vars(norm)
        if self._hands:
            norm.forward = partial(self._norm, norm.forward)
        self._tap = layer.mlp.register_forward_hook(self._keep) if router.config.branch == "mlp" else None

    def checkpointing_of(self, layer: nn.Module) -> None:
        """Recompute in the backward pass as that layer does (transformers sets both attributes on every module)."""
        self.gradient_checkpointing = getattr(layer, "gradient_checkpointing", False)
        self._gradient_checkpointing_func = getattr(layer, "_gradient_checkpointing_func", None)

    def train(self, mode: bool = True) -> MoDLayer:
        """Also the layer that is not registered."""
        self.layer.training = mode
        return super().train(mode)

    def forward(self, hidden_states: Tensor, *, unimod: ForwardState, position_embeddings: tuple[Tensor, Tensor], **kwargs: object) -> Tensor:
        """hidden_states: [1, T, D]; cos and sin: [1, T, d]. Returns [1, T, D]."""
        packed, trail = unimod.packed, unimod.trail
        if packed.static:
            return self._alone(hidden_states, unimod, position_embeddings=position_embeddings, **kwargs)
        routing = self.router(hidden_states.squeeze(0), packed, trail)   # not [0], whose backward fills a tensor of zeros
        log = None if torch.compiler.is_compiling() else _LOG.get()        # compiled layers are not recorded
        if log is not None:
            log[self.number] = routing
        i, (cos, sin), passed = routing.index, position_embeddings, hidden_states
        if routing.passing is not None:
            passed = hidden_states * routing.passing[:, None].to(hidden_states.dtype)
        if not any(s.length for s in routing.segments):     # a threshold may turn every token away
            return passed
        before = trail and trail.received
        inner = replace(unimod, packed=packed.take(i, routing.segments, routing.rank))
        run = partial(self._through, routing=routing, unimod=inner, position_embeddings=(cos[:, i], sin[:, i]), **kwargs)
        x, y, mlp = self._gradient_checkpointing_func(run, hidden_states) if self.gradient_checkpointing and self.training else run(hidden_states)
        if trail and trail.watched:                         # skipped tokens keep what they received last
            trail.received = (trail.received.new_zeros(len(packed)) if before is None else before).index_copy(0, i, trail.received)
        passed, x, y = passed.squeeze(0), x.squeeze(0), y.squeeze(0)
        if routing.passing is None:
            return scatter(passed, y, i, routing.weight, x=x, gated=mlp, rank=routing.rank)[None]
        write = scatter if torch.is_grad_enabled() else scatter_    # `passed` is this layer's own; the caller may still hold hidden_states
        return write(passed, y, i, routing.weight, gated=y - x if mlp is None else mlp, rank=routing.rank)[None]

    def _alone(self, hidden_states: Tensor, state: ForwardState, **kwargs: object) -> Tensor:
        """One token of every row: all are computed, and those that the router turns away leave no trace, neither here nor in the cache."""
        judged = self.router.alone(hidden_states.squeeze(0), state.packed, state.trail)
        y = layer_output(self.layer(hidden_states, unimod=replace(state, keep=None if judged is None else judged[0]), **kwargs))
        mlp, self._mlp = self._mlp, None
        if judged is None:
            return y
        keep, factor = (x[:, None] for x in judged)
        gated = y - hidden_states if mlp is None else mlp
        past = hidden_states * factor.to(y.dtype) if self.router.config.scale_skipped else hidden_states
        return torch.where(keep, (y + (factor - 1).to(y.dtype) * gated).to(y.dtype), past)

    def _through(self, hidden_states: Tensor, *, routing: Routing, **kwargs: object) -> tuple[Tensor, Tensor, Tensor | None]:
        """The kept tokens, the layer's output on them, and its MLP's [K, D] where that is gated."""
        try:
            x = self._gather(hidden_states, routing)
            y = layer_output(self.layer(x, **kwargs))
            return x, y, None if self._mlp is None else self._mlp.squeeze(0)
        finally:
            self._mlp = self._normed = None

    def _gather(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """The kept tokens: [1, K, D]. Where a kernel normalises them on the way, `_norm` hands the layer the result."""
        norm = known_norm(self.layer.input_layernorm) if self._hands else None
        if norm is None or norm.weight.dtype != hidden_states.dtype or backend("kernels", hidden_states.device.type, hidden_states.dtype) != "triton":
            return hidden_states.squeeze(0).index_select(0, routing.index)[None]
        x, n = gather_norm(hidden_states.squeeze(0), routing.index, norm, routing.rank)
        self._normed = x[None], n[None]
        return self._normed[0]

    def _norm(self, stock: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The layer's input norm: what was worked out on the way for this very tensor, else its own forward."""
        return self._normed[1] if self._normed is not None and x is self._normed[0] else stock(x)

    def _keep(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        self._mlp = out

    def keep_norm(self) -> None:
        """Let the layer norm its input itself from now on: a compiler fuses that better, and sees the same code in every layer."""
        if self._hands:
            del self.layer.input_layernorm.forward
        self._hands = False

    def release(self) -> nn.Module:
        """The stock layer as it was before it was wrapped, with its present weights."""
        if self._tap:
            self._tap.remove()
        self.keep_norm()
        MoDLayer.checkpointing_of(self.layer, self)
        return self.layer


def layer_output(out: Tensor | tuple) -> Tensor:
    """What a decoder layer computed; some of transformers' wrap it in a tuple."""
    return out[0] if isinstance(out, tuple) else out


def apply_mod(model: nn.Module, plan: CapacityPlan, config: RouterConfig | None = None) -> nn.Module:
    """Route `model.layers` (an nn.ModuleList of decoder layers of width `model.width`) by the plan, in place; returns the model.

    Layers that the plan leaves dense stay as they are. Raises `ParameterError` when the plan is for another number of layers, when it does not
    suit a router that looks back at earlier layers, or when the model is routed already.
    """
    if plan.layers != len(model.layers):
        raise ParameterError(f"The plan has {plan.layers} layers, the model {len(model.layers)}; make the plan for this model.")
    if routed := [layer.number for layer in routed_layers(model)]:
        raise ParameterError(f"Layers {', '.join(map(str, routed))} of this model are routed already; call remove_mod first.")
    config = config or RouterConfig()
    suits(plan, config)
    for i in plan.routed():
        old = model.layers[i]
        follows = config.reach == "run" and i - 1 in plan.routed()
        router = TaskRouter(model.width, plan.at(i), config, follows).to(next(old.parameters()))
        model.layers[i] = MoDLayer(old, router, i).train(old.training)
        if config.score == "learned" and (follows or (config.across and i != plan.routed()[0])):
            router.proj = model.layers[i - 1 if follows else plan.routed()[0]].router.proj
        if config.predictor and follows:
            router.predict = model.layers[i - 1].router.predict
    if config.alone:
        model.__dict__["_thaw"] = [p for n, p in model.named_parameters() if p.requires_grad and ".router." not in n]
        train_routers_only(model)
    return model


def suits(plan: CapacityPlan, config: RouterConfig) -> None:
    """Raise `ParameterError` for a plan that a router which looks back at earlier layers cannot carry out."""
    routed = plan.routed()
    if config.score == "attention" and 0 in routed:
        raise ParameterError("score='attention' looks at the layer before, so layer 0 cannot be routed; give a plan that leaves it dense.")
    for task in TASKS:
        for i, (c, following) in enumerate(zip(plan.capacity[task], plan.capacity[task][1:])):
            if config.reach == "exit" and following > c:
                raise ParameterError(f"reach='exit': a token that was dropped never comes back, but {task} keeps {c:g} in layer {i} and {following:g} in "
                                     f"layer {i + 1}; give capacities that do not rise with depth, such as last_half.")
            if config.reach == "run" and {i, i + 1} <= set(routed) and following != c:
                raise ParameterError(f"reach='run': one decision holds for neighbouring routed layers, but {task} keeps {c:g} in layer {i} and "
                                     f"{following:g} in layer {i + 1}; give them one capacity, such as last_half does.")


def learn_capacity(model: nn.Module, saving: float, weight: dict[str, float] | None = None) -> LearnedCapacity:
    """Let the capacities of a routed model be learned, in place, starting from one for all: see `capacity.LearnedCapacity`.

    weight: what a token-layer of each task counts, default t2i and mmu the same and lm dense. Returns what is learned, whose `plan()` is the
    result. Raises `ParameterError` for a saving out of reach, a dense model, or a router whose choice has no edge to learn from.
    """
    routed = routed_layers(model)
    if not routed or any(layer.router.config.compete != "segment" or layer.router.config.reach != "layer" for layer in routed):
        raise ParameterError("Capacities are learned where each layer chooses for itself among the tokens of a segment: call apply_mod with a "
                             "router of compete='segment' and reach='layer' first.")
    learned = LearnedCapacity(len(model.layers), [layer.number for layer in routed], weight or {"t2i": 1.0, "mmu": 1.0}, saving)
    learned.to(next(model.parameters()).device)
    for row, layer in enumerate(routed):
        layer.router.learned, layer.router.row = learned, row
        layer.router.capacity = learned.host(row)
    return learned


def remove_mod(model: nn.Module) -> nn.Module:
    """Put the stock layers back, in place; their weights are the ones trained meanwhile. What a router froze is trained
    again. Returns the model."""
    for i, layer in enumerate(model.layers):
        if isinstance(layer, MoDLayer):
            model.layers[i] = layer.release()
    for p in model.__dict__.pop("_thaw", ()):
        p.requires_grad_(True)
    return model


def routed_layers(model: nn.Module) -> list[MoDLayer]:
    """The layers of a model that are routed, in order; none when it is dense."""
    return [layer for layer in model.layers if isinstance(layer, MoDLayer)]


def train_routers_only(model: nn.Module) -> nn.Module:
    """Freeze everything but the routers (Router-Tuning, arXiv 2410.13184), in place; returns the model."""
    for name, p in model.named_parameters():
        p.requires_grad_(".router." in name)
    return model


@contextmanager
def record_routing() -> Iterator[dict[int, Routing]]:
    """Collect the `Routing` of every routed layer by layer number, with its gradients, for the last forward inside the block."""
    log: dict[int, Routing] = {}
    token = _LOG.set(log)
    try:
        yield log
    finally:
        _LOG.reset(token)
