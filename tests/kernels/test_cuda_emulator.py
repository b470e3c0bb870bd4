r"""The CUDA C++ kernels, run on the CPU by tests/cuda_emulator and compared with the reference in float64.

Under AddressSanitizer and UBSan (both libraries must be there before Python's own):

    PETUNE_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    python -m pytest tests/kernels/test_cuda_emulator.py
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
from pathlib import Path

import pytest
import torch

from petune_kernels import reference
from tests.cuda_emulator import build
from tests.cuda_emulator.ops import DTYPES
from tests.cuda_emulator.values import BF16, F16, F32, close, double, rand, seeds, small

LN, RMS = False, True

# Widths: 1 and odd ones (element-wise path); each number of chunks a warp may hold and its edges, in 16-bit (chunk 8)
# and fp32 (chunk 4); rows of several warps with one row per block and with several.
WIDTHS = (1, 7, 64, 100, 264, 512, 768, 769, 1024, 1280, 2048, 4096)

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler (g++ or clang++) for the emulator")


def check_residual_norm(
    emulator, T, H, G=1, dtype=F32, param=None, rms=LN, bias=True, residual=True, gamma=True, beta=True, n_seeds=None,
    p=0.3, want_z=True, want_xhat=True, want=(True,) * 5, dz=True, shared=(),
):  # fmt: skip
    """Forward, and backward from either saved row, against the reference in float64."""
    param = param or dtype
    x, residual = rand(T, H, dtype=dtype), rand(T, H, dtype=dtype) + 0.5 if residual else None
    bias, gamma, beta = (
        small(1 if name in shared else G, H, param) if there else None
        for name, there in (("bias", bias), ("gamma", gamma), ("beta", beta))
    )
    want = [w and n not in shared for w, n in zip(want, ("dresidual", "dx", "bias", "gamma", "beta"), strict=True)]
    seed = None if n_seeds is None else seeds(n_seeds)
    want = [w and (i < 2 or (bias, gamma, beta)[i - 2] is not None) for i, w in enumerate(want)]
    args = (x, bias, residual, gamma, beta, seed, p, 1e-5, rms)
    ours = emulator.residual_norm(*args, want_z, want_xhat)
    exact = reference.residual_norm(*double(*args), want_z, want_xhat)
    for name, o, e in zip(("y", "z", "xhat"), ours, exact, strict=False):
        close(name, o, e, dtype, H)
    close("rstd", ours[3], exact[3], F32, H)

    dy, dz = rand(T, H, dtype=dtype), rand(T, H, dtype=dtype) if dz else None
    for row_is_z in (False, True):
        row = exact[1 if row_is_z else 2].to(dtype)  # as saved, rounded; both sides start from it
        back = (dy, dz, row, exact[3].float(), bias, gamma, beta, seed, p, rms, row_is_z, *want)
        ours = emulator.residual_norm_backward(*back)
        grads = reference.residual_norm_backward(*double(*back))
        # where H = 1 (or little is left of g) rstd = eps^-1/2 multiplies rounding errors of g, which are of its size
        scale = max(1.0, exact[3].max().item()) if T else 1.0
        for name, o, e in zip(("dresidual", "dx", "dbias", "dgamma", "dbeta"), ours, grads, strict=True):
            kept = param if name in ("dbias", "dgamma", "dbeta") else dtype
            close(f"{name}, row_is_z={row_is_z}", o, e, kept, int(max(T // G, H) * scale**2) if kept is param else H)


@pytest.mark.parametrize("H", WIDTHS)
def test_residual_norm_widths(emulator, H):
    for dtype, rms in itertools.product(DTYPES, (LN, RMS)):
        check_residual_norm(emulator, 5, H, dtype=dtype, rms=rms, n_seeds=1)


@pytest.mark.parametrize("G", (1, 3))
def test_residual_norm_replicas(emulator, G):
    widths = ((40, BF16), (1280, F32), (31, F16))
    # 69 rows: more than a block takes at a time, uneven over blocks, several teams of blocks with 7 multiprocessors
    for (H, dtype), n_seeds, multiprocessors in itertools.product(widths, {1, G, 23}, (1, 7)):
        emulator.configure(multiprocessors=multiprocessors)
        check_residual_norm(emulator, 69, H, G, dtype, n_seeds=n_seeds)


@pytest.mark.parametrize("shared", (("gamma",), ("bias", "beta")), ids=str)
def test_residual_norm_of_replicas_that_share_parameters(emulator, shared):
    for H, dtype in ((40, BF16), (31, F32), (8200, BF16)):
        check_residual_norm(emulator, 12, H, 3, dtype, n_seeds=3, shared=shared)


@pytest.mark.parametrize("dtype", (BF16, F16))
def test_residual_norm_fp32_parameters(emulator, dtype):
    for H in (72, 77):
        check_residual_norm(emulator, 9, H, 3, dtype, param=F32, n_seeds=3)


@pytest.mark.parametrize("H", (72, 30))
def test_residual_norm_optional_parts(emulator, H):
    for parts in itertools.product((False, True), repeat=5):
        bias, residual, gamma, beta, dropout = parts
        check_residual_norm(
            emulator, 3, H, dtype=BF16, bias=bias, residual=residual, gamma=gamma, beta=beta,
            n_seeds=1 if dropout else None, dz=dropout,
        )  # fmt: skip
    for want_z, want_xhat in itertools.product((False, True), repeat=2):
        x = rand(3, H)
        y, z, xhat, _ = emulator.residual_norm(x, None, None, None, None, None, 0.0, 1e-5, LN, want_z, want_xhat)
        assert (z is not None, xhat is not None) == (want_z, want_xhat)
        assert torch.equal(y, xhat if want_xhat else y)


@pytest.mark.parametrize("rms", (LN, RMS))
@pytest.mark.parametrize("H", (72, 1096, 30))
def test_residual_norm_every_subset_of_gradients(emulator, H, rms):
    """Alone or together, a gradient is the same number; nothing else is touched."""
    T, G = 10, 2
    dy, dz, row = (rand(T, H, dtype=BF16) for _ in range(3))
    bias, gamma, beta = (small(G, H, BF16) for _ in range(3))
    rstd, seed = torch.rand(T) + 0.5, seeds(G)
    for row_is_z in (False, True):
        base = (dy, dz, row, rstd, bias, gamma, beta, seed, 0.2, rms, row_is_z)
        exact = reference.residual_norm_backward(*double(*base), *[True] * 5)
        for want in itertools.product((False, True), repeat=5):
            ours = emulator.residual_norm_backward(*base, *want)
            for k, (o, e) in enumerate(zip(ours, exact, strict=True)):
                assert (o is not None) == want[k]
                if want[k]:
                    close(f"gradient {k} of {want}, row_is_z={row_is_z}", o, e, BF16, H)


@pytest.mark.parametrize(
    "H, dtype, want",
    [
        (8192, BF16, (1, 1, 1, 1, 1)),  # the widest row that registers hold with every sum
        (8200, BF16, (1, 1, 1, 1, 1)),  # the narrowest that they do not
        (16384, F16, (1, 0, 0, 1, 0)),  # 512 threads, one sum
        (16384, F32, (1, 1, 1, 1, 1)),
        (16383, BF16, (1, 1, 1, 1, 1)),
        (20000, BF16, (1, 1, 0, 0, 0)),
    ],
)
def test_residual_norm_wide(emulator, H, dtype, want):
    want = [bool(w) for w in want]
    check_residual_norm(emulator, 3, H, dtype=dtype, n_seeds=1, want=want)


@pytest.mark.parametrize("H, threads", ((768, 256), (5120, 160), (6144, 192), (769, 256)))
def test_residual_norm_fills_every_multiprocessor(emulator, H, threads):
    """A sum's blocks are those that run at once, however many threads one has; the emulator says 512 threads."""
    check_residual_norm(emulator, 67, H, dtype=BF16, gamma=False, n_seeds=1, want=(1, 1, 1, 0, 0))
    dy, rstd, gamma = rand(67, H, dtype=BF16), torch.ones(67), small(1, H, BF16)
    emulator.configure(multiprocessors=3)
    emulator.residual_norm_backward(dy, None, dy, rstd, None, gamma, None, None, 0.0, RMS, False, 1, 0, 0, 1, 0)
    assert emulator.library.emulator_blocks() == 3 * (512 // threads)


@pytest.mark.parametrize("H", (64, 63))
def test_no_rows(emulator, H):
    for G in (1, 2):
        check_residual_norm(emulator, 0, H, G, n_seeds=G)
        u, bias = rand(0, H), small(G, H, F32)
        assert emulator.bias_act(u, bias, None, 0).shape == (0, H)
        du, dbias, dgate = emulator.bias_act_backward(u, u, bias, u, 0, True, True, True)
        assert du.shape == dgate.shape == (0, H) and torch.equal(dbias, torch.zeros_like(bias))
        h, code = emulator.bias_act_coded(u, bias, 0)
        du, dbias = emulator.bias_act_coded_backward(u, code, bias, 0, True, True)
        assert h.shape == code.shape == du.shape == (0, H) and torch.equal(dbias, torch.zeros_like(bias))
        assert torch.equal(emulator.column_sum(u, G), torch.zeros(G, H))
    assert emulator.dropout(rand(0, H), seeds(1), 0.5).shape == (0, H)


def test_unaligned_tensors(emulator):
    """Views that start off a 16-byte boundary, one tensor at a time."""
    T, H, G = 6, 64, 2

    def shifted(t):
        wide = torch.cat([t.flatten()[:1], t.flatten()])
        return wide[1:].view(t.shape)

    tensors = [rand(T, H, dtype=BF16), small(G, H, BF16), rand(T, H, dtype=BF16), small(G, H, BF16), small(G, H, BF16)]
    seed = seeds(G)
    for k in range(len(tensors)):
        args = [shifted(t) if i == k else t for i, t in enumerate(tensors)]
        assert args[k].data_ptr() % 16 == 2
        ours = emulator.residual_norm(*args, seed, 0.3, 1e-5, LN, True, True)
        exact = reference.residual_norm(*double(*args), seed, 0.3, 1e-5, LN, True, True)
        for name, o, e in zip(("y", "z", "xhat"), ours, exact, strict=False):
            close(name, o, e, BF16, H)
        x, bias, dy = args[0], args[1], tensors[2]
        close("h", emulator.bias_act(x, bias, dy, 0), reference.bias_act(*double(x, bias, dy), 0), BF16)
        ours = emulator.bias_act_backward(dy, x, bias, None, 0, True, True, False)
        exact = reference.bias_act_backward(*double(dy, x, bias, None), 0, True, True, False)
        close("dbias", ours[1], exact[1], BF16, T)
        check_coded(emulator, x, bias, dy, 0)
        close("sum", emulator.column_sum(args[0], G), reference.column_sum(args[0].double(), G), F32, T)


ACTIVATIONS = (0, 1, 2, 3)


def check_coded(emulator, u, bias, dh, act):
    """h bit for bit, the code but at a tie (act'(0) is one), every subset of the gradients that follow from it."""
    h, code = emulator.bias_act_coded(u, bias, act)
    assert torch.equal(h, emulator.bias_act(u, bias, None, act))
    lo, step = reference.SLOPE_CODES[act]
    slope = reference.bias_act_backward(torch.ones_like(u).double(), *double(u, bias), None, act, True, False, False)[0]
    assert ((slope - lo - step * code.double()).abs() <= (0.501 * step if act != 2 else 0)).all()
    for want in itertools.product((False, True), (False, True) if bias is not None else (False,)):
        ours = emulator.bias_act_coded_backward(dh, code, bias, act, *want)
        exact = reference.bias_act_coded_backward(*double(dh, code, bias), act, *want)
        for name, o, e, wanted in zip(("du", "dbias"), ours, exact, want, strict=True):
            assert (o is not None) == wanted
            kept = bias.dtype if name == "dbias" and wanted else dh.dtype
            close(f"{name} of code {act}", o, e, kept, 4 * len(u))


@pytest.mark.parametrize("N", (1, 7, 8, 100, 256, 264, 769, 3072))
def test_bias_act(emulator, N):
    for dtype, gated, bias_dtype in itertools.product(DTYPES, (False, True), ("own", "f32", None)):
        G = 1 if bias_dtype is None else 3
        bias = None if bias_dtype is None else small(G, N, F32 if bias_dtype == "f32" else dtype)
        u, dh, gate = 2 * rand(9, N, dtype=dtype), rand(9, N, dtype=dtype), rand(9, N, dtype=dtype) if gated else None
        for act in ACTIVATIONS:
            exact = reference.bias_act(*double(u, bias, gate), act)
            close(f"act {act}", emulator.bias_act(u, bias, gate, act), exact, dtype)
            want = (True, bias is not None, gated)
            ours = emulator.bias_act_backward(dh, u, bias, gate, act, *want)
            exact = reference.bias_act_backward(*double(dh, u, bias, gate), act, *want)
            for name, o, e in zip(("du", "dbias", "dgate"), ours, exact, strict=True):
                kept = bias.dtype if name == "dbias" and bias is not None else dtype
                close(f"{name} of act {act}", o, e, kept, 4 * 9)
            check_coded(emulator, u, bias, dh, act)


@pytest.mark.parametrize("N", (40, 37))
def test_bias_act_every_subset_of_gradients(emulator, N):
    T, G = 66, 2
    u, dh, gate = (rand(T, N, dtype=BF16) for _ in range(3))
    bias = small(G, N, BF16)
    exact = reference.bias_act_backward(*double(dh, u, bias, gate), 0, True, True, True)
    for want in itertools.product((False, True), repeat=3):
        ours = emulator.bias_act_backward(dh, u, bias, gate, 0, *want)
        for k, (o, e) in enumerate(zip(ours, exact, strict=True)):
            assert (o is not None) == want[k]
            if want[k]:
                close(f"gradient {k} of {want}", o, e, BF16, 4 * T)


def test_activations_at_extremes(emulator):
    u = torch.tensor([[0.0, -0.0, 88.0, -88.0, 1e4, -1e4, 1e-30, math.inf, math.nan]])
    for act in ACTIVATIONS:
        h, exact = emulator.bias_act(u, None, None, act), reference.bias_act(u.double(), None, None, act).float()
        torch.testing.assert_close(h, exact, equal_nan=True)
        code, exact = emulator.bias_act_coded(u, None, act)[1], reference.bias_act_coded(u.double(), None, act)[1]
        assert (code.int() - exact.int()).abs().max() <= 1 and code[0, -1] == 0  # act'(0) is a tie
    # the slope's factors overflow and underflow, the slope does not
    for dtype, act in itertools.product((BF16, F16), ACTIVATIONS):
        dh, v = torch.ones(1, 6, dtype=dtype), u[:, :6].to(dtype)
        assert emulator.bias_act_backward(dh, v, None, None, act, True, False, False)[0].isfinite().all()


@pytest.mark.parametrize("N", (1, 7, 64, 100, 768, 2304))
def test_column_sum(emulator, N):
    for dtype, G, T in itertools.product(DTYPES, (1, 3), (3, 333)):
        for multiprocessors in (1, 11):
            emulator.configure(multiprocessors=multiprocessors)
            x = rand(T, N, dtype=dtype)
            close("sum", emulator.column_sum(x, G), reference.column_sum(x.double(), G), F32, 4 * T)


@pytest.mark.parametrize("p", (0.0, 0.1, 0.999))
def test_dropout_masks_are_the_contract_bit_for_bit(emulator, p):
    for (T, H), n_seeds, dtype in itertools.product(((6, 5), (3, 1), (3, 4100), (9, 64), (6, 1030)), (1, 3), DTYPES):
        x, seed = torch.ones(T, H, dtype=dtype), seeds(n_seeds)
        keep = reference.keep_mask(seed, p, T * H // n_seeds).view(T, H)
        assert torch.equal(emulator.dropout(x, seed, p) != 0, keep)
        # the same mask inside the norm, forward and backward
        z = emulator.residual_norm(x, None, None, None, None, seed, p, 1e-5, RMS, True, False)[1]
        assert torch.equal(z != 0, keep)
        back = (x, x, torch.zeros_like(x), torch.zeros(T), None, None, None, seed, p, RMS, 0)
        assert torch.equal(emulator.residual_norm_backward(*back, False, True, False, False, False)[1] != 0, keep)
    x, seed = rand(40, 33), seeds(1)
    assert torch.equal(emulator.dropout(x, seed, p), reference.dropout(x, seed, p))


def all_ops(emulator, H: int) -> list[torch.Tensor]:
    """Results of every op on fixed inputs, G = 2, bf16 rows with fp32 parameters."""
    torch.manual_seed(1)
    T, G = 90, 2
    x, residual, dy = (rand(T, H, dtype=BF16) for _ in range(3))
    bias, gamma, beta = (small(G, H, F32) for _ in range(3))
    seed = seeds(G)
    y, z, xhat, rstd = emulator.residual_norm(x, bias, residual, gamma, beta, seed, 0.1, 1e-5, LN, True, True)
    back = emulator.residual_norm_backward(dy, x, z, rstd, bias, gamma, beta, seed, 0.1, LN, True, *[True] * 5)
    act = emulator.bias_act_backward(dy, x, bias, residual, 0, True, True, True)
    coded = emulator.bias_act_coded(x, bias, 0)
    coded += emulator.bias_act_coded_backward(dy, coded[1], bias, 0, True, True)
    return [y, z, xhat, rstd, *back, *act, *coded, emulator.bias_act(x, bias, residual, 1), emulator.column_sum(x, G),
            emulator.dropout(x, seed, 0.5)]  # fmt: skip


@pytest.mark.parametrize("H", (264, 1288, 77))
def test_any_interleaving_gives_the_same_bits(emulator, H):
    """Threads between barriers and blocks in any order: no race, and the last block may be any block."""
    expected = None
    for order, seed in (("ascending", 0), ("descending", 0), ("random", 1), ("random", 2)):
        emulator.configure(order, seed, multiprocessors=6)
        results = all_ops(emulator, H)
        expected = expected or results
        assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True)), order
    emulator.runs = 2  # on the workspace as the first run left it
    assert all(torch.equal(r, e) for r, e in zip(all_ops(emulator, H), expected, strict=True))


