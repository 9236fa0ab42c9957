"""The choice of implementations: automatic, forced, refused, and said once."""

import pytest
import torch

from unimod.config import ParameterError
from unimod.ops import backend as module
from unimod.ops.backend import backend, use_backend


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.delenv("UNIMOD_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_cpu_takes_what_runs_there_and_says_why_once(capsys):
    assert backend("kernels", "cpu") == "reference" and backend("attention", "cpu") == "sdpa" == backend("attention",
                                                                                                         "cpu")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("unimod: kernels by reference on cpu (triton: ")
    assert said[1].startswith("unimod: attention by sdpa on cpu "
                              "(flash: ") and "varlen: it needs float16 or bfloat16 on CUDA" in said[1]


def test_cuda_prefers_kernels_where_they_are(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: name == "triton" or None)
    assert backend("kernels", "cuda", torch.bfloat16) == "triton" and backend("attention", "cuda",
                                                                              torch.bfloat16) == "varlen"
    assert backend("attention", "cuda", torch.float32) == "sdpa"
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    monkeypatch.setattr(module, "_chosen", {})
    assert backend("attention", "cuda", torch.bfloat16) == "flash"


def test_a_name_forces_its_family_only_and_only_inside(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("UNIMOD_BACKEND", "reference")
    assert backend("kernels", "cpu") == "reference"
    with use_backend("sdpa"):
        assert backend("kernels", "cpu") == ("triton" if module.find_spec("triton")
                                             else "reference") and backend("attention", "cpu") == "sdpa"
    assert backend("kernels", "cpu") == "reference"


def test_what_cannot_run_is_refused_with_the_reason(monkeypatch):
    with use_backend("varlen"), pytest.raises(ParameterError, match="asks for 'varlen', but it needs float16 or "
                                                                    "bfloat16 on CUDA.*Allowed here: sdpa"):
        backend("attention", "cpu")
    allowed = "triton or reference for kernels; flash or varlen or sdpa or flex"
    with pytest.raises(ParameterError, match=f"There is no backend 'cudnn'. Allowed: {allowed}"), use_backend("cudnn"):
        pass
    monkeypatch.setenv("UNIMOD_BACKEND", "tritn")
    with pytest.raises(ParameterError, match="no backend 'tritn'"):
        backend("kernels", "cpu")
