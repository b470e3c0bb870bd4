"""tune and counts: the paper's table, options, errors, reports."""

from __future__ import annotations

import io

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, T5Config, T5ForConditionalGeneration

from petune_kernels.regimes import TuneReport, counts, regimes, tune

PAPER = {  # Transferability of Transformer Modules, for BERT base with 2 labels
    "full": (109_483_778, 100),
    "ffn": (56_669_184, 51.76),
    "attention": (28_348_416, 25.89),
    "layernorm": (36_864, 0.0337),
    "layernorm-attention": (18_432, 0.0168),
    "layernorm-ffn": (18_432, 0.0168),
    "bitfit": (101_376, 0.0926),
    "random": (36_864, 0.0337),
    "frozen": (1_538, 0.0014),
}


@pytest.fixture(scope="module")
def bert_base() -> BertForSequenceClassification:
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig())


def states(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters()}


def trained(model: nn.Module) -> set[str]:
    return {n for n, on in states(model).items() if on}


@pytest.mark.parametrize("regime", PAPER)
def test_counts_of_the_paper(bert_base, regime: str) -> None:
    table = counts(bert_base)
    assert table.total == 109_483_778
    count, percent = PAPER[regime]
    assert table[regime].count == count
    assert table[regime].percent == pytest.approx(percent, abs=5e-3 if percent > 1 else 5e-5)


@pytest.mark.parametrize("regime", [r for r in PAPER if r != "random"])
def test_tune_reports_the_papers_counts(bert_base, regime: str) -> None:
    report = tune(bert_base, regime)
    assert report.total == 109_483_778
    assert report.count == (0 if regime == "frozen" else PAPER[regime][0])
    assert report.percent == pytest.approx(100 * report.count / report.total)
    assert report.head_count == 1_538
    numel = sum(p.numel() for p in bert_base.parameters() if p.requires_grad)
    assert report.trainable == numel == (report.count + (0 if regime == "full" else 1_538))


def test_counts_of_one_layer_and_with_embedding_norm(bert_base) -> None:
    assert counts(bert_base, layers=[7])["layernorm"].count == 3_072
    assert counts(bert_base, layers=[7])["random"].count == 3_072
    assert counts(bert_base, embedding_norm=True)["layernorm"].count == 38_400
    assert counts(bert_base, embedding_norm=True)["bitfit"].count == 101_376 + 768
    assert counts(bert_base, embedding_norm=True)["ffn"].count == 56_669_184
    assert tune(bert_base, "layernorm", layers=[7]).count == 3_072
    assert tune(bert_base, "layernorm", embedding_norm=True).count == 38_400


def test_counts_changes_nothing(bert_base) -> None:
    tune(bert_base, "ffn", layers=[2], train_head=False)
    before = states(bert_base)
    counts(bert_base)
    assert states(bert_base) == before and any(before.values()) and not all(before.values())


def test_counts_says_why_a_regime_is_empty() -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(num_layers=1))
    row = counts(model)["bitfit"]
    assert row.count == 0 and "matches nothing" in row.note
    with pytest.raises(KeyError, match="nonsense"):
        counts(model)["nonsense"]


def test_regimes_lists_them_all(bert_base) -> None:
    assert list(regimes()) == list(PAPER) == [row.regime for row in counts(bert_base)]
    assert all(regimes().values())


def test_layers_restrict_the_blocks(small_bert) -> None:
    model = small_bert()
    report = tune(model, "attention", layers=[1])
    assert trained(model) == set(report.names) | {"classifier.weight", "classifier.bias"}
    assert {n.split(".")[3] for n in report.names} == {"1"}
    assert report.per_layer == (0, report.count)
    assert tune(model, "attention", layers=range(2)).count == 2 * report.count


def test_full_with_layers_is_those_blocks(small_bert) -> None:
    model = small_bert()
    report = tune(model, "full", layers=(0,))
    assert trained(model) == {n for n, _ in model.named_parameters() if ".layer.0." in n or "classifier" in n}
    assert report.pooler == "frozen"


