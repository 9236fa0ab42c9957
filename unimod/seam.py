"""The seam to transformers: the only file that imports its inside or knows an attribute of its decoder layers.

    layer(h, attention_mask=None, position_ids=position, position_embeddings=(cos, sin), unimod=ForwardState(batch))

A stock layer passes keywords that it does not know on to its attention, which is the one function registered here: it
reads the intervals of the batch in the `ForwardState`. No modelling file is rewritten, no T x T mask is stored.
`tests/models/test_seam.py` is the contract, run on the oldest and the newest release that is supported;
`tests/test_floors.py` keeps these names in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

from .batch import Batch
from .ops.attention import attention_received, interval_attention
from .ops.decode import rms_norm
from .ops.gather_scatter import Norm
from .routing import ForwardState
from .versions import warn

ATTENTION = "unimod_intervals"
Observer = Callable[[nn.Module, Tensor, Tensor, Batch], None]
_OBSERVER: ContextVar[Observer | None] = ContextVar("attention_observer", default=None)
# once a process: here is the first file that leans on transformers
warn()


# What a decoder layer and its stack are made of


def layer_output(out: Tensor | tuple) -> Tensor:
    """What a decoder layer computed; some of transformers' wrap it in a tuple."""
    return out[0] if isinstance(out, tuple) else out


def input_norm(layer: nn.Module) -> nn.Module | None:
    """The norm of a layer's input; None where it has none of that name."""
    return getattr(layer, "input_layernorm", None)


def set_input_norm(layer: nn.Module, norm: nn.Module) -> None:
    """Put another norm in its place."""
    layer.input_layernorm = norm


def hooked(module: nn.Module | None) -> bool:
    """Whether somebody hangs on a module's forward: an offloader, a sharder, an observer."""
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def known_norm(module: nn.Module | None) -> Norm | None:
    """What `route_gather` needs of a norm; None for a module that computes something else."""
    if type(module) is nn.LayerNorm and module.weight is not None and len(module.normalized_shape) == 1:
        return Norm(module.weight, module.bias, module.eps, "layer")
    if type(module).__name__ in ("LlamaRMSNorm", "Emu3RMSNorm", "ChameleonRMSNorm"):
        return Norm(module.weight, None, module.variance_epsilon, "rms")
    return None


class _StepNorm(nn.Module):
    """The RMSNorm of another module as one operation."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.norm)


@contextmanager
def step_norms(decoder: PreTrainedModel) -> Iterator[None]:
    """Inside the block, which has no gradients, every RMSNorm of the stack is one operation in place of eight. A norm
    that has a hook stays as it is."""
    replaced = []
    for parent in list(decoder.modules()):
        for name, module in parent.named_children():
            stock = getattr(module, "stock", module)
            known = known_norm(stock)
            if known is not None and known.kind == "rms" and not hooked(module) and not hooked(stock):
                replaced.append((parent, name, module))
                setattr(parent, name, _StepNorm(known))
    try:
        yield
    finally:
        for parent, name, module in replaced:
            setattr(parent, name, module)


def mlp(layer: nn.Module) -> nn.Module:
    """A layer's MLP."""
    return layer.mlp


def attention(layer: nn.Module) -> nn.Module:
    """A layer's attention, which carries the `scaling` of its logits."""
    return layer.self_attn


def query_projection(layer: nn.Module) -> nn.Linear:
    """The projection to all heads' queries: [D, H * d]."""
    return layer.self_attn.q_proj


def layer_number(module: nn.Module) -> int | None:
    """The number of the layer that an attention belongs to; the towers of a vision-language model number none."""
    return getattr(module, "layer_idx", None)


def embedding(decoder: PreTrainedModel) -> nn.Module:
    """From ids to the residual stream."""
    return decoder.embed_tokens


def set_embedding(decoder: PreTrainedModel, module: nn.Module) -> None:
    """Put another one in its place."""
    decoder.embed_tokens = module


def final_norm(decoder: PreTrainedModel) -> nn.Module:
    """The norm behind the last layer."""
    return decoder.final_layernorm if hasattr(decoder, "final_layernorm") else decoder.norm


def set_final_norm(decoder: PreTrainedModel, module: nn.Module) -> None:
    """Put another one in its place."""
    setattr(decoder, "final_layernorm" if hasattr(decoder, "final_layernorm") else "norm", module)


def fresh_rotary(decoder: PreTrainedModel) -> nn.Module:
    """A rotary embedding of the decoder's configuration on the CPU, its frequencies in float32 whatever the weights'
    dtype."""
    with torch.device("cpu"):
        return type(decoder.rotary_emb)(decoder.config)


def set_rotary(decoder: PreTrainedModel, module: nn.Module) -> None:
    """Put another one in its place."""
    decoder.rotary_emb = module


