"""Which parameter of a transformer is which: found by what modules hold, never by a model's name.

- A block is an element of the innermost ModuleList (or Sequential) whose elements hold an attention and, apart from
  it, a linear layer. ALBERT's groups of layers and Swin's stages are therefore looked through; T5's `layer` list
  inside a block is not a list of blocks, because none of its elements holds both.
- Below a block, the topmost module that holds an attention is an attention sub-block, its norms included; all other
  linear layers are the feed-forward network (FFN). Plain containers are looked through.
- A norm directly on the block belongs to a neighbour: they are dealt in the order of registration, evenly, attentions
  first and the FFN last. Where they do not suffice for all sub-blocks, those that hold a norm of the same width get
  none (ESM's attention; Phi's q_norm is narrower). Of three or more, one named after a sub-block goes there first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

Part = Literal["attention", "ffn", "other"]
Kind = Literal["linear", "norm", "other"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HEADS = re.compile(r"^(n|num)_(\w+_)?heads?$|^(\w+_)?head_(\w+_)?(dim|size)$")

_FFN = re.compile("feed_?forward|ffn|mlp")


@dataclass(frozen=True)
class Member:
    """One parameter of a block: its name in the model, its block, the sub-block it belongs to, and its kind."""

    name: str
    block: int
    part: Part
    kind: Kind

    @property
    def is_bias(self) -> bool:
        return self.name.endswith("bias")


@dataclass(frozen=True)
class Anatomy:
    """A model's parameters by name (each shared one once), and the names that play a part in the regimes."""

    parameters: dict[str, nn.Parameter]
    members: tuple[Member, ...]
    blocks: tuple[str, ...]
    embedding_norms: tuple[str, ...]
    head: tuple[str, ...]
    pooler: tuple[str, ...]

    def numel(self, names: Collection[str]) -> int:
        return sum(self.parameters[name].numel() for name in names)


class _Child(NamedTuple):
    name: str
    module: nn.Module
    attention: bool


def read(model: nn.Module, ignore: Collection[int] = ()) -> Anatomy:
    """Reads a model's anatomy; changes nothing and reads no data, so the meta device will do.

    ignore: ids of parameters to leave out. Raises ValueError if the model has no transformer blocks.
    """
    lists = _block_lists(model)
    if not lists:
        kinds = sorted({type(m).__name__ for m in model.modules() if not isinstance(m, _CONTAINERS)})
        raise ValueError(
            f"model: no transformer blocks in {type(model).__name__}: wanted a ModuleList whose elements hold an "
            f"attention and other linear layers; found modules of the kinds {', '.join(kinds)}"
        )
    parameters = {name: p for name, p in model.named_parameters() if id(p) not in ignore}
    names = {id(p): name for name, p in parameters.items()}
    base, body = _body(model, {id(block) for blocks in lists for block in blocks})

    members: dict[str, Member] = {}
    in_body = [blocks for blocks in lists if any(id(p) in body for block in blocks for p in block.parameters())]
    flat = [block for blocks in in_body for block in blocks]
    for blocks in in_body:
        for block, child_parts in zip(blocks, _parts(blocks), strict=True):
            for module, part in _modules(block, child_parts):
                for own, p in module.named_parameters(recurse=False):
                    if id(p) in names:
                        name, index = names[id(p)], next(i for i, b in enumerate(flat) if b is block)
                        members.setdefault(name, Member(name, index, part, _kind(module, own, p)))

    module_names = {id(m): name for name, m in model.named_modules()}
    pooler = getattr(base, "pooler", None)
    pooler_ids = {id(p) for p in pooler.parameters()} if isinstance(pooler, nn.Module) else set()
    embedding_ids = {id(p) for norm in _embedding_norms(base, {id(b) for b in flat}) for p in norm.parameters()}
    return Anatomy(
        parameters=parameters,
        members=tuple(members[name] for name in parameters if name in members),
        blocks=tuple(module_names[id(block)] for block in flat),
        embedding_norms=tuple(name for name, p in parameters.items() if id(p) in embedding_ids),
        head=tuple(name for name, p in parameters.items() if id(p) not in body | pooler_ids),
        pooler=tuple(name for name, p in parameters.items() if id(p) in pooler_ids),
    )


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return bool(re.search("Norm(Gated)?$", type(module).__name__)) and weight is not None and weight.dim() == 1


