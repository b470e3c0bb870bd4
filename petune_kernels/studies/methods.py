"""The papers' methods by name. A method is a sequence of stages; `single.py` trains them one after the other.

What a paper leaves open is an option with its default here; docs/papers.md, "Methods", says why.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import petune_kernels as pk
from petune_kernels.regimes import regimes
from petune_kernels.regimes.structure import read

from . import adapter
from . import options as option
from .regularize import Around, ChildTuning, Mixout, fisher_masks
from .train import STRIDE
from .tuned_model import plain_names, shadowed


@dataclass
class Setting:
    """What a stage starts from.

    load: a fresh pretrained model with the initial head, the same at each call. wi: the seed of what is new.
    losses: a model -> for each batch of an epoch, a function that gives its loss. model: what the stage before left,
    unpatched; None for the first. head: the names of the head's parameters in a fresh model.
    """

    load: Callable[[], nn.Module]
    wi: int
    losses: Callable[[nn.Module], Iterable[Callable[[], Tensor]]]
    head: tuple[str, ...]
    model: nn.Module | None = None

    def start(self) -> nn.Module:
        """The model of the stage before, or a fresh one."""
        return self.load() if self.model is None else self.model

    def seed(self) -> None:
        """Fixes the initial values of what a method adds, whatever was drawn before."""
        torch.manual_seed(self.wi * STRIDE + 1)


Prepare = Callable[[Setting], tuple[nn.Module, "Around | None"]]


@dataclass(frozen=True)
class Stage:
    """prepare: sets up the model with requires_grad of what trains, and what happens around each update.

    share: of all steps. lr: None for the recipe's. head_lr: of the head where it differs. head_only: nothing below the
    head trains, so that its input may be computed once.
    """

    name: str
    share: float
    prepare: Prepare
    lr: float | None = None
    head_lr: float | None = None
    head_only: bool = False


@dataclass(frozen=True)
class Method:
    """A method's name and its options, all of them; made by `method`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prefix(self) -> int:
        """Tokens that the model reads before those of a text, and gives positions to."""
        return int(self.options["tokens"]) if self.options.get("pet", self.name) == "prefix" else 0

    def stages(self) -> list[Stage]:
        return _METHODS[self.name].build(self.options)


@dataclass(frozen=True)
class _Spec:
    help: str
    options: Mapping[str, option.Option]
    build: Callable[[Mapping[str, Any]], list[Stage]]


def method(name: str, **options: Any) -> Method:
    """The method with these options, and defaults for the others.

    Raises ValueError for an unknown name or option or a value that is not accepted, naming what is.
    """
    if name not in _METHODS:
        close = difflib.get_close_matches(str(name), _METHODS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"method is {name!r}; accepted are {', '.join(_METHODS)}{hint}")
    spec = _METHODS[name].options
    for key, value in options.items():
        if key not in spec:
            raise ValueError(f"method {name!r} has no option {key!r}; it has {', '.join(spec) or 'none'}")
        if not spec[key].fits(value):
            raise ValueError(f"method {name!r}: {key} is {value!r}; accepted is {spec[key].accepted}")
    return Method(name, {key: one.default for key, one in spec.items()} | options)


def head_of(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The head's parameters by their `names` in a model without PEFT, also from a PEFT model, which trains a copy."""
    unwrap: Any = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    plain = plain_names(dict(base.named_parameters()))
    return {name: plain[name] for name in names}


def _tuned(regime: str, **fixed: Any) -> Callable[[Mapping[str, Any]], Prepare]:
    def build(options: Mapping[str, Any]) -> Prepare:
        def prepare(setting: Setting) -> tuple[nn.Module, None]:
            model = setting.start()
            more: dict[str, Any] = {"seed": setting.wi} if regime == "random" else {}
            names = {"pooler": "train_pooler"}
            pk.tune(model, regime, **{names.get(k, k): v for k, v in options.items()}, **more, **fixed)
            return model, None

        return prepare

    return build


def _regime(regime: str, help: str) -> _Spec:
    options = {"pooler": option.flag(False)}
    if regime != "frozen":
        options["layers"] = option.LAYERS
    if regime in ("layernorm", "layernorm-attention", "layernorm-ffn", "bitfit"):
        options["embedding_norm"] = option.flag(False)
    if regime == "random":
        options |= {"budget": option.optional(option.count(None)), "fraction": option.optional(option.share(None))}
    prepare = _tuned(regime)
    return _Spec(
        help, options, lambda o: [Stage(regime, 1.0, prepare(o), head_only=regime == "frozen" and not o["pooler"])]
    )


def _top(options: Mapping[str, Any]) -> list[Stage]:
    def prepare(setting: Setting) -> tuple[nn.Module, None]:
        model, k = setting.start(), options["k"]
        anatomy = read(model)
        n = len(anatomy.blocks)
        if k > n:
            raise ValueError(f"k is {k}; the model has {n} layers")
        pk.tune(model, "full", layers=range(n - k, n), train_pooler=options["pooler"] and bool(anatomy.pooler))
        return model, None

    return [Stage("topk", 1.0, prepare)]


def _lora(options: Mapping[str, Any]) -> Prepare:
    def prepare(setting: Setting) -> tuple[nn.Module, None]:
        from peft import LoraConfig

        model = setting.start()
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=options["r"],
            lora_alpha=options["alpha"],
            lora_dropout=options["dropout"],
            target_modules=_targets(model, options["targets"]),
            modules_to_save=_head_modules(setting.head),
        )
        return _peft(model, config, setting), None

    return prepare


