"""The op cases: each op, forward and backward, as one expression of PyTorch and as what it is compared with.

`expression(t, drop)` is what a model would write; `drop` is dropout where the op has it. The gate runs it in float64
with the very mask that our seed gives, and with no dropout for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from petune_kernels import reference
from petune_kernels.ops.attention import attention
from petune_kernels.ops.bias_act import bias_act
from petune_kernels.ops.column_sum import column_sum
from petune_kernels.ops.dropout import dropout
from petune_kernels.ops.lora_linear import lora_linear
from petune_kernels.ops.packed_linear import packed_linear
from petune_kernels.ops.residual_norm import residual_norm

Tensors = Mapping[str, Tensor]
Drop = Callable[[Tensor], Tensor]
EPS, RANK = 1e-5, 8
HEADS = {64: 1, 384: 12, 768: 12, 1024: 16, 4096: 32}  # by hidden size, of the models of op_runs.WIDTHS
WIDER = 16  # the least rank of a 16-bit tl.dot, which LoRAFusion gives its factors to unpadded


@dataclass(frozen=True)
class OpCase:
    """One op in one use.

    Attributes:
        shapes: of each input, in the letters of `sizes`.
        frozen: the inputs that get no gradient.
        wide: the inputs that are float32 beside 16-bit ones; such a case is timed in 16 bits only.
        expression: the op in PyTorch, from inputs and dropout. Where it adds a bias, that is a pass which a stock model
            does not make: there the linear before adds it, and a patched model's does not.
        ours: the same from inputs, p and a seed (None: the op draws its own).
        peers: for each peer, what imports it and returns its call; it computes the same with dropout off.
        bytes, flops: formulas of forward plus backward in the letters above and s, the bytes of an element. The bytes
            are those that no implementation can avoid: each operand and result once, each way.
        back_bytes, back_flops: backward's part of them; "" where nothing gets a gradient.
        matmuls: the products with frozen weights and no more, whose time is a floor for the case and which is no peer.
    """

    op: str
    use: str
    shapes: Mapping[str, str]
    frozen: tuple[str, ...]
    expression: Callable[[Tensors, Drop], Any]
    ours: Callable[[Tensors, float, Tensor | None], Any]
    bytes: str
    back_bytes: str = ""
    flops: str = "0"
    back_flops: str = "0"
    p: float = 0.0
    wide: tuple[str, ...] = ()
    eager: Callable[[Tensors, float], Any] | None = None
    peers: Mapping[str, Callable[[], Callable[[Tensors], Any]]] = field(default_factory=dict)
    matmuls: Callable[[Tensors], Tensor] | None = None

    def comes_in(self, dtype: torch.dtype) -> bool:
        """In float32 a case with float32 inputs is the one without."""
        return not (self.wide and dtype.itemsize > 2)

    def eagerly(self, t: Tensors, p: float) -> Any:
        if self.eager is not None:
            return self.eager(t, p)
        return self.expression(t, (lambda x: F.dropout(x, p)) if p else (lambda x: x))


def masked(seed: Tensor, p: float) -> Drop:
    """Dropout with the mask that our kernels draw from this seed."""
    return lambda x: torch.where(reference.keep_mask(seed, p, x.numel()).reshape(x.shape), x / (1 - p), 0.0)


def _norm(t: Tensors, drop: Drop) -> Tensor:
    z = t["x"] + t["bias"] if "bias" in t else t["x"]
    z = drop(z) + t["residual"] if "residual" in t else z
    return F.layer_norm(z, z.shape[-1:], t.get("gamma"), t.get("beta"), EPS)


def _rms(t: Tensors, drop: Drop) -> Tensor:
    z = drop(t["x"]) + t["residual"] if "residual" in t else t["x"]
    return F.rms_norm(z, z.shape[-1:], t.get("gamma"), EPS)


def _our_norm(t: Tensors, p: float, seed: Tensor | None) -> Any:
    return residual_norm(
        t["x"], t["gamma"], t.get("beta"), bias=t.get("bias"), residual=t.get("residual"), p=p, eps=EPS,
        rms="beta" not in t, seed=seed,
    )  # fmt: skip


def _liger_layer_norm() -> Callable[[Tensors], Any]:
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda t: liger_layer_norm(t["x"], t["gamma"], t["beta"], EPS)


def _liger_rms_norm() -> Callable[[Tensors], Any]:
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda t: liger_rms_norm(t["x"], t["gamma"], EPS, in_place=False)


def _liger_swiglu() -> Callable[[Tensors], Any]:
    from liger_kernel.transformers.functional import liger_swiglu

    return lambda t: liger_swiglu(t["u"], t["gate"])


def _flash_norm() -> Callable[[Tensors], Any]:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return lambda t: layer_norm_fn(
        t["x"], t["gamma"], t.get("beta"), residual=t.get("residual"), eps=EPS, is_rms_norm="beta" not in t
    )


def _quack_norm() -> Callable[[Tensors], Any]:
    from quack import rmsnorm

    return lambda t: rmsnorm(t["x"], t["gamma"], residual=t.get("residual"), eps=EPS)


def _apex_layer_norm() -> Callable[[Tensors], Any]:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return lambda t: fused_layer_norm_affine(t["x"], t["gamma"], t["beta"], t["x"].shape[-1:], EPS)


def _apex_rms_norm() -> Callable[[Tensors], Any]:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return lambda t: fused_rms_norm_affine(t["x"], t["gamma"], t["x"].shape[-1:], EPS)


# LowMemoryBP's norms have no gamma and beta: its users fold them into the next projection. The derivatives of its
# activations are step functions, kept in 2 bits: the gate finds them off and prints no time.
def _lowmem_layer_norm() -> Callable[[Tensors], Any]:
    from lomem.functional import layer_norm

    return lambda t: layer_norm(t["x"], t["x"].shape[-1:], EPS)


def _lowmem_rms_norm() -> Callable[[Tensors], Any]:
    from lomem.functional import rms_norm

    return lambda t: rms_norm(t["x"], t["x"].shape[-1:], EPS)


def _lowmem_gelu() -> Callable[[Tensors], Any]:
    from lomem.functional import regelu2

    return lambda t: regelu2(t["u"] + t["bias"])


def _lowmem_silu() -> Callable[[Tensors], Any]:
    from lomem.functional import resilu2

    return lambda t: resilu2(t["u"]) * t["gate"]


# Unsloth's norms give gamma and beta no gradient, and write dx over dy: of calls that share a dy, as all of a set do,
# only the first computes the case, and all do the same work.
def _unsloth_layer_norm() -> Callable[[Tensors], Any]:
    from unsloth.kernels import fast_layernorm

    return lambda t: fast_layernorm(
        SimpleNamespace(weight=t["gamma"], bias=t["beta"], eps=EPS, elementwise_affine=True), t["x"]
    )


def _unsloth_rms_norm() -> Callable[[Tensors], Any]:
    from unsloth.kernels import fast_rms_layernorm

    return lambda t: fast_rms_layernorm(SimpleNamespace(weight=t["gamma"], eps=EPS), t["x"])


def _unsloth_lora() -> Callable[[Tensors], Any]:
    """Without a bias, which is added as PyTorch does: Unsloth leaves a projection that has one to PEFT."""
    from unsloth.kernels.fast_lora import LoRA_W

    return lambda t: LoRA_W.apply(t["x"].unsqueeze(0), t["w"], None, t["a"], t["b"], 2.0).squeeze(0) + t["c"]


def _lorafusion() -> Callable[[Tensors], Any]:
    from lorafusion.ops.lora_v1 import fused_linear_lora

    return lambda t: fused_linear_lora(
        t["x"].unsqueeze(0), t["w"], t["a"], t["b"], 2.0, seed=0, dropout_p=0.0, linear_bias=t["c"]
    ).squeeze(0)


def _lora(t: Tensors, drop: Drop) -> Tensor:
    """As PEFT's layer runs, its casts included."""
    update = F.linear(F.linear(drop(t["x"].to(t["a"].dtype)), t["a"]), t["b"])
    return (F.linear(t["x"], t["w"], t["c"]) + update * 2.0).to(t["x"].dtype)


