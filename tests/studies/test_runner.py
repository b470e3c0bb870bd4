"""Results on disk: resumable after a kill at any point, nothing lost, run twice or overwritten."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from petune_kernels.studies import runner, store
from petune_kernels.studies.errors import InputError, StudyError
from petune_kernels.studies.study import Run, Study, parse

from .test_study import CONTENT


def study(**changes: Any) -> Study:
    return parse(CONTENT | changes)


def fake(one: Study, run: Run, device: str, progress: Any = None) -> dict[str, Any]:
    """A run that takes no time; importable by the processes of --jobs."""
    return {"id": run.id, "pid": os.getpid(), "device": device, "value": float("nan")}


def slow(one: Study, run: Run, device: str, progress: Any = None) -> dict[str, Any]:
    time.sleep(0.05)
    return fake(one, run, device)


def breaks(one: Study, run: Run, device: str, progress: Any = None) -> dict[str, Any]:
    if run.wi == 11:
        raise RuntimeError("no such luck")
    return fake(one, run, device)


def dies(one: Study, run: Run, device: str, progress: Any = None) -> dict[str, Any]:
    os._exit(1)


def go(folder: Path, execute: runner.Execute = fake, jobs: int = 1, which: Study | None = None) -> list[dict[str, Any]]:
    which = which or study()
    return runner.run(which, folder, jobs=jobs, execute=execute, runs=which.runs(), pack=False)


def lines(folder: Path) -> list[str]:
    return (folder / "runs.jsonl").read_text().splitlines()


def test_every_run_is_done_once_and_a_second_start_does_nothing(tmp_path: Path) -> None:
    found = go(tmp_path)
    assert [r["id"] for r in found] == [r.id for r in study().runs()]
    header = json.loads(lines(tmp_path)[0])
    assert header["hash"] == study().hash and header["spec"]["methods"][1]["options"] == {"r": 8}
    assert found[0]["value"] is None  # NaN, as JSON has it
    assert (tmp_path / "runs.jsonl").stat().st_mode & 0o777 == 0o644
    before = (tmp_path / "runs.jsonl").read_bytes()
    assert go(tmp_path, dies) == found and (tmp_path / "runs.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["runs.jsonl"]


def test_a_file_cut_at_any_byte_is_gone_on_with_or_refused(tmp_path: Path) -> None:
    whole = go(tmp_path / "whole")
    content = (tmp_path / "whole" / "runs.jsonl").read_bytes()
    head = content.index(b"\n") + 1
    path = tmp_path / "cut" / "runs.jsonl"
    path.parent.mkdir()
    for end in [*range(head, head + 250, 7), len(content) - 1, len(content)]:
        path.write_bytes(content[:end])
        done = content[head:end].count(b"\n")
        ran: list[str] = []

        def count(one: Study, run: Run, device: str, progress: Any = None, ran: list[str] = ran) -> dict[str, Any]:
            ran.append(run.id)
            return fake(one, run, device)

        found = go(path.parent, count)
        assert [r["id"] for r in found] == [r["id"] for r in whole] and len(ran) == len(whole) - done
    path.write_bytes(content[: head - 1])  # a header without its end is never written by this program
    with pytest.raises(InputError, match="not a result file"):
        go(path.parent)
    assert path.read_bytes() == content[: head - 1]


def test_a_killed_process_goes_on_where_it_was(tmp_path: Path) -> None:
    script = "import sys, pathlib; from tests.studies import test_runner as t; t.go(pathlib.Path(sys.argv[1]), t.slow)"
    root = Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=root)
    path = tmp_path / "runs.jsonl"
    deadline = time.monotonic() + 60
    while not path.exists() or len(lines(tmp_path)) < 4:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    survived = [json.loads(line) for line in lines(tmp_path)[1:-1]]
    assert 2 <= len(survived) < 12
    found = go(tmp_path)
    assert found[: len(survived)] == survived and len(found) == len({r["id"] for r in found}) == 12


def test_jobs_share_the_runs_and_a_start_with_other_jobs_goes_on(tmp_path: Path) -> None:
    found = go(tmp_path, slow, jobs=2)
    assert sorted(r["id"] for r in found) == sorted(r.id for r in study().runs())
    assert os.getpid() not in {r["pid"] for r in found}
    assert go(tmp_path, dies) == found


def test_ranks_divide_the_runs_and_any_other_start_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    done: list[dict[str, Any]] = []
    for rank in (2, 0):
        monkeypatch.setenv("RANK", str(rank))
        done = go(tmp_path)
    assert len(done) == 8 and {p.name for p in tmp_path.iterdir()} == {"runs.0.jsonl", "runs.2.jsonl"}
    assert runner.local_device("cuda") == "cuda:1" and runner.local_device("cpu") == "cpu"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert len(go(tmp_path)) == 12 and len(lines(tmp_path)) == 1 + 4


def test_a_run_that_breaks_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="run movie/train-split/FT/global/11-11/patched: RuntimeError: no such luck"):
        go(tmp_path, breaks)
    assert len(lines(tmp_path)) == 1 + 4
    assert len(go(tmp_path)) == 12


def test_a_process_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="a process of the study died"):
        go(tmp_path, dies, jobs=2)


@pytest.mark.parametrize(
    "content",
    [b"", b"my,own,file\n", b'{"petune_study": 1}\n', b"\xff\xfe", b"[1]\n", b'{"petune_study": 2, "hash": "h"}\n'],
)
def test_a_foreign_file_is_refused_and_not_touched(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "runs.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="not a result file of a study"):
        go(tmp_path)
    assert (tmp_path / "runs.jsonl").read_bytes() == content


def test_a_result_file_of_another_study_is_refused(tmp_path: Path) -> None:
    go(tmp_path)
    before = (tmp_path / "runs.jsonl").read_bytes()
    with pytest.raises(InputError, match="another study.*'small'.*choose another --out"):
        go(tmp_path, which=study(recipe={"lr": 1.0}))
    assert (tmp_path / "runs.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": "lora"},
        {"test": "welch"},
        {"alpha": 0.01},
        {"correction": "holm"},
        {"seeds": {"runs": 4, "first": 10}},
    ],
)
def test_what_no_run_depends_on_may_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    found, which = go(tmp_path), study(**changes)
    assert list(store.collect(tmp_path, which).values()) == found
    assert len(go(tmp_path, which=which)) == len(which.runs())
    with pytest.raises(InputError, match="another study"):
        store.collect(tmp_path, study(seeds={"runs": 3, "first": 11}))


def test_a_file_with_the_hash_of_an_earlier_version_goes_by_the_study_in_its_header(tmp_path: Path) -> None:
    found = go(tmp_path)
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text().replace(study().hash, "0123456789abcdef"))
    assert go(tmp_path, dies) == found
    with pytest.raises(InputError, match="another study"):
        go(tmp_path, which=study(recipe={"lr": 1.0}))


def test_other_data_under_the_same_path_are_refused(tiny_csv: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.csv", tmp_path / "out"
    data.write_bytes(tiny_csv.read_bytes())
    which = study(tasks=[{"name": "mine", "file": str(data)}])

    def one(which: Study, run: Run, device: str, progress: Any = None) -> dict[str, Any]:
        if run.wi == 11:
            raise KeyboardInterrupt
        return runner.describe(run, runner.load_task(run.task))

    with pytest.raises(KeyboardInterrupt):
        go(out, one, which=which)
    before = (out / "runs.jsonl").read_bytes()
    data.write_text(tiny_csv.read_text().replace("positive", "negative", 1))
    runner.load_task.cache_clear()
    with pytest.raises(InputError, match="task 'mine' .*texts or labels are not those that earlier runs read"):
        go(out, which=which)
    assert (out / "runs.jsonl").read_bytes() == before
    data.write_bytes(tiny_csv.read_bytes())
    runner.load_task.cache_clear()
    assert len(go(out, which=which)) == 6
    data.unlink()
    runner.load_task.cache_clear()
    assert len(go(out, which=which)) == 6  # nothing is left to do, so nothing is read


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors"])
def test_another_model_under_the_same_path_is_refused(changed: str, tiny_model: Path, tmp_path: Path) -> None:
    folder, out = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "out"
    which, more = study(model=str(folder)), study(model=str(folder), seeds={"runs": 4, "first": 10})
    assert len(go(out, which=which)) == 12
    good = (folder / changed).read_bytes()
    (folder / changed).write_bytes(good[:-1] + b" ")
    assert len(go(out, which=which)) == 12  # nothing is left to do
    with pytest.raises(InputError, match="its config or weights are not those of the run "):
        go(out, which=more)
    assert len(lines(out)) == 1 + 12
    (folder / changed).write_bytes(good)
    assert len(go(out, which=more)) == 16
    old = [{k: v for k, v in one.items() if k != "model_digest"} for one in map(json.loads, lines(out)[:-1])]
    (out / "runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in old))
    assert len(go(out, which=more)) == 16  # a file of an earlier version


def test_a_model_may_be_mended_as_long_as_no_run_is_done(tiny_model: Path, tmp_path: Path) -> None:
    folder, out = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "out"
    good = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(good + b" ")

    def fails(*args: Any) -> Any:
        raise StudyError("weights of the backbone are missing")

    with pytest.raises(StudyError, match="missing"):
        which = study(model=str(folder))
        runner.run(which, out, execute=fails, runs=which.runs(), pack=False)
    (folder / "config.json").write_bytes(good)
    assert len(go(out, which=study(model=str(folder)))) == 12


def test_damage_in_the_middle_and_runs_told_twice_are_refused(tmp_path: Path) -> None:
    go(tmp_path)
    path = tmp_path / "runs.jsonl"
    good = path.read_text().split("\n")
    for bad, message in ((good[1][:-3], "line 2 is damaged"), (good[2], "line 3: the run .* occurs twice")):
        path.write_text("\n".join([good[0], bad, *good[2:]]))
        before = path.read_bytes()
        with pytest.raises(InputError, match=message):
            go(tmp_path)
        assert path.read_bytes() == before
    path.write_text("\n".join(good))
    shutil.copy(path, tmp_path / "runs.1.jsonl")
    with pytest.raises(InputError, match="runs.jsonl: the run .* stands in another file"):
        store.collect(tmp_path, study())


def test_two_processes_cannot_write_one_file(tmp_path: Path) -> None:
    with (
        store.Store(tmp_path / "runs.jsonl", study(), {}),
        pytest.raises(InputError, match="written by another process"),
    ):
        go(tmp_path)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--jobs is 0"):
        go(tmp_path, jobs=0)
    with pytest.raises(InputError, match="model is '/nowhere'; accepted is a folder"):
        runner.model_folder("/nowhere")
    with pytest.raises(InputError, match="cannot be written"):
        go(Path("/dev/null/x"))


def earnest(model: Path, data: Path) -> Study:
    runner.load_task.cache_clear()
    return study(
        model=str(model),
        tasks=[{"name": "tiny", "file": str(data), "train_rows": 48, "test_rows": 32}],
        methods=[{"name": "full", "label": "FT"}, {"name": "lora", "options": {"r": 2}}],
        recipe={"lr": 1e-3, "steps": 4, "length": 16, "evaluate_every": 2},
        seeds={"runs": 1},
        patched=[True, False],
    )


def test_a_study_in_earnest(tiny_model: Path, tiny_csv: Path, tmp_path: Path) -> None:
    found = runner.run(earnest(tiny_model, tiny_csv), tmp_path)
    assert [(r["method"], r["patched"]) for r in found] == [(m, p) for m in ("FT", "lora") for p in (True, False)]
    for record in found:
        outcome = record["outcome"]
        assert outcome["failed"] is None and "model" not in outcome and outcome["stages"][0]["peak_bytes"] > 0
        assert [entry["step"] for entry in outcome["history"]] == [2, 4]
        assert record["rows"] == {
            "train": 48,
            "validation": 24,
            "dropped": record["rows"]["dropped"],
            "tests": {"test": 32},
        }
    (full,), (lora,) = found[0]["outcome"]["stages"], found[2]["outcome"]["stages"]
    assert full["trained"] + full["head"] == found[0]["outcome"]["total"] > lora["trained"] > 0


@pytest.mark.slow
def test_jobs_give_the_values_of_one_process(tiny_model: Path, tiny_csv: Path, tmp_path: Path) -> None:
    which = earnest(tiny_model, tiny_csv)
    alone = runner.run(which, tmp_path / "alone")
    apart = {r["id"]: r["outcome"] for r in runner.run(which, tmp_path / "apart", jobs=2)}
    assert len(alone) == len(apart) == 4
    for record in alone:
        other = apart[record["id"]]
        assert other["test"] == record["outcome"]["test"]
        assert [entry["loss"] for entry in other["history"]] == [
            entry["loss"] for entry in record["outcome"]["history"]
        ]
