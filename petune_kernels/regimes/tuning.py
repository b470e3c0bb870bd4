"""`tune`: which parameters train, as a named regime (Transferability of Transformer Modules, EMNLP 2022)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from petune_kernels.patch import pattern
from petune_kernels.regimes import sampled
from petune_kernels.regimes.report import CountRow, CountTable, TuneReport
from petune_kernels.regimes.structure import Anatomy, Member, read


@dataclass(frozen=True)
class _Regime:
    description: str
    trains: Callable[[Member], bool]  # of the parameters of the blocks; for random, the pool that it draws from


_REGIMES = {
    "full": _Regime("all parameters", lambda m: True),
    "ffn": _Regime("feed-forward linears, weights and biases", lambda m: m.part == "ffn" and m.kind == "linear"),
    "attention": _Regime(
        "attention linears, weights and biases", lambda m: m.part == "attention" and m.kind == "linear"
    ),
    "layernorm": _Regime("all norms of the blocks", lambda m: m.kind == "norm"),
    "layernorm-attention": _Regime("the attention's norms", lambda m: m.part == "attention" and m.kind == "norm"),
    "layernorm-ffn": _Regime("the feed-forward network's norms", lambda m: m.part == "ffn" and m.kind == "norm"),
    "bitfit": _Regime("all biases of the blocks, the norms' included", lambda m: m.is_bias),
    "random": _Regime("random scalars of the blocks, as many as layernorm has", lambda m: True),
    "frozen": _Regime("the head only", lambda m: False),
}
_WITH_EMBEDDING_NORM = ("layernorm", "layernorm-attention", "layernorm-ffn", "bitfit")


def regimes() -> dict[str, str]:
    """Every regime's name and what it trains, in a few words. All of them train the head too."""
    return {name: regime.description for name, regime in _REGIMES.items()}


def tune(
    model: nn.Module,
    regime: str,
    layers: Sequence[int] | None = None,
    train_head: bool = True,
    train_pooler: bool = False,
    embedding_norm: bool = False,
    *,
    budget: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
) -> TuneReport:
    """Sets requires_grad of all of model's parameters so that the regime trains, and nothing else.

    model: any transformer; blocks, attentions, FFNs and norms are found by structure. Its Parameter objects stay.
    regime: one of `regimes()`.
    layers: the blocks that train, counted from 0, encoder blocks before decoder blocks; None: all. With regime full,
        only those blocks train.
    train_head: also train what is outside the base model (a head tied to an embedding is inside).
    train_pooler: also train base_model.pooler. Regime full on all layers always does.
    embedding_norm: regimes layernorm* and bitfit also train the norms before the blocks (bitfit: their biases).
    budget, fraction, seed: regime random trains `budget` scalars, or this share (0, 1] of the blocks' scalars;
        default: as many as regime layernorm. Which ones depends on the seed alone. Each touched weight W then has
        beside it a Parameter `<name>_sampled` for the optimizer to train; every other scalar of W stays bit-identical
        under any optimizer, and checkpoints have the keys they always had. Another `tune` takes these out again, and
        W keeps what was trained. A weight of which more than one scalar in 512 trains, and one that is no nn.Linear's,
        costs its full gradient for a moment.

    Raises TypeError for a wrong type, and ValueError for an unknown regime, layers that are empty, repeated or out of
    range, a model without blocks, a replicated one, a regime that matches nothing in it, a PEFT model (its
    configuration has chosen already) and a choice that leaves nothing to train. After an error the model is as it was.
    """
    _check_types(model, regime, layers, train_head, train_pooler, embedding_norm, budget, fraction, seed)
    if pattern.replicated(model):
        raise ValueError("tune: the model is replicated, with what trains; release() it first")
    anatomy = read(model, ignore=sampled.settle(model))
    chosen = _choose(anatomy, regime, layers, train_head, embedding_norm)
    head = anatomy.head if train_head else ()
    if train_pooler and not anatomy.pooler:
        raise ValueError("train_pooler: True was given, but the base model has no pooler")
    pooler = anatomy.pooler if train_pooler else ()
    picks: dict[str, Tensor] = {}
    if regime == "random":
        picks = _pick(anatomy, chosen, layers, budget, fraction, seed)
        if taken := sampled.clashes(model, tuple(picks)):
            raise ValueError(f"model: regime 'random' needs the names {', '.join(taken)} + '_sampled', which are taken")
    whole = () if regime == "random" else chosen
    trained = {name for name in (*whole, *head, *pooler) if _floating(anatomy, name)}
    if not trained and not picks:
        raise ValueError(
            f"nothing would train: regime {regime!r}, train_head={train_head}, train_pooler={train_pooler}; the model "
            f"has {len(anatomy.head)} head and {len(anatomy.pooler)} pooler tensors"
        )

    sampled.remove(model)
    for name, p in anatomy.parameters.items():
        p.requires_grad_(name in trained)
    names = sampled.install(model, picks) if regime == "random" else chosen
    sizes = {n: len(index) for n, index in picks.items()} if regime == "random" else _sizes(anatomy, chosen)
    per_layer = [0] * len(anatomy.blocks)
    for member in anatomy.members:
        per_layer[member.block] += sizes.get(member.name, 0)
    pooled = not trained.isdisjoint(anatomy.pooler)
    return TuneReport(
        regime=regime,
        names=names,
        count=sum(sizes.values()),
        total=anatomy.numel(anatomy.parameters),
        head_names=head,
        head_count=anatomy.numel(head),
        pooler="trained" if pooled else "frozen" if anatomy.pooler else "none",
        trainable=sum(len(index) for index in picks.values()) + anatomy.numel(trained),
        per_layer=tuple(per_layer),
    )


