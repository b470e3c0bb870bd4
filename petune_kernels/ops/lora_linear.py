r"""lora_linear: a frozen linear layer with its LoRA update, for one projection or several that read the same x.

Forward, per projection (Hu et al. 2022; PEFT's `lora.Linear`, whose `lora_bias` is bias_b):

    y = x W^T + bias + s * (dropout(x) A^T B^T + bias_b)

Backward, with D the dropout mask (0 or 1/(1-p)):

    dx = sum over projections of  dy W + D * (s dy B) A
    dA = (s dy B)^T dropout(x)      dB = s dy^T (dropout(x) A^T)      dbias = sum_rows dy      dbias_b = s sum_rows dy

Saved: x where A, B or W trains (or what its producer keeps and x can be made again from: _saving.py), and the seed; no
more but parameters. Backward makes dropout(x) A^T again from the dropout(x) that dA needs anyway. Eager PEFT saves, for
each projection, dropout(x), its mask, dropout(x) A^T, and in mixed precision x in float32. Masks are drawn for each
projection apart, as PEFT does.

Numerics. W and x share a dtype; adapters share one that is x's or float32. In the latter case x A^T, dA and dB are what
float32 arithmetic gives from the 16-bit x and dy, as in PEFT, and no widened x is kept (see matmul.py).

Two paths forward. "adapter" multiplies by W and folds the rank-r product in: one more pass over y. "merged" multiplies
by W + s B A: one more pass over W, but no dropout and no replicas. In 16 bits the sum W + s B A rounds a small
update away, and a training run starts at update zero, so "auto" may merge float32 weights only, from MERGE_ROWS rows
on: nowhere yet, since on a CPU nothing is gained and on a GPU nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import matmul  # registers the ops' matmul kernels, too
from ..backends import pick
from . import _checks as check
from . import _frames as frames
from . import _saving as saving
from ._seeds import new_seeds

PATHS = ("auto", "adapter", "merged")

MERGE_ROWS: dict[str, float | None] = {"cpu": None, "cuda": None}
"""Per device type: "auto" merges when T is at least this multiple of K; None: never.

CPU: forward + backward, float32, 2048 rows, K 384, r 8, two threads, merged against adapter: 11.8 and 11.6 ms at
N = 384, 31.2 and 31.9 ms at N = 1536: no gain beyond the noise, and x A^T moves into backward. CUDA: not measured.
"""


class Projection(NamedTuple):
    """y = x w^T + bias + scale (dropout_p(x) a^T b^T + bias_b): the arguments of `lora_linear` for one projection.

    w [N, K], bias [N], a [r, K], b [N, r], bias_b [N], or with a replica axis; None where absent. p is 0 outside
    training.
    """

    w: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    bias_b: Tensor | None = None
    scale: float = 1.0
    p: float = 0.0

    def takes(self, x: Tensor) -> bool:
        """Whether `lora_linear` serves x: one dtype for x and w, that or float32 for the others; any in autocast."""
        w, bias, a, b, bias_b, _, _ = self
        if check.autocast_dtype(x) is not None:
            return torch.float64 not in {x.dtype, *(t.dtype for t in (w, bias, a, b, bias_b) if t is not None)}
        if x.dtype != w.dtype or (bias is not None and not _beside(bias, x.dtype)):
            return False
        if a is None or b is None:
            return True
        return _beside(a, x.dtype) and a.dtype == b.dtype == (b if bias_b is None else bias_b).dtype


def _beside(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether a small parameter may stand beside rows of this dtype."""
    return t.dtype == dtype or (t.dtype == torch.float32 and dtype != torch.float64)


