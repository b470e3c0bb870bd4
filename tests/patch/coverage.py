"""docs/coverage.md: for every family, which modules which pattern runs, and which are left alone and why.

python -m tests.patch.coverage writes it; a test compares it with what `patch` does.
"""

from __future__ import annotations

import re
from pathlib import Path

import petune_kernels as pk

from .models import FAMILIES, HEADS, build

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
_INTRO = """# What `patch` does to which model

Small random models of every family, with the head named, on a CPU. `*` stands for a layer's number. Made by
`python -m tests.patch.coverage`; `tests/patch/test_families.py` compares it with what `patch` does, and the patched
models' loss, logits and every gradient with the unpatched ones'.

A module under "left alone" runs as it did. Where no pattern is named beside it, it has nothing to save (embeddings,
activations that are one torch op), or is a projection of another class than nn.Linear (GPT-2's Conv1D).
"""


def page() -> str:
    return _INTRO + "".join(section(family) for family in FAMILIES)


def section(family: str) -> str:
    """The part of the page on one family."""
    model = build(family)
    report = pk.patch(model)
    fused: dict[str, dict[str, None]] = {}
    alone: dict[str, dict[str, None]] = {}
    parts = {path for path, _ in report.parts.items()}
    for entry in report.entries:
        place = _general(entry.path) or "(the model)"
        if entry.pattern:
            kind = entry.pattern + (", as a part" if entry.path in parts and entry.part else "")
            fused.setdefault(kind, {})[f"`{place}` ({entry.kind})"] = None
        else:
            alone.setdefault(_general(_number(entry.reason)), {})[f"`{place}` ({entry.kind})"] = None
    lines = [f"\n## {family}, {HEADS[FAMILIES[family].main]}\n", "| pattern | modules |", "|---|---|"]
    lines += [f"| {kind} | {', '.join(places)} |" for kind, places in fused.items()]
    lines += ["", "| left alone, because | modules |", "|---|---|"]
    lines += [f"| {reason} | {', '.join(places)} |" for reason, places in alone.items()]
    return "\n".join(lines) + "\n"


def _general(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def _number(reason: str) -> str:
    """Without the size of a difference, which depends on the machine."""
    return re.sub(r" by [\d.e+-]+ on a sample", " on a sample", reason).replace("|", "/")


if __name__ == "__main__":
    PAGE.write_text(page())
