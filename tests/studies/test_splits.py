"""Protocols: what validates and what tests, samples, out-of-domain tests, and no leak that is not labelled."""

from __future__ import annotations

from pathlib import Path

import pytest

from petune_kernels.studies import sources
from petune_kernels.studies.errors import InputError
from petune_kernels.studies.sources import Source
from petune_kernels.studies.splits import PROTOCOLS, TaskSpec, cut, load
from petune_kernels.studies.tasks import Examples, Named


def examples(name: str, rows: int) -> Examples:
    return Examples([f"{name} {i}" for i in range(rows)], None, [i % 2 for i in range(rows)])


def source(**changes: Examples) -> Source:
    return Source(
        changes.get("train", examples("train", 100)), {"test": changes.get("test", examples("test", 30))}, ("n", "p")
    )


def spec(**changes) -> TaskSpec:
    return TaskSpec("movie", **changes)


def test_the_last_tenth_of_train_validates_unshuffled_and_the_held_out_part_tests() -> None:
    task = cut(source(), spec())
    assert task.train.texts == [f"train {i}" for i in range(90)]
    assert task.validation.texts == [f"train {i}" for i in range(90, 100)]
    assert task.tests["test"] == source().tests["test"] and not task.leaky


def test_halves_of_dev() -> None:
    fair, leaking = (cut(source(), spec(protocol=p)) for p in ("dev1-dev2", "dev2-dev2"))
    assert fair.tests == leaking.tests and len(fair.tests["test"]) == 15  # the same half tests
    assert set(fair.validation.texts) | set(fair.tests["test"].texts) == set(source().tests["test"].texts)
    assert not set(fair.validation.texts) & set(fair.tests["test"].texts)
    assert leaking.validation == leaking.tests["test"]
    assert len(fair.train) == len(leaking.train) == 100
    assert not fair.leaky and leaking.leaky
    other = cut(source(), spec(protocol="dev1-dev2", split_seed=1))
    assert other.tests != fair.tests


def test_both_halves_of_dev_train_on_the_same_rows_whichever_of_them_repeats_a_training_text() -> None:
    plain = cut(source(), spec(protocol="dev1-dev2"))
    for part in (plain.validation, plain.tests["test"]):
        repeated = [*part.texts[:4], *(f"train {i}" for i in range(96))]
        twice = source(train=Examples(repeated, None, [i % 2 for i in range(100)]))
        halves = {"train_rows": 20, "validation_rows": 10, "test_rows": 10}
        fair, leaking = (cut(twice, spec(protocol=p, **halves)) for p in ("dev1-dev2", "dev2-dev2"))
        assert fair.train == leaking.train and fair.dropped == leaking.dropped == 4
        assert fair.tests == leaking.tests and len(fair.validation) == len(leaking.validation) == 10


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_leaky_says_whether_validation_and_test_overlap(protocol: str) -> None:
    task = cut(source(), spec(protocol=protocol, test_rows=10, validation_rows=10))
    assert task.leaky == bool(set(task.validation.keys()) & set(task.tests["test"].keys()))
    assert not set(task.train.keys()) & {*task.validation.keys(), *task.tests["test"].keys()}


def test_rows_that_stand_in_a_later_part_are_dropped_or_refused() -> None:
    texts = ["  TEST  3 ", "twin", *(f"train {i}" for i in range(97)), "Twin"]  # the last is in validation
    repeated = source(train=Examples(texts, None, [i % 2 for i in range(100)]))
    task = cut(repeated, spec())
    assert task.dropped == 2 and len(task.train) == 88 and "twin" not in task.train.texts
    with pytest.raises(InputError, match="2 rows also stand in a later part"):
        cut(repeated, spec(leaks="refuse"))


def test_a_pair_is_the_same_example_only_if_both_texts_are() -> None:
    train = Examples(["a"] * 20, [str(i) for i in range(20)], [i % 2 for i in range(20)])
    test = Examples(["A", "a"], ["0", "other"], [0, 1])
    assert cut(Source(train, {"test": test}, ("n", "p")), spec()).dropped == 1


