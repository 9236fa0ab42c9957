"""The choice of implementations: automatic, forced, refused, and reported once."""

import pytest
import torch

from unimod.config import ParameterError
from unimod.ops import attention_varlen
from unimod.ops import backend as module
from unimod.ops.backend import backend, choice, use_backend


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.delenv("UNIMOD_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_cpu_takes_what_runs_there_and_says_why_once(capsys):
    assert backend("kernels", "cpu") == "reference"
    assert backend("attention", "cpu") == "sdpa" == backend("attention", "cpu")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("unimod: kernels by reference on cpu (triton: ")
    assert said[1].startswith("unimod: attention by sdpa on cpu (flash: ")
    assert "varlen: it needs float16 or bfloat16 on CUDA" in said[1]


def test_cuda_prefers_kernels_where_they_are(monkeypatch):
    half = torch.bfloat16
    monkeypatch.setattr(module, "find_spec", lambda name: name == "triton" or None)
    assert backend("kernels", "cuda", half) == "triton" and backend("attention", "cuda", half) == "varlen"
    assert backend("attention", "cuda", torch.float32) == "sdpa"
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    for function, name in ((None, "varlen"), (len, "flash")):
        monkeypatch.setattr(attention_varlen, "flash_function", lambda function=function: function)
        monkeypatch.setattr(module, "_chosen", {})
        assert backend("attention", "cuda", half) == name
        assert choice("attention", "cuda", half)[0] == name
    monkeypatch.setattr(attention_varlen, "flash_function", lambda: None)
    assert "no flash_attn_varlen_func" in choice("attention", "cuda", half)[1]["flash"]


def test_a_name_forces_its_family_only_and_only_inside(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("UNIMOD_BACKEND", "reference")
    assert backend("kernels", "cpu") == "reference" and not capsys.readouterr().err
    assert choice("kernels", "cpu", torch.float32) == ("reference", {})
    with use_backend("sdpa"):
        assert backend("kernels", "cpu") == ("triton" if module.find_spec("triton") else "reference")
        assert backend("attention", "cpu") == "sdpa"
    assert backend("kernels", "cpu") == "reference"


def test_what_cannot_run_is_refused_with_the_reason(monkeypatch):
    reason = "asks for 'varlen', but it needs float16 or bfloat16 on CUDA.*Allowed here: sdpa"
    with use_backend("varlen"), pytest.raises(ParameterError, match=reason):
        backend("attention", "cpu")
    allowed = "triton or reference for kernels; flash or varlen or sdpa for attention"
    with pytest.raises(ParameterError, match=f"There is no backend 'cudnn'. Allowed: {allowed}"), use_backend("cudnn"):
        pass
    monkeypatch.setenv("UNIMOD_BACKEND", "tritn")
    with pytest.raises(ParameterError, match="no backend 'tritn'"):
        backend("kernels", "cpu")