def _is_attention(module: nn.Module) -> bool:
    """An attention by class, by name, or by an int attribute that counts or sizes heads; it must hold parameters."""
    by_name = isinstance(module, nn.MultiheadAttention) or "Attention" in type(module).__name__
    by_heads = any(type(value) is int and _HEADS.match(key) for key, value in vars(module).items())
    return (by_name or by_heads) and any(True for _ in module.parameters())


def _holds_attention(module: nn.Module) -> bool:
    return any(_is_attention(m) for m in module.modules())


def _kind(module: nn.Module, own_name: str, p: nn.Parameter) -> Kind:
    """Linear: a matrix (or a stack of them, as experts have) or a bias, of anything but a norm or an embedding."""
    if _is_norm(module):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "other"
    return "linear" if p.dim() >= 2 or own_name.endswith("bias") else "other"


def _holds_linear(module: nn.Module) -> bool:
    return any(
        p.dim() >= 2 and _kind(m, name, p) == "linear"
        for m in module.modules()
        for name, p in m.named_parameters(recurse=False)
    )


def _children(block: nn.Module, path: str = "") -> Iterator[_Child]:
    for name, child in block.named_children():
        if isinstance(child, _CONTAINERS):
            yield from _children(child, f"{path}{name}.")
        else:
            yield _Child(path + name, child, _holds_attention(child))


def _is_block(module: nn.Module) -> bool:
    children = list(_children(module))
    return any(c.attention for c in children) and any(_holds_linear(c.module) for c in children if not c.attention)


def _is_hugging_face(module: nn.Module) -> bool:
    return hasattr(type(module), "base_model")  # the class, because a compiled model passes attributes on


def _unwrap(module: nn.Module) -> nn.Module:
    """The module inside wrappers that hold it and nothing else (compiled, checkpointed, data-parallel)."""
    while len(module._modules) == 1 and not module._parameters:
        (child,) = module._modules.values()
        if child is None or isinstance(child, _CONTAINERS):
            break
        module = child
    return module


def _block_lists(module: nn.Module) -> list[list[nn.Module]]:
    """The innermost lists of blocks, in the order of registration; a block that stands twice counts once."""
    inner = [found for child in module.children() for found in _block_lists(child)]
    if inner or not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return inner
    blocks = [_unwrap(child) for child in module.children()]  # children() leaves repeats out
    return [blocks] if any(_is_block(block) for block in blocks) else []


def _parts(blocks: list[nn.Module]) -> list[dict[int, Part]]:
    """For each block of a list, the part of each of its children (by id)."""
    children = [list(_children(block)) for block in blocks]
    norm_names = {c.name for kids in children for c in kids if _is_norm(c.module)}
    ffn_names: set[str] = set()
    dealt: dict[str, Part] = {}
    parts: list[dict[int, Part]] = []
    for kids in children:
        # An Identity in the place of another block's norm (ModernBERT's first) keeps that place in the deal.
        slots = [c for c in kids if _is_norm(c.module) or (c.name in norm_names and isinstance(c.module, nn.Identity))]
        slot_ids = {id(c.module) for c in slots}
        attentions = [c for c in kids if c.attention]
        rest = [c for c in kids if not c.attention and id(c.module) not in slot_ids]
        part: dict[int, Part] = {}
        if attentions:
            ffn_names |= {c.name for c in rest}
            dealt |= (deal := _deal(slots, attentions, rest))
            part |= {id(c.module): "attention" for c in attentions}
            part |= {id(c.module): "ffn" for c in rest}
            part |= {id(c.module): deal[c.name] for c in slots}
        parts.append(part)
    for kids, part in zip(children, parts, strict=True):
        if not part:  # a block with some other mixer in attention's place: what its siblings call FFN is FFN
            part |= {id(c.module): dealt.get(c.name, "ffn" if c.name in ffn_names else "other") for c in kids}
    return parts