def counts(model: nn.Module, layers: Sequence[int] | None = None, embedding_norm: bool = False) -> CountTable:
    """Every regime's number of parameters in model, without changing it; the meta device will do.

    The head is left out, as in the paper's table, except in regime frozen, which is the head. layers and
    embedding_norm as for `tune`; each applies to the regimes that know it. Errors as for `tune`.
    """
    _check_types(model, "full", layers, True, False, embedding_norm, None, None, 0)
    anatomy = read(model, ignore=sampled.settle(model))
    if layers is not None:
        _check_layers(layers, len(anatomy.blocks))
    total = anatomy.numel(anatomy.parameters)
    rows = []
    for regime in _REGIMES:
        count, note = 0, ""
        if regime == "frozen":
            count = anatomy.numel(anatomy.head)
        else:
            try:
                same = "layernorm" if regime == "random" else regime
                with_norm = embedding_norm and regime in _WITH_EMBEDDING_NORM
                count = anatomy.numel(_choose(anatomy, same, layers, True, with_norm))
            except _NoMatch as error:
                note = str(error)
        rows.append(CountRow(regime, count, 100 * count / total, note))
    return CountTable(type(model).__name__, total, tuple(rows))


class _NoMatch(ValueError):
    pass


def _sizes(anatomy: Anatomy, names: Sequence[str]) -> dict[str, int]:
    return {name: anatomy.parameters[name].numel() for name in names}


def _choose(
    anatomy: Anatomy, regime: str, layers: Sequence[int] | None, train_head: bool, embedding_norm: bool
) -> tuple[str, ...]:
    """The names that a regime trains (for random: may draw from), in the model's order."""
    if embedding_norm and regime not in _WITH_EMBEDDING_NORM:
        raise ValueError(f"embedding_norm: regime {regime!r} does not know it; {', '.join(_WITH_EMBEDDING_NORM)} do")
    if embedding_norm and not anatomy.embedding_norms:
        raise ValueError("embedding_norm: True was given, but the model has no norm before its blocks")
    if layers is not None:
        if regime == "frozen":
            raise ValueError("layers: regime 'frozen' trains no block; leave it None")
        _check_layers(layers, len(anatomy.blocks))
    elif regime == "frozen":
        return ()
    elif regime == "full":
        head = () if train_head else anatomy.head
        return tuple(name for name in anatomy.parameters if name not in head and _floating(anatomy, name))
    members = [m for m in anatomy.members if layers is None or m.block in layers]
    chosen = {m.name for m in members if _REGIMES[regime].trains(m) and _floating(anatomy, m.name)}
    if not chosen:
        kinds: dict[str, int] = {}
        for m in members:
            kind = f"{m.part} {m.kind}{' bias' if m.is_bias else ''}"
            kinds[kind] = kinds.get(kind, 0) + 1
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise _NoMatch(f"regime {regime!r} matches nothing: the blocks hold these floating-point tensors: {found}")
    if embedding_norm:
        chosen |= {name for name in anatomy.embedding_norms if regime != "bitfit" or name.endswith("bias")}
    return tuple(name for name in anatomy.parameters if name in chosen)


