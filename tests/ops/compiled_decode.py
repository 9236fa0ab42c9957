"""The kernels of decode steps compiled ahead of time for GPUs that need not be there; run by test_decode.py without
Triton's interpreter."""

import pytest
import torch
import triton
from ops.compiled import SHORT, fresh  # noqa: F401  # a fixture
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unimod.ops import decode_triton as decode
from unimod.ops.kernels_triton import row_block

INTEGERS = dict.fromkeys(("used", "place", "task", "source"), "*i64")
FLAGS = dict.fromkeys(("active", "always", "kept"), "*i1")
FLOATS = dict.fromkeys(("q", "k", "top", "total", "partial", "gate", "threshold"), "*fp32")
NUMBERS = dict.fromkeys(("scale", "gain", "eps"), "fp32")
NUMBERS |= dict.fromkeys(("heads", "kv_heads", "room", "runs", "qh", "qt", "kh", "kt", "vh", "vt", "D"), "i32")
GATES = ("tanh", "sigmoid", "raw", "none")


def attention(dtype):
    sizes = {"GROUP": 4, "D": 128, "WIDTH": 128}
    for one in ({}, {"runs": 1}):                           # Triton makes a 1 a constant
        yield decode.partial_kernel, sizes | one | {"WIDEN": False, "M": 16, "N": decode.BLOCK[dtype]}, 4
    for absent in ({}, {"active": None, "runs": 1}):
        yield decode.combine_kernel, sizes | absent | {"RUNS": 32}, 4


def routed():
    block = row_block(4096)
    warps = block.pop("num_warps")
    for gate, flag in zip(GATES, (True, False, True, False)):
        absent = {"source": None} if flag else {"always": None}
        yield decode.decide_kernel, absent | {"SHARED": flag, "PREDICTED": flag, "GATE": gate} | block, warps
    for absent in ({}, {"gated": None}):
        yield decode.apply_kernel, absent | {"SCALED": not absent} | block, warps
    yield decode.norm_kernel, block, warps


@pytest.mark.parametrize("arch, dtype", [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32),
                                         (100, torch.bfloat16)], ids=str)
def test_kernels_of_a_decode_step(arch, dtype):
    for kernel, constants, warps in (*attention(dtype), *routed()):
        types = INTEGERS | FLAGS | FLOATS | NUMBERS
        signature = {name: "constexpr" if name in constants else types.get(name, f"*{SHORT[dtype]}")
                     for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
        assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024
