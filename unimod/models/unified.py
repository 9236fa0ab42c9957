"""A stock transformers causal model run layer by layer on packed tokens.

    model = UnifiedModel(PhiForCausalLM(config), layout)
    hidden = model(batch)                       # [T, D]
    logits = model.head(hidden[batch.labelled])

Two ways lead to the model's numbers: `nll` of targets, and `code_logits` where a picture's next code is asked for. A
model whose picture codes have embeddings and a head of their own overrides these and `embed`, as Janus does.

The layers are transformers' own, and attend over the intervals of the batch through `unimod.seam`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import seam
from ..batch import FEATURE, Batch, lengths_of
from ..config import ParameterError
from ..layers import MLPGatedLayer, MoDLayer
from ..losses import targets_of
from ..ops.attention import prepared, ready
from ..ops.cross_entropy import linear_cross_entropy
from ..ops.decode import by_triton
from ..router import routing_plan
from ..routing import BatchPlan, ForwardState, LayerPlan
from ..upload import upload
from ..versions import explained
from .cache import KVCache
from .layout import Layout


class UnifiedModel(nn.Module):
    """One transformer for understanding and generation: a stock `lm` and the `layout` that writes its sequences.

    `lm` is a transformers model with `lm_head` whose decoder has `embed_tokens`, `layers`, a final norm and
    `rotary_emb`. `projector` takes the features of a vision tower, [F, D_v], to the width of the residual stream.
    """

    def __init__(self, lm: PreTrainedModel, layout: Layout, projector: nn.Module | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.layout = layout
        self.projector = projector
        self.compiled = False
        """Whether `compile_layers` was called."""
        self.skipped: frozenset[int] = frozenset()
        """Layers that a forward passes by; `without` sets it."""
        self.decoder.set_attn_implementation(seam.ATTENTION)
        # out of the module tree: a cast of the model leaves its frequencies exact
        self.__dict__["rotary"] = seam.fresh_rotary(self.decoder)

    @property
    def decoder(self) -> PreTrainedModel:
        """The stack of decoder layers with its embedding and final norm."""
        return self.lm.model

    @property
    def embedding(self) -> nn.Module:
        """From text ids to the residual stream."""
        return seam.embedding(self.decoder)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, dense or routed."""
        return self.decoder.layers

    @property
    def width(self) -> int:
        """Width of the residual stream (D)."""
        return self.decoder.config.hidden_size

    @property
    def head(self) -> nn.Linear:
        """From hidden states to logits over the text vocabulary, of which the picture codes are a part in most
        models."""
        return self.lm.lm_head

    @property
    def one_head(self) -> bool:
        """Whether `nll` is of one plain linear head, not one that an adapter wraps or a model has of its own."""
        return type(self).nll is UnifiedModel.nll and type(self.head) is nn.Linear

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.head.weight.device

    def embed(self, batch: Batch) -> Tensor:
        """What enters the first layer: [T, D]. Raises ValueError for features that the model has no projector for."""
        h = self.embedding(batch.ids.clamp(min=0))
        if batch.features is None:
            return h
        if self.projector is None:
            raise ValueError(f"This {self.layout.kind} model has no projector for vision features; give it picture "
                             f"codes, or load its CLIP-ViT variant.")
        return with_features(h, batch.ids, self.projector(batch.features.to(h.dtype)).to(h.dtype))

    def plan(self, batch: Batch, attention: bool = True, targets: bool = True) -> BatchPlan:
        """What is worked out once for all layers and the losses, on the host, and moved to the batch's device in one
        copy. attention, targets: whether that of the mask and of the losses, too."""
        host, routers = batch.host or batch, {x.number: x.router for x in self._live() if hasattr(x, "router")}
        layers = routing_plan(routers, host)
        memo = self.attention_plan(host, layers) if attention else {}
        scored = any(router.needs_attention for router in routers.values())
        return upload(BatchPlan(layers, memo, targets_of(host) if targets else None,
                                host.segment_numbers() if scored else None), batch.ids.device)

    def attention_plan(self, batch: Batch, layers: Mapping[int, LayerPlan], longest: int = 0) -> dict:
        """`ops.attention.prepared` for a batch on the host and its layers' plans."""
        known = {lengths_of(plan.segments): plan.longest for plan in layers.values() if not plan.threshold_tasks}
        return prepared(batch.mask, known, self.device.type, self.attention_dtype, self.attention_shape, longest)

    @property
    def attention_dtype(self) -> torch.dtype:
        """The dtype of queries, keys and values."""
        device = self.device.type
        cast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if cast else self.head.weight.dtype

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """Heads, heads of keys, and the width of a head."""
        config = self.decoder.config
        width = getattr(config, "head_dim", None) or self.width // config.num_attention_heads
        return config.num_attention_heads, config.num_key_value_heads, width

    def _live(self) -> list[nn.Module]:
        """The layers that a forward goes through."""
        return [layer for i, layer in enumerate(self.layers) if i not in self.skipped]

    def forward(self, batch: Batch, cache: KVCache | None = None, decode: bool = False,
                plan: BatchPlan | None = None) -> Tensor:
        """Hidden states after the final norm: [T, D]. `cache` is read and written; `decode` as in `ForwardState`; plan:
        `plan(batch)`, where it was made already.

        cos and sin are computed and applied in float32 whatever the weights' dtype.
        """
        h = self.embed(batch)[None]
        if self.compiled:                                   # no view: a compiler's guards would make a frame of its own
            h = h.clone()
        if plan is None:                                    # a cache that grows by a token has no use for the mask
            plan = BatchPlan() if decode else self.plan(batch, cache is None or cache.fresh, targets=False)
        # once for all layers; in bfloat16 angles beyond position 256 would be whole radians apart
        rotary = self.rotary.to(h.device)(h.new_empty(0, dtype=torch.float32), position_ids=batch.position[None])
        state = ForwardState(batch, plan=plan, cache=cache, decode=decode, attention=dict(plan.attention),
                             compiled=self.compiled)
        if self.compiled and cache is None and not seam.observed():
            state.ready = ready(batch.mask, state.attention, self.device.type, self.attention_dtype,
                                self.attention_shape)
        layers, earlier = self._live(), state.earlier
        one_op = decode and not self.compiled and by_triton(h)
        with explained(), seam.step_norms(self.decoder) if one_op else nullcontext():
            for layer, following in zip(layers, [*layers[1:], None]):
                # by attribute: a wrapper around a layer, such as torch's checkpoint_wrapper, hands these through
                if not hasattr(layer, "router"):            # a span ends at a dense layer
                    earlier.routing = earlier.decision = None
                scored = hasattr(following, "router") and following.router.needs_attention
                earlier.needs_attention = scored and (cache is None or cache.fresh)
                h = seam.layer_output(layer(h, attention_mask=None, position_ids=None, position_embeddings=rotary,
                                            unimod=state))
            h = seam.final_norm(self.decoder)(h)
        if cache is not None:
            cache.fresh = False
        return h.squeeze(0)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood of each target, in nats and float32. hidden: [N, D], target: int64 [N]."""
        return F.cross_entropy(self.head(hidden).float(), target, reduction="none")

    def weighted_nll(self, hidden: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of weight * nll, and nll without a gradient, without holding all logits. weight: float32 [N]; else as
        `nll`."""
        return linear_cross_entropy(hidden, self.head.weight, self.head.bias, target, weight)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary where an answer goes on, float32. hidden: [N, D]; returns [N, V]."""
        return self.head(hidden).float()

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the picture codes, in their own order, float32. hidden: [N, D]; returns [N, codebook]."""
        at, bias = self.layout.codes_at, self.head.bias
        return F.linear(hidden, self.head.weight[at], None if bias is None else bias[at]).float()


