"""What `petune report` predicts, against the same count on real tensors, known peaks and real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn
from transformers import AutoConfig
from typer.testing import CliRunner

from petune_kernels.cli import app
from petune_kernels.meta import Values
from petune_kernels.studies import footprint, measure, plots, report
from petune_kernels.studies.errors import InputError

SMALL = dict(vocab_size=211, num_hidden_layers=3, hidden_size=96, num_attention_heads=4, intermediate_size=160)
CONFIGS = {
    "bert": SMALL,
    "roberta": SMALL | dict(pad_token_id=1),
    "llama": SMALL | dict(num_key_value_heads=2, attention_dropout=0.1),
    "qwen3": SMALL | dict(num_key_value_heads=2, head_dim=24),  # no dropout: torch's fused attention
    "gpt2": dict(vocab_size=211, n_layer=3, n_embd=96, n_head=4, n_inner=160),
}
LORA = {"r": 4, "dropout": 0.1, "targets": "all-linear"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name, sizes in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        AutoConfig.for_model(name, **sizes).save_pretrained(folder)
        found[name] = str(folder)
    return found


def counted(settings: report.Settings, level: str) -> int:
    """Saved bytes of a real model."""
    model, _ = report.build(settings, level, torch.device("cpu"))
    batch = report.make_batch(settings, model, torch.device("cpu"))
    apart = [*model.parameters(), *model.buffers(), *batch.values()]
    return measure.saved_bytes(lambda: report.loss_of(model, batch), apart)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("level", report.LEVELS)
@pytest.mark.parametrize("family", CONFIGS)
def test_saved_bytes_are_those_of_the_real_model(folders, family: str, level: str, padded: bool) -> None:
    if (family, level) == ("gpt2", "coded"):
        pytest.skip("GPT-2 has no feed-forward block that a pattern knows")
    cases = [("layernorm", {}, "bfloat16"), ("full", {}, "float32")]
    cases += [] if family == "gpt2" else [("lora", LORA, "bfloat16")]  # its projections are no nn.Linear
    for regime, options, dtype in cases:
        settings = report.Settings(folders[family], regime, options, 4, 24, dtype, padded=padded)
        found, wanted = report.predict(settings, level), counted(settings, level)
        assert found.saved == pytest.approx(wanted, rel=0.005), regime
        assert found.saved == sum(found.groups.values()) == sum(found.layers) + found.outside
        assert found.groups.get("other", 0) <= 0.03 * found.saved, found.groups


@pytest.mark.parametrize(
    ("regime", "options", "width"),
    [("layernorm", {}, 22.1), ("bitfit", {}, 22.1), ("full", {}, 34.1)],
)
def test_on_cuda_a_bert_layer_keeps_what_is_known(regime: str, options: dict, width: float) -> None:
    """The published account of eager PyTorch: flash attention, masks of a byte; bytes per token and hidden unit."""
    settings = report.Settings("bert-base", regime, options, 2, 128, "bfloat16", device="cuda")
    found = report.predict(settings, report.STOCK)
    assert found.layers[5] / (2 * 128 * 768) == pytest.approx(width, abs=0.05)


class Chain(nn.Module):
    """x -> exp(x w) -> exp -> mean: each exp saves its result, the product nothing but x while w trains."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w).exp().exp()


def test_the_peak_of_a_known_step() -> None:
    with torch.device("meta"), (values := Values()):
        model, x = Chain(), torch.randn(1000, 64, device="cpu").to("meta")
        found = footprint.follow(model, [], {"x": x}, lambda m, b: m(b["x"]).mean(), values)
    row, square = 1000 * 64 * 4, 64 * 64 * 4
    assert found.weights == found.gradients == square and found.saved == 2 * row
    assert abs(found.optimizer - 2 * square) < 100  # AdamW's two averages, and its count of steps
    # Going back through the outer exp: both results, the gradient that comes in and the one that goes out.
    assert found.peak["transients"] == pytest.approx(2 * row, abs=2000)
    assert found.rise == pytest.approx(4 * row, rel=0.01)
    assert found.total == pytest.approx(4 * row + 3 * square + row, rel=0.01)  # with x


def test_labels_of_a_patched_bert(folders) -> None:
    found = report.predict(report.Settings(folders["bert"], "layernorm", {}, 4, 24), "exact")
    row = 4 * 24 * 96 * 4
    assert found.groups["q k v"] == 2 * 3 * row  # nothing trains before the first layer's attention
    assert found.groups["feed-forward u"] >= 3 * 4 * 24 * 160 * 4
    assert row * 2 * 3 <= found.groups["norm rows"] <= 1.2 * row * 2 * 3
    assert "attention scores" not in found.groups and found.layers[0] < found.layers[1] == found.layers[2]


def test_a_language_model_and_a_vision_model_are_followed(folders) -> None:
    lm = report.predict(report.Settings(folders["gpt2"], "full", {}, 2, 16, head="causal-lm"), "exact")
    assert lm.outside >= 2 * 16 * 211 * 4  # the logits
    wanted = counted(report.Settings(folders["gpt2"], "full", {}, 2, 16, head="causal-lm"), "exact")
    assert lm.saved == pytest.approx(wanted, rel=0.005)
    vit = report.run(report.Settings("vit", "layernorm", {}, 1, 16, levels=["exact"]), False, Console(quiet=True))
    assert vit["settings"]["length"] == 14 * 14  # patches of 16 x 16 of 224 x 224
    found = vit["levels"]["exact"]["predicted"]
    assert len(found["layers"]) == 12 and found["saved"] > 0


