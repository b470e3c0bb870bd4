"""Examples, metrics, and reading data sets of every kind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from petune_kernels.studies import sources
from petune_kernels.studies.cache import Member
from petune_kernels.studies.errors import InputError, StudyError
from petune_kernels.studies.splits import TaskSpec, load
from petune_kernels.studies.tasks import NAMED, Examples, TaskData, classification_metrics, regression_metrics


def one_hot(answers: list[int], classes: int = 2) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(answers), classes).float()


def test_classification_metrics_by_hand() -> None:
    truth, answers = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]  # 2 true, 1 false positives; 2 true, 1 false negatives
    found = classification_metrics(one_hot(answers), torch.tensor(truth))
    assert found == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3, "matthews": 1 / 3})
    assert classification_metrics(one_hot([0] * 6), torch.tensor(truth))["matthews"] == 0
    three = classification_metrics(one_hot([0, 1, 1], 3), [0, 1, 2])
    assert three["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)  # macro
    assert all(math.isnan(v) for v in classification_metrics(one_hot(answers) * math.nan, truth).values())


def test_regression_metrics_by_hand() -> None:
    found = regression_metrics(torch.tensor([[1.0], [2.0], [10.0]]), [1.0, 2.0, 3.0])
    assert found["spearman"] == pytest.approx(1) and found["pearson"] == pytest.approx(
        np.corrcoef([1, 2, 10], [1, 2, 3])[0, 1]
    )
    assert regression_metrics(np.zeros((3, 1)), [1.0, 2.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    with pytest.raises(InputError, match="2 predictions for 3 references"):
        regression_metrics(np.zeros((2, 1)), [1.0, 2.0, 3.0])


def data(train: Examples, test: Examples, labels: int = 2) -> TaskData:
    return TaskData(train, test, {"test": test}, labels, "pearson" if labels == 1 else "accuracy")


def test_a_task_knows_what_a_constant_answer_reaches() -> None:
    train, test = Examples(list("abc"), None, [0, 1, 1]), Examples(list("defg"), None, [1, 1, 1, 0])
    assert data(train, test).baseline == {"test": 0.75}
    turned = Examples(test.texts, None, [1 - int(label) for label in test.labels])
    assert data(train, turned).baseline == {"test": 0.75}  # by the class that is rarer in train
    scores = Examples(list("abc"), None, [0.5, 1.0, 2.0])
    assert data(scores, scores, 1).baseline == {"test": 0.0}


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, 2], 2, "row 1: the label is 2; accepted is an integer from 0 to 1"),
        ([0, -1], 2, "row 1: the label is -1"),
        ([0, 1.5], 2, "row 1: the label is 1.5"),
        ([0.5, math.nan], 1, "row 1: the label is nan; accepted is a finite number"),
        ([1, 1], 2, "one class only"),
    ],
)
def test_wrong_labels_are_refused(labels: list[float], classes: int, message: str) -> None:
    wrong = Examples(["a", "b"], None, labels)
    with pytest.raises(InputError, match=message):
        data(wrong, wrong, classes)


def test_empty_parts_and_unequal_lengths_are_refused() -> None:
    good, empty = Examples(["a", "b"], None, [0, 1]), Examples([], None, [])
    with pytest.raises(InputError, match="the validation part is empty"):
        data(good, empty)
    with pytest.raises(InputError, match="2 texts, 1 pairs and 2 labels"):
        Examples(["a", "b"], ["c"], [0, 1])


def hub_copy(folder: Path) -> Path:
    import datasets  # not above: a machine without it, as a GPU's may be, could then collect no test at all

    features = datasets.Features(
        {"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"),
         "label": datasets.ClassLabel(names=["entailment", "not_entailment"])}
    )  # fmt: skip

    def part(name: str, rows: int) -> datasets.Dataset:
        columns = {c: [f"{name} {c} {i}" for i in range(rows)] for c in ("sentence1", "sentence2")}
        return datasets.Dataset.from_dict({**columns, "label": [i % 2 for i in range(rows)]}, features=features)

    datasets.DatasetDict({"train": part("train", 40), "validation": part("dev", 20)}).save_to_disk(folder)
    return folder


def test_a_glue_task_from_a_local_copy(tmp_path: Path) -> None:
    task = load(TaskSpec("rte", path=str(hub_copy(tmp_path / "rte"))))
    assert (len(task.train), len(task.validation), len(task.tests["test"])) == (36, 4, 20)
    assert task.names == ("entailment", "not_entailment") and task.primary == "accuracy"
    assert (
        task.train.texts[0] == "train sentence1 0" and task.train.pairs and task.train.pairs[1] == "train sentence2 1"
    )
    with pytest.raises(InputError, match="no split 'validation_matched'; it has train, validation"):
        load(TaskSpec("mnli", path=str(tmp_path / "rte")))


def test_a_copy_of_data_files_has_the_classes_of_its_labels(tmp_path: Path) -> None:
    """No features say there how many classes there are; a sentence may be empty, as some of QQP's are."""

    def part(name: str, rows: int, **changes: Any) -> None:
        lines = [{"premise": f"{name} {i}", "hypothesis": "", "label": i % 3} | changes for i in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))

    part("train", 40)
    part("validation", 20)
    assert load(TaskSpec("cb", path=str(tmp_path))).names == ("0", "1", "2")
    for changes, message in (
        ({"label": "neutral"}, "split train, row 0: the label is 'neutral'; accepted is a number"),
        ({"premise": None}, "split train, row 0: no value in the column 'premise'"),
    ):
        part("train", 40, **changes), part("validation", 20, **changes)
        with pytest.raises(InputError, match=message):
            load(TaskSpec("cb", path=str(tmp_path)))


