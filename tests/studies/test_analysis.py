"""What `--analyse` says of models that are known to have changed, or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from petune_kernels.studies import analysis, runner
from petune_kernels.studies.study import parse
from petune_kernels.studies.tasks import Examples

from .test_study import CONTENT

RECIPE = {"lr": 1e-3, "steps": 3, "length": 16}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
KINDS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL,
    "deberta-v2": SMALL,
    "albert": SMALL | {"embedding_size": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40},
    "bart": {
        "d_model": 32,
        **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
        "max_position_embeddings": 40,
        **{"eos_token_id": 3, "bos_token_id": 2, "decoder_start_token_id": 3},
    },
}


def folder_of(kind: str, tiny_model: Path, to: Path) -> Path:
    """A random model of this kind with the tokenizer of the tiny one."""
    config = AutoConfig.for_model(kind, num_labels=2, vocab_size=17, pad_token_id=0, **KINDS[kind])
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(to)
    for path in tiny_model.glob("*token*"):
        shutil.copy(path, to)
    return to


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_backbones_whatever_the_head_does_with_them(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = folder_of(kind, tiny_model, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = Examples(["good film", "a bad bad plot", "dull", "great"], None, [1, 0, 0, 1])
    before = analysis.features(model, tokenizer, rows, batch=3)
    assert before.shape == (4, 32)
    base = model.base_model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith(model.base_model_prefix + "."):
                p += 1
    assert analysis.feature_change(before, analysis.features(model, tokenizer, rows, batch=3)) == 0
    if kind in ("roberta", "deberta-v2"):  # their heads read the first position alone
        inputs = tokenizer(rows.texts[:3], padding=True, return_tensors="pt")
        hidden = base(**inputs).last_hidden_state[:, 0]
        assert before[:3] == pytest.approx(hidden.detach().numpy(), abs=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_linear_probing_changes_no_features_and_no_weights(
    kind: str, tiny_model: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    runner.load_task.cache_clear()
    which = parse(
        CONTENT
        | {
            "model": str(folder_of(kind, tiny_model, tmp_path / "model")),
            "tasks": [{"name": "tiny", "file": str(tiny_csv), "train_rows": 40, "test_rows": 30}],
            "methods": [{"name": "full", "label": "FT"}, {"name": "lp"}],
            "recipe": RECIPE,
            "seeds": {"runs": 1},
        }
    )
    analysis.analyse(which, tmp_path, "cpu")
    (path,) = tmp_path.glob("analysis-*.json")
    found = json.loads(path.read_text())
    assert found["lp"]["features"] == {"train": 0, "test": 0} and not any(found["lp"]["weights"].values())
    assert min(found["FT"]["features"].values()) > 0 and any(found["FT"]["weights"].values())
    assert not any("classifier" in name for name in found["FT"]["weights"])  # a random head has changed from nothing


def test_blocks_are_those_that_a_regime_counts(tiny_model: Path, tiny_csv: Path, tmp_path: Path) -> None:
    """A decoder's blocks follow the encoder's and stand apart from them; ALBERT's layers share one block."""
    tasks = [{"name": "tiny", "file": str(tiny_csv)}]
    each = {"methods": [{"name": "layernorm", "each_layer": True}], "reference": "", "seeds": {"runs": 1}}
    for kind, blocks in (("bart", 4), ("albert", 1)):
        runner.load_task.cache_clear()
        folder = folder_of(kind, tiny_model, tmp_path / kind)
        runs = runner.plan(parse(CONTENT | each | {"model": str(folder), "tasks": tasks, "recipe": RECIPE}))
        assert [run.method.title for run in runs] == [f"layernorm #{k + 1}" for k in range(blocks)]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bart", num_labels=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight += 1
    moved = analysis._by_block(analysis.weight_change(model, before), model)
    assert [name for name, change in moved.items() if change] == ["block 4"] and len(moved) == 4
