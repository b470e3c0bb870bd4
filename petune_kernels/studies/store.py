"""Results as JSON lines: a header that names the study, then one line a run, on the disk before the next run starts.

A process that is killed leaves at most one half line at the end. It is cut off when the file is opened again, and its
run is done again. Any other damage, and a file of another study, is refused and not touched.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import tempfile
from pathlib import Path
from typing import IO, Any

from .errors import InputError
from .study import Study, parse

VERSION = 1


class Store:
    """The result file of one process, open for appending and locked; use as a context manager."""

    def __init__(self, path: Path, study: Study, header: dict[str, Any]):
        self.path, self.recovered = path, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                spec = dataclasses.asdict(study)
                _create(
                    path, {"petune_study": VERSION, "hash": study.hash, "study": study.name, "spec": spec, **header}
                )
            check(path, study)
            self._file: IO[bytes] = path.open("r+b")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError(f"{path} is being written by another process") from None
        whole = self._file.read()
        end = whole.rfind(b"\n") + 1
        self.recovered = len(whole) - end
        try:
            records(path)
        except InputError:
            self._file.close()
            raise
        if self.recovered:
            self._file.truncate(end)
            os.fsync(self._file.fileno())
        self._file.seek(end)

    def append(self, record: dict[str, Any]) -> None:
        """Adds one run and returns when it is on the disk. NaN and infinity become null."""
        line = json.dumps(finite(record), allow_nan=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def check(path: Path, study: Study) -> None:
    """Raises InputError if the file is not a result of this very study, as far as runs depend on what it says.

    The hash is made anew from the study that the header holds: files of earlier versions have one of other keys.
    """
    found = header(path)
    try:
        same = parse(found["spec"]).hash == study.hash
    except (InputError, KeyError):
        same = False
    if not same:
        raise InputError(
            f"{path} holds results of another study ({found.get('study')!r}, {found['hash']}), not of "
            f"{study.name!r} ({study.hash}); choose another --out. Nothing was changed"
        )


def records(path: Path) -> list[dict[str, Any]]:
    """The runs of a result file, without a half line at its end."""
    header(path)
    lines = path.read_bytes().split(b"\n")[1:-1]  # what follows the last newline is half a line, or nothing
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 2):
        try:
            record = json.loads(line)
            name = record["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number} is damaged ({error}); nothing was changed") from error
        if name in found:
            raise InputError(f"{path}, line {number}: the run {name} occurs twice; nothing was changed")
        found[name] = record
    return list(found.values())


def collect(folder: Path, study: Study) -> dict[str, dict[str, Any]]:
    """All runs in the folder's result files (one per process group rank), by id."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("runs*.jsonl")):
        check(path, study)
        for record in records(path):
            if record["id"] in found:
                raise InputError(f"{path}: the run {record['id']} stands in another file of {folder}, too")
            found[record["id"]] = record
    return found


def finite(value: Any) -> Any:
    """The value with None in place of NaN and infinity, as JSON needs it."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def header(path: Path) -> dict[str, Any]:
    """The first line of a result file. Raises InputError for a file that is none."""
    with path.open("rb") as stream:
        line = stream.readline()
    try:
        found = json.loads(line)
        if line.endswith(b"\n") and found["petune_study"] == VERSION and found["hash"]:
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path} is not a result file of a study; choose another --out. Nothing was changed")


def _create(path: Path, header: dict[str, Any]) -> None:
    """The file with its header, whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".header-", delete=False) as scratch:
        scratch.write((json.dumps(finite(header)) + "\n").encode())
        os.fchmod(scratch.fileno(), 0o644)  # a temporary file is the owner's alone
        scratch.flush()
        os.fsync(scratch.fileno())
    try:
        os.link(scratch.name, path)
    except FileExistsError:  # another process was first, and its header is as good
        pass
    finally:
        os.unlink(scratch.name)