def test_any_data_set_from_a_local_copy(tmp_path: Path) -> None:
    spec = TaskSpec("mine", dataset=str(hub_copy(tmp_path / "d")), text="sentence1", pair="sentence2")
    assert len(load(spec).tests["test"]) == 20
    with pytest.raises(InputError, match="no column 'text'; the columns are sentence1"):
        load(TaskSpec("mine", dataset=str(tmp_path / "d")))


def test_what_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object) -> None:
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(StudyError, match="(?s)nyu-mll/glue.*cola.*Couldn't reach.*`path`"):
        load(TaskSpec("cola"))


def test_the_metrics_of_the_papers() -> None:
    primary = {name: task.primary for name, task in NAMED.items() if task.primary != "accuracy"}
    assert primary == {"cola": "matthews", "mrpc": "f1", "stsb": "pearson", "qqp": "f1", "cb": "f1", "multirc": "f1"}
    assert [name for name, _ in NAMED["mnli"].tests] == ["test", "mismatched"]


def test_the_named_fields_of_superglue_become_texts() -> None:
    copa = {"premise": "It rained.", "question": "effect", "choice1": "Wet.", "choice2": "Dry."}
    assert sources._COMPOSE["copa"](copa, ()) == ("It rained. What happened as a result?", "Wet. Or: Dry.")
    assert {task.compose for task in NAMED.values()} == set(sources._COMPOSE)