class LoraLinear(torch.autograd.Function):
    """apply(x, (p, scale, groups, merged), *(w, bias, a, b, bias_b, seed for each projection)); None where absent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: tuple[tuple, tuple, int, bool], *tensors: Any) -> Any:
        p, scale, groups, merged = how
        w, bias, a, b, bias_b, seed = _by_role(tensors)
        y = pick("lora_linear", x)(check.as_rows(x), cast(w, x.dtype), bias, a, b, bias_b, seed, p, scale, merged)
        want_w, _, want_a, want_b, _, _ = _by_role(ctx.needs_input_grad[2:])
        need_x = any(want_w) or any(want_a) or any(want_b)
        saving.save(ctx, saving.known(x) if need_x else None, *tensors)
        ctx.p, ctx.scale, ctx.groups = p, scale, groups
        ctx.set_materialize_grads(False)
        lead = x.shape[:-1]
        return tuple([check.in_shape(one, lead) for one in y])

    @staticmethod
    @saving.once_differentiable
    def backward(ctx: Any, *dy: Tensor | None) -> Any:
        p, scale = ctx.p, ctx.scale
        x, *saved = saving.load(ctx)
        w, bias, a, b, bias_b, seed = _by_role(saved)
        grads: list[Any] = [None] * len(saved)
        like = next((d for d in dy if d is not None), None)
        if like is None:
            return (None, None, *grads)
        want_x, _, *need = ctx.needs_input_grad
        want_w, want_bias, want_a, want_b, want_bias_b, _ = _by_role(need)
        want_dsum = [i or j for i, j in zip(want_bias, want_bias_b, strict=True)]
        rows = [check.as_rows(check.dense(d)) for d in dy]
        x = check.as_rows(x)
        dx, da, db, dsum = pick("lora_linear_backward", like)(
            rows, x, cast(w, like.dtype), a, b, seed, p, scale, ctx.groups, want_x, want_a, want_b, want_dsum,
        )  # fmt: skip
        for i, at in enumerate(range(0, len(saved), 6)):
            if want_w[i] and rows[i] is not None:
                grads[at] = (rows[i].T @ x).to(w[i].dtype)  # type: ignore
            if want_bias[i]:
                grads[at + 1] = bias_gradient(dsum[i], bias[i])
            if want_a[i]:
                grads[at + 2] = da[i]
            if want_b[i]:
                grads[at + 3] = db[i]
            if want_bias_b[i]:
                grads[at + 4] = bias_gradient(dsum[i] * scale[i], bias_b[i])
        return (check.in_shape(dx, like.shape[:-1]) if want_x else None, None, *grads)


def _by_role(values: Sequence[Any]) -> list[Sequence[Any]]:
    """One sequence a role (w, bias, a, b, bias_b, seed) from what stands projection by projection."""
    return [values[0::6], values[1::6], values[2::6], values[3::6], values[4::6], values[5::6]]


def cast(w: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Weights as a matmul of this dtype takes them: under autocast they may be in another."""
    return [m if m.dtype == dtype else m.to(dtype) for m in w]


def bias_gradient(dsum: Tensor, bias: Tensor) -> Tensor:
    """Column sums [G, N] as the gradient of a bias [N] (which all replicas share) or [G, N]."""
    if dsum.numel() != bias.numel():
        dsum = dsum.sum(0)
    return dsum.reshape(bias.shape).to(bias.dtype)


def as_list(op: str, name: str, value: Any, n: int) -> list[Any]:
    """One value a projection: a sequence of n, or None for none anywhere."""
    if value is None:
        return [None] * n
    if not isinstance(value, (list, tuple)):
        value = [value]
    if len(value) != n:
        raise ValueError(f"{op}: {name} has {len(value)} entries for {n} projections; accepted is one for each")
    return list(value)


