"""The tensors of a checkpoint folder, and what each model family says of its folders.

    weights = Weights(folder)           # CheckpointError for nothing to read, a missing shard, a damaged file
    weights.shapes["lm_head.weight"]    # (58498, 2048)
    fill(module, weights, ours)         # into the module's own device and dtype

Understood are safetensors and torch's own files (read with `weights_only`, so that no code in a pickle ever runs), each
whole or in shards with an index. Files are memory-mapped: a tensor's values are read when it is copied.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import ParameterError
from .layout import Layout
from .text import Text
from .unified import UnifiedModel

# file names that are looked for, in this order, whole or as NAME.index.json with shards
NAMES = ("model.safetensors", "pytorch_model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin",
         "model.pt", "tokenizer.safetensors")
Shapes = Mapping[str, tuple[int, ...]]


class CheckpointError(ParameterError):
    """A checkpoint folder that cannot be used: the message names the file, what was found and what was expected."""


class Weights:
    """The tensors of one folder, or of one `file` in it: `tensors`, `shapes` and `dtypes` by key, and the `files`."""

    def __init__(self, folder: str | Path, file: Path | None = None) -> None:
        self.folder = Path(folder)
        self.files = self._files() if file is None else [file]
        self.tensors: dict[str, Tensor] = {}
        for path in self.files:
            self.tensors |= _read(path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: tensor.dtype for key, tensor in self.tensors.items()}

    def __len__(self) -> int:
        return len(self.tensors)

    def under(self, prefix: str) -> Weights:
        """Those whose key begins with a prefix, which is taken off."""
        part = copy(self)
        part.tensors = {k[len(prefix):]: v for k, v in self.tensors.items() if k.startswith(prefix)}
        return part

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder. Give the one with config.json and the weights.")
        for name in NAMES:
            whole, index = self.folder / name, self.folder / f"{name}.index.json"
            if whole.is_file():
                return [whole]
            if index.is_file():
                shards = sorted({self.folder / shard for shard in read_json(index).get("weight_map", {}).values()})
                missing = [s.name for s in shards if not s.is_file()]
                if missing or not shards:
                    raise CheckpointError(f"{index} names {len(shards)} shards, of which {len(missing)} are missing: "
                                          f"{', '.join(missing[:3])}. Download the missing files into the folder.")
                return shards
        raise CheckpointError(f"{self.folder} holds no weights. Expected one of {', '.join(NAMES[:4])} (or its index "
                              f"with shards); found {listing(self.folder)}.")


def listing(folder: Path) -> str:
    """Names of up to 12 entries of a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and was refused, since loading it could run code "
                              f"({str(error).splitlines()[0]}). Ask its maker for a safetensors file.") from None
    except (SafetensorError, KeyError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({str(error).partition(chr(10))[0]}): it is damaged or cut "
                              "short, or not of its kind. Copy or download it again.") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path} is not a state dict of named tensors; save the model's state_dict() in it.")
    return state


def read_json(path: Path) -> dict:
    """A JSON object. Raises `CheckpointError` when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder holds: {listing(path.parent)}.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the file is damaged. Copy it again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not an object of named settings.")
    return found


def compare(expected: Mapping[str, Tensor], weights: Weights, ours: Callable[[str], str | None],
            theirs: Callable[[str], str] = str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Which file key fills which entry of a state dict, and what does not fit.

    ours: file key -> key of the state dict, or None for what belongs to another part; theirs: back again. Returns
    {state key: file key} and the lists "missing", "unexpected" (file keys) and "shape" (sentences).
    """
    shapes = weights.shapes
    source = {entry: key for key in shapes if (entry := ours(key)) is not None}
    wrong = []
    for entry in sorted(expected.keys() & source.keys()):
        asked, found = tuple(expected[entry].shape), shapes[source[entry]]
        linear = len(asked) == 2 and found == (*asked, 1, 1)            # a 1 x 1 convolution is a linear map
        if found != asked and not linear:
            wrong.append(f"{source[entry]} has shape {list(found)}, config.json asks for {list(asked)}")
    missing = sorted(theirs(entry) for entry in expected.keys() - source.keys())
    unexpected = sorted(source[entry] for entry in source.keys() - expected.keys())
    return source, {"missing": missing, "unexpected": unexpected, "shape": wrong}