def with_features(h: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    """h, [T, D], with `features`, [F, D], in the places of the F tokens whose id is `FEATURE`."""
    # not masked_scatter, whose backward waits for the device to count the places: the host knows their number
    at = (ids != FEATURE).byte().argsort(stable=True)[:len(features)]
    return h.index_copy(0, at, features)


@contextmanager
def without(model: UnifiedModel, layer: int) -> Iterator[None]:
    """Inside the block the model passes one decoder layer by, dense or routed: losses, capture, cache and generation
    alike. Blocks may be nested.

    Raises `ParameterError` for a layer that does not exist or is passed by already.
    """
    if not 0 <= layer < len(model.layers):
        raise ParameterError(f"layer {layer} does not exist here, so it cannot be left out; allowed: 0 to "
                             f"{len(model.layers) - 1}.")
    if layer in model.skipped:
        raise ParameterError(f"layer {layer} is left out already; name another one.")
    before, model.skipped = model.skipped, model.skipped | {layer}
    try:
        yield
    finally:
        model.skipped = before


def compile_layers(model: UnifiedModel, **options: object) -> UnifiedModel:
    """Compile the decoder layers, dense and routed, each for itself, in place; call it after `apply_mod`. Returns the
    model.

    What is compiled is the stock layer on the tokens it is given, of any number; what depends on the rows' lengths
    stays outside: routers, gather, scatter and attention, which have kernels of their own. So batches of other lengths
    compile nothing anew (of another number of rows neither, but under torch 2.11). A layer whose MLP's output is gated
    stays as it is: its MLP is looked at from outside. options: for `torch.compile`.
    """
    for layer in model.layers:
        if isinstance(layer, MoDLayer):
            layer.keep_norm()
        inner = getattr(layer, "layer", layer)
        # an attribute that some layers have and others lack makes two frames
        seam.set_recomputed(inner, seam.recomputed(inner))
        if not isinstance(layer, MLPGatedLayer):
            inner.compile(dynamic=True, **options)
    model.compiled = True
    return model
