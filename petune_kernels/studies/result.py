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
    """Tries to write there, or where the folder will be made: better to fail before a long run than after it.

    The folder itself is made by what is first written, so that a run that fails leaves none.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
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
        """Dated names in `folder`, which `write` makes."""
        writable(folder)
        stem = f"{study}-{time.strftime('%Y%m%d-%H%M%S')}"
        return Files((folder / f"{stem}.json").resolve(), (folder / f"{stem}.png").resolve())

    def write(self, result: dict[str, Any]) -> None:
        """The result as JSON; NaN and infinity are refused, as other readers refuse them."""
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
