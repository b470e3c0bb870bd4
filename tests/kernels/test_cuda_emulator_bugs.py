"""The emulator can fail: bugs planted in a small kernel are each seen and named."""

from __future__ import annotations

import ctypes
import math
import os

import pytest
import torch

from tests.cuda_emulator import build

SANITIZE = os.environ.get("PETUNE_SANITIZE", "0") not in ("", "0")

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler (g++ or clang++) for the emulator")


@pytest.fixture(scope="module")
def stage():
    """Builds tests/cuda_emulator/row_sum.cu over csrc/cuda with one place of reduce.cuh changed: stage(old, new)."""

    def make(old: str = "", new: str = ""):
        library = ctypes.CDLL(str(build.build_stage(old, new, SANITIZE)))
        for name in ("row_sums", "half_leaves", "two_barriers", "no_blocks", "past_the_end"):
            getattr(library, f"stage_{name}").restype = ctypes.c_char_p
        return library

    return make


def run_row_sums(library, order: int, seed: int = 0) -> torch.Tensor | str:
    rows, threads, groups = 4, 128, 2
    values = torch.arange(rows * threads, dtype=torch.float32).reshape(rows, threads)
    out = torch.full_like(values, math.nan)
    library.emulator_configure(order, ctypes.c_int64(seed), 4, 0)
    error = library.stage_row_sums(
        ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()), rows, threads, groups
    )
    if error:
        return error.decode()
    return out - 3 * values.sum(1, keepdim=True)


BARRIER = "    for (int k = 0; k < N; ++k) mine[N * warp + k] = v[k];\n  __syncthreads();\n"


def test_the_stage_is_right_as_it_is(stage):
    library = stage()
    for order, seed in ((0, 0), (1, 0), (2, 1), (2, 2)):
        assert (run_row_sums(library, order, seed) == 0).all()


def test_a_missing_barrier_is_caught(stage):
    library = stage(BARRIER, BARRIER.replace("  __syncthreads();\n", ""))
    results = [run_row_sums(library, order, seed) for order, seed in ((0, 0), (1, 0), (2, 1), (2, 2))]
    wrong = [not isinstance(r, torch.Tensor) or bool((r != 0).any()) for r in results]
    assert any(wrong), "no order of threads shows the race"
    assert any(not torch.equal(results[0], r) for r in results[1:]), "all orders give the same bits"


def test_a_single_scratch_buffer_is_caught(stage):
    """Without the second buffer, one barrier per sum is too few: a fast warp overwrites what a slow one still reads."""
    library = stage("  turn ^= 1;\n", "")
    results = [run_row_sums(library, order, seed) for order, seed in ((0, 0), (1, 0), (2, 1), (2, 2), (2, 3))]
    assert all(isinstance(r, torch.Tensor) for r in results)
    assert any((r != 0).any() for r in results)


def test_a_wrong_lane_is_caught(stage):
    full = "__shfl_xor_sync(0xffffffffu, v[k], step)"
    reads_inactive = stage(full, "(threadIdx.x % 32 < 16 ? __shfl_xor_sync(0x0000ffffu, v[k], step) : 0.0f)")
    assert "wrong lane" in run_row_sums(reads_inactive, 0) and "takes no part" in run_row_sums(reads_inactive, 0)
    not_in_mask = stage(full, "__shfl_xor_sync(0x7fffffffu, v[k], step)")
    assert "wrong lane" in run_row_sums(not_in_mask, 0)
    wrong_step = stage("for (int step = 16; step > 0; step /= 2)", "for (int step = 8; step > 0; step /= 2)")
    assert (run_row_sums(wrong_step, 0) != 0).any()


def test_lanes_that_left_and_barriers_that_part_are_caught(stage):
    library, out = stage(), torch.zeros(64)
    pointer = ctypes.c_void_p(out.data_ptr())
    assert b"has left the kernel" in library.stage_half_leaves(pointer)
    assert b"barrier divergence" in library.stage_two_barriers(pointer)
    assert b"invalid configuration argument" in library.stage_no_blocks(pointer)
    assert library.stage_past_the_end(pointer, 31) is None and out[0] == 1


@pytest.mark.skipif(not SANITIZE, reason="needs AddressSanitizer: make sanitize")
def test_shared_memory_past_its_end_is_caught(stage):
    library, out = stage(), torch.zeros(64)
    child = os.fork()
    if child == 0:  # the sanitizer ends the process
        library.stage_past_the_end(ctypes.c_void_p(out.data_ptr()), 32)
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0
