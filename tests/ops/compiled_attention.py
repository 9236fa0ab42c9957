"""Triton's statistics of attention compiled for GPUs that are not there; run by test_attention.py without TRITON_INTERPRET."""

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unimod.ops.attention import triton as kernels

POINTERS = {"lo": "*i64", "hi": "*i64", "label": "*i64", "position": "*i64", "segment": "*i64", "first": "*i64", "last": "*i64", "scale": "fp32",
            "lse": "*fp32", "mass": "*fp32", "entropy": "*fp32", "distance": "*fp32", "received": "*fp32"}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
@pytest.mark.parametrize("kernel, labels", [(kernels.mass_kernel, 0), (kernels.mass_kernel, 3), (kernels.received_kernel, None)])
def test_kernels_compile(arch, dtype, name, kernel, labels):
    block = kernels.BLOCK[dtype]
    width = 64 if name == "bf16" else 32                       # products of float32 unroll: wide ones take long to compile
    constants = {"D": width, "WIDTH": width, "WIDEN": False, "M": block, "N": block} | ({} if labels is None else {"LABELS": labels, "KINDS": 16})
    signature = {arg: "constexpr" if arg in constants else POINTERS.get(arg, f"*{name}" if arg in "qk" else "i32") for arg in kernel.arg_names}
    done = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", arch, 32))
    assert "cubin" in done.asm and done.metadata.shared <= 99 * 1024