def projections(op: str, x: Tensor, w: list[Tensor], bias: list[Tensor | None], *, autocast: bool) -> int:
    """Checks x, W and bias of projections that share x; returns the G that the biases imply."""
    check.floating(op, x=x)
    T, K = check.rows(op, "x", x)
    G = 1
    for i, (m, c) in enumerate(zip(w, bias, strict=True)):
        tensors = {f"w[{i}]": m, f"bias[{i}]": c}
        if not isinstance(m, Tensor):
            raise TypeError(f"{op}: w[{i}] is {type(m).__name__}; accepted is a torch.Tensor")
        check.floating(op, **tensors)
        check.same_device(op, x, **tensors)
        if m.dim() != 2 or m.shape[1] != K or m.shape[0] == 0:
            raise ValueError(f"{op}: w[{i}] has shape {tuple(m.shape)}; accepted is [N, {K}] for x of {tuple(x.shape)}")
        if m.dtype != x.dtype and not autocast:
            raise TypeError(f"{op}: w[{i}] is {m.dtype}, x is {x.dtype}; they must agree")
        G = max(G, check.small(op, T, m.shape[0], **{f"bias[{i}]": c}))
        _adapter_dtype(op, x, **{f"bias[{i}]": c})
    for i, c in enumerate(bias):
        if c is not None and c.dim() == 2 and c.shape[0] not in (1, G):
            raise ValueError(f"{op}: bias[{i}] has {c.shape[0]} replicas, another has {G}; they must agree")
    return G


