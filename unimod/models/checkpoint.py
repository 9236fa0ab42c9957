"""Build, load and save models: folders of released models as they are, with the routers beside the weights.

    model, image_tokenizer = from_pretrained("show-o", text="phi-1_5", image_tokenizer="magvitv2", device="cuda",
                                             dtype=torch.bfloat16)
    model, image_tokenizer = from_pretrained(shipped("showo-tiny"))      # routed again if it was saved routed
    save_pretrained(folder, model, image_tokenizer)
    inspect(folder)                                                      # what a folder holds, without loading it

    config.json, weights      in the model's original layout
    routers.safetensors       with plan.yaml and router.json, if routed
    image_tokenizer/          see image_tokenizer.py, if there is one

A folder that cannot be used raises `CheckpointError`: it names the file, what was found and what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from ..baselines import own_class
from ..config import MODELS, ParameterError, RouterConfig, expanded, one_of
from ..layers import MoDLayer, apply_mod, routed_layers
from ..plan import CapacityPlan
from ..router import TaskRouter
from ..seam import without_initial_values
from . import chameleon, emu3, janus, showo
from .image_tokenizer import CONFIG_FILE, ImageTokenizer, load_image_tokenizer, stock_image_tokenizer, stock_kind
from .layout import Layout
from .text import HubText, Text, WordTokenizer
from .unified import UnifiedModel
from .weights import CheckpointError, Family, Weights, compare, fill, listing, read_json

INSIDE = ("model.vqmodel.", "vqmodel.")  # beginnings of the keys of an image tokenizer among a model's own weights
FAMILIES = (showo.FAMILY, emu3.FAMILY, chameleon.FAMILY, janus.FAMILY)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class NoText:
    """The text tokenizer of a folder that has none: the model can be analysed and routed, but to write or read text
    raises `CheckpointError`."""

    size: int
    eot: int
    folder: Path

    def encode(self, text: str) -> list[int]:
        raise CheckpointError(f"{self.folder} has no text tokenizer, so {text[:40]!r} cannot be written. Give "
                              "from_pretrained(text=...) the folder of one (Show-o: Phi-1.5's; Emu3: the converted "
                              "model's).")

    def decode(self, ids: object) -> str:
        return self.encode(str(ids))

    def token(self, i: int) -> str:
        return f"#{i}"


def build_model(name: str, words: tuple[str, ...], codebook_size: int = 256, grid: tuple[int, int] = (6, 6),
                text_budget: int = 96, seed: int = 0) -> UnifiedModel:
    """A tiny model with fresh weights. Raises `ParameterError` for an unknown name."""
    one_of("model", name, MODELS)
    torch.manual_seed(seed)
    builder = {"showo-tiny": showo.tiny, "emu3-tiny": emu3.tiny}[name]
    return builder(WordTokenizer(words), codebook_size, grid, text_budget)


def from_pretrained(folder: str | Path, *, text: str | Path | Text | None = None,
                    image_tokenizer: str | Path | None = None, text_budget: int | None = None,
                    device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
                    router: type[TaskRouter] | None = None) -> tuple[UnifiedModel, ImageTokenizer | None]:
    """The model in a folder, in eval mode and routed if it was saved routed, and its image tokenizer, or None.

    text: a tokenizer, or the folder of transformers' tokenizer; default: the one in the folder, if any.
    image_tokenizer: folder of MAGVIT-v2 or Emu3's vision tokenizer; default: the one inside the folder. text_budget:
    Show-o's T, which its config.json does not give (128; 381 in the released models tuned on LLaVA). dtype: default as
    stored. router: the class of a model that was routed by one of your own. Weights are read one tensor at a time,
    straight to `device`, after a check that they fit its memory. Raises `CheckpointError`.
    """
    folder = Path(expanded(folder))
    family, config = _recognise(folder)
    weights = Weights(folder)
    dtype = dtype or next((d for d in weights.dtypes.values() if d.is_floating_point), torch.float32)
    _room(folder, weights, family, dtype, torch.device(device))
    if text_budget is not None:
        config = {**config, "text_budget": text_budget}
    layout = _layout(folder, config, family, text)
    with _empty(device, dtype):
        model = family.build(config, layout, weights.shapes)
    fill(model, weights, family.ours, family.theirs)
    _load_routers(folder, model, router)
    if image_tokenizer is not None or (folder / "image_tokenizer").is_dir():
        found = load_image_tokenizer(image_tokenizer or folder / "image_tokenizer")
    else:
        found = stock_image_tokenizer(weights.under(INSIDE[0]) or weights.under(INSIDE[1]))
    return model.eval(), found and found.to(device)


def save_pretrained(folder: str | Path, model: UnifiedModel, image_tokenizer: ImageTokenizer | None = None) -> Path:
    """Write the model in its original key layout, its routers beside it, and its image tokenizer; returns the folder.

    config.json is written last, so a half-written folder does not load.
    """
    folder, family = Path(expanded(folder)), next((f for f in FAMILIES if f.name == model.layout.kind), None)
    if family is None:
        raise CheckpointError(f"No family of models is named {model.layout.kind!r}, so nobody could load what is "
                              f"saved. Known: {', '.join(f.name for f in FAMILIES)}. Add yours to "
                              "`checkpoint.FAMILIES` (`unimod.models` says how).")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    # cloned, since routers may share weights and safetensors refuses tensors that share memory
    state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    save_file({family.theirs(k): v for k, v in state.items() if ".router." not in k}, folder / "model.safetensors",
              metadata={"format": "pt"})
    for name in ("routers.safetensors", "plan.yaml", "router.json"):
        (folder / name).unlink(missing_ok=True)
    if routed := routed_layers(model):
        routers = {k: v for k, v in state.items() if ".router." in k and ".learned." not in k}
        save_file(routers, folder / "routers.safetensors")
        plan_of(model).save(folder / "plan.yaml")
        router = routed[0].router
        settings = asdict(router.config) | ({"class": type(router).__qualname__} if own_class(router) else {})
        (folder / "router.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    if image_tokenizer is not None:
        image_tokenizer.save(folder / "image_tokenizer")
    config, text = family.describe(model), model.layout.text
    if isinstance(text, HubText):
        text.tokenizer.save_pretrained(folder)
    elif isinstance(text, WordTokenizer):
        config["words"] = text.words
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def shipped(name: str) -> Path:
    """Folder of a trained tiny checkpoint that comes with the package. Raises `CheckpointError` if it is not there."""
    folder = Path(str(resources.files("unimod"))) / "checkpoints" / name
    if not (folder / "config.json").exists():
        raise CheckpointError(f"The package holds no checkpoint {name!r} in {folder.parent}. "
                              f"Train it: python -m unimod train-tiny {name}.")
    return folder


def plan_of(model: UnifiedModel) -> CapacityPlan:
    """The capacity plan a model is routed by, all dense when it is not; the present one of learned capacities."""
    for layer in routed_layers(model):
        if layer.router.learned is not None:
            return layer.router.learned.plan()
    rows = [layer.router.capacity if isinstance(layer, MoDLayer) else (1.0, 1.0, 1.0) for layer in model.layers]
    return CapacityPlan({task: tuple(row[i] for row in rows) for i, task in enumerate(("t2i", "mmu", "lm"))})


def outline(folder: str | Path) -> tuple[UnifiedModel, Family, Weights]:
    """A folder's model on the meta device (shapes, no values), its family and its weights. Raises `CheckpointError`."""
    folder = Path(expanded(folder))
    family, config = _recognise(folder)
    weights, layout = Weights(folder), _layout(folder, config, family, None)
    with torch.device("meta"):
        return family.build(config, layout, weights.shapes), family, weights