def test_conversions_of_the_emulator(emulator):
    """Its bf16 and fp16 are torch's, for every pattern of bits and for fp32 values of every size and at every tie."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (BF16, F16):
        x = patterns.view(dtype).reshape(1, -1)
        same = emulator.dropout(x, seeds(1), 0.0)
        assert torch.equal(same.nan_to_num(nan=1.5), x.nan_to_num(nan=1.5)) and torch.equal(same.isnan(), x.isnan())
        finite = x[x.isfinite()].float().sort().values
        ties = (finite[1:] + finite[:-1]) / 2
        wide = torch.randn(4096) * 2.0 ** torch.randint(-40, 40, (4096,))
        values = torch.cat([ties, ties.nextafter(ties + 1), wide]).reshape(1, -1)
        gate = torch.ones_like(values, dtype=dtype)
        relu = emulator.bias_act(torch.zeros_like(gate), values[0].contiguous(), gate, 2)
        assert torch.equal(relu, values.clamp(min=0).to(dtype))


def test_offsets_beyond_32_bits(emulator):
    """The last rows of tensors of more than 2^32 elements; only their pages exist."""
    H, T = 16384, 2**18 + 2

    def sparse() -> torch.Tensor:
        pages = mmap.mmap(-1, T * H * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
        return torch.frombuffer(pages, dtype=BF16).view(T, H)

    x, y, bias = sparse(), sparse(), rand(H, dtype=BF16)
    x[-1] = rand(H, dtype=BF16)
    rstd, seed = torch.ones(T), seeds(1)
    emulator.configure(multiprocessors=T, only_last_block=True)
    emulator._call("residual_norm", "ResidualNorm", T=T, H=H, G=1, seeds=1, dtype=1, param_dtype=1, x=x, bias=bias,
                   seed=seed, p=0.5, eps=1e-5, y=y, rstd=rstd)  # fmt: skip
    e = torch.arange((T - 1) * H // 4, T * H // 4)
    keep = (reference.philox(seed, e) >= 2**31).flatten()
    z = torch.where(keep, 2 * (x[-1].double() + bias.double()), 0.0)
    close("y", y[-1], (z - z.mean()) / z.var(correction=0).add(1e-5).sqrt(), BF16, H)
    emulator._call("residual_norm_backward", "ResidualNormBackward", 1, T=T, H=H, G=1, seeds=1, dtype=1, param_dtype=1,
                   dy=x, row=y, rstd=rstd, seed=seed, p=0.5, dx=y)  # fmt: skip
    assert torch.equal(y[-1] != 0, keep & (y[-1] != 0)) and (y[-1] != 0).sum() > 0.49 * H
    for rows in (torch.float32, torch.bfloat16):
        n = T * H * 2 // rows.itemsize
        emulator._call("dropout", "Dropout", n=n, seeds=1, dtype=DTYPES[rows], x=x, seed=seed, p=0.5, y=y)
    own = 256 * 8  # what the last block writes: one chunk per thread at the very end
    assert torch.equal(y[-1, -own:].double(), torch.where(keep, 2 * x[-1].double(), 0.0)[-own:])
    for rows, code in ((4, None), (3, sparse().view(torch.uint8).view(-1, H)[:T])):
        blocks = -(-T // (8 * rows))  # 8 rows at a time; the last block's third time is the last that is there
        row, own = (blocks - 1) * 8 + 2 * blocks * 8, 32 * 8
        assert T > row and row * H > 2**31
        x[row], y[row] = rand(H, dtype=BF16), math.nan
        emulator._call("bias_act", "BiasAct", T=T, N=H, G=1, dtype=1, param_dtype=1, u=x, bias=bias, act=2, h=y,
                       code=code)  # fmt: skip
        close("h", y[row, -own:], (x[row].double() + bias.double()).relu()[-own:], BF16)
    assert torch.equal(code[row, -own:] == 1, y[row, -own:] > 0)


def test_bad_calls_are_errors(emulator):
    x = rand(2, 8)
    with pytest.raises(RuntimeError, match="workspace is null"):
        # the C function allocates what the size function says; only a direct call can forget it
        struct = emulator.structs["ColumnSum"](T=2, N=8, G=1, dtype=0, x=x.data_ptr(), out=x.data_ptr())
        call = emulator.library.petune_column_sum_without_workspace
        call.restype = ctypes.c_char_p
        raise RuntimeError(call(ctypes.byref(struct)).decode())
    with pytest.raises(RuntimeError, match="unknown dtype 7"):
        emulator._call("dropout", "Dropout", n=16, seeds=1, dtype=7, x=x, seed=seeds(1), p=0.5, y=x)


def test_everything_is_built() -> None:
    """Each op of ops.h has its .cu file."""
    ops = {"residual_norm", "bias_act", "column_sum", "dropout"}
    assert {p.stem for p in Path(build.CSRC / "cuda").glob("*.cu")} == ops
