"""Published methods, each a configuration of the router.

    apply_mod(model, plan, PRESETS["early-exit"])
"""

from __future__ import annotations

from .config import RouterConfig

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
