"""What one training step holds in memory, followed op by op on the meta device: no weights, no values, no run.

The peak. A step (forward, backward, AdamW) is carried out on tensors without values. A storage counts, whole, from the
op that made it until its last holder lets go of it; the peak is the largest sum after any op. So it is the largest of

    weights and buffers + inputs + AdamW's states + gradients so far + saved activations not yet freed + transients

over the step, where transients are what lives for a moment: an op's result beside its inputs, a gradient on its way
down, float32 copies. It is the second step that is followed, when AdamW has its states. An op of ours that is composed
of torch's ops on the device asked for is followed inside.

Not seen: what a kernel takes for itself (oneDNN's packed weights, a matmul's workspace, partial sums), what an
allocator rounds up or cannot give back, and the process (Python, torch). CUDA's own way is taken where torch's
functions differ by device (attention, dropout).

Saved bytes are those of `measure.saved_bytes`, by the same code.
"""

from __future__ import annotations

import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petune_kernels import backends, meta

from . import measure, train

GROUPS = {
    "norm rows": r"Norm\w*:|:\w*Norm",
    "q k v": r":ScaledDotProduct\w*\.(query|key|value)|:Attention\w*\..* (heads|square)$|Att\w*:Bmm[^ ]*( thin)?$",
    "attention output": r":ScaledDotProduct\w*\.(out|log)",
    "attention scores": r"Att\w*:.*(Softmax|Where| square$)|:ScaledDotProduct\w*\.attn",
    "feed-forward u": r":(Gelu|Silu|Relu|Tanh|Sigmoid|Pow|BiasAct)|(MLP|Intermediate|FeedForward|FF|Activation)\w*:Mul",
    "dropout masks": r"Dropout\w*:|:\w*Dropout",
    "low-rank products": r":(LoraLinear|Mm|Addmm|Bmm).* thin$",
    "projection inputs": r":(Addmm|Mm|Linear|LoraLinear|PackedLinear)",
    "layer inputs": r":( \w+)?$",  # not in the graph: what checkpointing holds
    "other": "",
}
"""Group of saved tensors -> the uses that belong to it; the first group that fits. A use is "module:node.name", the
class of the module and the autograd node, and the tensor's shape: square (scores), heads (4 dimensions) or thin (as
narrow as a rank).
"""

PARTS = ("weights", "optimizer", "gradients", *GROUPS, "transients", "inputs")
"""Of what is held at the worst moment."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one step.

    saved: for backward, as measure.saved_bytes counts; by group of tensors, by layer and outside of them. weights: with
    buffers. optimizer: AdamW's states. peak: what is held at the worst moment, by category (weights, inputs, optimizer,
    gradients, the groups of saved tensors, transients). rise: of the peak over what is held between two steps.
    """

    saved: int
    groups: dict[str, int]
    layers: tuple[int, ...]
    outside: int
    weights: int
    gradients: int
    optimizer: int
    peak: dict[str, int]
    rise: int

    @property
    def total(self) -> int:
        return sum(self.peak.values())


def follow(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batch: Mapping[str, Tensor],
    loss_of: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    values: meta.Values,
) -> Footprint:
    """The footprint of a step of `model`, which is on the meta device, in training mode, tuned and perhaps patched.

    blocks: its layers. batch: on the meta device, made under `values`. The kernels that count are those of the device
    that the meta device stands for (meta.standing_for), "cpu" or "cuda". Raises what the model raises where it cannot
    do without values.
    """
    parameters, buffers = list(model.parameters()), list(model.buffers())
    alive = [*parameters, *buffers, *batch.values()]
    ledger = _Ledger()
    with values, ways_of_device(), ledger, _Where(blocks) as where, ExitStack() as hooks:
        ledger.label([*parameters, *buffers], "weights")
        ledger.label(batch.values(), "inputs")
        updates = train.Updates([([p for p in parameters if p.requires_grad], 1e-3)], steps=2)
        loss_of(model, batch).backward()
        updates.step()
        for setting in updates.optimizer.param_groups:
            setting["fused"] = True  # as on a real device, from now on: setting up the states refuses the meta device
        ledger.label_rest("optimizer")
        between, sizes = ledger.now, ledger.by_label()
        for p in parameters:
            if p.requires_grad:
                hooks.callback(
                    p.register_post_accumulate_grad_hook(lambda p: ledger.label([p.grad], "gradients")).remove
                )
        ledger.peak = 0
        with measure.Saving(where) as saving:
            loss = loss_of(model, batch)
        uses = _uses(loss)
        groups, layers, saved = defaultdict[str, int](int), [0] * len(blocks), 0
        for holders in saving.alive(alive).values():
            size, tensor = holders[0].tensor.untyped_storage().nbytes(), holders[0].tensor
            group = _group([(holder, uses.get(id(holder), "")) for holder in holders])
            ledger.label([tensor], group)
            groups[group] += size
            saved += size
            block = next((holder.note[0] for holder in holders if holder.note[0] is not None), None)
            if block is not None:
                layers[block] += size
        del holders, tensor
        loss.backward()
        gradients = sum(p.grad.untyped_storage().nbytes() for p in parameters if p.grad is not None)
        del loss
        updates.step()
    return Footprint(
        saved=saved,
        groups={name: groups[name] for name in GROUPS if groups[name]},
        layers=tuple(layers),
        outside=saved - sum(layers),
        weights=sizes["weights"],
        gradients=gradients,
        optimizer=sizes.get("optimizer", 0),
        peak=ledger.at_peak(),
        rise=ledger.peak - between,
    )


