"""A study as a TOML file: which model, tasks, methods, seeds and recipe, and the runs that they make together.

Keys are strict: an unknown one is an error that names the nearest. The hash of what its runs depend on, not of the
file's layout or of defaults that it spells out, ties a result file to its study.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError
from .splits import TaskSpec
from .statistics import CORRECTIONS, TESTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = {
    "transferability": "methods against tasks, and single layers (Transferability of Transformer Modules)",
    "stability": "methods against tasks over many seeds, with t-tests (Revisiting Parameter-Efficient Tuning)",
    "protocol": "the same runs validated on one half of dev and, leaking, on the half that tests",
    "classification-head": "ways to a classification head, in and out of domain (A Good Classification Head)",
}
VARY = ("global", "wi", "do")
READ_LATER = ("reference", "test", "alpha", "correction")
"""Keys that only tables read: no run depends on them, and none on the number of seeds."""


@dataclass(frozen=True)
class MethodSpec:
    """A method as a study file names it.

    name, options: what `methods.method` takes. label: in tables (default: the name). scale: a word for the parameter
    scale; methods of one label and several scales are drawn as curves of one panel. recipe: changes to the study's.
    each_layer: one method per layer of the model, with the option layers=[k].
    """

    name: str
    label: str = ""
    scale: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    each_layer: bool = False

    @property
    def title(self) -> str:
        return " ".join(filter(None, [self.label or self.name, self.scale]))

    def of_layer(self, k: int) -> MethodSpec:
        """What a method with each_layer is for layer k."""
        label, options = f"{self.label or self.name} #{k + 1}", self.options | {"layers": [k]}
        return dataclasses.replace(self, label=label, options=options, each_layer=False)


@dataclass(frozen=True)
class SeedSpec:
    """`runs` seeds from `first` on. vary: "global" varies weight initialisation and data order together, "wi" and "do"
    one of them while the other stays at `first`."""

    runs: int = 3
    first: int = 0
    vary: tuple[str, ...] = ("global",)

    def __post_init__(self) -> None:
        if self.runs < 1 or self.first < 0:
            raise InputError(f"seeds: runs is {self.runs} and first {self.first}; accepted are at least 1 and 0")
        _unique("seeds: vary", self.vary)
        for name in self.vary:
            if name not in VARY:
                raise InputError(f"seeds: vary has {name!r}; accepted: {', '.join(VARY)}")


@dataclass(frozen=True)
class Run:
    """One training run of a study; `id` names it in the result file."""

    task: TaskSpec
    method: MethodSpec
    vary: str
    wi: int
    do: int
    patched: bool
    stop_on: str = ""

    @property
    def id(self) -> str:
        parts = [self.task.title, self.task.protocol, self.method.title, self.stop_on, self.vary]
        variant = "patched" if self.patched else "stock"
        return "/".join([*filter(None, parts), f"{self.wi}-{self.do}", variant])


@dataclass(frozen=True)
class Study:
    """What a study file says.

    model: a folder of a transformers encoder with its tokenizer, or "minilm". patched: [true], or [true, false] to run
    each beside the unpatched model. reference: the label of the method that the t-tests compare with.
    """

    kind: str
    name: str
    model: str
    tasks: tuple[TaskSpec, ...]
    methods: tuple[MethodSpec, ...]
    recipe: dict[str, Any]
    seeds: SeedSpec = field(default_factory=SeedSpec)
    patched: tuple[bool, ...] = (True,)
    dropout: bool = True
    reference: str = ""
    test: str = "student"
    alpha: float = 0.05
    correction: str = "none"

    def __post_init__(self) -> None:
        for name, accepted in (("kind", tuple(KINDS)), ("test", TESTS), ("correction", CORRECTIONS)):
            if getattr(self, name) not in accepted:
                raise InputError(f"study: {name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}")
        if not 0 < self.alpha < 1:
            raise InputError(f"study: alpha is {self.alpha}; accepted is a number between 0 and 1")
        for name in ("tasks", "methods", "patched"):
            if not getattr(self, name):
                raise InputError(f"study: {name} is empty; at least one is needed")
        _unique("study: patched", self.patched)
        _unique("tasks", [task.title for task in self.tasks])
        _unique("methods", [method.title for method in self.methods])
        if self.reference and self.reference not in [method.title for method in self.methods]:
            raise InputError(
                f"study: reference is {self.reference!r}; the methods are {', '.join(m.title for m in self.methods)}"
            )

    @property
    def hash(self) -> str:
        from .recipe import Recipe

        content = {key: value for key, value in dataclasses.asdict(self).items() if key not in READ_LATER}
        del content["seeds"]["runs"], content["recipe"]
        plain = {f.name: f.default for f in dataclasses.fields(Recipe)}
        defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}  # as TOML has it
        for method, own in zip(self.methods, content["methods"], strict=True):
            own["recipe"] = {k: v for k, v in self.recipe_of(method).items() if k not in defaults or v != defaults[k]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def recipe_of(self, method: MethodSpec) -> dict[str, Any]:
        """The study's recipe with the method's changes, whose `epochs` or `steps` take the place of both."""
        length = {"epochs", "steps"}
        inherited = {k: v for k, v in self.recipe.items() if k not in length or not length & method.recipe.keys()}
        return inherited | method.recipe

    def methods_of(self, layers: int | None) -> list[MethodSpec]:
        """The methods, those with each_layer once for each of the model's `layers`."""
        return [
            one
            for method in self.methods
            for one in ([method.of_layer(k) for k in range(layers or 0)] if method.each_layer else [method])
        ]

    def runs(self, layers: int | None = None) -> list[Run]:
        """Every run, seed by seed, so that a study cut short has all methods; stock and patched follow each other."""
        if layers is None and any(method.each_layer for method in self.methods):
            raise InputError("a method has each_layer; the number of the model's layers is needed")
        tasks = self.tasks
        stops: tuple[str, ...] = ("",)
        if self.kind == "protocol":
            halves = ("dev1-dev2", "dev2-dev2")
            tasks = tuple(dataclasses.replace(task, protocol=p) for task in self.tasks for p in halves)
            stops = ("loss", "metric")
        runs = [
            Run(task, method, vary, wi, do, patched, stop_on)
            for vary, wi, do in self._seeds()
            for task in tasks
            for method in self.methods_of(layers)
            for stop_on in stops
            for patched in self.patched
        ]
        if twice := [name for name, count in Counter(run.id for run in runs).items() if count > 1]:
            raise InputError(f"two runs would be called {twice[0]!r}; a `label` keeps two apart")
        return runs

    def _seeds(self) -> Iterator[tuple[str, int, int]]:
        first = self.seeds.first
        for i in range(first, first + self.seeds.runs):
            for vary in self.seeds.vary:
                yield vary, first if vary == "do" else i, first if vary == "wi" else i