def recomputed(layer: nn.Module) -> bool:
    """Whether the layer is recomputed in the backward pass, as `gradient_checkpointing_enable` of a stock model asks of
    each."""
    return getattr(layer, "gradient_checkpointing", False)


def set_recomputed(layer: nn.Module, on: bool) -> None:
    """Ask it of one layer."""
    layer.gradient_checkpointing = on


# Attention over packed tokens


def _packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                      scaling: float,
                      dropout: float = 0.0, unimod: ForwardState | None = None, **_: object) -> tuple[Tensor, None]:
    """transformers' attention contract for one packed row: q [1, H, T, d], k and v [1, H_kv, T, d] -> [1, T, H, d].

    Rotated queries and keys arrive in float32, as cos and sin do, and are rounded to the dtype of the values here,
    once. A compiled layer is one graph with it, but where a cache is written or somebody looks at attention.
    """
    if unimod is None or attention_mask is not None:
        raise RuntimeError(f"The attention '{ATTENTION}' works on packed tokens only: call the model through unimod's "
                           f"UnifiedModel, "
                           "which packs without padding, or choose another attn_implementation.")
    if dropout:
        raise RuntimeError(f"Attention dropout {dropout} is not available on packed tokens; build the model with "
                           f"attention_dropout=0.")
    if unimod.ready is not None and not unimod.earlier.needs_attention:
        q, k, v = (x.squeeze(0).to(value.dtype) for x in (query, key, value))
        return unimod.ready(q, k, v, scaling).unsqueeze(0), None
    return (_attend_outside if unimod.compiled else _attend)(module, query, key, value, scaling, unimod), None


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float,
            state: ForwardState) -> Tensor:
    # squeeze, not [0], whose backward fills a tensor of zeros: three copies a layer
    q, k, v = query.squeeze(0), key.squeeze(0), value.squeeze(0)
    mask = state.mask
    observer = None if torch.compiler.is_compiling() else _OBSERVER.get()
    if not state.decode or observer is not None:            # a decode step rounds them as it writes them into the cache
        q, k = q.to(v.dtype), k.to(v.dtype)
    if observer is not None:
        observer(module, q, k, state.given())
    if state.earlier.needs_attention:
        segment = state.plan.segment
        segment = state.batch.segment_numbers() if segment is None else segment
        segment = segment if state.index is None else segment[state.index]
        state.earlier.received = attention_received(q, k, mask.lo, mask.hi, segment, mask.lengths, scaling)
    if state.cache is not None:
        return state.cache.attend(layer_number(module), q, k, v, state, scaling)[None]
    memo = None if torch.compiler.is_compiling() else state.attention
    return interval_attention(q, k, v, mask, scaling, memo)[None]


_attend_outside = torch.compiler.disable(_attend)
AttentionInterface.register(ATTENTION, _packed_attention)


def observed() -> bool:
    """Whether somebody looks at attention now."""
    return _OBSERVER.get() is not None


@contextmanager
def observe_attention(observer: Observer) -> Iterator[None]:
    """Call `observer(module, q, k, batch)` in every attention, with q [H, T, d] and k [H_kv, T, d] after norm and
    RoPE. Blocks may be nested: each observer is called."""
    outer = _OBSERVER.get()

    def both(*seen: object) -> None:
        outer(*seen)
        observer(*seen)

    token = _OBSERVER.set(observer if outer is None else both)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


# Stock models that attend in their own way


def stock_attention(name: str) -> Callable:
    """The attention function that transformers has under a name, such as sdpa."""
    return ALL_ATTENTION_FUNCTIONS[name]


def register_attention(name: str, function: Callable, masks_of: str) -> None:
    """Enter an attention of our own, which is given the masks of another one."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks_of])


def attention_name(config: PreTrainedConfig | None) -> str | None:
    """The attention that a configuration has chosen."""
    return getattr(config, "_attn_implementation", None)


def attention_names(config: PreTrainedConfig, instead: Mapping[str, str] | None = None) -> dict | str:
    """The attention of a model and its parts, as `set_attn_implementation` takes it, with some names put in place of
    others."""
    own = (instead or {}).get(attention_name(config), attention_name(config))
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name)) is not None}
    return {"": own} | {name: attention_names(part, instead) for name, part in parts.items()} if parts else own


# Checkpoints


def without_initial_values() -> contextmanager:
    """Modules of transformers that are made inside the block draw no initial values."""
    return no_init_weights()


def chameleon_codes(vocabulary: Mapping[str, int]) -> dict[int, int]:
    """Picture code -> id, as the names of Chameleon's vocabulary map spell the codes."""
    return ChameleonImageVocabularyMapping(vocabulary).img2bpe