class _Ledger(TorchDispatchMode):
    """Every storage from the op that made it until it is freed, with a label; the sum and its peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = meta.kind(torch.device("meta"))
        self._live: dict[int, tuple[int, int]] = {}  # storage -> (number, bytes); numbers are never used twice
        self._refs: dict[int, Any] = {}
        self._labels: dict[int, str] = {}
        self._worst: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].is_floating_point():
            return 1.0  # the loss: nothing is decided by it
        if func.overloadpacket is torch.ops.aten._fused_adamw_:
            return None  # in place, and not there on the meta device
        composed = backends.composed(func._opname, self._device) if func.namespace == "petune" else None
        if composed is None:
            out = func(*args, **kwargs)
        else:
            with self:
                out = composed(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_meta:
                self._enter(t)
        if self.now > self.peak:
            self.peak, self._worst = self.now, list(self._live.values())
        return out

    def _enter(self, t: Tensor) -> int:
        storage, key = t.untyped_storage(), measure.storage_key(t)
        if key not in self._live:
            self._live[key] = (len(self._labels), storage.nbytes())
            self._labels[len(self._labels)] = ""
            self._refs[key] = weakref.ref(storage, lambda _: self._leave(key))
            self.now += storage.nbytes()
        return self._live[key][0]

    def _leave(self, key: int) -> None:
        self.now -= self._live.pop(key)[1]
        del self._refs[key]

    def label(self, tensors: Any, name: str) -> None:
        for t in tensors:
            self._labels[self._enter(t)] = name

    def label_rest(self, name: str) -> None:
        for number, _ in self._live.values():
            self._labels[number] = self._labels[number] or name

    def by_label(self, held: Sequence[tuple[int, int]] | None = None) -> dict[str, int]:
        sums = defaultdict[str, int](int)
        for number, size in self._live.values() if held is None else held:
            sums[self._labels[number] or "transients"] += size
        return dict(sums)

    def at_peak(self) -> dict[str, int]:
        found = self.by_label(self._worst)
        return {name: found[name] for name in PARTS if found.get(name)}


class _Where:
    """While entered: a call gives (number of the layer that runs or None, class of the innermost module)."""

    def __init__(self, blocks: Sequence[nn.Module]):
        self._numbers = {block: i for i, block in enumerate(blocks)}
        self._running: list[nn.Module] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _Where:
        self._hooks = [
            register_module_forward_pre_hook(lambda module, args: self._running.append(module)),
            register_module_forward_hook(lambda module, args, out: self._running.__delitem__(-1)),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def __call__(self) -> tuple[int | None, str]:
        block = next((self._numbers[m] for m in reversed(self._running) if m in self._numbers), None)
        return block, type(self._running[-1]).__name__ if self._running else ""


def _uses(loss: Tensor) -> dict[int, str]:
    """id of what holds a saved tensor -> "node.name" of the autograd node that saved it. Unpacks nothing: that would
    run a checkpointed layer again."""
    found: dict[int, str] = {}
    waiting, seen = [loss.grad_fn], set[Any]()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in (name for name in dir(node) if name.startswith("_raw_saved_")):
            value = getattr(node, name)
            several = isinstance(value, (tuple, list))
            for i, variable in enumerate(value if several else [value]):
                own = name.removeprefix("_raw_saved_") + (str(i) if several else "")
                found[id(variable.data)] = f"{node.name()}.{own}"
        waiting += [following for following, _ in node.next_functions]
    return found


def _group(uses: Sequence[tuple[Any, str]]) -> str:
    """The first group that one of the uses of a storage belongs to."""
    texts = []
    for holder, use in uses:
        shape = holder.tensor.shape
        kind = ""
        if len(shape) > 2 and shape[-1] == shape[-2]:
            kind = " square"
        elif len(shape) == 4:
            kind = " heads"
        elif len(shape) > 1 and shape[-1] <= 64:
            kind = " thin"
        texts.append(f"{holder.note[1]}:{use}{kind}")
    return next(group for group, fits in GROUPS.items() if any(re.search(fits, text) for text in texts))


@contextmanager
def ways_of_device() -> Iterator[None]:
    """On the meta device, torch's functions take the way that they take on the device that it stands for. They are
    replaced, since a mode for torch's functions is off within backward, where checkpointing runs a layer again."""
    cuda = meta.kind(torch.device("meta")) == "cuda"
    own_attention, own_dropout = F.scaled_dot_product_attention, F.dropout

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _attention(cuda, query, *args, **kwargs) if query.is_meta else own_attention(query, *args, **kwargs)

    def dropout(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (_dropout if cuda and input.is_meta else own_dropout)(input, *args, **kwargs)

    F.scaled_dot_product_attention, F.dropout = attention, dropout
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = own_attention, own_dropout


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's: it keeps a mask of a byte an element, where the CPU keeps one in x's dtype."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _attention(
    cuda: bool, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's choice: flash attention where it serves, else the memory-efficient one (CUDA) or plain math (CPU)."""
    aten, mask = torch.ops.aten, attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    if cuda:
        flash = mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256
    else:  # the CPU's own rule, asked with tensors that have these shapes; their memory is never touched
        stand_ins = [
            None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in (q, k, v, mask)
        ]
        flash = aten._fused_sdp_choice(*stand_ins, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa) == 1
    if flash and cuda:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    if flash:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale
        )[0]
    if not cuda:
        return aten._scaled_dot_product_attention_math(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    bias = None if mask is None else mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p, is_causal, scale=scale)[0]
