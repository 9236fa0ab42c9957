"""unimod: a research workbook for UniMoD, task-aware Mixture-of-Depths in unified multimodal transformers (arXiv
2502.06474).

The names below are imported when they are first used, so that `import unimod` costs nothing.
"""

from importlib import import_module

_HOME = {
    "pack": "batch", "CapacityPlan": "plan", "make_plan": "plan", "RouterConfig": "config", "apply_mod": "layers",
    "remove_mod": "layers",
    "from_pretrained": "models.checkpoint", "save_pretrained": "models.checkpoint", "shipped": "models.checkpoint",
    "inspect": "models.checkpoint",
    "answer": "generate", "draw": "generate", "capture": "capture", "train": "train", "TrainConfig": "train",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"unimod has no {name!r}; it hands out {', '.join(__all__)}.")
    return getattr(import_module(f"unimod.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
