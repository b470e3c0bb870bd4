"""Where a study's result goes: a JSON file and a figure with the same name."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError


def writable(folder: Path) -> None:
    """Makes the folder and writes there once: better to fail before a long run than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class Files:
    """`json` and `figure` of one result."""

    json: Path
    figure: Path

    @staticmethod
    def new(folder: Path, study: str) -> Files:
        """Dated names in `folder`, which is made now."""
        writable(folder)
        stem = f"{study}-{time.strftime('%Y%m%d-%H%M%S')}"
        return Files((folder / f"{stem}.json").resolve(), (folder / f"{stem}.png").resolve())

    def write(self, result: dict[str, Any]) -> None:
        """The result as JSON; NaN and infinity are refused, as other readers refuse them."""
        self.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
