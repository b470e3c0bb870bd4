"""Runs that can be compared, and the gate that compares them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config

import petune_kernels as pk
from petune_kernels.studies import measure, train
from petune_kernels.studies.errors import InputError

CPU = torch.device("cpu")


def batches(seed: int = 0, rows: int = 8, length: int = 12) -> Iterator[train.Batch]:
    """Endless batches with padding, whose label is the parity of the first token."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(5, 17, (rows, length), generator=draw)
        mask = torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=draw)
        yield {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids[:, 0] % 2}


def pair(folder: Path, regime: str = "layernorm", dtype: torch.dtype = torch.float32, dropout: bool = True):
    models = {name: train.load_model(folder, 2, 0, dtype, CPU, dropout) for name in ("stock", "patched")}
    for model in models.values():
        pk.tune(model, regime)
    pk.patch(models["patched"])
    return models


@pytest.mark.parametrize("regime", ["layernorm", "bitfit", "full", "random"])
def test_without_dropout_losses_are_equal_to_rounding_over_50_steps(tiny_model: Path, regime: str) -> None:
    models = pair(tiny_model, regime, dropout=False)
    runs = {name: train.Run(model, batches(), 50, 1e-3, seed=0) for name, model in models.items()}
    measure.interleave({name: run.step for name, run in runs.items()}, 50)
    stock, patched = runs["stock"].losses, runs["patched"].losses
    assert len(stock) == 50 and len(set(stock)) > 40  # it trains on other batches every step
    assert max(abs(a - b) for a, b in zip(stock, patched, strict=True)) < 1e-5


def test_with_dropout_a_run_repeats_itself_whatever_runs_beside_it(tiny_model: Path) -> None:
    def losses(beside: bool) -> list[float]:
        models = pair(tiny_model)
        runs = {n: train.Run(m, batches(), 6, 1e-3, 0) for n, m in models.items() if n == "patched" or beside}
        measure.interleave({name: run.step for name, run in runs.items()}, 6)
        return runs["patched"].losses

    assert losses(beside=True) == losses(beside=False)


def test_a_run_is_adamw_with_warm_up_and_decay(tiny_model: Path) -> None:
    ours, plain = (train.load_model(tiny_model, 2, 0, torch.float32, CPU, dropout=False) for _ in range(2))
    run, stream = train.Run(ours, batches(), 20, 1e-3, seed=0), batches()
    optimizer = torch.optim.AdamW(plain.parameters())
    expected = []
    for rate in [0.5e-3, 1e-3, 1e-3, 17 / 18 * 1e-3, 16 / 18 * 1e-3]:  # two steps of warm-up, then down to 0 in 18
        run.step()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = plain(**next(stream)).loss
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert run.losses == pytest.approx(expected, rel=1e-6)
    weights = zip(ours.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in weights)


def test_the_norm_of_all_gradients_together_is_clipped() -> None:
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    updates = train.Updates([([a], 1.0), ([b], 1.0)], 10, clip=1.0)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    updates.apply()
    first = [updates.optimizer.state[p]["exp_avg"].item() for p in (a, b)]  # a tenth of the gradient
    assert first == pytest.approx([0.06, 0.08])


def test_no_step_has_the_dropout_of_another_seeds_step(tiny_model: Path) -> None:
    seen = []
    for seed in (0, 1, 2):
        run = train.Run(pair(tiny_model)["stock"], batches(), 4, 1e-3, seed)
        for _ in range(3):
            run.step()
            seen.append(torch.initial_seed())
    assert len(set(seen)) == 9


def test_a_loss_is_computed_in_float32_or_better() -> None:
    labels = torch.tensor([0, 2, 1, 1])
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        logits = torch.randn(4, 3).to(dtype)
        loss, _ = train.loss_of(lambda logits=logits: SimpleNamespace(logits=logits), {"labels": labels})  # type: ignore
        assert torch.equal(loss, F.cross_entropy(logits.to(wide), labels))


def test_a_run_trains_what_the_regime_says_and_nothing_else(tiny_model: Path) -> None:
    model = pair(tiny_model)["stock"]
    before = copy.deepcopy(model.state_dict())
    run = train.Run(model, batches(), 4, 1e-2, 0)
    run.step()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trained and any("LayerNorm" in name for name in trained)


