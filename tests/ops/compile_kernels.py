"""Compiles every kernel ahead of time for the GPUs named, in a process without the interpreter: a line per kernel, dtype and target; float32 for one."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unimod.ops import kernels_triton as kernels

ROWS, COUNTS = {"h", "y", "gated", "out", "grad", "dh", "dy", "dgated", "x", "n", "dx", "dn", "weight", "bias", "score"}, {"rank", "index", "last"}
FLOATS = {"dweight", "dbias"}
KERNELS = [
    (kernels.select_kernel, {"BLOCK": 2**14, "num_warps": 32}),
    (kernels.scatter_kernel, {"GATED": False, "INPLACE": False}), (kernels.scatter_kernel, {"GATED": True, "INPLACE": True}),
    (kernels.scatter_backward_kernel, {"GATED": False, "LEARNED": True}), (kernels.scatter_backward_kernel, {"GATED": True, "LEARNED": False}),
    (kernels.gather_kernel, {"CENTRED": True, "BIAS": True}), (kernels.gather_kernel, {"CENTRED": False, "BIAS": False}),
    (kernels.gather_backward_kernel, {"CENTRED": True, "BIAS": True}), (kernels.gather_backward_kernel, {"CENTRED": False, "BIAS": False}),
]


def types(kernel, constants, dtype):
    for name in kernel.arg_names:
        if name in constants:
            yield name, "constexpr"
        elif name in ROWS:
            yield name, f"*{dtype}"
        elif name in COUNTS:
            yield name, "*i64"
        elif name in FLOATS:
            yield name, "*fp32"
        else:
            yield name, {"sizes": "*i32", "eps": "fp32"}.get(name, "i32")


for target in map(int, sys.argv[1:]):
    for kernel, constants in KERNELS:
        constants = {**kernels.row_block(4096), **constants}
        warps = constants.pop("num_warps")
        for dtype in ("bf16", "fp32") if target == 90 else ("bf16",):
            source = ASTSource(kernel, dict(types(kernel, constants, dtype)), constants)
            made = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps})
            assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024, made.metadata
            print(f"sm_{target} {kernel.__name__} {dtype} {constants} {made.metadata.shared}")