def test_encoder_blocks_come_before_decoder_blocks() -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(num_layers=2, num_decoder_layers=3))
    assert len(tune(model, "layernorm").per_layer) == 5
    assert all(n.startswith("encoder.block.1.") for n in tune(model, "layernorm", layers=[1]).names)
    assert all(n.startswith("decoder.block.0.") for n in tune(model, "layernorm", layers=[2]).names)
    assert [n.split(".")[1] for n in tune(model, "layernorm-ffn", layers=[4]).names] == ["block"]


def test_head_and_pooler_options(small_bert) -> None:
    model = small_bert()
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    head = {"classifier.weight", "classifier.bias"}
    report = tune(model, "bitfit", train_head=False)
    assert trained(model) == set(report.names) and report.head_names == () and report.pooler == "frozen"
    report = tune(model, "bitfit", train_pooler=True)
    assert trained(model) == set(report.names) | head | pooler and report.pooler == "trained"
    assert report.trainable == report.count + report.head_count + 16 * 17
    tune(model, "frozen", train_head=False, train_pooler=True)
    assert trained(model) == pooler
    assert tune(model, "full").pooler == "trained" and all(states(model).values())
    tune(model, "full", train_head=False)
    assert trained(model) == set(states(model)) - head


def test_embedding_norm_option(small_bert) -> None:
    model = small_bert()
    norm = {"bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"}
    for regime in ("layernorm", "layernorm-attention", "layernorm-ffn"):
        without = set(tune(model, regime).names)
        assert set(tune(model, regime, embedding_norm=True).names) == without | norm
    without = set(tune(model, "bitfit").names)
    assert set(tune(model, "bitfit", embedding_norm=True).names) == without | {"bert.embeddings.LayerNorm.bias"}
    report = tune(model, "layernorm", layers=[0], embedding_norm=True)
    assert report.count == 64 + 32 and report.per_layer == (64, 0)


def test_parameters_stay_the_same_objects(small_bert) -> None:
    model = small_bert()
    before = dict(model.named_parameters())
    for regime in regimes():
        tune(model, regime)
        now = dict(model.named_parameters())
        assert all(now[n] is p for n, p in before.items())
    tune(model, "full")
    assert list(dict(model.named_parameters())) == list(before)


def test_tune_prints_nothing(small_bert, capfd) -> None:
    tune(small_bert(), "random")
    assert capfd.readouterr() == ("", "")


def test_report_prints(small_bert) -> None:
    report = tune(small_bert(), "layernorm")
    assert isinstance(report, TuneReport)
    console = Console(file=io.StringIO(), width=100)
    console.print(report)
    for text in (str(report), console.file.getvalue()):  # type: ignore[attr-defined]
        for part in ("layernorm", "128 of ", "2 of 2: 0-1", "34 in 2 tensors", "pooler", "frozen", "162"):
            assert part in text
    assert "not trained" in str(tune(small_bert(), "ffn", train_head=False))
    assert "3 of 5: 0-1, 4" in str(tune(small_bert(num_hidden_layers=5), "ffn", layers=[4, 0, 1]))


def test_count_table_prints(bert_base) -> None:
    table = counts(bert_base)
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    for text in (str(table), console.file.getvalue()):  # type: ignore[attr-defined]
        for part in ("BertForSequenceClassification", "109,483,778", "56,669,184", "0.0926", "1,538", "frozen"):
            assert part in text


