"""Routed layers: wrap any decoder layer so that only the kept tokens go through it.

    apply_mod(model, plan, RouterConfig(shared=False))    # UniMoD; shared=True is MoD
    remove_mod(model)                                     # the stock layers again, untouched

The way of a batch, from `pack` to the loss:

    batch.pack                          sequences behind one another, with an interval mask
    losses.losses                       asks the model, then the head, of labelled tokens only
    models.unified.UnifiedModel.forward embeds; works out `router.routing_plan` once; runs the layers
      layers.MoDLayer.forward           a routed layer:
        router.TaskRouter.forward         scores, top-k of each segment (ops.select), gates -> Routing; where kernels
                                          run, with the gather of the kept tokens in one op (ops.route)
        routing.ForwardState.of_kept      the kept tokens' mask
        the stock layer                   attention by seam._attend -> ops.attention.interval_attention
        ops.gather_scatter.scatter        its output back among the skipped tokens

The state dict keeps the backbone's stock keys; router keys stand beside them (`layers.5.router.proj.weight`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from . import seam
from .baselines import RandomRouter, fade, own_class, router_class, suits
from .capacity import LearnedCapacity
from .config import ParameterError, RouterConfig
from .ops.attention import attention_runs
from .ops.backend import backend
from .ops.decode import apply_decision
from .ops.gather_scatter import scatter, scatter_
from .plan import CapacityPlan
from .router import TaskRouter
from .routing import ForwardState, Gather, LayerPlan, Routing

_LOG: ContextVar[dict[int, Routing] | None] = ContextVar("routing_log", default=None)


class PrecomputedNorm(nn.Module):
    """A layer's input norm that a kernel may have computed already, with the gather: it then returns that result.

    Parameters are the stock norm's own, under their names; whatever else is asked of it is the stock norm's.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.__dict__["stock"] = stock
        self._parameters, self._buffers = stock._parameters, stock._buffers
        self.given: tuple[Tensor, Tensor] | None = None
        """What was gathered, and its norm."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x."""
        return self.given[1] if self.given is not None and x is self.given[0] else self.stock(x)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "stock" not in self.__dict__:                # a copy that is being made
                raise
            return getattr(self.stock, name)