def _floating(anatomy: Anatomy, name: str) -> bool:
    return anatomy.parameters[name].is_floating_point()


def _pick(
    anatomy: Anatomy,
    pool: tuple[str, ...],
    layers: Sequence[int] | None,
    budget: int | None,
    fraction: float | None,
    seed: int,
) -> dict[str, Tensor]:
    """Draws scalars of the pool's parameters, laid end to end: for each parameter hit, flat positions [n]."""
    if any(anatomy.parameters[name].is_meta for name in pool):
        raise ValueError("model: regime 'random' needs a model with values; this one is on the meta device")
    sizes = _sizes(anatomy, pool)
    total = sum(sizes.values())
    if fraction is not None:
        budget = max(1, round(fraction * total))
    elif budget is None:
        budget = anatomy.numel(_choose(anatomy, "layernorm", layers, True, False))
    if not 1 <= budget <= total:
        raise ValueError(f"budget: {budget:,} was given; the chosen blocks have 1 to {total:,} scalars to draw")
    numbers = sampled.draw(total, budget, seed)
    counts = torch.tensor(list(sizes.values()), device="cpu")
    ends = counts.cumsum(0)
    per_parameter = numbers.tensor_split(torch.searchsorted(numbers, ends)[:-1])
    starts = (ends - counts).tolist()
    return {n: mine - s for n, mine, s in zip(sizes, per_parameter, starts, strict=True) if len(mine)}


def _check_layers(layers: Sequence[int], number: int) -> None:
    if len(layers) == 0:
        raise ValueError("layers: an empty list was given; give block indices, or None for all blocks")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers: {list(layers)} names a block twice")
    if wrong := [i for i in layers if not 0 <= i < number]:
        raise ValueError(f"layers: {wrong} out of range; the model has blocks 0 to {number - 1}")


def _check_types(
    model: object,
    regime: object,
    layers: object,
    train_head: object,
    train_pooler: object,
    embedding_norm: object,
    budget: object,
    fraction: object,
    seed: object,
) -> None:
    def wrong(name: str, value: object, accepted: str) -> TypeError:
        return TypeError(f"{name}: {value!r} of type {type(value).__name__} was given; accepted is {accepted}")

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: an object of type {type(model).__name__} was given; accepted is a torch.nn.Module")
    if not isinstance(regime, str):
        raise wrong("regime", regime, "a str")
    if regime not in _REGIMES:
        raise ValueError(
            f"regime: {regime!r} is unknown; the regimes are {', '.join(_REGIMES)}. LoRA, prefix and others are "
            "PEFT's: get_peft_model chooses what trains"
        )
    if layers is not None:
        if not isinstance(layers, Sequence) or isinstance(layers, (str, bytes)):
            raise wrong("layers", layers, "a list of block indices, or None for all blocks")
        for i in layers:
            if not isinstance(i, int) or isinstance(i, bool):
                raise wrong("layers", i, "a list of ints, or None for all blocks")
    flags = {"train_head": train_head, "train_pooler": train_pooler, "embedding_norm": embedding_norm}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise wrong(name, value, "True or False")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise wrong("seed", seed, "an int")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: {seed} was given; accepted is 0 to 2**63 - 1")
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool)):
        raise wrong("budget", budget, "an int, or None for as many scalars as regime layernorm has")
    if fraction is not None:
        if not isinstance(fraction, (int, float)) or isinstance(fraction, bool):
            raise wrong("fraction", fraction, "a float, or None")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: {fraction} was given; accepted is a share over 0 and up to 1")
    if budget is not None and fraction is not None:
        raise ValueError(f"budget, fraction: {budget} and {fraction} were given; give one of the two")
    if (budget is not None or fraction is not None) and regime != "random":
        raise ValueError(f"budget, fraction: only regime 'random' knows them, and {regime!r} was given")
    if _is_peft(model):
        raise ValueError(
            "model: a PEFT model was given, and its PEFT configuration has already chosen what trains; "
            "tune takes the model without it"
        )


def _is_peft(model: nn.Module) -> bool:
    if "peft" not in sys.modules:  # then nothing can be one of its models; saves a slow import
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(m, (PeftModel, BaseTunerLayer)) for m in model.modules())