def _deal(slots: list[_Child], attentions: list[_Child], rest: list[_Child]) -> dict[str, Part]:
    """Deals a block's own norms to its sub-blocks: the part of each, by child name."""
    takers: list[tuple[str, Part, list[nn.Module]]] = [(a.name, "attention", [a.module]) for a in attentions]
    takers.append(("", "ffn", [c.module for c in rest]))
    widths = {width for c in slots for width in _norm_widths(c.module)}
    if len(slots) < len(takers):
        takers = [t for t in takers if not any(_norm_widths(m) & widths for m in t[2])] or takers
    if len(slots) < len(takers):  # one norm for several attentions side by side
        takers = [next(t for t in takers if t[1] == part) for part in dict.fromkeys(t[1] for t in takers)]
    dealt: dict[str, int] = {}  # the number of its taker
    for slot in slots if len(slots) > 2 else ():  # of two, `post_attention_layernorm` is the FFN's
        cross = [i for i, t in enumerate(takers) if "cross" in t[0] and "cross" in slot.name]
        named = [i for i, t in enumerate(takers) if t[0] and t[0] in slot.name]
        ffn = [i for i, t in enumerate(takers) if t[1] == "ffn" and _FFN.search(slot.name)]
        if found := cross + named + ffn:
            dealt[slot.name] = found[0]
    share, extra = divmod(len(slots), len(takers))
    last = len(takers) - extra if share else 0  # a single shared norm is the attention's, one too many the FFN's
    given = list(dealt.values())
    quota = [max(0, share + (last <= i < last + extra) - given.count(i)) for i in range(len(takers))]
    for slot in slots:
        if slot.name not in dealt:
            taker = next(i for i, left in enumerate(quota) if left)
            quota[taker] -= 1
            dealt[slot.name] = taker
    return {name: takers[taker][1] for name, taker in dealt.items()}


def _norm_widths(module: nn.Module) -> set[int]:
    return {m.get_parameter("weight").numel() for m in module.modules() if _is_norm(m)}


def _modules(block: nn.Module, child_parts: dict[int, Part]) -> Iterator[tuple[nn.Module, Part]]:
    """Every module of a block with its part; parameters of the block itself belong to no sub-block."""
    part_of: dict[int, Part] = {}
    for child in _children(block):
        part_of |= {id(m): child_parts[id(child.module)] for m in child.module.modules()}
    for module in block.modules():
        yield module, part_of.get(id(module), "other")


def _body(model: nn.Module, block_ids: set[int]) -> tuple[nn.Module, set[int]]:
    """The base model and the ids of the parameters that are not head.

    A transformers model names its base model. Any other one: its head is what it registers after the child that holds
    the blocks, save norms (a final norm is no head) and embeddings.
    """
    core = _unwrap(model)
    base = core.base_model if _is_hugging_face(core) else None
    if isinstance(base, nn.Module) and (base is not core or not re.search("For[A-Z]", type(core).__name__)):
        return base, {id(p) for p in base.parameters()}
    body = {id(p) for p in core.parameters(recurse=False)}
    holders = []
    for child in core.children():
        if any(id(m) in block_ids for m in child.modules()):
            holders.append(child)
        if not holders or child is holders[-1] or _is_norm(child) or isinstance(child, nn.Embedding):
            body |= {id(p) for p in child.parameters()}
    only = holders[0] if len(holders) == 1 else core
    base = only.base_model if _is_hugging_face(only) else core
    assert isinstance(base, nn.Module)
    return base, body


def _embedding_norms(module: nn.Module, block_ids: set[int]) -> Iterator[nn.Module]:
    """The norms before the blocks: in an embeddings module that precedes them, or beside them and named so."""
    before = True
    for name, child in module.named_children():
        if id(child) in block_ids:
            continue
        if any(id(m) in block_ids for m in child.modules()):
            before = False
            yield from _embedding_norms(child, block_ids)
        elif _is_norm(child):
            if re.search(r"(^|_)(emb|pre)", name) and "after" not in name:
                yield child
        elif before and any(isinstance(m, (nn.Embedding, *_CONVOLUTIONS)) for m in child.modules()):
            yield from (m for m in child.modules() if _is_norm(m))
