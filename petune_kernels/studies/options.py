"""Options of methods: a default, what is accepted in words, and the check."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    default: Any
    accepted: str
    fits: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def flag(default: bool) -> Option:
    return Option(default, "true or false", lambda v: isinstance(v, bool))


def count(default: int | None) -> Option:
    return Option(default, "an int from 1", lambda v: type(v) is int and v >= 1)


def share(default: float | None) -> Option:
    return Option(default, "a share over 0 and up to 1", lambda v: _number(v) and 0 < v <= 1)


def part(default: float) -> Option:
    return Option(default, "a share between 0 and 1", lambda v: _number(v) and 0 < v < 1)


def probability(default: float) -> Option:
    return Option(default, "a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1)


def positive(default: float | None) -> Option:
    return Option(default, "a number over 0", lambda v: _number(v) and 0 < v < math.inf)


def choice(default: str, *names: str) -> Option:
    return Option(default, ", ".join(names), lambda v: v in names)


def optional(option: Option) -> Option:
    return Option(None, option.accepted + ", or none", lambda v: v is None or option.fits(v))


LAYERS = Option(
    None,
    "a list of layers, counted from 0, or none",
    lambda v: v is None or (isinstance(v, (list, tuple)) and len(v) > 0 and all(type(i) is int and i >= 0 for i in v)),
)