def test_bfloat16_keeps_what_is_below_its_resolution(tiny_model: Path) -> None:
    model = pair(tiny_model, dtype=torch.bfloat16)["stock"]
    norm = model.bert.encoder.layer[1].output.LayerNorm.weight
    run = train.Run(model, batches(), 40, 1e-3, 0)
    for _ in range(30):  # each step is below 2^-8, bfloat16's resolution at 1, where gamma starts
        run.step()
    assert norm.dtype == torch.bfloat16 and (norm - 1).abs().max() >= 2**-7


def test_the_head_depends_on_the_seed_and_dropout_can_be_left_out(tiny_model: Path) -> None:
    first, again, other = (train.load_model(tiny_model, 3, s, torch.float32, CPU, dropout=False) for s in (0, 0, 1))
    assert first.classifier.weight.equal(again.classifier.weight)
    assert not first.classifier.weight.equal(other.classifier.weight)
    assert first.bert.pooler.dense.weight.equal(other.bert.pooler.dense.weight)
    assert first.training and first.classifier.weight.shape == (3, 32)
    rates = {m.p for m in first.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.0}
    with_dropout = train.load_model(tiny_model, 2, 0, torch.float32, CPU)
    assert {m.p for m in with_dropout.modules() if isinstance(m, nn.Dropout)} == {0.1}
    config = GPT2Config()
    train.without_dropout(config)
    assert config.embd_pdrop == config.attn_pdrop == config.resid_pdrop == config.summary_first_dropout == 0


def test_a_head_in_the_folder_does_not_take_the_seeds_place(tiny_model: Path) -> None:
    first, again, other = (train.load_model(tiny_model, 2, s, torch.float32, CPU) for s in (0, 0, 1))  # has 2 labels
    assert first.classifier.weight.equal(again.classifier.weight)
    assert not first.classifier.weight.equal(other.classifier.weight)
    body = first.bert.state_dict()
    assert all(value.equal(body[name]) for name, value in other.bert.state_dict().items())


