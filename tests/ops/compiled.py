"""Every Triton kernel compiled ahead of time for GPUs that need not be there; run by test_kernels.py without Triton's
interpreter."""

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unimod.ops import attention_triton as attention
from unimod.ops import kernels_triton as kernels
from unimod.ops import route_triton as route

SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}
TYPES = dict.fromkeys(("rank", "index", "last", "lo", "hi", "label", "position", "segment", "first", "task"), "*i64")
TYPES |= dict.fromkeys(("sums", "lse", "mass", "entropy", "distance", "received", "score", "factor", "dweight",
                        "grad_factor", "grad_score", "rotary", "rotary_out"), "*fp32")
TYPES |= dict.fromkeys(("eps", "scale", "gain"), "fp32") | dict.fromkeys(("sizes", "bounds", "bounds_out"), "*i32")
TYPES |= dict.fromkeys(("eligible", "flags", "flags_out"), "*i1")
VALUES = {"h", "y", "gated", "out", "grad", "dh", "dy", "dgated", "x", "n", "weight", "bias", "scorer", "shift",
          "grad_h", "grad_x", "grad_n", "q", "k"}
"""Pointers to the dtype of the model; any other argument is an int32."""
BACKWARD = {"CENTRED": False, "BIAS": False, "NORM": True, "SCORER": True, "TASKS": 3, "GATE": "tanh"}
WIDE = kernels.row_block(4096)
SHOWO = kernels.row_block(2048)
ROUTED = [
    (kernels.select_kernel, {"BLOCK": 2**14, "num_warps": 32, "GATE": "tanh"}),
    (kernels.select_kernel, {"BLOCK": 2**14, "num_warps": 32, "GATE": None, "eligible": None, "factor": None}),
    (kernels.scatter_kernel, WIDE | {"INPLACE": False, "gated": None}),
    (kernels.scatter_kernel, WIDE | {"INPLACE": True}),
    (kernels.scatter_backward_kernel, WIDE | {"gated": None, "dgated": None}),
    (kernels.scatter_backward_kernel, WIDE | {"h": None, "y": None, "gated": None, "dweight": None}),
    (route.score_kernel, WIDE | {"TASKS": 3}),
    (route.gather_kernel, SHOWO | {"CENTRED": True, "ANGLES": 128}),
    (route.gather_kernel, WIDE | {"CENTRED": False, "ANGLES": 256, "bias": None, "flags": None}),
    (route.route_backward_kernel, route.backward_block(2048) | BACKWARD | {"CENTRED": True, "BIAS": True}),
    (route.route_backward_kernel, route.backward_block(4096) | BACKWARD | {"GATE": "sigmoid"}),
    (route.route_backward_kernel, route.backward_block(4096) | BACKWARD | {"TASKS": 1, "GATE": "raw", "task": None,
                                                                           "grad_score": None}),
    (route.total_kernel, {"ROWS": 6, "AHEAD": 2, "TASKS": 3, "LINES": route.LINES, "COLUMNS": route.COLUMNS}),
]


@pytest.fixture(autouse=True, scope="module")
def fresh(tmp_path_factory):
    """Nothing is taken from an earlier run's cache."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def compiles(kernel, constants, dtype, arch, warps=4):
    """Into a binary whose shared memory fits every GPU since the A100."""
    signature = {}
    for name in kernel.arg_names:
        kind = f"*{SHORT[dtype]}" if name in VALUES else TYPES.get(name, "i32")
        signature[name] = "constexpr" if name in constants else kind
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024


@pytest.mark.parametrize("arch, dtype", [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32),
                                         (100, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("kernel, constants", ROUTED)
def test_kernels_of_a_routed_layer(kernel, constants, dtype, arch):
    constants = dict(constants)
    compiles(kernel, constants, dtype, arch, constants.pop("num_warps", 4))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel, labels", [(attention.mass_kernel, 0), (attention.mass_kernel, 3),
                                            (attention.received_kernel, None)])
def test_statistics_of_attention(kernel, labels, dtype, arch):
    block = attention.BLOCK[dtype]
    width = 64 if dtype == torch.bfloat16 else 32           # products of float32 unroll: wide ones take long to compile
    constants = {"D": width, "WIDTH": width, "WIDEN": False, "M": block, "N": block}
    if labels is not None:
        constants |= {"LABELS": labels, "KINDS": 16}
    compiles(kernel, constants, dtype, arch)
