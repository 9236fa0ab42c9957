"""Build, save and load models: a folder with the backbone in its stock key layout and the routers beside it.

    model = build_model("showo-tiny", words, codebook_size=256, grid=(6, 6))
    save_model(folder, model, image_tokenizer)
    model, image_tokenizer = load_model(folder)          # routed again if it was routed
    model, image_tokenizer = load_model(shipped("showo-tiny"))

    config.json               kind and sizes            model.safetensors      backbone ("showo." in front for Show-o)
    image_tokenizer/          see image_tokenizer.py    routers.safetensors    with plan.yaml and router.json, if routed
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Emu3ForCausalLM, PhiForCausalLM

from ..config import MODELS, ParameterError
from ..layers import MoDLayer, apply_mod
from ..plan import CapacityPlan
from ..router import RouterConfig
from . import emu3, showo
from .backbone import UnifiedModel
from .image_tokenizer import ImageTokenizer, load_image_tokenizer
from .text import WordTokenizer

PREFIX = {"showo": "showo.", "emu3": ""}


class CheckpointError(ParameterError):
    """A checkpoint folder that cannot be used: the message names the file, what was found and what was expected."""


def build_model(name: str, words: tuple[str, ...], codebook_size: int = 256, grid: tuple[int, int] = (6, 6),
                text_budget: int = 96, seed: int = 0) -> UnifiedModel:
    """A tiny model with fresh weights. Raises `ParameterError` for an unknown name."""
    text = WordTokenizer(words)
    torch.manual_seed(seed)
    if name == "showo-tiny":
        layout = showo.ShowoLayout(text, codebook_size, grid, text_budget)
        return UnifiedModel(PhiForCausalLM(showo.tiny_showo_config(layout.vocab_size)), layout)
    if name == "emu3-tiny":
        layout = emu3.Emu3Layout(text, codebook_size, grid, text_budget)
        return UnifiedModel(Emu3ForCausalLM(emu3.tiny_emu3_config(layout.vocab_size, pad=layout.pad, bos=layout.bos, eos=layout.eos)), layout)
    raise ParameterError(f"There is no model {name!r}. Allowed: {', '.join(MODELS)}.")


def save_model(folder: str | Path, model: UnifiedModel, image_tokenizer: ImageTokenizer) -> Path:
    """Write the model and its picture tokenizer; config.json is written last, so a half-written folder does not load."""
    folder, layout = Path(folder), model.layout
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in model.lm.state_dict().items()}
    save_file({PREFIX[layout.kind] + k: v for k, v in state.items() if ".router." not in k}, folder / "model.safetensors")
    routed = {i: layer for i, layer in enumerate(model.layers) if isinstance(layer, MoDLayer)}
    if routed:
        save_file({k: v for k, v in state.items() if ".router." in k}, folder / "routers.safetensors")
        plan_of(model).save(folder / "plan.yaml")
        (folder / "router.json").write_text(json.dumps(asdict(next(iter(routed.values())).router.config), indent=1))
    else:
        for name in ("routers.safetensors", "plan.yaml", "router.json"):
            (folder / name).unlink(missing_ok=True)
    image_tokenizer.save(folder / "image_tokenizer")
    config = {"name": f"{layout.kind}-tiny", "words": layout.text.words, "codebook_size": layout.codebook_size, "grid": layout.grid,
              "text_budget": layout.text_budget}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def load_model(folder: str | Path) -> tuple[UnifiedModel, ImageTokenizer]:
    """The model (routed if it was saved routed) and its picture tokenizer. Raises `CheckpointError` naming what is wrong."""
    folder = Path(folder)
    config = _read(folder / "config.json", lambda p: json.loads(p.read_text()))
    try:
        model = build_model(config["name"], tuple(config["words"]), config["codebook_size"], tuple(config["grid"]), config["text_budget"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} lacks or garbles {error}; "
                              "a checkpoint of unimod has name, words, codebook_size, grid and text_budget.") from None
    prefix = PREFIX[model.layout.kind]
    state = {k.removeprefix(prefix): v for k, v in _read(folder / "model.safetensors", load_file).items()}
    if (folder / "plan.yaml").exists():
        apply_mod(model, CapacityPlan.load(folder / "plan.yaml"), RouterConfig(**_read(folder / "router.json", lambda p: json.loads(p.read_text()))))
        state |= _read(folder / "routers.safetensors", load_file)
    _fill(model.lm, state, folder)
    return model.eval(), load_image_tokenizer(folder / "image_tokenizer")


def shipped(name: str) -> Path:
    """Folder of the trained tiny checkpoint that comes with the package. Raises `CheckpointError` when it is not there."""
    folder = Path(str(resources.files("unimod"))) / "checkpoints" / name
    if not (folder / "config.json").exists():
        raise CheckpointError(f"The package holds no checkpoint {name!r} in {folder.parent}. Train it: python -m unimod train-tiny {name}.")
    return folder


def plan_of(model: UnifiedModel) -> CapacityPlan:
    """The capacity plan a model is routed by; all dense when it is not."""
    rows = [layer.router.capacity if isinstance(layer, MoDLayer) else (1.0, 1.0, 1.0) for layer in model.layers]
    return CapacityPlan({task: tuple(row[i] for row in rows) for i, task in enumerate(("t2i", "mmu", "lm"))})


def _read(path: Path, reader: Callable) -> dict:
    try:
        return reader(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a checkpoint folder holds config.json, model.safetensors and image_tokenizer/.") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the file is damaged. Copy it again or train anew.") from None


def _fill(module: nn.Module, state: dict, folder: Path) -> None:
    own = module.state_dict()
    wrong = [f"{k}: shape {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in own.keys() & state.keys() if state[k].shape != own[k].shape]
    for label, keys in (("missing", own.keys() - state.keys()), ("unexpected", state.keys() - own.keys()), ("", wrong)):
        if keys:
            raise CheckpointError(f"{folder} does not fit its config.json: {len(keys)} {label} entries, such as {sorted(keys)[0]}. "
                                  "Use the config.json the weights were saved with.")
    module.load_state_dict(state)