def test_accuracy_counts_every_row_once_and_leaves_the_mode(tiny_model: Path) -> None:
    model = pair(tiny_model)["stock"]
    stream = batches()
    some = [next(stream), next(batches(1, rows=3))]
    with torch.no_grad():
        right = sum(int((model.eval()(**b).logits.argmax(-1) == b["labels"]).sum()) for b in some)
    model.train()
    assert train.accuracy(model, iter(some)) == right / 11
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", ["layernorm", "bitfit", "full", "frozen"])
def test_the_gate_passes_the_patched_model(tiny_model: Path, regime: str, dtype: torch.dtype) -> None:
    models = pair(tiny_model, regime, dtype)
    found = train.deviations(models["stock"], models["patched"], next(batches()))
    assert [row for row in found if not row.within] == []
    gradients = {row.name.removeprefix("gradient of ") for row in found} - {"loss", "logits"}
    assert gradients == {name for name, p in models["stock"].named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_the_gate_takes_few_sampled_scalars_together(tiny_model: Path, seed: int, dtype: torch.dtype) -> None:
    """Of one number stock may be right by chance; five of six seeds failed so. A wrong one is seen all the same."""
    torch.manual_seed(seed)
    stock = train.load_model(tiny_model, 2, seed, dtype, CPU, True)
    pk.tune(stock, "random", seed=seed)
    patched = copy.deepcopy(stock)
    pk.patch(patched)
    batch = next(batches())
    assert all(row.within for row in train.deviations(stock, patched, batch))
    sampled = next(p for n, p in patched.named_parameters() if n.endswith("_sampled"))
    sampled.register_hook(lambda grad: grad + 1)
    wrong = [row.name for row in train.deviations(stock, patched, batch) if not row.within]
    assert wrong == ["gradient of all sampled scalars"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_sees_a_wrong_norm(tiny_model: Path, dtype: torch.dtype) -> None:
    models = pair(tiny_model, "layernorm", dtype)
    with torch.no_grad():
        models["patched"].bert.encoder.layer[0].output.LayerNorm.bias[:8] += 0.5
    found = train.deviations(models["stock"], models["patched"], next(batches()))
    assert "logits" in {row.name for row in found if not row.within}


def test_the_gate_sees_a_wrong_gradient_behind_right_logits(tiny_model: Path) -> None:
    models = pair(tiny_model)
    weight = models["patched"].bert.encoder.layer[0].output.LayerNorm.weight
    weight.register_hook(lambda grad: grad * 1.001)
    found = train.deviations(models["stock"], models["patched"], next(batches()))
    assert [row.name for row in found if not row.within] == ["gradient of bert.encoder.layer.0.output.LayerNorm.weight"]


def test_the_gate_sees_a_nan_and_a_missing_gradient(tiny_model: Path) -> None:
    models = pair(tiny_model)
    weight = models["patched"].bert.encoder.layer[0].output.LayerNorm.weight
    hook = weight.register_hook(lambda grad: grad * float("nan"))
    assert not all(row.within for row in train.deviations(models["stock"], models["patched"], next(batches())))
    hook.remove()
    weight.requires_grad_(False)
    with pytest.raises(InputError, match="same gradients"):
        train.deviations(models["stock"], models["patched"], next(batches()))


def test_a_loss_that_stock_has_right_by_chance_bounds_nobody(tiny_model: Path, monkeypatch) -> None:
    def numbers(loss: float, logits: list[float]) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(loss), "logits": torch.tensor(logits), "gradient of w": torch.ones(2)}

    def within(*found: dict[str, torch.Tensor]) -> list[bool]:
        made = iter(found)  # float64, ours, stock
        monkeypatch.setattr(train, "_results", lambda model, batch: next(made))
        return [row.within for row in train.deviations(models["stock"], models["patched"], {})]

    models, exact = pair(tiny_model), numbers(1.0, [1.0, 1.0])
    stock = numbers(1.0, [1.001, 0.999])
    assert within(exact, numbers(1.002, [1.001, 0.999]), stock) == [True] * 3
    assert within(exact, numbers(1.004, [1.001, 0.999]), stock) == [False, True, True]
    assert within(exact, exact, numbers(float("inf"), [1.0, 1.0])) == [False, True, True]


def test_a_folder_without_model_or_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--model {tmp_path}"):
        train.load_model(tmp_path, 2, 0, torch.float32, CPU)
    with pytest.raises(InputError, match=r"no tokenizer: none of the files tokenizer\.json, .* is there"):
        train.load_tokenizer(tmp_path)
    AutoConfig.for_model("bert").save_pretrained(tmp_path)  # of which transformers makes a tokenizer of five tokens
    with pytest.raises(InputError, match="no tokenizer: none of the files"):
        train.load_tokenizer(tmp_path)


def test_pickled_weights_are_not_read(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "pickled")
    model = train.load_model(folder, 2, 0, torch.float32, torch.device("cpu"))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded as a classifier: .*safetensors"):
        train.load_model(folder, 2, 0, torch.float32, torch.device("cpu"))


def test_a_backbone_that_is_not_whole_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """transformers fills what is missing with random values, and a "pretrained" model would depend on the seed."""
    folder = shutil.copytree(tiny_model, tmp_path / "cut")
    whole = load_file(folder / "model.safetensors")
    cut = {name: value for name, value in whole.items() if ".layer.1." not in name}
    save_file(cut, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"cut: .* missing: bert\.encoder\.layer\.1\..* and 13 more$"):
        train.load_model(folder, 2, 0, torch.float32, CPU)
    wide = BertForSequenceClassification.from_pretrained(tiny_model).config
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    wide.intermediate_size = 48
    wide.save_pretrained(folder)
    with pytest.raises(InputError, match="not the shapes of its config: .*intermediate"):
        train.load_model(folder, 2, 0, torch.float32, CPU)
    BertForMaskedLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "masked")
    with pytest.raises(InputError, match=r"missing: bert\.pooler\.dense\.bias, .*saved without the pooler"):
        train.load_model(tmp_path / "masked", 2, 0, torch.float32, CPU)