def _prefix(options: Mapping[str, Any]) -> Prepare:
    def prepare(setting: Setting) -> tuple[nn.Module, None]:
        from peft import PrefixTuningConfig

        config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=options["tokens"])
        config.modules_to_save = _head_modules(setting.head)
        return _peft(setting.start(), config, setting), None

    return prepare


def _peft(model: nn.Module, config: Any, setting: Setting) -> nn.Module:
    from peft import get_peft_model

    setting.seed()
    wrapped: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    dtype = next(model.parameters()).dtype
    return wrapped.to(dtype)  # a prefix is made in float32 whatever the model's dtype


def _head_modules(names: Sequence[str]) -> list[str]:
    return sorted({name.split(".")[0] for name in names})


_ROLES = {"q": r"q(uery)?", "k": r"k(ey)?", "v": r"v(alue)?", "o": r"o(ut(put)?)?(\.dense)?|dense"}


def _targets(model: nn.Module, targets: str) -> list[str]:
    """Full paths of the blocks' linears that LoRA goes on: all, or those of attention with these roles."""
    modules = dict(model.named_modules())
    paths = {}
    for member in read(model).members:
        path, _, own = member.name.rpartition(".")
        if own == "weight" and isinstance(modules[path], nn.Linear):
            paths[path] = member.part
    if targets == "all-linear":
        return list(paths)
    attention = [path for path, part in paths.items() if part == "attention"]
    chosen = []
    for role in targets:
        pattern = re.compile(rf"(^|\.)({_ROLES[role]})(_proj|_lin|_proj_lin)?$")
        found = [path for path in attention if pattern.search(path)]
        if not found:
            raise ValueError(
                f"targets is {targets!r}, but no linear of the attention looks like {role!r}: "
                f"{', '.join(attention[:4]) or 'it has none'}; targets='all-linear' takes every linear"
            )
        chosen += found
    return chosen


def _adapter(options: Mapping[str, Any]) -> Prepare:
    def prepare(setting: Setting) -> tuple[nn.Module, None]:
        model = setting.start()
        pk.tune(model, "frozen")
        setting.seed()
        for p in adapter.insert(model, options["placement"], options["reduction"], options["std"]):
            p.requires_grad_(True)
        return model, None

    return prepare


def _mixout(options: Mapping[str, Any]) -> list[Stage]:
    def prepare(setting: Setting) -> tuple[nn.Module, Around]:
        model = setting.start()
        pk.tune(model, "full")
        parameters = dict(model.named_parameters())
        matrices = [m.name for m in read(model).members if m.kind == "linear" and not m.is_bias]
        return model, Mixout([parameters[name] for name in matrices], options["p"])

    return [Stage("mixout", 1.0, prepare)]


def _child(options: Mapping[str, Any]) -> list[Stage]:
    def prepare(setting: Setting) -> tuple[nn.Module, Around]:
        model = setting.start()
        pk.tune(model, "full")
        parameters = dict(model.named_parameters())
        encoder = [parameters[m.name] for m in read(model).members]
        return model, ChildTuning(fisher_masks(encoder, setting.losses(model), options["share"]))

    return [Stage("child-tuning-d", 1.0, prepare)]


