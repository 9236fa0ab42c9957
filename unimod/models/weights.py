"""The tensors of a checkpoint folder: known by name and shape without loading them, read one at a time.

    weights = Weights(folder)              # CheckpointError when there is nothing to read, a shard is missing, a file damaged
    weights.shapes["lm_head.weight"]       # (58498, 2048)
    fill(module, weights, ours)            # into the module's own device and dtype

Understood are safetensors and torch's own files (read with `weights_only`, so that no code in a pickle ever runs), each whole or
in shards with an index.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable
from copy import copy
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..config import ParameterError

NAMES = ("model.safetensors", "pytorch_model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "model.pt", "tokenizer.safetensors")
"""File names that are looked for, in this order, whole or as NAME.index.json with shards."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
"""What safetensors calls them."""


class CheckpointError(ParameterError):
    """A checkpoint folder that cannot be used: the message names the file, what was found and what was expected."""


class Weights:
    """The tensors of one folder, or of one `file` in it. `shapes` and `dtypes` (torch's) by key; `files` are what they are read from."""

    def __init__(self, folder: str | Path, file: Path | None = None) -> None:
        self.folder = Path(folder)
        self.files = self._files() if file is None else [file]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        for path in self.files:
            for key, tensor in (_safetensors if path.suffix == ".safetensors" else _pickled)(path):
                self.shapes[key], self.dtypes[key], self._readers[key] = tensor

    def __getitem__(self, key: str) -> Tensor:
        """One tensor, on the CPU, as stored."""
        return self._readers[key]()

    def __len__(self) -> int:
        return len(self.shapes)

    def under(self, prefix: str) -> Weights:
        """Those whose key begins with a prefix, which is taken off."""
        part = copy(self)
        part.shapes, part.dtypes, part._readers = ({k[len(prefix):]: v for k, v in d.items() if k.startswith(prefix)}
                                                   for d in (self.shapes, self.dtypes, self._readers))
        return part

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder. Give the folder that holds config.json and the weights.")
        for name in NAMES:
            whole, index = self.folder / name, self.folder / f"{name}.index.json"
            if whole.is_file():
                return [whole]
            if index.is_file():
                shards = sorted({self.folder / shard for shard in read_json(index).get("weight_map", {}).values()})
                missing = [s.name for s in shards if not s.is_file()]
                if missing or not shards:
                    raise CheckpointError(f"{index} names {len(shards)} shards, of which {len(missing)} are missing: {', '.join(missing[:3])}. "
                                          "Download the missing files into the folder.")
                return shards
        found = ", ".join(sorted(p.name for p in self.folder.iterdir())[:12]) or "nothing"
        raise CheckpointError(f"{self.folder} holds no weights. Expected one of {', '.join(NAMES[:4])} (or its index with shards); found {found}.")


def _safetensors(path: Path) -> Iterable[tuple[str, tuple]]:
    try:
        file = safe_open(path, "pt")
        for key in file.keys():  # noqa: SIM118 - a safe_open handle does not iterate
            part = file.get_slice(key)
            yield key, (tuple(part.get_shape()), DTYPES[part.get_dtype()], lambda key=key: file.get_tensor(key))
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is damaged or cut short. Copy or download it again.") from None


def _pickled(path: Path) -> Iterable[tuple[str, tuple]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and was refused, since loading it could run code ({str(error).splitlines()[0]}). "
                              "Ask its maker for a safetensors file.") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({str(error).splitlines()[0]}): it is damaged or not a file of torch.save. "
                              "Copy or download it again.") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path} is not a state dict of named tensors; save the model's state_dict() in it.")
    for key, tensor in state.items():
        yield key, (tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)


def read_json(path: Path) -> dict:
    """A JSON object. Raises `CheckpointError` when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in path.parent.iterdir())[:12]) if path.parent.is_dir() else "no such folder"
        raise CheckpointError(f"{path} is missing; the folder holds: {found or 'nothing'}.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the file is damaged. Copy it again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not an object of named settings.")
    return found


def compare(expected: dict[str, Tensor], weights: Weights, ours: Callable[[str], str | None],
            theirs: Callable[[str], str] = str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Which file key fills which entry of a state dict, and what does not fit.

    ours: file key -> key of the state dict, or None for what belongs to another part; theirs: back again. Returns {state key: file
    key} and the lists "missing", "unexpected" (file keys) and "shape" (sentences).
    """
    source = {entry: key for key in weights.shapes if (entry := ours(key)) is not None}
    wrong = [f"{source[k]} has shape {list(weights.shapes[source[k]])}, config.json asks for {list(expected[k].shape)}"
             for k in sorted(expected.keys() & source.keys()) if not _fits(tuple(expected[k].shape), weights.shapes[source[k]])]
    missing = sorted(theirs(k) for k in expected.keys() - source.keys())
    return source, {"missing": missing, "unexpected": sorted(source[k] for k in source.keys() - expected.keys()),
                    "shape": wrong}


def _fits(asked: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """A 1 x 1 convolution is a linear map."""
    return asked == found or (len(asked) == 2 and found == (*asked, 1, 1))


def fill(module: nn.Module, weights: Weights, ours: Callable[[str], str | None], theirs: Callable[[str], str] = str) -> None:
    """Copy the weights into a module tensor by tensor, to its own device and dtype. The names are as in `compare`.

    Raises `CheckpointError` when an entry is missing, unexpected or of another shape; the module is untouched then.
    """
    own = module.state_dict(keep_vars=True)
    source, problems = compare(own, weights, ours, theirs)
    said = [f"{len(entries)} {label} ({'; '.join(entries[:3])}{'; ...' if len(entries) > 3 else ''})" for label, entries in
            (("missing", problems["missing"]), ("unexpected", problems["unexpected"]), ("of another shape", problems["shape"])) if entries]
    if said:
        raise CheckpointError(f"The weights in {weights.folder} do not fit its config.json: {', '.join(said)}. Use the config.json they were saved with.")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(weights[source[key]].view(tensor.shape))
