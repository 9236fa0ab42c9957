"""Decode steps by kernels: every one by the interpreter, compiled for GPUs that need not be there, and counted."""

import pytest
import torch
from ops.test_kernels import HERE, run

from unimod.bench.counts import Counter, decode_step
from unimod.layers import apply_mod
from unimod.maskgit import MaskedDrawing
from unimod.ops.backend import meta_as
from unimod.plan import paper_emu3, paper_showo
from unimod.presets import preset


@pytest.mark.timeout(600)
@pytest.mark.parametrize("file, interpret", [("interpreted_decode.py", "1"), ("compiled_decode.py", "0")])
def test_every_kernel_equals_its_reference_and_compiles(file, interpret):
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file), TRITON_INTERPRET=interpret)
    assert " passed" in out and "skipped" not in out and "failed" not in out


@pytest.mark.parametrize("name", ["showo-256", "showo-512", "emu3-4k", "emu3-8k"])
@pytest.mark.parametrize("routed", [False, True])
def test_a_step_of_released_size_takes_few_operations_and_nothing_of_the_host(name, routed):
    plan = (paper_showo(24) if name.startswith("showo") else paper_emu3(32)) if routed else None
    counter, layers = decode_step(name, plan)
    assert not counter.host_ops and not counter.uploads
    assert counter.device_ops.total() / layers <= 28      # 26.8 on Show-o; 26.0 and, routed, 27.0 on Emu3


@torch.no_grad()
def test_a_masked_step_of_a_routed_model_uploads_nothing():
    model, _ = preset("showo-256")
    model = apply_mod(model, paper_showo(24)).to(torch.bfloat16).eval()
    with meta_as("cuda"):
        drawing = MaskedDrawing(model, model.layout, ["x" * 9, "x"], None, 4, 1.5)
        drawing.step()
        with Counter() as counter:
            drawing.step()
    assert not counter.host_ops and not counter.uploads
    assert counter.device_ops["select_kernel"] == 12        # of the routed layers
