"""Which implementation an op takes: what cannot run says so, and what is slow is said once."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import nn

import petune_kernels as pk
from petune_kernels import backends
from petune_kernels.ops.bias_act import bias_act
from petune_kernels.ops.residual_norm import residual_norm


def test_a_backend_that_does_not_serve_says_so() -> None:
    with pytest.raises(ValueError, match="backend: got 'metal'; accepted are reference, cpu, cuda, triton"):
        pk.backend("metal").__enter__()
    if backends.MISSING["cuda"]:
        with pytest.raises(pk.BackendError, match="backend 'cuda' cannot run here: "):
            pk.backend("cuda").__enter__()
    with (
        pk.backend("cpu"),
        pytest.raises(pk.BackendError, match="'cpu' has no kernel for residual_norm on cpu"),
    ):
        residual_norm(torch.ones(2, 8, dtype=torch.float16))


def test_triton_serves_a_gpu_and_three_dtypes() -> None:
    """Outside its interpreter; inside a context no op falls back to another backend."""
    pytest.importorskip("triton")
    with pk.backend("triton"):
        with pytest.raises(pk.BackendError, match="'triton' has no kernel for residual_norm on cpu in torch.float32"):
            residual_norm(torch.ones(2, 8))
        with pytest.raises(pk.BackendError, match="'triton' has no kernel for bias_act"):
            bias_act(torch.ones(2, 8))


def test_one_warning_where_the_reference_serves_for_want_of_an_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def warned() -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            pk.patch(nn.Sequential(nn.LayerNorm(8)))
        return [str(w.message) for w in seen if "petune_kernels runs" in str(w.message)]

    def choose(*slow: backends.Choice) -> None:
        served = backends.Choice("residual_norm", "cpu", "cpu", "kernel loaded")
        monkeypatch.setattr(backends, "describe", lambda: [served, *slow])

    todo = "the CUDA library was not built; install the CUDA toolkit"
    choose(backends.Choice("bias_act", "cuda", "reference", "no compiled kernel is loaded", todo))
    assert warned() == []  # the model is on the CPU
    monkeypatch.setattr(sys.modules["petune_kernels.patch"], "_device", lambda model: "cuda")
    assert warned() == [f"petune_kernels runs bias_act on its reference: {todo}"]


def test_a_cuda_library_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Built for another torch, say: Triton and the reference go on, and `petune doctor` names it."""
    broken = tmp_path / "_cuda.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(backends, "_CUDA_LIBRARY", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "the CUDA library cannot be loaded (" in backends._load()["cuda"]