@dataclass(frozen=True)
class Inspection:
    """What a folder holds, found out without loading it."""

    folder: str
    kind: str
    layers: int
    width: int
    vocabulary: int
    codebook: int
    parameters: int  # in the weights of the model itself
    dtypes: tuple[str, ...]
    files: tuple[str, ...]
    weights_gb: float  # as stored, in 10^9 bytes
    load_bf16_gb: float
    load_fp32_gb: float
    train_gb: float  # weights, gradients and AdamW's two moments in fp32; activations come on top
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shape: tuple[str, ...]
    text: str
    image_tokenizer: str
    routed: str

    @property
    def loads(self) -> bool:
        """Whether the weights fit the configuration."""
        return not (self.missing or self.unexpected or self.shape)

    def __str__(self) -> str:
        def some(entries: tuple[str, ...]) -> str:
            shown = "; ".join(entries[:4]) + ("; ..." if len(entries) > 4 else "")
            return f"{len(entries)}: {shown}" if entries else "0"
        rows = {
            "kind": self.kind,
            "layers x width": f"{self.layers} x {self.width}",
            "vocabulary": f"{self.vocabulary}, {self.codebook} of them picture codes",
            "parameters": f"{self.parameters:,}",
            "stored": f"{self.weights_gb:.3f} GB in {', '.join(self.files[:3])} ({', '.join(self.dtypes)})",
            "to load": f"{self.load_bf16_gb:.3f} GB in bf16, {self.load_fp32_gb:.3f} GB in fp32",
            "to train": f"{self.train_gb:.3f} GB and activations",
            "missing keys": some(self.missing),
            "unexpected keys": some(self.unexpected),
            "other shapes": some(self.shape),
            "text tokenizer": self.text,
            "picture tokenizer": self.image_tokenizer,
            "routers": self.routed,
        }
        return "\n".join(f"{name:18s} {value}" for name, value in rows.items())


