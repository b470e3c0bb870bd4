"""Writes the measured tables of README and docs/kernels.md from the newest dated results: `python bench/readme.py`.

With --check it only compares.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, too
from bench import harness, memory  # noqa: E402
from petune_kernels.studies import layouts, store  # noqa: E402
from petune_kernels.studies.study import read  # noqa: E402

STUDIES = ("transferability", "stability", "protocol", "classification-head")
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


def bench_results() -> list[dict[str, Any]]:
    """Of each benchmark and device the newest file's results: one that is complete, or all parts of a GPU file, which a
    time limit may have cut short."""
    newest: dict[tuple[str, str], list[dict[str, Any]]] = {}
    folder = ROOT / "bench" / "results"
    for path in sorted([*folder.glob("*-bench-*.json"), *folder.glob("*-gpu*.json")]):
        found = json.loads(path.read_text())
        parts = found.get("parts") or ([found] if found["complete"] else [])
        for key in {(part["benchmark"], part["machine"]["device"]) for part in parts}:
            newest[key] = [part for part in parts if (part["benchmark"], part["machine"]["device"]) == key]
    return [part for key in sorted(newest) for part in newest[key] if any(row["seconds"] for row in part["rows"])]


def render_bench() -> str:
    """One table for each result: every case with its providers' medians, each peer's time over petune's, and what there
    is of CUDA graphs, shares of the floor and Trainer's loop."""
    return "\n".join("\n".join([*_bench_table(result), ""]) for result in bench_results())


