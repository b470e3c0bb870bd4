"""The CUDA backend's ops on torch CPU tensors, through the emulator: signatures and results as in schema.py.

Outputs start as NaN, so an element that a kernel forgets is seen.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    kinds = {"i64": c_int64, "int": c_int, "ptr": c_void_p, "f64": c_double, "bool": c_bool}
    pairs = [word.split(":") for word in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kinds[kind]) for field, kind in pairs]})


# The structs of csrc/common/ops.h; Emulator checks their sizes.
STRUCTS = {
    "ResidualNorm": "T:i64 H:i64 G:i64 seeds:i64 dtype:int param_dtype:int x:ptr bias:ptr residual:ptr gamma:ptr "
    "beta:ptr seed:ptr p:f64 eps:f64 rms:bool y:ptr z:ptr xhat:ptr rstd:ptr shared:int",
    "ResidualNormBackward": "T:i64 H:i64 G:i64 seeds:i64 dtype:int param_dtype:int dy:ptr dz:ptr row:ptr rstd:ptr "
    "gamma:ptr seed:ptr p:f64 rms:bool row_is_z:bool dresidual:ptr dx:ptr dbias:ptr dgamma:ptr dbeta:ptr "
    "workspace:ptr shared:int",
    "BiasAct": "T:i64 N:i64 G:i64 dtype:int param_dtype:int u:ptr bias:ptr gate:ptr act:int h:ptr code:ptr",
    "BiasActBackward": "T:i64 N:i64 G:i64 dtype:int param_dtype:int dh:ptr u:ptr bias:ptr gate:ptr "
    "code:ptr act:int du:ptr dbias:ptr dgate:ptr workspace:ptr",
    "ColumnSum": "T:i64 N:i64 G:i64 dtype:int x:ptr out:ptr workspace:ptr",
    "Dropout": "n:i64 seeds:i64 dtype:int x:ptr seed:ptr p:f64 y:ptr",
}


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _new(like: torch.Tensor, wanted: bool = True, shape=None, dtype=None) -> torch.Tensor | None:
    return like.new_full(like.shape if shape is None else shape, float("nan"), dtype=dtype) if wanted else None


def _groups(*params: torch.Tensor | None) -> int:
    return max([p.shape[0] for p in params if p is not None and p.dim() == 2], default=1)


def _shared(*params: torch.Tensor | None) -> int:
    """Bits of ops.h's Shared: parameters without the replica axis that others have."""
    G = _groups(*params)
    return sum(1 << i for i, p in enumerate(params) if p is not None and G > 1 and p.dim() == 1)


