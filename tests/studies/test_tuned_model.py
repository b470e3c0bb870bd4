"""What `petune tune` writes is loaded by the line that it prints, and nothing else loads something less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import petune_kernels.studies.adapter
from petune_kernels.studies import commands, runner, tuned_model
from petune_kernels.studies.errors import InputError

RECIPE = ["lr=1e-2", "steps=6", "length=16", "batch=8"]
SMALL = {"adapter": ["reduction=4"], "prefix": ["tokens=2"], "random": ["budget=300"]}
SMALL |= {"eh-ft": ["reserve=true", "r=2"]}


def tuned(model: Path, data: Path, folder: Path, method: str, options: list[str]) -> str:
    """Runs `petune tune` and gives the line that loads what it wrote."""
    runner.load_task.cache_clear()
    console = Console(record=True, width=500, file=(folder.parent / "log").open("w"))
    arguments = (False, options, RECIPE, 3, 4, folder, "cpu", True, False)
    commands.tune(console, str(model), method, "tiny", data, *arguments)
    line = next(line for line in console.export_text().splitlines() if line.startswith("load it with "))
    return line.removeprefix("load it with ").strip()


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    inputs = tokenizer(["good film", "the plot is dull", "a great weak plot"], padding=True, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("method", ["full", "random", "adapter", "lora", "prefix", "eh-ft"])
def test_the_printed_line_loads_the_model_that_was_scored(
    tiny_model: Path, tiny_csv: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, save, before = AutoTokenizer.from_pretrained(tiny_model), tuned_model.save, list[torch.Tensor]()

    def watched(model: Any, folder: Path) -> str:
        before.append(logits(model, tokenizer))
        return save(model, folder)

    monkeypatch.setattr(tuned_model, "save", watched)
    line = tuned(tiny_model, tiny_csv, tmp_path / "out", method, SMALL.get(method, []))
    loaded = eval(line, {"transformers": transformers, "peft": peft, "petune_kernels": petune_kernels}).eval()
    again = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    torch.testing.assert_close(logits(loaded, again), before[0], rtol=1e-4, atol=1e-5)
    untuned = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    assert not torch.allclose(before[0], logits(untuned, tokenizer), atol=1e-2)
    if method == "adapter":  # and the folder does not load as the model without its adapters
        with pytest.raises((OSError, ValueError)):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model", local_files_only=True)
        with pytest.raises(FileNotFoundError, match=r"has no bottlenecks.json"):
            petune_kernels.studies.adapter.from_pretrained(tmp_path)


def test_a_prefix_on_a_changed_model_is_refused_before_it_is_trained(
    tiny_model: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "tuned", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(
        InputError, match="method 'eh-ft': a model that has a prefix and is tuned itself cannot be saved"
    ):
        tuned(tiny_model, tiny_csv, tmp_path / "out", "eh-ft", ["reserve=true", "pet=prefix", "tokens=2"])
    assert not (tmp_path / "out").exists()