def _adapter_dtype(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and not _beside(t, x.dtype):
            also = "" if x.dtype in (torch.float32, torch.float64) else " or float32"
            raise TypeError(f"{op}: {name} is {t.dtype}; accepted is x's {x.dtype}{also}")


def _adapter(
    op: str, i: int, x: Tensor, N: int, a: Tensor | None, b: Tensor | None, bias_b: Tensor | None
) -> int | None:
    """Checks one projection's adapter; returns its G, or None where there is no adapter."""
    tensors = {f"a[{i}]": a, f"b[{i}]": b, f"bias_b[{i}]": bias_b}
    if a is None or b is None:
        given = [name for name, t in tensors.items() if t is not None]
        if given:
            raise ValueError(f"{op}: {given[0]} is given without its a and b; accepted is both or neither")
        return None
    check.floating(op, **tensors)
    check.same_device(op, x, **tensors)
    _adapter_dtype(op, x, **tensors)
    if not a.dtype == b.dtype == (b if bias_b is None else bias_b).dtype:
        raise TypeError(f"{op}: a[{i}], b[{i}] and bias_b[{i}] differ in dtype ({a.dtype}, {b.dtype}); they must agree")
    K = x.shape[-1]
    if a.dim() not in (2, 3) or a.shape[-1] != K or 0 in a.shape:
        raise ValueError(
            f"{op}: a[{i}] has shape {tuple(a.shape)}; accepted is [r, {K}] or [G, r, {K}] with r and G of at least 1"
        )
    wanted = (*a.shape[:-2], N, a.shape[-2])
    if b.shape != wanted:
        raise ValueError(
            f"{op}: b[{i}] has shape {tuple(b.shape)}; beside a[{i}] of {tuple(a.shape)} it must be {wanted}"
        )
    if bias_b is not None and bias_b.shape != (*a.shape[:-2], N):
        raise ValueError(
            f"{op}: bias_b[{i}] has shape {tuple(bias_b.shape)}; beside b[{i}] it must be {(*a.shape[:-2], N)}"
        )
    return 1 if a.dim() == 2 else a.shape[0]


def _replicas(op: str, x: Tensor, its: list[Projection], *, autocast: bool) -> int:
    """Checks x and every projection; returns their G."""
    G = projections(op, x, [it.w for it in its], [it.bias for it in its], autocast=autocast)
    T = x.numel() // x.shape[-1]
    for i, it in enumerate(its):
        g = _adapter(op, i, x, it.w.shape[0], it.a, it.b, it.bias_b)
        if g is not None and g > 1:
            if G not in (1, g) or T % g:
                raise ValueError(
                    f"{op}: a[{i}] has {g} replicas; they must divide the {T} rows of x and agree with the others' {G}"
                )
            G = g
    for i, it in enumerate(its):
        if it.a is not None and G != (1 if it.a.dim() == 2 else it.a.shape[0]):
            raise ValueError(f"{op}: a[{i}] has shape {tuple(it.a.shape)}; another parameter has {G} replicas")
    return G


def usual(x: Tensor, it: Projection) -> bool:
    """Whether `_replicas` would find nothing to refuse and one replica: matrices and vectors that fit together, on x's
    device and in its dtype, or with factors in float32. For speed, as `check.usual`.
    """
    w, bias, a, b, bias_b, _, _ = it
    if not isinstance(w, Tensor) or w.dim() != 2:
        return False
    if not all([t is None or isinstance(t, Tensor) for t in (bias, a, b, bias_b)]):
        return False
    (N, K), dtype, device = w.shape, x.dtype, x.device
    if x.shape[-1] != K or not N or not K or w.dtype != dtype or w.device != device:
        return False
    if bias is not None and not (bias.shape == (N,) and bias.dtype == dtype and bias.device == device):
        return False
    if a is None or b is None:
        return a is b is bias_b
    r = a.shape[0] if a.dim() == 2 else 0
    if not r or a.shape[1] != K or b.shape != (N, r) or not _beside(a, dtype) or b.dtype != a.dtype:
        return False
    if a.device != device or b.device != device:
        return False
    return bias_b is None or (bias_b.shape == (N,) and bias_b.dtype == a.dtype and bias_b.device == device)


def are_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in check.FLOATS and x.dim() > 0


def choose_path(path: str, x: Tensor, T: int, G: int, p: Sequence[float]) -> bool:
    """Whether the forward runs on the merged weight."""
    if path not in PATHS:
        raise ValueError(f"lora_linear: path is {path!r}; accepted are {', '.join(PATHS)}")
    possible = G == 1 and not any(p)
    if path == "merged" and not possible:
        raise ValueError(f"lora_linear: path 'merged' needs p = 0 and one replica; got p {tuple(p)} and G {G}")
    if path != "auto":
        return path == "merged"
    factor = MERGE_ROWS.get(x.device.type)
    return possible and factor is not None and x.dtype == torch.float32 and T >= factor * x.shape[-1]


def lora_linear(
    x: Tensor,
    w: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    a: Tensor | Sequence[Tensor | None] | None = None,
    b: Tensor | Sequence[Tensor | None] | None = None,
    *,
    bias_b: Tensor | Sequence[Tensor | None] | None = None,
    scale: float | Sequence[float] = 1.0,
    p: float | Sequence[float] = 0.0,
    seed: Tensor | Sequence[Tensor | None] | None = None,
    path: str = "auto",
) -> Any:
    """y_i = x W_i^T + bias_i + s_i (dropout(x) A_i^T B_i^T + bias_b_i); see the top of this file.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64; its T rows are all but the last dimension.
        w: [N, K] in x's dtype, or a sequence of them for projections that share x. Frozen as a rule; where one
            requires grad, it gets its gradient.
        bias: [N] or [G, N], x's dtype or float32, each or all None.
        a, b: [r, K] and [N, r], or [G, r, K] and [G, N, r] for G replicas whose rows follow one another (G divides
            T); x's dtype or float32. None in both for a projection without an adapter.
        bias_b: [N] or [G, N], the bias of PEFT's lora_B, scaled like the update.
        scale: s, one number or one for each projection.
        p: dropout probability in [0, 1), likewise; in effect whenever it is not 0.
        seed: int64 [1] or [G], one tensor for each projection; drawn from torch's generator of x's device when None.
        path: "auto", "adapter" or "merged" (W + s B A; needs p = 0 and one replica).

    Returns:
        [..., N], or a tuple of them when w is a sequence. Under autocast everything is computed in autocast's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    op = "lora_linear"
    single = isinstance(w, Tensor)
    if not isinstance(w, (Tensor, list, tuple)):
        raise TypeError(f"{op}: w is {type(w).__name__}; accepted is a torch.Tensor or a list of them")
    ws: list[Any] = [w] if isinstance(w, Tensor) else list(w)
    n = len(ws)
    if n == 0:
        raise ValueError(f"{op}: w is empty; accepted is at least one projection")
    biases, as_, bs, bias_bs, seeds = (
        as_list(op, name, value, n)
        for name, value in (("bias", bias), ("a", a), ("b", b), ("bias_b", bias_b), ("seed", seed))
    )
    ps, scales = (
        as_list(op, name, value if isinstance(value, (list, tuple)) else [value] * n, n)
        for name, value in (("p", p), ("scale", scale))
    )
    dtype = check.autocast_dtype(x) if isinstance(x, Tensor) else None
    if dtype is not None:
        x = x.to(dtype)
        biases, as_, bs, bias_bs = (
            [None if t is None else t.to(dtype) for t in ts] for ts in (biases, as_, bs, bias_bs)
        )
    its = [Projection(*column) for column in zip(ws, biases, as_, bs, bias_bs, scales, ps, strict=True)]
    G = 1
    if not (are_rows(x) and all(usual(x, it) for it in its)):
        G = _replicas(op, x, its, autocast=dtype is not None)
    seeds = [check.seeds(op, one_seed, x.numel() // x.shape[-1], G, x.device) for one_seed in seeds]
    y = _run(x, its, seeds, G, path)
    return y[0] if single else y


def project(x: Tensor, its: Sequence[Projection]) -> tuple[Tensor, ...]:
    """`lora_linear` of projections that share x, for who has them in this form."""
    if are_rows(x) and check.autocast_dtype(x) is None and all([usual(x, it) for it in its]):
        if not frames.recording() and all([_is_small(x, it) for it in its]):
            return tuple([_by_torch(x, it) for it in its])
        return _run(x, its, [None] * len(its), 1, "auto")
    w, bias, a, b, bias_b, scale, p = map(list, zip(*its, strict=True))
    return lora_linear(x, w, bias, a, b, bias_b=bias_b, scale=scale, p=p)


def _is_small(x: Tensor, it: Projection) -> bool:
    """Whether torch's own ops are faster where nothing is kept for backward: a model that generates has one row. A GPU
    waits for launches, of which the op has fewer; a compiler fuses."""
    if not x.is_cpu or x.numel() * it.w.shape[0] >= matmul.OP_FROM["cpu"] or it.p or torch.compiler.is_compiling():
        return False
    return it.a is None or it.a.dtype == x.dtype


def _by_torch(x: Tensor, it: Projection) -> Tensor:
    y = F.linear(x, it.w, it.bias)
    if it.a is None or it.b is None:
        return y
    return y.add_(F.linear(F.linear(x, it.a), it.b, it.bias_b), alpha=it.scale)


def _run(x: Tensor, its: Sequence[Projection], seeds: list[Tensor | None], G: int, path: str) -> tuple[Tensor, ...]:
    """What has been checked but for p. `seeds`: None where one is to be drawn."""
    for it in its:
        check.probability("lora_linear", it.p)
    drops = [it.p != 0.0 and it.a is not None for it in its]
    unseeded = [i for i, seed in enumerate(seeds) if seed is None and drops[i]]
    if unseeded:
        seeds = list(seeds)
        for i, drawn in zip(unseeded, new_seeds(len(unseeded), x.device, G), strict=True):
            seeds[i] = drawn
    p = tuple([float(it.p) if drop else 0.0 for it, drop in zip(its, drops, strict=True)])
    tensors: list[Tensor | None] = []
    for it, seed, drop in zip(its, seeds, drops, strict=True):
        tensors += (*it[:5], seed if drop else None)
    merged = choose_path(path, x, x.numel() // x.shape[-1], G, p)
    return LoraLinear.apply(check.dense(x), (p, tuple([float(it.scale) for it in its]), G, merged), *tensors)
