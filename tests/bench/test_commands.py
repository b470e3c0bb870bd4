"""What surrounds the benchmarks: results put together."""

from __future__ import annotations

import json
from pathlib import Path

from bench.__main__ import main


def test_collect_leaves_out_what_is_broken_and_its_own_file(tmp_path: Path, capsys) -> None:
    (tmp_path / "1.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "2.json").write_text('{"rows": [')
    for _ in range(2):
        assert main("collect", str(tmp_path), str(tmp_path / "all.json")) == 0
        assert "left out" in (said := capsys.readouterr().err) and "2.json" in said and "1.json" not in said
        assert json.loads((tmp_path / "all.json").read_text())["parts"] == [{"rows": []}]
    assert main("collect", str(tmp_path), str(tmp_path / "none" / "all.json")) == 2
    assert "is no folder" in capsys.readouterr().err