class Emulator:
    """The library, one method per op. order, seed: how threads and blocks are interleaved; runs: of a backward."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.structs = {name: _struct(name, fields) for name, fields in STRUCTS.items()}
        for name, struct in self.structs.items():
            if (size := self.library.petune_sizeof(name.encode())) != ctypes.sizeof(struct):
                raise RuntimeError(f"{name} has {size} bytes in ops.h and {ctypes.sizeof(struct)} here: update STRUCTS")
        self.library.emulator_configure.argtypes = [c_int, c_int64, c_int, c_int]
        self.runs = 1
        self.configure()

    def configure(
        self, order: str = "ascending", seed: int = 0, multiprocessors: int = 4, only_last_block: bool = False
    ) -> None:
        index = ("ascending", "descending", "random").index(order)
        self.library.emulator_configure(index, seed, multiprocessors, only_last_block)

    def _call(self, function: str, struct: str, *more: int, **fields) -> None:
        call = getattr(self.library, f"petune_{function}")
        call.restype = c_char_p
        values = {k: _pointer(v) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
        error = call(ctypes.byref(self.structs[struct](**values)), *more)
        if error is not None:
            raise RuntimeError(error.decode())

    @staticmethod
    def _common(x: torch.Tensor, *params: torch.Tensor | None) -> dict:
        param = next((p for p in params if p is not None), x)
        return {"T": x.shape[0], "dtype": DTYPES[x.dtype], "param_dtype": DTYPES[param.dtype]}

    def residual_norm(self, x, bias, residual, gamma, beta, seed, p, eps, rms, want_z, want_xhat):
        seeds = 0 if seed is None else seed.numel()
        y, z, xhat = _new(x), _new(x, want_z), _new(x, want_xhat)
        rstd = _new(x, shape=[x.shape[0]], dtype=torch.float32)
        self._call(
            "residual_norm", "ResidualNorm", **self._common(x, bias, gamma, beta), H=x.shape[1],
            G=_groups(bias, gamma, beta), seeds=seeds, x=x, bias=bias, residual=residual, gamma=gamma,
            beta=beta, seed=seed, p=p, eps=eps, rms=rms, y=y, z=z, xhat=xhat, rstd=rstd,
            shared=_shared(bias, gamma, beta),
        )  # fmt: skip
        return y, z, xhat, rstd

    def residual_norm_backward(
        self, dy, dz, row, rstd, bias, gamma, beta, seed, p, rms, row_is_z, want_dresidual, want_dx, want_dbias,
        want_dgamma, want_dbeta,
    ):  # fmt: skip
        seeds = 0 if seed is None else seed.numel()
        dresidual, dx = _new(dy, want_dresidual), _new(dy, want_dx)
        dbias, dgamma, dbeta = (
            _new(like, True) if want else None
            for want, like in ((want_dbias, bias), (want_dgamma, gamma), (want_dbeta, beta))
        )
        self._call(
            "residual_norm_backward", "ResidualNormBackward", self.runs, **self._common(dy, bias, gamma, beta),
            H=dy.shape[1], G=_groups(bias, gamma, beta), seeds=seeds, dy=dy, dz=dz, row=row, rstd=rstd,
            gamma=gamma, seed=seed, p=p, rms=rms, row_is_z=row_is_z, dresidual=dresidual, dx=dx,
            dbias=dbias, dgamma=dgamma, dbeta=dbeta, shared=_shared(bias, gamma, beta),
        )  # fmt: skip
        return dresidual, dx, dbias, dgamma, dbeta

    def bias_act(self, u, bias, gate, act):
        h = _new(u)
        self._call(
            "bias_act", "BiasAct", **self._common(u, bias), N=u.shape[1], G=_groups(bias), u=u, bias=bias, gate=gate,
            act=act, h=h,
        )  # fmt: skip
        return h

    def bias_act_backward(self, dh, u, bias, gate, act, want_du, want_dbias, want_dgate):
        du, dgate = _new(u, want_du), _new(u, want_dgate)
        dbias = _new(bias) if want_dbias else None
        self._call(
            "bias_act_backward", "BiasActBackward", self.runs, **self._common(u, bias), N=u.shape[1], G=_groups(bias),
            dh=dh, u=u, bias=bias, gate=gate, act=act, du=du, dbias=dbias, dgate=dgate,
        )  # fmt: skip
        return du, dbias, dgate

    def bias_act_coded(self, u, bias, act):
        h, code = _new(u), torch.full(u.shape, 255, dtype=torch.uint8)
        self._call(
            "bias_act", "BiasAct", **self._common(u, bias), N=u.shape[1], G=_groups(bias), u=u, bias=bias, act=act,
            h=h, code=code,
        )  # fmt: skip
        return h, code

    def bias_act_coded_backward(self, dh, code, bias, act, want_du, want_dbias):
        du, dbias = _new(dh, want_du), _new(bias) if want_dbias else None
        self._call(
            "bias_act_backward", "BiasActBackward", self.runs, **self._common(dh, bias), N=dh.shape[1], G=_groups(bias),
            dh=dh, bias=bias, code=code, act=act, du=du, dbias=dbias,
        )  # fmt: skip
        return du, dbias

    def column_sum(self, x, groups):
        out = _new(x, shape=[groups, x.shape[1]], dtype=torch.float32)
        self._call("column_sum", "ColumnSum", self.runs, T=x.shape[0], N=x.shape[1], G=groups, dtype=DTYPES[x.dtype],
                   x=x, out=out)  # fmt: skip
        return out

    def dropout(self, x, seed, p):
        y = _new(x)
        self._call("dropout", "Dropout", n=x.numel(), seeds=seed.numel(), dtype=DTYPES[x.dtype], x=x, seed=seed, p=p,
                   y=y)  # fmt: skip
        return y