def inspect(folder: str | Path) -> Inspection:
    """A folder's kind, sizes, keys that do not fit and routers. Raises `CheckpointError` when it is not a model's."""
    folder = Path(expanded(folder))
    model, family, weights = outline(folder)
    _, problems = compare(model.state_dict(), weights, family.ours, family.theirs)
    count = sum(p.numel() for p in model.parameters())
    text, routed = model.layout.text, "none"
    if (folder / "plan.yaml").exists():
        plan, has_routers = CapacityPlan.load(folder / "plan.yaml"), (folder / "routers.safetensors").exists()
        routed = (f"{len(plan.routed())} of {plan.layers} layers, "
                  + ("routers.safetensors" if has_routers else "but routers.safetensors is missing"))
    inside = next((name for name in INSIDE if stock_kind(weights.under(name).shapes)), None)
    tokenizer = f"inside ({inside})" if inside else "none"
    return Inspection(
        folder=str(folder), kind=family.name, layers=len(model.layers), width=model.width,
        vocabulary=model.layout.vocab_size, codebook=model.layout.codebook_size, parameters=count,
        dtypes=tuple(sorted({str(d).removeprefix("torch.") for d in weights.dtypes.values()})),
        files=tuple(p.name for p in weights.files), weights_gb=sum(p.stat().st_size for p in weights.files) / 1e9,
        load_bf16_gb=2 * count / 1e9, load_fp32_gb=4 * count / 1e9, train_gb=16 * count / 1e9,
        **{name: tuple(entries) for name, entries in problems.items()},
        text="none" if isinstance(text, NoText) else type(text).__name__,
        image_tokenizer="image_tokenizer/" if (folder / "image_tokenizer").is_dir() else tokenizer, routed=routed)


def _recognise(folder: Path) -> tuple[Family, dict]:
    expected = "; ".join(f.folder for f in FAMILIES)
    if not (folder / "config.json").is_file():
        if (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"{folder} holds a picture tokenizer, not a model; give it as image_tokenizer= "
                                  "beside a model's folder.")
        raise CheckpointError(f"{folder / 'config.json'} is missing; found: {listing(folder)}. "
                              f"Expected a model's folder: {expected}.")
    config = read_json(folder / "config.json")
    for family in FAMILIES:
        if family.recognises(config):
            return family, config
    says = {k: config[k] for k in ("_class_name", "model_type", "architectures") if k in config}
    says = says or f"the settings {', '.join(sorted(config)[:8])}"
    raise CheckpointError(f"{folder / 'config.json'} is not of a model that is known here: it says {says}. "
                          f"Expected one of: {expected}.")


def _layout(folder: Path, config: dict, family: Family, text: str | Path | Text | None) -> Layout:
    try:
        return family.layout(config, _text(folder, config, family, text))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} has a setting of the wrong kind ({type(error).__name__}: "
                              f"{error}). Use the config.json that belongs to the weights.") from None


def _text(folder: Path, config: dict, family: Family, text: str | Path | Text | None) -> Text:
    if "words" in config:
        return WordTokenizer(config["words"])
    size, eot, name = family.text(config)
    if text is None and any((folder / file).exists() for file in TOKENIZER_FILES):
        text = folder
    if text is None:
        return NoText(size, eot, folder)
    if not isinstance(text, (str, Path)):
        return text
    try:
        return HubText.load(text, size, name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"text={str(text)!r} is not a tokenizer that transformers can load: "
                              f"{str(error).splitlines()[0]}") from None


def _load_routers(folder: Path, model: UnifiedModel, router: type[TaskRouter] | None) -> None:
    path = folder / "routers.safetensors"
    there = {file.name: file.is_file() for file in (path, folder / "plan.yaml")}
    if not any(there.values()):
        return
    if not all(there.values()):
        lacking, given = sorted(there, key=there.get)
        raise CheckpointError(f"{folder} has a {given} but no {lacking}. Copy it there, or remove {given} to load the "
                              "dense model.")
    try:
        settings = read_json(folder / "router.json")
        name = settings.pop("class", None)
        if name != (router and router.__qualname__):
            raise CheckpointError(f"{folder} was routed by {f'the class {name}' if name else 'no class of your own'}; "
                                  f"load it with router={name}.")
        apply_mod(model, CapacityPlan.load(folder / "plan.yaml"), RouterConfig.stored(settings), router)
    except (ParameterError, TypeError) as error:
        raise CheckpointError(f"{folder} cannot be routed as its plan.yaml and router.json say: {error}") from None
    layers = enumerate(model.layers)
    routers = torch.nn.ModuleDict({str(i): layer.router for i, layer in layers if isinstance(layer, MoDLayer)})
    fill(routers, Weights(folder, path), lambda key: key.partition("layers.")[2].replace(".router.", ".", 1))


def _room(folder: Path, weights: Weights, family: Family, dtype: torch.dtype, device: torch.device) -> None:
    """Raises `CheckpointError` when the weights cannot fit the memory that is free on the device."""
    needed = sum(tensor.numel() for key, tensor in weights.tensors.items() if family.ours(key)) * dtype.itemsize
    free = needed                                           # unknown on other devices: not refused
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        free = psutil.virtual_memory().available
    if needed > free:
        raise CheckpointError(f"{folder} needs {needed / 1e9:.1f} GB in {dtype}, {device} has {free / 1e9:.1f} GB "
                              "free. Load it in dtype=torch.bfloat16, or on a larger device.")


@contextmanager
def _empty(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside get their memory on the device in the dtype, but no initial values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), without_initial_values():
            yield
    finally:
        torch.set_default_dtype(before)
