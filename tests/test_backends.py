"""Which implementation an op takes: what cannot run says so, and what is slow is said once."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import nn

import petune_kernels as pk
from petune_kernels import backends, matmul, reference
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


def test_a_backend_within_another_gives_way_to_it_again() -> None:
    with pk.backend("reference"):
        with pk.backend("reference"):
            pass
        assert backends.pick("dropout", torch.ones(2)) is reference.dropout


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
        monkeypatch.setattr(backends, "describe", lambda device: [c for c in (served, *slow) if c.device == device])

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


def test_a_cuda_library_for_other_gpus_is_said_before_anything_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads on any GPU; the launch of one kernel shows. Here x of the launch is on the CPU, the failure is made."""
    device, probe = torch.device("cuda", 0), backends.cannot_run

    def fails(*args: object) -> torch.Tensor:
        raise RuntimeError("petune: dropout: no kernel image is available for execution on the device\nand a stack")

    monkeypatch.setitem(backends.MISSING, "cuda", "")
    here = torch.ones, torch.zeros
    for own in here:
        monkeypatch.setattr(torch, own.__name__, lambda *a, own=own, **k: own(*a, **{**k, "device": "cpu"}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    probe.cache_clear()
    try:
        with monkeypatch.context() as broken:
            broken.setattr(torch.ops.petune, "dropout", fails)
            why = probe(device)
        assert "does not run on Tesla T4 (petune: dropout: no kernel image" in why and "stack" not in why
        assert "TORCH_CUDA_ARCH_LIST" in why
        monkeypatch.setattr(backends, "_has_kernel", lambda op, device: True)
        rows = {choice.op: choice for choice in backends.describe("cuda")}
        assert rows["residual_norm"].backend == "none" and rows["residual_norm"].todo == why

        model = nn.Sequential(nn.LayerNorm(8))
        monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
        monkeypatch.setattr(backends, "cannot_run", lambda device: why)
        with pytest.raises(pk.PatchError, match="patch: model is on cpu: the CUDA library, built by CUDA"):
            pk.patch(model)
        assert "forward" not in vars(model[0])
    finally:
        probe.cache_clear()


def test_triton_serves_nothing_where_it_finds_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles its launchers, C, at their first call: the reference serves, and says why."""
    pytest.importorskip("triton")
    taken: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.library, "impl", lambda name, *_: taken.append(name))
    monkeypatch.setitem(backends.MISSING, "cuda", "the CUDA library was not built")
    monkeypatch.setattr(backends, "_has_kernel", lambda op, device: False)
    monkeypatch.setattr(matmul, "MANY_ROWS", torchs := dict(matmul.MANY_ROWS))
    own = dict(torchs)
    assert backends._register_triton() and taken
    assert {launcher.__module__ for launcher in torchs.values()} == {"petune_kernels.triton.lora_adapter"}
    torchs.update(own)
    taken.clear()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    assert not backends._register_triton() and not taken and torchs == own
    rows = {choice.op: choice for choice in backends.describe("cuda")}
    assert rows["residual_norm"].backend == "reference" and "no C compiler" in rows["residual_norm"].why
    monkeypatch.setenv("CC", "/opt/cc")  # which Triton takes as it is
    assert backends._register_triton() and taken