def test_a_small_sample_is_a_part_of_a_larger_one_and_keeps_the_order() -> None:
    small, large = (cut(source(), spec(train_rows=n, validation_rows=5, test_rows=7)) for n in (20, 40))
    assert (len(small.train), len(large.train), len(small.validation), len(small.tests["test"])) == (20, 40, 5, 7)
    assert set(small.train.texts) < set(large.train.texts)
    numbers = [int(text.split()[1]) for text in large.train.texts]
    assert numbers == sorted(numbers) and small.tests == large.tests and small.validation == large.validation
    other = cut(source(), spec(train_rows=20, validation_rows=5, test_rows=7, split_seed=1))
    assert other.train != small.train and other.validation != small.validation and other.tests != small.tests


def test_out_of_domain_tests_stand_beside_the_own_one_and_leak_nothing() -> None:
    other = Examples(["train 5", "elsewhere"], None, [1, 0])
    task = cut(source(), spec(out_of_domain=("amazon",)), {"amazon": other})
    assert list(task.tests) == ["test", "amazon"] and "train 5" not in task.train.texts and task.dropped == 1


def test_a_local_copy_of_a_task_is_tested_on_another_task_too(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str | None] = []

    def named(task: Named, folder: str | None = None) -> Source:
        read.append(folder)
        return source()

    elsewhere = Source(examples("elsewhere", 50), {}, ("n", "p"))
    monkeypatch.setattr(sources, "named", named)
    monkeypatch.setattr(sources, "indexed", lambda name, say: elsewhere)
    task = load(TaskSpec("sst2", path="/mine", out_of_domain=("amazon",)))
    assert read == ["/mine"] and len(task.tests["amazon"]) == 10


def test_another_task_is_cut_as_this_one_and_has_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"movie": ("n", "p"), "amazon": ("n", "p"), "tweets": ("p", "n")}
    monkeypatch.setattr(sources, "indexed", lambda name, say: Source(examples(name, 50), {}, names[name]))
    first, second = (load(spec(held_out=0.5, split_seed=s, out_of_domain=("amazon",))).tests["amazon"] for s in (0, 1))
    assert len(first) == 25 and first != second
    with pytest.raises(InputError, match="out_of_domain 'tweets' has the classes"):
        load(spec(out_of_domain=("tweets",)))


def test_one_table_is_cut_by_a_seed(tiny_csv: Path) -> None:
    first, second = (load(TaskSpec("t", file=str(tiny_csv), split_seed=s)) for s in (0, 1))
    assert len(first.tests["test"]) == 60 and first.tests != second.tests
    assert load(TaskSpec("t", file=str(tiny_csv))).train == first.train


def test_a_file_is_no_known_task_whatever_its_name(tiny_csv: Path) -> None:
    assert load(TaskSpec("cola", file=str(tiny_csv))).primary == "accuracy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "dev3"}, "protocol is 'dev3'; accepted: train-split, dev1-dev2"),
        ({"leaks": "keep"}, "leaks is 'keep'"),
        ({"train_rows": 0}, "train_rows is 0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"out_of_domain": ("amazn",)}, "unknown task 'amazn'"),
        ({"primary": "f2"}, "primary is 'f2'; accepted: accuracy, f1, matthews"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cut(source(), spec(**changes))


def test_an_unknown_task_and_an_empty_split_are_named() -> None:
    with pytest.raises(InputError, match="unknown task 'moive'; known are cola, .*`dataset`; did you mean 'movie'"):
        TaskSpec("moive")
    with pytest.raises(InputError, match="the train part is empty"):
        cut(source(train=examples("train", 1)), spec())
    with pytest.raises(InputError, match="the test part is empty"):
        cut(source(test=examples("test", 0)), spec())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"path": "/mine"},
            "path is '/mine', and nothing reads it: .* the package index, with which held_out",
        ),
        ({"text": "words"}, "text is 'words', and nothing reads it"),
        ({"file": "a.csv", "dataset": "d"}, "dataset is 'd', and nothing reads it: the texts come from file"),
        ({"dataset": "d", "path": "/mine"}, "path is '/mine', and nothing reads it: the texts come from dataset"),
        ({"name": "rte", "held_out": 0.5}, "held_out is 0.5, .* GLUE or SuperGLUE, with which path may stand"),
    ],
)
def test_a_key_that_nothing_reads_is_named(keys: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TaskSpec(**{"name": "movie"} | keys)
