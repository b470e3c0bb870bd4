"""Writes README's measured tables from the newest dated results: `python bench/readme.py` (`--check` only compares)."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def demo_results() -> list[Path]:
    """The newest demo result of each dtype."""
    newest: dict[str, Path] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*-demo-*.json")):
        newest[json.loads(path.read_text())["settings"]["dtype"]] = path
    return [newest[dtype] for dtype in sorted(newest, reverse=True)]


def _pair(values: dict[str, Any], form: str, scale: float = 1.0) -> str:
    return " | ".join(form.format(values[v] / scale) for v in ("stock", "patched"))


def _column(path: Path) -> list[str]:
    r = json.loads(path.read_text())
    saved, memory, time = r["saved_bytes_per_token_per_layer"], r["memory"], r["time"]
    medians = {v: time[v]["median"] for v in ("stock", "patched")}
    spread = "{:.0f} to {:.0f} ms"
    quartiles = " | ".join(spread.format(1e3 * time[v]["low"], 1e3 * time[v]["high"]) for v in ("stock", "patched"))
    by_seed = {
        v: ", ".join(f"{run['accuracy'][v]:.3f}" for run in r["runs"]) for v in ("stock", "patched", "untrained")
    }
    exact = r["without_dropout"]
    patterns = ", ".join(f"{n} `{name}`" for name, n in r["coverage"]["by_pattern"].items())
    ratio = time["ratio"]
    s, m, chosen = r["settings"], r["machine"], r["trainable"]
    return [
        f"`{s['regime']}`, {s['batch']} x {s['length']} tokens, {s['dtype']}, {m['cpu']}, {m['threads']} threads, "
        f"torch {m['versions']['torch']}; {chosen['count']:,} of {chosen['total']:,} parameters train, and the head; "
        f"{patterns} patched, {len(r['coverage']['left_alone'])} modules left alone. "
        f"`{r['command']}`, [{path.name}](bench/results/{path.name})",
        "",
        "| | stock | patched |",
        "|---|---|---|",
        f"| bytes saved for backward, per token and layer | {_pair(saved, '{:,.0f}')} |",
        f"| peak resident memory of a step above the loaded model | "
        f"{_pair({v: memory[v]['rise'] for v in ('stock', 'patched')}, '{:,.0f} MiB', MIB)} |",
        f"| step time, median | {_pair(medians, '{:,.0f} ms', 1e-3)} |",
        f"| step time, quartiles | {quartiles} |",
        f"| test accuracy by seed | {by_seed['stock']} | {by_seed['patched']} |",
        f"| the same, head untrained | {by_seed['untrained']} | {by_seed['untrained']} |",
        "",
        f"Step time, patched over stock: {ratio['median']:.2f} (quartiles {ratio['low']:.2f} to {ratio['high']:.2f}, "
        f"{ratio['n']} turns). Largest loss difference with dropout off, {len(exact['losses']['stock'])} steps: "
        f"{exact['largest_loss_difference']:.1e}.",
        "",
    ]


def render() -> str:
    return "\n".join(line for path in demo_results() for line in _column(path))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if README differs from the results")
    readme = ROOT / "README.md"
    before = readme.read_text()
    begin, end = "<!-- demo:begin -->", "<!-- demo:end -->"
    after = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{render()}{end}", before, flags=re.S)
    if parser.parse_args().check:
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