def read(path: Path) -> Study:
    """The study of a TOML file. Raises InputError naming the file, the key and what is accepted."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} cannot be read as TOML: {error}") from error
    try:
        return parse(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse(content: Mapping[str, Any]) -> Study:
    """The study of a table as TOML gives it."""
    return _build(Study, content, "study")


def _build(kind: type[Any], table: Any, where: str) -> Any:
    """A dataclass from a table; nested dataclasses from nested tables, tuples from arrays."""
    if not isinstance(table, Mapping):
        raise InputError(f"{where}: expected a table, got {table!r}")
    check_keys(table, [f.name for f in dataclasses.fields(kind)], where)
    needed = dataclasses.MISSING
    for f in dataclasses.fields(kind):
        if f.name not in table and f.default is needed and f.default_factory is needed:
            raise InputError(f"{where}: the key {f.name!r} is missing")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in table.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_value(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    kinds = inner if origin in (types.UnionType, typing.Union) else (dict,) if origin is dict else (origin or hint,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise InputError(f"{where} is {value!r}; accepted is {names}")
    if origin is dict:  # options and recipes; TOML has no word for None
        return {key: None if item == "none" else item for key, item in value.items()}
    return value


def check_keys(table: Mapping[str, Any], accepted: Sequence[str], where: str) -> None:
    """Raises InputError for a key that is not accepted, with the nearest one that is."""
    for key in table:
        if key not in accepted:
            close = difflib.get_close_matches(key, accepted, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; accepted: {', '.join(accepted)}"
            raise InputError(f"{where}: unknown key {key!r}{hint}")


def _unique(where: str, values: Sequence[Any]) -> None:
    for value in values:
        if list(values).count(value) > 1:
            raise InputError(f"{where}: {value!r} occurs more than once; a `label` keeps two apart")