@pytest.mark.parametrize("model", ["clip", "whisper", "wav2vec2"])
def test_a_model_of_other_inputs_is_refused(model: str) -> None:
    with pytest.raises(InputError, match=f"{model} reads .* accepted: models of token ids, or of images alone"):
        report.run(report.Settings(model), False, Console(quiet=True))
    with pytest.raises(InputError, match="--padded: vit reads images of one size"):
        report.run(report.Settings("vit", padded=True), False, Console(quiet=True))


def test_a_size_that_no_machine_here_holds() -> None:
    found = report.predict(report.Settings("llama", "lora", {"r": 8}, 8, 1024, "bfloat16"), "exact")
    assert found.weights > 12e9 and found.total > 30e9


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the high-water mark cannot be reset here")
@pytest.mark.parametrize("level", ["stock", "exact", pytest.param("checkpoint", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("regime", "dtype"),
    [("layernorm", "float32"), ("lora", "float32"), pytest.param("lora", "bfloat16", marks=pytest.mark.slow)],
)
def test_the_peak_is_that_of_a_real_process(tmp_path: Path, regime: str, dtype: str, level: str) -> None:
    AutoConfig.for_model("bert", **SMALL | dict(hidden_size=256, intermediate_size=1024)).save_pretrained(tmp_path)
    settings = report.Settings(str(tmp_path), regime, LORA if regime == "lora" else {}, 16, 128, dtype)
    found = report.predict(settings, level)
    measured = measure.fresh_process(report.run_step, settings, level, True)
    assert found.saved == pytest.approx(measured["saved"], rel=0.02)
    assert found.rise == pytest.approx(measured["rise"], rel=0.1)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the high-water mark cannot be reset here")
def test_the_peak_of_a_small_step_is_that_of_a_real_process(tmp_path: Path) -> None:
    """Most of its blocks are of 64 or 256 KiB, which glibc must give back, too."""
    AutoConfig.for_model("bert", **SMALL | dict(hidden_size=256, intermediate_size=1024)).save_pretrained(tmp_path)
    settings = report.Settings(str(tmp_path), "layernorm", {}, 2, 32)
    measured = measure.fresh_process(report.run_step, settings, "stock", True)
    assert report.predict(settings, "stock").rise == pytest.approx(measured["rise"], rel=0.1)


def test_what_was_measured_lies_inside_the_picture_and_under_the_label() -> None:
    figure = Figure()
    axes = figure.subplots()
    plots._stacks(axes, "", {"stock": {"weights": 10 << 20}}, {"stock": 20 << 20})
    (label,) = axes.texts
    assert axes.get_ylim()[1] > 20 and label.xy == (0, 20) and label.get_text() == "10"


def run(*arguments: str):
    return CliRunner().invoke(app, ["report", *arguments], env={"COLUMNS": "160"})


def test_the_command_writes_a_result_and_its_picture(folders, tmp_path: Path) -> None:
    lora = ["--regime", "lora", "--option", "r=4", "--option", "targets=all-linear"]
    sizes = ["--batch", "2", "--length", "16", "--memory", "recompute", "--memory", "stock"]
    shown = run(folders["bert"], *lora, *sizes, "--measure", "--out", str(tmp_path))
    assert shown.exit_code == 0, shown.output
    (path,) = tmp_path.glob("report-*.json")
    result = json.loads(path.read_text())
    assert list(result["levels"]) == ["recompute", "stock"]
    assert result["settings"]["options"] == {"r": 4, "targets": "all-linear"}
    for row in result["levels"].values():
        assert row["predicted"]["saved"] == pytest.approx(row["measured"]["saved"], rel=0.02)
        assert row["measured"]["rise"] > 0 and row["measured"]["rise_given_back"] > 0
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert re.search(r"feed-forward u .*\d", shown.output) and "predicted is off by" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "'nothing' is neither a local folder"),
        (["bert-base", "--length", "513"], "--length is 513, but the model takes at most 512"),
        (["bert-base", "--regime", "eh-ft"], "--regime eh-ft has stages"),
        (["bert-base", "--regime", "mixout"], "changes the update itself"),
        (["bert-base", "--regime", "child-tuning-d"], "cannot be followed"),
        (["bert-base", "--regime", "lora", "--option", "rank=4"], "has no option 'rank'"),
        (["bert-base", "--head", "qa"], "--head is 'qa'; accepted: auto"),
        (["bert-base", "--dtype", "float16"], "--dtype is 'float16'; accepted: float32, bfloat16"),
        (["bert-base", "--memory", "none"], "--memory is 'none'"),
        (["bert-base", "--device", "cuda", "--measure"], "PyTorch sees no NVIDIA GPU"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    shown = run(*arguments, "--out", str(tmp_path))
    assert shown.exit_code == 2 and message in shown.output, shown.output


def test_what_a_model_cannot_do_without_values_is_said(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_a_value(model: nn.Module, batch: dict) -> torch.Tensor:
        loss = model(**batch).loss
        if bool((loss > 0).any()):
            loss = 2 * loss
        return loss

    monkeypatch.setattr(report, "loss_of", read_a_value)
    with pytest.raises(InputError, match="cannot be followed without values"):
        report.predict(report.Settings(folders["bert"]), "exact")


def test_a_level_that_does_not_fit_is_named(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    import petune_kernels as pk

    def refuse(model: nn.Module, **kwargs) -> None:
        raise pk.PatchError("it does not fit")

    monkeypatch.setattr(pk, "patch", refuse)
    settings = report.Settings(folders["bert"], levels=("stock", "exact"), batch=2, length=16)
    found = report.run(settings, False, Console(quiet=True))
    assert list(found["levels"]) == ["stock"] and found["refused"] == {"exact": "it does not fit"}
    with pytest.raises(InputError, match="--memory exact: it does not fit"):
        report.run(dataclasses.replace(settings, levels=("exact",)), False, Console(quiet=True))