class MoDLayer(nn.Module):
    """A decoder layer behind a router.

    It has one set of children with the layer that it wraps, and the router among them; the layer itself is not
    registered. So a wrapped layer saves like an unwrapped one, and a child that is replaced, hooked, sharded or adapted
    through either is the one that runs. With y = layer(x) on the kept tokens and the gate w, the output is

        x + w * (y - x)  =  y + (w - 1) * (y - x)      (UniMoD, section 3; the second form is exact at w = 1)

    for kept tokens and x for all others (w * x where the router scales those that it skips). A skipped token is neither
    query nor key in this layer, keeps its position, is ranked anew in the next routed layer and still counts in the
    loss where it has a target; its score gets no gradient, since only the gates of kept tokens enter the output.
    """

    def __init__(self, layer: nn.Module, router: TaskRouter, number: int) -> None:
        super().__init__()
        if hasattr(layer, "router"):
            raise ParameterError(f"{type(layer).__name__} already has a 'router'; call remove_mod before routing it "
                                 f"again.")
        self.__dict__["layer"] = layer
        # one set of children, not a child `layer`: stock keys, and model.layers[5].mlp = X is what runs
        self._parameters, self._buffers, self._modules = layer._parameters, layer._buffers, layer._modules
        self._non_persistent_buffers_set = layer._non_persistent_buffers_set
        self.router = router
        self.number = number
        # transformers sets it on every module that has the attribute
        self.gradient_checkpointing = seam.recomputed(layer)
        """Whether the kept tokens' way through the layer, gate included, is recomputed in the backward pass."""
        seam.set_recomputed(layer, False)
        norm = seam.input_norm(layer)
        if seam.known_norm(norm) is not None:
            seam.set_input_norm(layer, PrecomputedNorm(norm))

    def train(self, mode: bool = True) -> MoDLayer:
        """Also the layer that is not registered."""
        self.layer.training = mode
        return super().train(mode)

    def forward(self, hidden_states: Tensor, *, unimod: ForwardState, position_embeddings: tuple[Tensor, Tensor],
                **kwargs: object) -> Tensor:
        """hidden_states: [1, T, D]; cos and sin: [1, T, d]. Returns [1, T, D]."""
        if unimod.decode:
            return self._decode(hidden_states, unimod, position_embeddings=position_embeddings, **kwargs)
        earlier, plan = unimod.earlier, unimod.plan.layers.get(self.number)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        gather = None if recompute or plan is None else self._gather(hidden_states, position_embeddings, unimod, plan)
        if gather is None:
            routing = self.router(hidden_states.squeeze(0), unimod.batch, earlier, plan)
        else:
            routing = self.router(hidden_states, unimod.batch, earlier, plan, gather)
        log = None if torch.compiler.is_compiling() else _LOG.get()        # compiled layers are not recorded
        if log is not None:
            log[self.number] = routing
        found, index, scale = routing.gathered, routing.index, routing.skip_scale
        h = hidden_states if found is None else found.h
        skipped = h if scale is None else h * scale[:, None].to(h.dtype)
        if not any(s.length for s in routing.segments):     # a threshold may turn every token away
            return skipped
        received = earlier.received
        # gathered, not computed anew: cos and sin of the kept tokens' own positions, in float32
        angles = [x.index_select(1, index) for x in position_embeddings] if found is None else (found.cos, found.sin)
        run = partial(self._run, routing=routing, unimod=unimod.of_kept(routing, plan.longest if plan else 0),
                      position_embeddings=tuple(angles), **kwargs)
        # the router stays outside: its decision is needed to scatter, and costs 2 D FLOPs a token
        x, y, gated = checkpoint(run, hidden_states, use_reentrant=False) if recompute else run(hidden_states)
        if earlier.needs_attention:                         # skipped tokens keep what they received last
            received = earlier.received.new_zeros(h.shape[1]) if received is None else received
            earlier.received = received.index_copy(0, index, earlier.received)
        # the usual end: skipped tokens are h itself, which nobody may write to
        if scale is None:
            return scatter(h, y, index, routing.weight, x=x, gated=gated, rank=routing.rank)
        # in place without gradients: `skipped` is this layer's own, while the caller may still hold hidden_states
        write = scatter if torch.is_grad_enabled() else scatter_
        return write(skipped, y, index, routing.weight, gated=y - x if gated is None else gated, rank=routing.rank)

    def _run(self, hidden_states: Tensor, *, routing: Routing, **kwargs: object) -> tuple[Tensor, Tensor,
                                                                                          Tensor | None]:
        """The kept tokens [1, K, D], the layer's output on them, and what the gate multiplies where that is not their
        difference."""
        found, norm = routing.gathered, seam.input_norm(self.layer)
        if found is None:
            x = hidden_states.index_select(1, routing.index)
            return x, *self._layer(x, **kwargs)
        if not isinstance(norm, PrecomputedNorm):           # a compiled layer norms its input itself
            return found.x, *self._layer(found.x, **kwargs)
        norm.given = found.x, found.normed                  # the very tensor by which the norm knows its result
        try:
            return found.x, *self._layer(found.x, **kwargs)
        finally:
            norm.given = None

    def _layer(self, x: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """The layer's output and what the gate multiplies, None for the whole update; both like x: [1, K, D]."""
        return seam.layer_output(self.layer(x, **kwargs)), None

    def _decode(self, hidden_states: Tensor, state: ForwardState, **kwargs: object) -> Tensor:
        """A decode step: all tokens are computed, and those that the router drops leave no trace, neither here nor in
        the cache."""
        decision = self.router.decode(hidden_states.squeeze(0), state.batch, state.earlier)
        y, gated = self._layer(hidden_states, unimod=replace(state, active=None if decision is None else decision[0]),
                               **kwargs)
        if decision is None:
            return y
        return apply_decision(hidden_states, y, *decision, gated, self.router.config.scale_skipped)

    def _gather(self, h: Tensor, angles: tuple[Tensor, Tensor], state: ForwardState, plan: LayerPlan) -> Gather | None:
        """What the kept tokens bring along, where kernels score, choose, gather and normalise them in one op; None
        where the plain ops do."""
        norm = seam.input_norm(self.layer)
        stock = getattr(norm, "stock", norm)
        known, hooked = seam.known_norm(stock), seam.hooked(stock) or seam.hooked(getattr(self.router, "proj", None))
        if known is None or known.weight.dtype != h.dtype or hooked or torch.compiler.is_compiling():
            return None
        if backend("kernels", h.device.type, h.dtype) != "triton" or not self.router.fuses(state.batch, plan):
            return None
        runs = attention_runs(state.attention)
        return Gather(known, *angles, *((None, None) if runs is None else (runs.bounds.flatten(), runs.causal)))

    def keep_norm(self) -> None:
        """Let the layer norm its input itself: a compiler fuses that better, and sees the same code in every layer."""
        norm = seam.input_norm(self.layer)
        if isinstance(norm, PrecomputedNorm):
            seam.set_input_norm(self.layer, norm.stock)

    def release(self) -> nn.Module:
        """The stock layer as it was before it was wrapped, with its present children and weights."""
        self.keep_norm()
        seam.set_recomputed(self.layer, self.gradient_checkpointing)
        del self.layer.router
        return self.layer


class MLPGatedLayer(MoDLayer):
    """A routed layer whose gate is for its MLP's part of the update (gamma-MoD, p-MoD): the MLP's output is kept as it
    passes by."""

    def __init__(self, layer: nn.Module, router: TaskRouter, number: int) -> None:
        super().__init__(layer, router, number)
        self._output: Tensor | None = None
        self._hook: RemovableHandle | None = None
        self._hooked: tuple[nn.Module | None] = (None,)     # in a tuple, so that it is no child of this layer
        self._hook_mlp()                                    # now, so that a compiled layer finds it hooked

    def _layer(self, x: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
        self._hook_mlp()
        try:
            y, _ = super()._layer(x, **kwargs)
            return y, self._output
        finally:
            self._output = None

    def _hook_mlp(self) -> None:
        """Hook the MLP that is there now, which may have been replaced."""
        mlp = seam.mlp(self.layer)
        if self._hooked[0] is mlp:
            return
        if self._hook:
            self._hook.remove()
        self._hooked, self._hook = (mlp,), mlp.register_forward_hook(self._keep_output)

    def _keep_output(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._output = output

    def release(self) -> nn.Module:
        """As `MoDLayer.release`, without the hook."""
        if self._hook:
            self._hook.remove()
        return super().release()


def stock_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a layer, without those of a router that shares its children."""
    return (p for name, p in layer.named_parameters() if not name.startswith("router."))


def apply_mod(model: nn.Module, plan: CapacityPlan, config: RouterConfig | None = None,
              router: type[TaskRouter] | None = None) -> nn.Module:
    """Route `model.layers` (an nn.ModuleList of decoder layers of width `model.width`) by the plan, in place; returns
    the model.

    Layers that the plan leaves dense stay as they are. router: a class of your own in place of the configuration's
    (`router`'s docstring has an example). Raises `ParameterError` when the plan is
    for another number of layers, when it does not suit a router that looks back at earlier layers, or when the model is
    routed already.
    """
    if plan.layers != len(model.layers):
        raise ParameterError(f"The plan has {plan.layers} layers, the model {len(model.layers)}; make the plan for "
                             f"this model.")
    if routed := [layer.number for layer in routed_layers(model)]:
        raise ParameterError(f"Layers {', '.join(map(str, routed))} of this model are routed already; call remove_mod "
                             f"first.")
    if router is not None and not (isinstance(router, type) and issubclass(router, TaskRouter)):
        raise ParameterError(f"router={router!r} is not a class of routers; give a subclass of "
                             "unimod.router.TaskRouter.")
    config = config or RouterConfig()
    suits(plan, config)
    if router is not None and router_class(config) not in (TaskRouter, RandomRouter, *router.__mro__):
        raise ParameterError(f"{router.__name__} does not do what the configuration asks of "
                             f"{router_class(config).__name__}: derive it from that class, or leave score, topk_scope "
                             "and decision_scope at their defaults.")
    for i in plan.routed():
        old = model.layers[i]
        made = (router or router_class(config))(model.width, plan.at(i), config).to(next(old.parameters()))
        follows = config.decision_scope == "span" and i - 1 in plan.routed()
        if follows:                                         # `baselines.Span` repeats the decision of the layer before
            made.follows = True
        layer = MLPGatedLayer if config.branch == "mlp" else MoDLayer
        model.layers[i] = layer(old, made, i).train(old.training)
        if config.score == "learned" and (follows or (config.shared_layers and i != plan.routed()[0])):
            made.proj = model.layers[i - 1 if follows else plan.routed()[0]].router.proj
        if config.predictor and follows:
            made.predict = model.layers[i - 1].router.predict
    if config.freeze_backbone:
        model.__dict__["_thaw"] = [p for n, p in model.named_parameters() if p.requires_grad and ".router." not in n]
        train_routers_only(model)
    return model


def learn_capacity(model: nn.Module, saving: float, weight: dict[str, float] | None = None) -> LearnedCapacity:
    """Let the capacities of a routed model be learned, in place, starting from one for all: see
    `capacity.LearnedCapacity`.

    weight: what a token-layer of each task counts, default t2i and mmu the same and lm dense. Returns what is learned,
    whose `plan()` is the result. Raises `ParameterError` for a saving out of reach, a dense model, or a router whose
    choice has no edge to learn from.
    """
    routed = routed_layers(model)
    if own := [layer for layer in routed if own_class(layer.router)]:
        raise ParameterError(f"{type(own[0].router).__name__} is a router of your own, and capacities are learned with "
                             "the package's: call apply_mod without router= first.")
    if not routed or any(layer.router.config.topk_scope != "segment" or layer.router.config.decision_scope != "layer"
                         for layer in routed):
        raise ParameterError("Capacities are learned where each layer chooses for itself among the tokens of a "
                             "segment: call apply_mod with a router of topk_scope='segment' and "
                             "decision_scope='layer' first.")
    learned = LearnedCapacity(len(model.layers), [layer.number for layer in routed], weight or {"t2i": 1.0, "mmu": 1.0},
                              saving)
    learned.to(next(model.parameters()).device)
    for row, layer in enumerate(routed):
        fade(layer.router, learned, row)
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
    """Collect the `Routing` of every routed layer by layer number, with its gradients, for the last forward inside the
    block."""
    log: dict[int, Routing] = {}
    token = _LOG.set(log)
    try:
        yield log
    finally:
        _LOG.reset(token)