def _bench_table(result: dict[str, Any]) -> list[str]:
    machine, rows = result["machine"], [row for row in result["rows"] if row["seconds"]]
    providers = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    peers = list(dict.fromkeys(name for row in rows for name in row["petune_over"]))
    more: dict[str, Callable[[dict[str, Any]], str]] = {}
    if any("graph" in row for row in rows):
        more["petune, CUDA graph"] = lambda row: _ms(row.get("graph", {}).get("seconds", {}).get("petune"))
    if any("share_of_floor" in row.get("graph", {}) for row in rows):
        more["petune, CUDA graph, share of floor"] = lambda row: _share(row.get("graph", {}))
    if any("share_of_floor" in row for row in rows):
        more["petune, share of floor"] = lambda row: _share(row)
    if any("backward" in row for row in rows):
        more["petune, backward alone, share"] = lambda row: _share(row.get("backward", {}))
    if any("trainer" in row for row in rows):
        more["petune over eager in Trainer"] = lambda row: _ratio(
            row.get("trainer", {}).get("speedup", {}).get("petune")
        )
    names = ["case", *providers, *(f"petune over {name}" for name in peers), *more]
    cut = "" if result["complete"] else " Cut short by its time limit."
    lines = [
        f"`{result['command']}`, {machine['device']}, {machine['threads']} threads, torch "
        f"{machine['versions']['torch']}; medians in ms, and a peer's time over petune's with its quartiles.{cut}",
        *(f"  \n{note}" for note in harness.notes(result | {"rows": rows})),
        "",
        f"| {' | '.join(names)} |",
        f"|---|{'--:|' * (len(names) - 1)}",
    ]
    for row in rows:
        cells = [" ".join(map(str, row["case"].values())), *(_ms(row["seconds"].get(name)) for name in providers)]
        cells += [_ratio(row["petune_over"].get(name)) for name in peers] + [cell(row) for cell in more.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ms(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{1e3 * spread['median']:.4g}"


def _ratio(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def _share(found: dict[str, Any]) -> str:
    share = found.get("share_of_floor", {}).get("petune")
    return "-" if share is None else f"{100 * share:.0f} %"


def memory_result() -> dict[str, Any] | None:
    """The newest complete result of the memory benchmark."""
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob("*-memory*.json"))]
    return next((result for result in reversed(found) if result["complete"]), None)


def render_memory(
    result: dict[str, Any], shapes: Sequence[str] | None = None, titles: Sequence[str] = tuple(memory.CELLS)
) -> str:
    """The tables of bench/memory.py with these titles, of these shapes or all of them."""
    machine, s = result["machine"], result["settings"]
    ran = f"; steps of {s['batch']} x {s['length']} tokens and {s['layers']} layers" if s["timed"] else ""
    lines = [
        f"`{result['command']}`, {machine['device']}, {machine['threads']} threads, torch "
        f"{machine['versions']['torch']}; bfloat16, the model's own dropout{ran}.",
        "",
    ]
    for shape, rows in memory.by_shape(result).items():
        if shapes is not None and shape not in shapes:
            continue
        for title in titles:
            if grid := memory.grid(rows, memory.CELLS[title]):
                names = [shape, *(row["case"]["regime"] for row in rows)]
                lines += [f"{title[0].upper()}{title[1:]}:", "", f"| {' | '.join(names)} |"]
                lines += [f"|---|{'--:|' * (len(names) - 1)}", *(f"| {' | '.join(line)} |" for line in grid), ""]
        if peers := [(row["case"]["regime"], peer) for row in rows for peer in row.get("against_peers", [])]:
            lines += ["A peer's step time over that of the fastest level that keeps at most 5 % more:", ""]
            lines += ["| regime | peer | level | ratio, median and quartiles |", "|---|---|---|---|"]
            lines += [
                f"| {regime} | {p['peer']} | {p['level']} | {p['median']:.2f} ({p['low']:.2f} to {p['high']:.2f}) |"
                for regime, p in peers
            ]
            lines.append("")
    return "\n".join(lines)


def lora_results() -> dict[int, dict[str, Any]]:
    """By the number of rows, the newest complete result of `ops --op lora_linear` with them."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*-ops-lora-*.json")):
        result = json.loads(path.read_text())
        if result["complete"]:
            found[result["rows"][0]["case"]["tokens"]] = result | {"file": path.name}
    return dict(sorted(found.items(), reverse=True))


def render_lora() -> str:
    """PEFT's time over ours for each shape of projection, by factors, dropout and rows."""
    results, places = lora_results(), {"H to H": "384 to 384", "H to N": "384 to 1536", "N to H": "1536 to 384"}
    places["N to N"] = "1536 to 1536"
    kinds = {"fp32 (PEFT's default)": " float32 adapter", "bf16": "", "bf16, rank 16": " rank 16"}
    lines = [f"`{result['command']}` ({result['file']})  " for result in results.values()]
    lines += ["", f"| factors | p | T | {' | '.join(places.values())} |", f"|---|---|---|{'---|' * len(places)}"]
    for kind, ending in kinds.items():
        for p in ("0.1", "0.0"):
            for rows, result in results.items():
                by_use = {row["case"]["use"]: row["petune_over"].get("eager") for row in result["rows"]}
                cells = [by_use.get(f"{place} p={p}{ending}") for place in places]
                if any(cells):
                    texts = [f"{c['median']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" if c else "-" for c in cells]
                    lines.append(f"| {kind} | {float(p):g} | {rows} | {' | '.join(texts)} |")
    return "\n".join([*lines, ""])


def render_studies() -> str:
    """Of each of the project's studies the main table and that of stock beside patched."""
    blocks = []
    for name in STUDIES:
        folder = ROOT / "bench" / "results" / name
        study = read(ROOT / "bench" / "studies" / f"{name}.toml")
        records = list(store.collect(folder, study).values())  # refuses results of another study file
        header = json.loads((folder / "runs.jsonl").open().readline())
        grids, machine = layouts.tables(study, records), header["machine"]
        start, end = (
            datetime.strptime(t, "%Y-%m-%dT%H:%M:%S%z")
            for t in (header["started"], max(r["finished"] for r in records))
        )
        blocks += [
            *(grid.markdown() for grid in (grids[0], grids[-1])),
            f"`{header['command']}`, {start:%Y-%m-%d}, {machine['cpu']}, {machine['threads']} thread on "
            f"{machine['cores_allowed']} core{'s' * (machine['cores_allowed'] > 1)}, torch "
            f"{machine['versions']['torch']}: {len(records)} runs in {(end - start).total_seconds() / 60:.0f} minutes. "
            f"Every run, all tables and the figures are in "
            f"[bench/results/{name}](bench/results/{name}).",
            "",
        ]
    return "\n".join(blocks)


def replaced(text: str, name: str, content: str) -> str:
    """The text with `content` between the markers of `name`, which must be there once."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    after, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}{end}", text, flags=re.S)
    if count != 1:
        raise SystemExit(f"the page has {count} places between {begin} and {end}; there must be one")
    return after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if README differs from the results")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = replaced(before, "demo", render())
    if "<!-- bench:" in before or bench_results():
        after = replaced(after, "bench", render_bench())
    after = replaced(after, "studies", render_studies())
    texts = {readme: after}
    if (found := memory_result()) is not None:
        kernels = ROOT / "docs" / "kernels.md"
        texts[readme] = replaced(after, "memory", render_memory(found, ["bert-base"], memory.MAIN))
        texts[kernels] = replaced(replaced(kernels.read_text(), "memory", render_memory(found)), "lora", render_lora())
    if check:
        return int(any(text != path.read_text() for path, text in texts.items()))
    for path, text in texts.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
