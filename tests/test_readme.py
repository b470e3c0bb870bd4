"""README tells the truth: its tables are those of the committed results, its commands exist."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

import petune_kernels as pk
from petune_kernels.studies import layouts, store
from petune_kernels.studies.study import read

ROOT = Path(__file__).parent.parent


def test_tables_are_the_results() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "readme.py"), "--check"])
    assert done.returncode == 0, "README differs from bench/results: run `python bench/readme.py`"
    assert "| step time, median |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["transferability", "stability", "classification-head"])
def test_study_tables_are_those_of_the_runs(name: str) -> None:
    folder, study = ROOT / "bench" / "results" / name, read(ROOT / "bench" / "studies" / f"{name}.toml")
    records = list(store.collect(folder, study).values())
    assert {record["id"] for record in records} == {run.id for run in study.runs()}
    grids = layouts.tables(study, records)
    assert (folder / "tables.md").read_text() == "\n".join(grid.markdown() for grid in grids)
    kept, made = cells((folder / "tables.csv").read_text()), cells(layouts.to_csv(study, records))
    assert len(kept) == len(made)
    for old, new in zip(kept, made, strict=True):
        assert new == (old if isinstance(old, str) else pytest.approx(old, rel=1e-9, nan_ok=True))


def cells(table: str) -> list[float | str]:
    """Every cell of a CSV, numbers as such: their last digits are those of the numpy and scipy that made them."""

    def cell(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    return [cell(text) for row in csv.reader(table.splitlines()) for text in row]


def test_what_it_names_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for target in re.findall(r"`make ([a-z-]+)", readme) + re.findall(r"^    make ([a-z-]+)", readme, flags=re.M):
        assert target in targets, target
    for name in re.findall(r"pk\.([a-z_]+)", readme):
        assert name in pk.__all__, name
    for path in re.findall(r"\]\(((?:bench|docs)/[^)]*)\)", readme):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"^    ((?:petune_kernels|csrc|bench|tests|docs)/\S*)", readme, flags=re.M):
        assert (ROOT / path).exists(), path
