r"""frozen_linear: y = x W^T + bias where W does not train.

Backward: dx = dy W, dbias = sum_rows dy by `column_sum` in float32. Nothing is saved but W. Autograd's own linear does
not keep x either while W is frozen, so what this op adds is the bias: its gradient is summed in float32 whatever the
dtype, it may have a replica axis, and it may stay float32 beside 16-bit activations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import matmul, meta
from .packed_linear import packed_linear


def frozen_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64.
        w: [N, K] in x's dtype. Frozen as a rule; where it requires grad, it gets its gradient.
        bias: [N], or [G, N] for G replicas whose rows follow one another; x's dtype or float32.

    Returns:
        [..., N]. Under autocast everything is computed in autocast's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    return packed_linear(x, (w,), (bias,), op="frozen_linear")[0]


_ONEDNN_WEIGHTS = 1 << 17
"""Size of w from which oneDNN gains over MKL whatever the rows: 384 x 384 does, 128 x 128 loses."""
_LEAST = min(matmul.OP_FROM.values())


def faster(x: Tensor, w: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the op is faster than torch's linear while w is frozen; a compiler chooses for itself."""
    work = x.numel() * w.shape[0]
    if torch.compiler.is_compiling() or work < _LEAST:  # first, because it costs a third of the rest
        return False
    kind = meta.kind(x.device)
    if work < matmul.OP_FROM.get(kind, math.inf):
        return False
    if kind == "cuda":
        return bias is not None and bias.requires_grad
    return w.numel() >= _ONEDNN_WEIGHTS and x.dtype == torch.float32 and matmul.onednn_pays(x, w.shape[0])