def test_csv_and_jsonl_with_pairs_and_scores(tmp_path: Path) -> None:
    rows = [{"a": f"first {i}", "b": f"second {i}", "y": i / 10} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n")
    (tmp_path / "rows.csv").write_text("a,b,y\n" + "\n".join(f"{r['a']},{r['b']},{r['y']}" for r in rows))
    common = {"text": "a", "pair": "b", "label_column": "y", "regression": True}
    first, second = (load(TaskSpec("s", file=str(tmp_path / f), **common)) for f in ("rows.jsonl", "rows.csv"))
    assert first.train == second.train and first.regression and first.primary == "pearson"
    assert len(first.tests["test"]) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "text,label\n", "has no rows"),
        ("x.csv", "text,label\na,0\n,1\n", "line 3: the column 'text' is empty"),
        ("x.csv", "text,label\na,0\nb,0\n", "1 different labels"),
        ("x.csv", "words,label\na,0\n", "no column 'text'; the columns are words, label"),
        ("x.jsonl", '{"text": "a", "label": 0}\n[1]\n', "line 2: expected a JSON object"),
        (
            "x.jsonl",
            '{"text": "a", "label": 0}\n{',
            "x.jsonl, line 2: no JSON: Expecting property name.* at character 2",
        ),
        (
            "x.jsonl",
            '{"text": ["a"], "label": 0}',
            "line 1: the column 'text' has .'a'.; accepted is a text or a number",
        ),
        ("x.csv", "text,label,label\na,0,1\n", "the column 'label' is there twice"),
        ("x.csv", "text,label\na,0\nb,NaN\n", "line 3: the label is NaN"),
        ("x.csv", "text,label\na,0\nb\n", "line 3: the column 'label' is empty"),
        ("x.csv", "", "is empty; expected a header"),
        ("x.csv", "text,label\nno, never,0\n", "line 2: more cells than the header has columns"),
        ("x.csv", "text,label\n" + "".join(f"a,{i}.5\n" for i in range(150)), "150 different labels"),
        ("x.csv", 'text,label\n"a,1\n', "cannot be read as a CSV file"),
        ("x.csv", "text,label\ncaf\xe9,1\n", "cannot be read as a CSV file in UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=message) as error:
        load(TaskSpec("t", file=str(tmp_path / name)))
    assert name in str(error.value)
    with pytest.raises(InputError, match="^/nowhere/x.csv does not exist$"):
        load(TaskSpec("t", file="/nowhere/x.csv"))


def test_csv_with_quotes_words_numbers_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        '\ufefftext,id,label\n"good, really\nso",1,10\nbad,2,2\nso so,3,-1\nplain,4,no\n'
    )
    found = sources.table(tmp_path / "rows.csv", "text", None, "label", False)
    assert found.names == ("-1", "2", "10", "no")  # numbers by value, then words
    assert found.train == Examples(["good, really\nso", "bad", "so so", "plain"], None, [2, 1, 0, 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1\t2.5\tgood\r\n2\tx\tbad", "line 2: expected"),
        (b"1\t2.5\r\n2\t1\tgood", "line 1: expected"),
        (b"1\t2.5\tgood", "has 1 rows, expected 2"),
    ],
)
def test_another_file_of_rated_sentences_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rated.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        sources._read_rated(tmp_path / "rated.txt", 2)


def test_rated_sentences_by_sign_and_by_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tweets.txt").write_bytes("1\t2.5\tgood\x85 day\r\n2\t0\tnothing\r\n3\t-1\tbad\r\n".encode("latin-1"))
    monkeypatch.setitem(sources.RATED_SETS, "tweets", ("tweets.txt", 3))
    monkeypatch.setattr(sources.cache, "fetch", lambda package, say: tmp_path)
    assert sources.indexed("tweets").train == Examples(["good\x85 day", "bad"], None, [1, 0])
    score = sources.indexed("tweets-score")
    assert score.train.labels == [2.5, 0.0, -1.0] and score.regression
    monkeypatch.setitem(sources.RATED_SETS, "tweets", ("tweets.txt", 4))
    with pytest.raises(InputError, match="has 3 rows, expected 4"):
        sources.indexed("tweets")


def test_comments_have_three_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 'sentiment,confidence,text\nnegative,1,"no, never"\nneutral,0.5,maybe\npositive,1,caf\xe9\n'
    (tmp_path / "comments.csv").write_bytes(rows.encode("latin-1"))
    monkeypatch.setattr(sources.cache, "fetch", lambda package, say: tmp_path)
    found = sources.indexed("comments")
    assert found.names == ("negative", "neutral", "positive")
    assert found.train == Examples(["no, never", "maybe", "caf\xe9"], None, [0, 1, 2])
    assert isinstance(sources.cache.COMMENTS.members[0], Member)