WRONG_TYPES = [
    ({"model": "bert"}, "model: an object of type str"),
    ({"regime": 3}, "regime: 3 of type int"),
    ({"layers": 1}, "layers: 1 of type int"),
    ({"layers": "01"}, "layers: '01' of type str"),
    ({"layers": [0.0]}, "layers: 0.0 of type float"),
    ({"layers": [True]}, "layers: True of type bool"),
    ({"train_head": 1}, "train_head: 1 of type int"),
    ({"train_pooler": None}, "train_pooler: None"),
    ({"embedding_norm": "yes"}, "embedding_norm: 'yes'"),
    ({"seed": 0.5}, "seed: 0.5"),
    ({"regime": "random", "budget": 1e3}, "budget: 1000.0"),
    ({"regime": "random", "budget": True}, "budget: True"),
    ({"regime": "random", "fraction": "1"}, "fraction: '1'"),
]
WRONG_VALUES = [
    ({"regime": "lora"}, "regime: 'lora' is unknown.*full, ffn, attention.*frozen"),
    ({"layers": [0, 2]}, r"layers: \[2\] out of range; the model has blocks 0 to 1"),
    ({"layers": [-1]}, r"layers: \[-1\] out of range"),
    ({"layers": [1, 1]}, r"layers: \[1, 1\] names a block twice"),
    ({"layers": []}, "layers: an empty list"),
    ({"regime": "frozen", "layers": [0]}, "layers: regime 'frozen' trains no block"),
    ({"regime": "frozen", "train_head": False}, "nothing would train"),
    ({"regime": "ffn", "embedding_norm": True}, "embedding_norm: regime 'ffn'"),
    ({"regime": "full", "embedding_norm": True}, "embedding_norm: regime 'full'"),
    ({"seed": -1}, "seed: -1"),
    ({"budget": 5}, "only regime 'random'"),
    ({"fraction": 0.5}, "only regime 'random'"),
    ({"regime": "random", "budget": 0}, "budget: 0 was given; the chosen blocks have 1 to 4,"),
    ({"regime": "random", "budget": 10**6, "layers": [0]}, "budget: 1,000,000 was given"),
    ({"regime": "random", "fraction": 0.0}, "fraction: 0.0"),
    ({"regime": "random", "fraction": 1.5}, "fraction: 1.5"),
    ({"regime": "random", "fraction": 0.5, "budget": 3}, "give one of the two"),
    ({"regime": "random", "embedding_norm": True}, "embedding_norm: regime 'random'"),
]


@pytest.mark.parametrize("first", ["ffn", "random"])
@pytest.mark.parametrize(
    ("error", "given", "message"),
    [(TypeError, *case) for case in WRONG_TYPES] + [(ValueError, *case) for case in WRONG_VALUES],
)
def test_errors_change_nothing(small_bert, first: str, error: type, given: dict, message: str) -> None:
    model = small_bert()
    tune(model, first, train_pooler=True)
    before = states(model)
    with pytest.raises(error, match=message):
        tune(**{"model": model, "regime": "layernorm", **given})
    assert states(model) == before


def test_no_pooler() -> None:
    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=1), add_pooling_layer=False)
    with pytest.raises(ValueError, match="train_pooler.*no pooler"):
        tune(model, "ffn", train_pooler=True)
    assert tune(model, "ffn").pooler == "none"
    assert tune(model, "ffn").head_names == ()


def test_no_embedding_norm() -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(num_layers=1))
    with pytest.raises(ValueError, match="embedding_norm: .*no norm before its blocks"):
        tune(model, "layernorm", embedding_norm=True)


def test_no_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    for call in (lambda: tune(model, "full"), lambda: counts(model)):
        with pytest.raises(ValueError, match="no transformer blocks in Sequential.*Linear, ReLU"):
            call()


def test_no_match_lists_what_there_is() -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(num_layers=1))
    with pytest.raises(
        ValueError, match="'bitfit' matches nothing.*12 attention linear.*3 attention norm.*4 ffn linear"
    ):
        tune(model, "bitfit")


@pytest.mark.parametrize(
    "config",
    [LoraConfig(task_type="SEQ_CLS"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)],
)
def test_peft_has_already_chosen(small_bert, config) -> None:
    model = get_peft_model(small_bert(), config)
    before = states(model)
    with pytest.raises(ValueError, match="PEFT configuration has already chosen"):
        tune(model, "layernorm")
    assert states(model) == before


def test_peft_layers_inside_a_plain_model(small_bert) -> None:
    inner = get_peft_model(small_bert(), LoraConfig(task_type="SEQ_CLS")).base_model.model
    with pytest.raises(ValueError, match="PEFT configuration has already chosen"):
        counts(inner)


def test_integer_weights_are_left_alone(small_bert) -> None:
    model = small_bert()
    for layer in model.bert.encoder.layer:
        dense = layer.intermediate.dense
        dense.weight = nn.Parameter(dense.weight.detach().to(torch.int8), requires_grad=False)
    assert {n.split(".", 4)[4] for n in tune(model, "ffn").names} == {
        "intermediate.dense.bias",
        "output.dense.weight",
        "output.dense.bias",
    }
    assert not any("intermediate.dense.weight" in n for n in tune(model, "full").names)
    assert not any("intermediate.dense.weight" in n for n in tune(model, "random", fraction=0.9).names)