def _our_lora(t: Tensors, p: float, seed: Tensor | None) -> Any:
    return lora_linear(t["x"], t["w"], t["c"], t["a"], t["b"], scale=2.0, p=p, seed=seed)


def _attention(t: Tensors, drop: Drop) -> Tensor:
    return drop(torch.softmax(t["q"] @ t["k"].mT * t["q"].shape[-1] ** -0.5, -1)) @ t["v"]


def _packed(t: Tensors, drop: Drop) -> tuple[Tensor, ...]:
    return tuple(F.linear(t["x"], t[f"w{i}"], t[f"c{i}"]) for i in range(3))


_NORM = {"x": "T H", "gamma": "H", "beta": "H"}
_RMS = {"x": "T H", "gamma": "H"}
_LAYER_NORMS = {"liger": _liger_layer_norm, "flash-attn": _flash_norm, "apex": _apex_layer_norm}
_RMS_NORMS = {"liger": _liger_rms_norm, "flash-attn": _flash_norm, "quack": _quack_norm, "apex": _apex_rms_norm}
_HEADS = {name: "B h S D" for name in "qkv"}


def _lora_case(inside: str, outside: str, p: float, wide: bool, rank: str = "r") -> OpCase:
    """K, N and rank in the letters of `sizes`; flops of the frozen product forward and back, the update's two
    products and their gradients."""
    K, N, r = inside, outside, rank
    peers = {} if p else {"unsloth": _unsloth_lora} | ({"lorafusion": _lorafusion} if r == "R" else {})
    return OpCase(
        "lora_linear", f"{K} to {N} p={p}" + (" float32 adapter" if wide else "") + (" rank 16" if r == "R" else ""),
        {"x": f"T {K}", "w": f"{N} {K}", "c": N, "a": f"{r} {K}", "b": f"{N} {r}"}, ("w", "c"), _lora, _our_lora,
        f"s*(3*T*{K} + 2*T*{N} + 2*{K}*{N})", f"s*(2*T*{K} + T*{N} + {K}*{N})",
        f"4*T*{K}*{N} + 6*T*{r}*({K} + {N})", f"2*T*{K}*{N} + 4*T*{r}*({K} + {N})", p=p,
        wide=("a", "b") if wide else (), peers=peers, matmuls=lambda t: F.linear(t["x"], t["w"]),
    )  # fmt: skip


