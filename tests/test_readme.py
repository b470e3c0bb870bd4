"""README tells the truth: its tables are those of the committed results, its commands exist."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import petune_kernels as pk
from petune_kernels.studies import layouts, store
from petune_kernels.studies.recipe import Recipe
from petune_kernels.studies.splits import TaskSpec
from petune_kernels.studies.study import MethodSpec, SeedSpec, Study, read

ROOT = Path(__file__).parent.parent


def test_tables_are_the_results() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "readme.py"), "--check"])
    assert done.returncode == 0, "README differs from bench/results: run `python bench/readme.py`"
    assert "| step time, median |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["transferability", "stability", "protocol", "classification-head"])
def test_study_tables_are_those_of_the_runs(name: str) -> None:
    folder, study = ROOT / "bench" / "results" / name, read(ROOT / "bench" / "studies" / f"{name}.toml")
    records = list(store.collect(folder, study).values())
    assert {record["id"] for record in records} == {run.id for run in study.runs()}
    grids = layouts.tables(study, records)
    assert (folder / "tables.md").read_text() == "\n".join(grid.markdown() for grid in grids)
    kept, made = (
        pd.read_csv(table, keep_default_na=False, na_values=[""])
        for table in (folder / "tables.csv", io.StringIO(layouts.to_csv(study, records)))
    )
    pd.testing.assert_frame_equal(kept, made, rtol=1e-9, atol=0.0)  # last digits are those of a numpy and a scipy


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


def test_every_key_of_a_study_file_is_described() -> None:
    table = (ROOT / "docs" / "papers.md").read_text().partition("### The study file")[2].partition("What the papers")[0]
    described = set(re.findall(r"`([a-z_]+)`", table))
    for kind in (Study, SeedSpec, MethodSpec, TaskSpec, Recipe):
        keys = {field.name for field in dataclasses.fields(kind)} - {"seeds", "recipe", "tasks", "methods"}
        assert keys <= described, keys - described
