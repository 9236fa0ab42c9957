"""A device that is not there: tensors report `pretend:0`, numbers are computed on the CPU, and mixing the two is
refused as a GPU refuses it.

    model = there(model)                        # its parameters and buffers
    with On() as device:                        # moves to and makes tensors on model.device, as on a GPU
        model(batch.to(model.device))
    device.copies, device.waits                 # copies from the host, what the host waited for, our lines that asked

Tensors of the host are plain ones. The host waits for numbers, and for its own copies unless they are non_blocking. A
wait stalls a GPU; neither can be part of a CUDA graph.
"""

from __future__ import annotations

import os
import traceback
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import unimod

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "item")
INDEXED = ("index", "index_put_", "_index_put_impl_")


class _Module(_DummyBackendModule):
    """What torch asks of a device's module."""

    get_rng_state = staticmethod(lambda device=0: torch.zeros(0, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=0: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend(rename="pretend", backend_module=_Module())
DEVICE = torch.device("pretend", 0)
OURS = os.path.dirname(unimod.__file__) + os.sep


class Pretend(Tensor):
    """A tensor on the device; `host` holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> Pretend:
        made = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        made.host = host.detach()
        return made

    def __repr__(self, **_: object) -> str:
        return f"Pretend({self.host!r})"

    def tolist(self) -> list:
        _note("tolist", "waits")
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class On(TorchDispatchMode):
    """Makes and moves tensors on the device, and notes what crosses."""

    now: ClassVar[list[On]] = []

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.waits: list[str] = []

    def __enter__(self) -> On:
        self.now.append(self)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.now.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def there(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers on the device."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = made.setdefault(
                    id(p), nn.Parameter(Pretend(p.data), requires_grad=p.requires_grad)
                )
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = made.setdefault(id(b), Pretend(b))
    return model


def _note(name: str, *kinds: str) -> None:
    if On.now:
        files = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
        ours = islice((f"{'/'.join(file.split('/')[-2:])}:{line}" for file, line in files if file.startswith(OURS)), 3)
        place = f"{name} at {' < '.join(ours)}"
        for kind in kinds:
            getattr(On.now[-1], kind).append(place)


def _run(func, args, kwargs):
    """One operator: what it may mix, what crosses, its numbers."""
    name, leaves = func.overloadpacket.__name__, tree.tree_leaves((args, kwargs))
    theirs, mine = (
        [x for x in leaves if isinstance(x, Pretend)],
        [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Pretend)],
    )
    device = kwargs.get("device")
    up = (
        torch.device(device).type == "pretend"
        if device is not None
        else isinstance(args[0], Pretend)
        if name == "copy_"
        else bool(theirs)
    )
    if not theirs and not up:
        return func(*args, **kwargs)
    if theirs and any(x.ndim for x in mine) and name not in ("_to_copy", "copy_", *INDEXED):
        raise RuntimeError(
            f"{name} takes tensors of {DEVICE} and of the CPU, the latter of {[tuple(x.shape) for x in mine]}."
        )
    # a number of the host is an argument, not a copy
    if up and not name.endswith("_like") and any(x.ndim or name in ("_to_copy", "copy_") for x in mine):
        _note(
            name,
            *(
                ["copies"]
                if kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
                else ["copies", "waits"]
            ),
        )
    by_mask = name in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
    if theirs and (
        not up or by_mask or name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)
    ):
        _note(name, "waits")
    args, kwargs = tree.tree_map(lambda x: x.host if isinstance(x, Pretend) else x, (args, kwargs))
    out = func(*args, **kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {}))
    known = {id(x.host): x for x in theirs}  # what is written in place stays the same tensor
    return tree.tree_map(lambda x: known.get(id(x), Pretend(x)) if isinstance(x, Tensor) else x, out) if up else out


def _listed(numbers: Tensor, made: Pretend, non_blocking: bool = False) -> Pretend:
    _note("a list as an index", "copies", "waits")
    made.host.copy_(numbers)
    return made


_aten = torch.library.Library("aten", "IMPL")  # lists as indices, and numbers made tensors, pass the mode by
_aten.impl("empty.memory_format", lambda size, dtype=None, **_: Pretend(torch.empty(size, dtype=dtype)), "PrivateUse1")
_aten.impl(
    "empty_strided",
    lambda size, stride, dtype=None, **_: Pretend(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)
_aten.impl("_copy_from", _listed, "PrivateUse1")