def _lp_ft(options: Mapping[str, Any]) -> list[Stage]:
    return [
        Stage("head", options["share"], _tuned("frozen")({}), lr=options["stage_lr"], head_only=True),
        Stage("full", 1 - options["share"], _tuned("full")({})),
    ]


_STAGE_LR = {"lora": 5e-4, "prefix": 5e-3, "bitfit": 5e-4}


def _eh_ft(options: Mapping[str, Any]) -> list[Stage]:
    pet = options["pet"]
    first: dict[str, Prepare] = {
        "lora": _lora({"r": options["r"], "alpha": options["alpha"], "dropout": 0.0, "targets": options["targets"]}),
        "prefix": _prefix({"tokens": options["tokens"]}),
        "bitfit": _tuned("bitfit")({}),
    }
    rate = options["stage_lr"] if options["stage_lr"] is not None else _STAGE_LR[pet]
    second = _keep if options["reserve"] else _restart
    return [
        Stage(pet, options["share"], first[pet], lr=rate, head_lr=options["head_lr"]),
        Stage("full", 1 - options["share"], second),
    ]


def _restart(setting: Setting) -> tuple[nn.Module, None]:
    """The pretrained backbone with the head of the stage before, weights and biases."""
    assert setting.model is not None
    model = setting.load()
    with torch.no_grad():
        trained = head_of(setting.model, setting.head)
        for name, p in head_of(model, setting.head).items():
            p.copy_(trained[name])
    pk.tune(model, "full")
    return model, None


def _keep(setting: Setting) -> tuple[nn.Module, None]:
    """The model of the stage before as it is, with its PET parameters; all of it trains."""
    assert setting.model is not None
    for name, p in setting.model.named_parameters():
        p.requires_grad_(not shadowed(name))
    return setting.model, None


_TARGETS = ("qv", "qkvo", "all-linear")


def _single(name: str, build: Callable[[Mapping[str, Any]], Prepare]) -> Callable[[Mapping[str, Any]], list[Stage]]:
    return lambda options: [Stage(name, 1.0, build(options))]


_METHODS: dict[str, _Spec] = {
    **{name: _regime(name, text) for name, text in regimes().items()},
    "lora": _Spec(
        "low-rank updates of attention's projections (PEFT)",
        {
            "r": option.count(8),
            "alpha": option.positive(16),
            "dropout": option.probability(0.0),
            "targets": option.choice("qv", *_TARGETS),
        },
        _single("lora", _lora),
    ),
    "prefix": _Spec(
        "trained keys and values before every layer's own (PEFT, no MLP)",
        {"tokens": option.count(32)},
        _single("prefix", _prefix),
    ),
    "adapter": _Spec(
        "bottleneck adapters after the FFN (pfeiffer) or after attention too (houlsby)",
        {
            "placement": option.choice("pfeiffer", *adapter.PLACEMENTS),
            "reduction": option.count(64),
            "std": option.positive(0.02),
        },
        _single("adapter", _adapter),
    ),
    "topk": _Spec(
        "the last k layers, the pooler and the head", {"k": option.count(3), "pooler": option.flag(True)}, _top
    ),
    "lp": _Spec(
        "linear probing: the head only, its input computed once where dropout is off",
        {"pooler": option.flag(False)},
        lambda o: [Stage("lp", 1.0, _tuned("frozen")(o), head_only=not o["pooler"])],
    ),
    "lp-ft": _Spec(
        "linear probing for a share of the steps, then full fine-tuning",
        {"share": option.part(0.1), "stage_lr": option.positive(1e-3)},
        _lp_ft,
    ),
    "mixout": _Spec("full fine-tuning that mixes pretrained weights in", {"p": option.probability(0.9)}, _mixout),
    "child-tuning-d": _Spec(
        "full fine-tuning of the encoder's most informative scalars", {"share": option.share(0.3)}, _child
    ),
    "eh-ft": _Spec(
        "a PET method trains the head, then full fine-tuning restarts from the pretrained backbone with that head",
        {
            "pet": option.choice("lora", *_STAGE_LR),
            "share": option.part(0.1),
            "reserve": option.flag(False),
            "stage_lr": option.optional(option.positive(None)),
            "head_lr": option.optional(option.positive(None)),
            "r": option.count(8),
            "alpha": option.positive(16),
            "targets": option.choice("qkvo", *_TARGETS),
            "tokens": option.count(17),
        },
        _eh_ft,
    ),
}
METHODS: dict[str, str] = {name: spec.help for name, spec in _METHODS.items()}
"""Every method and what it does, in a line."""
