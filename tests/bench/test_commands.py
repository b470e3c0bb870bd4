"""Around the benchmarks: results put together, the GPU script over a stand-in, the cases of pytest-benchmark."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from bench import bench_ops
from bench.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def test_collect_leaves_out_what_is_broken_and_its_own_file(tmp_path: Path, capsys) -> None:
    (tmp_path / "1.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "2.json").write_text('{"rows": [')
    for _ in range(2):
        assert main("collect", str(tmp_path), str(tmp_path / "all.json")) == 0
        assert "left out" in (said := capsys.readouterr().err) and "2.json" in said and "1.json" not in said
        assert json.loads((tmp_path / "all.json").read_text())["parts"] == [{"rows": []}]
    assert main("collect", str(tmp_path), str(tmp_path / "none" / "all.json")) == 2
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("TOKENS", "abc"), ("TOKENS", "0x8"), ("WIDTH", "wide")])
def test_a_shape_of_the_op_cases_that_is_none_is_named(name: str, value: str, monkeypatch) -> None:
    assert not any(case.wide and dtype == torch.float32 for case, dtype in bench_ops.CASES)
    monkeypatch.setenv(f"PETUNE_BENCH_{name}", value)
    with pytest.raises(pytest.Collector.CollectError, match=f"PETUNE_BENCH_{name} is '{value}'; accepted"):
        importlib.reload(bench_ops)


def test_the_gpu_script_keeps_a_days_first_result_and_fails_with_what_puts_them_together(tmp_path: Path) -> None:
    python = tmp_path / "python"  # in its place: writes what it is asked to collect, or fails at it
    python.write_text('#!/bin/sh\ncase "$*" in *collect*) [ -z "$BROKEN" ] && echo {} > "$5";; esac\n')
    python.chmod(0o755)

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        given = os.environ | {"PYTHON": str(python), "TMPDIR": str(tmp_path)} | more
        script = ["bash", str(ROOT / "bench" / "gpu.sh"), str(tmp_path / "results")]
        return subprocess.run(script, env=given, capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stderr
    assert "cli doctor (at most" in done.stdout
    assert run().returncode == 0 and run(BROKEN="1").returncode == 1
    first, second = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert first.endswith("-gpu.json") and second.endswith("-gpu_02.json")