_PROJECTIONS = {"x": "T H"} | {f"w{i}": "H H" for i in range(3)} | {f"c{i}": "H" for i in range(3)}

CASES = (
    OpCase("residual_norm", "layernorm", _NORM, (), _norm, _our_norm, "5*T*H*s", "3*T*H*s", peers=_LAYER_NORMS),
    OpCase("residual_norm", "layernorm frozen", _NORM, ("gamma", "beta"), _norm, _our_norm, "5*T*H*s", "3*T*H*s",
           peers=_LAYER_NORMS | {"unsloth": _unsloth_layer_norm}),
    OpCase("residual_norm", "layernorm bare", {"x": "T H"}, (), _norm,
           lambda t, p, seed: residual_norm(t["x"], eps=EPS), "5*T*H*s", "3*T*H*s",
           peers={"LowMemoryBP": _lowmem_layer_norm}),
    OpCase("residual_norm", "layernorm residual", _NORM | {"residual": "T H"}, (), _norm, _our_norm,
           "6*T*H*s", "3*T*H*s", peers={"flash-attn": _flash_norm}),
    OpCase("residual_norm", "layernorm residual bias p=0.1", _NORM | {"residual": "T H", "bias": "H"}, (), _norm,
           _our_norm, "7*T*H*s", "4*T*H*s", p=0.1),
    OpCase("residual_norm", "rmsnorm", _RMS, (), _rms, _our_norm, "5*T*H*s", "3*T*H*s", peers=_RMS_NORMS),
    OpCase("residual_norm", "rmsnorm frozen", _RMS, ("gamma",), _rms, _our_norm, "5*T*H*s", "3*T*H*s",
           peers=_RMS_NORMS | {"unsloth": _unsloth_rms_norm}),
    OpCase("residual_norm", "rmsnorm bare", {"x": "T H"}, (), _rms,
           lambda t, p, seed: residual_norm(t["x"], eps=EPS, rms=True), "5*T*H*s", "3*T*H*s",
           peers={"LowMemoryBP": _lowmem_rms_norm}),
    OpCase("residual_norm", "rmsnorm residual", _RMS | {"residual": "T H"}, (), _rms, _our_norm, "6*T*H*s", "3*T*H*s",
           peers={"flash-attn": _flash_norm, "quack": _quack_norm}),
    OpCase("bias_act", "gelu bias", {"u": "T N", "bias": "N"}, (), lambda t, drop: F.gelu(t["u"] + t["bias"]),
           lambda t, p, seed: bias_act(t["u"], t["bias"]), "5*T*N*s", "3*T*N*s", peers={"LowMemoryBP": _lowmem_gelu}),
    OpCase("bias_act", "silu gate", {"u": "T N", "gate": "T N"}, (), lambda t, drop: F.silu(t["u"]) * t["gate"],
           lambda t, p, seed: bias_act(t["u"], act="silu", gate=t["gate"]), "8*T*N*s", "5*T*N*s",
           peers={"liger": _liger_swiglu, "LowMemoryBP": _lowmem_silu}),
    OpCase("column_sum", "bias gradient", {"x": "T N"}, ("x",), lambda t, drop: t["x"].sum(0, keepdim=True),
           lambda t, p, seed: column_sum(t["x"]), "T*N*s"),
    OpCase("dropout", "p=0.1", {"x": "T H"}, (), lambda t, drop: drop(t["x"]),
           lambda t, p, seed: dropout(t["x"], p, seed=seed) if p else t["x"] * 1, "4*T*H*s", "2*T*H*s",
           p=0.1),
    # of attention's seven products five are backward's, which computes the scores again and needs no o
    *(OpCase("attention", f"p={p}", _HEADS, (), _attention,
             lambda t, p, seed: attention(t["q"], t["k"], t["v"], p=p, seed=seed), "11*T*H*s", "7*T*H*s",
             "14*T*S*H", "10*T*S*H", p=p,
             eager=lambda t, p: F.scaled_dot_product_attention(t["q"], t["k"], t["v"], dropout_p=p))
      for p in (0.0, 0.1)),
    *(_lora_case(K, N, p, wide) for wide in (True, False) for K in "HN" for N in "HN" for p in (0.0, 0.1)),
    _lora_case("H", "H", 0.0, False, "R"),
    OpCase("packed_linear", "q k v", _PROJECTIONS, ("w0", "w1", "w2"), _packed,
           lambda t, p, seed: packed_linear(t["x"], [t[f"w{i}"] for i in range(3)], [t[f"c{i}"] for i in range(3)]),
           "s*(8*T*H + 6*H*H)", "s*(4*T*H + 3*H*H)", "12*T*H*H", "6*T*H*H",
           matmuls=lambda t: F.linear(t["x"], cast(Tensor, t["w0"]._base))),  # all three weights as they lie
)  # fmt: skip