def fill(module: nn.Module, weights: Weights, ours: Callable[[str], str | None],
         theirs: Callable[[str], str] = str) -> None:
    """Copy the weights into a module tensor by tensor, to its own device and dtype. The names are as in `compare`.

    Raises `CheckpointError` when an entry is missing, unexpected or of another shape; the module is untouched then.
    """
    own = module.state_dict(keep_vars=True)
    source, problems = compare(own, weights, ours, theirs)
    labels = {"missing": "missing", "unexpected": "unexpected", "shape": "of another shape"}
    wrong = [f"{len(entries)} {labels[name]} ({'; '.join(entries[:3])}{'; ...' if len(entries) > 3 else ''})"
             for name, entries in problems.items() if entries]
    if wrong:
        raise CheckpointError(f"The weights in {weights.folder} do not fit its config.json: {', '.join(wrong)}. "
                              "Use the config.json they were saved with.")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(weights.tensors[source[key]].view(tensor.shape))


def described(model: UnifiedModel, names: Iterable[str] | None = None) -> dict:
    """config.json of a stock model: its own, the ids of special tokens (`names`, default: all), grid and
    text_budget."""
    layout = model.layout
    ids = {f"{name}_token_id": layout.special[name] for name in (layout.special if names is None else names)}
    return {**model.lm.config.to_dict(), **ids, "grid": list(layout.grid), "text_budget": layout.text_budget}


@dataclass(frozen=True)
class Family:
    """One kind of model and its folders: how it is recognised, built and how its file names its weights.

    recognises(config) says whether a config.json is of this kind, text(config) gives (size, eot id, eot's name) of its
    text vocabulary, layout(config, text) makes the layout, build(config, layout, shapes) the model with fresh weights
    (shapes: those in the file, by key, or none), and describe(model) is the config.json that a saved model gets.
    prefixes: beginnings of the file's keys -> of the state dict's, the first that fits counts; None marks what belongs
    to another part. Saving takes the last that fits.
    """

    name: str
    folder: str  # what it looks like, in words, for messages
    recognises: Callable[[dict], bool]
    text: Callable[[dict], tuple[int, int, str]]
    layout: Callable[[dict, Text], Layout]
    build: Callable[[dict, Layout, Shapes], UnifiedModel]
    describe: Callable[[UnifiedModel], dict] = described
    prefixes: Mapping[str, str | None] = field(default_factory=lambda: {"": "lm."})

    def ours(self, key: str) -> str | None:
        """The entry of `UnifiedModel.state_dict()` that a key of the file fills."""
        for theirs, ours in self.prefixes.items():
            if key.startswith(theirs):
                return None if ours is None else ours + key[len(theirs):]
        return key

    def theirs(self, key: str) -> str:
        """The file's key for an entry of the state dict."""
        for theirs, ours in reversed(self.prefixes.items()):
            if ours and key.startswith(ours):
                return theirs + key[len(ours):]
        raise KeyError(f"{self.name} has no place in its file for {key}.")


def setting(config: dict, name: str) -> object:
    """A setting that config.json must have. Raises `CheckpointError`."""
    if config.get(name) is None:
        raise CheckpointError(f"config.json has no {name!r}; it has {', '.join(sorted(config)[:12])}. "
                              "Use the config.json that belongs to the weights.")
    return config[name]


def settings(config: dict, names: Mapping[str, str]) -> dict:
    """Those settings that config.json has, under our own names: {its name: ours}."""
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def special_ids(config: dict, names: Mapping[str, str], text: Text | None = None,
                released: Mapping[str, int] | None = None) -> dict[str, int]:
    """Ids of special tokens, {our name: how the tokenizer spells it}.

    Looked up in config.json (NAME_token_id, or its vocabulary_map), then in the text tokenizer; where that does not
    name all of them, those of the released model hold, if given. Raises `CheckpointError`.
    """
    vocabulary = config.get("vocabulary_map") or (text.tokenizer.get_vocab() if hasattr(text, "tokenizer") else {})
    found = {name: config.get(f"{name}_token_id", vocabulary.get(spelling)) for name, spelling in names.items()}
    lacking = [name for name, i in found.items() if i is None]
    if lacking and released is None:
        raise CheckpointError(f"Nothing says which ids the special tokens {', '.join(lacking)} have. Add "
                              f"{lacking[0]}_token_id to config.json, or give text=, a tokenizer that knows "
                              f"{names[lacking[0]]!r}.")
    return dict(released) if lacking else found


def agree(config: dict, **found: int) -> None:
    """Raises `CheckpointError` when config.json gives other sizes than follow from the rest of it."""
    for name, value in found.items():
        if config.get(name, value) != value:
            raise CheckpointError(f"config.json contradicts itself: {name} is {config[name]}, its other settings make "
                                  f"it {value}.")