def sizes(batch: int, length: int, hidden: int, dtype: torch.dtype) -> dict[str, int]:
    """The letters: T tokens of B sequences of S, N = 4 H, r and R ranks, h heads of D, s bytes an element."""
    return {
        "B": batch, "S": length, "T": batch * length, "H": hidden, "N": 4 * hidden, "r": RANK, "R": WIDER,
        "h": HEADS[hidden], "D": hidden // HEADS[hidden], "s": dtype.itemsize,
    }  # fmt: skip


def evaluate(formula: str, letters: Mapping[str, int]) -> float:
    return float(eval(formula, {"__builtins__": {}}, dict(letters)))


def inputs(case: OpCase, letters: Mapping[str, int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    """Random inputs, drawn on the device; a matrix of weights is scaled so that what it gives is of the size of x."""
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, shape in case.shapes.items():
        lengths = [letters[letter] for letter in shape.split()]
        weight = len(lengths) == 2 and shape[0] != "T"
        value = torch.randn(lengths, generator=generator, device=device) * (lengths[1] ** -0.5 if weight else 1.0)
        kept = torch.float32 if name in case.wide else dtype
        found[name] = value.to(kept).requires_grad_(name not in case.frozen)
    if case.op == "packed_linear":  # the weights behind one another, as patch() lays them
        weights = [name for name in found if name.startswith("w")]
        found |= zip(weights, torch.cat([found[name] for name in weights]).chunk(len(weights)), strict=True)
    return found
