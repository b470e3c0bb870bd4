"""Trains small models on the device of host_gpu.cpp beside the CPU, and prints what differs, a line each.

    python tests/host_gpu/steps.py LIBRARY FAMILY...

Reports of `patch`, losses and gradients, at three memory levels, for some regimes and LoRA in two precisions; two runs
packed; and regime random where the device is torch's default.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests import host_gpu  # noqa: E402  (before torch)

if __name__ == "__main__":
    host_gpu.enable(Path(sys.argv[1]))

import peft  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import petune_kernels as pk  # noqa: E402
from petune_kernels import backends  # noqa: E402
from tests.patch import models  # noqa: E402

TUNINGS = ("layernorm", "full", "random", "lora", "lora beside bfloat16")


def tuned(family: str, tuning: str) -> Any:
    model: Any = models.build(family, torch.bfloat16 if "bfloat16" in tuning else torch.float32, dropout=False)
    if not tuning.startswith("lora"):
        pk.tune(model, tuning)
        return model.train()
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_bias=False)
    return peft.get_peft_model(model, config).train()


def summary(report: Any) -> list[tuple[str, str, str]]:
    return [(entry.path, entry.pattern, entry.reason) for entry in report.entries]


def differences(family: str, tuning: str, level: str) -> Iterator[str]:
    ours = tuned(family, tuning)
    data = models.cast(models.batch(family), next(ours.parameters()).dtype)
    theirs = copy.deepcopy(ours).to("cuda")
    try:
        report = pk.patch(ours, memory=level)
    except pk.PatchError:  # no layers of transformers' kind
        return
    if summary(report) != summary(there := pk.patch(theirs, memory=level)):
        yield f"report:\n{report}\non the device:\n{there}"
    own = models.step(ours, data)
    got = models.step(theirs, {name: t.to("cuda") for name, t in data.items()})
    assert got.loss.is_cuda
    if not abs(float(got.loss) - float(own.loss)) <= (3e-2 if "bfloat16" in tuning else 1e-5) * abs(float(own.loss)):
        yield f"loss: {float(got.loss)}, not {float(own.loss)}"
    largest = max(float(g.abs().max()) for g in own.grads.values())
    allowed = largest * (0.25 if "bfloat16" in tuning else 2e-4)  # torch's own attention rounds otherwise than ours
    for name, grad in own.grads.items():
        off = float((got.grads[name].cpu() - grad).abs().max())
        if not off <= allowed:
            yield f"gradient of {name}: off by {off:.2g}, of {largest:.2g} at most"


def packed() -> Iterator[str]:
    def run(device: str) -> dict[str, torch.Tensor]:
        model: Any = models.build("bert", dropout=False)
        pk.tune(model, "layernorm")
        runs = pk.replicate(model.to(device), seeds=[0, 1])
        batches = [{name: t.to(device) for name, t in models.batch("bert").items()} for _ in range(2)]
        labels = [batch.pop("labels") for batch in batches]
        logits = runs.split(model(**runs.stack(batches)).logits)
        sum(map(nn.functional.cross_entropy, logits, labels)).backward()  # type: ignore[union-attr]
        return {
            f"{g} {n}": p.grad.cpu()
            for g in range(2)
            for n, p in runs.named_parameters(g).items()
            if p.grad is not None
        }

    torch.manual_seed(0)
    own = run("cpu")
    torch.manual_seed(0)
    got = run("cuda")
    for name, grad in own.items():
        off, largest = float((got[name] - grad).abs().max()), float(grad.abs().max())
        if not off <= 1e-5 + 1e-3 * largest:
            yield f"gradient of replica {name}: off by {off:.2g} of {largest:.2g}"


def main(families: list[str]) -> None:
    warnings.simplefilter("ignore")
    assert not backends.MISSING["cuda"], backends.MISSING
    try:
        torch.ones(2, device="cuda") + torch.ones(2)
        print("the device takes tensors of another")
    except RuntimeError:
        pass
    for family in families:
        for tuning in TUNINGS:
            for level in ("exact", "recompute", "checkpoint"):
                for line in differences(family, tuning, level):
                    print(f"{family}, {tuning}, {level}: {line}")
    for line in packed():
        print(f"packed: {line}")
    with torch.device("cuda"):  # regimes draw on the CPU, whatever the default is
        pk.tune(models.build("bert").to("cuda"), "random")
    print("done")


if __name__ == "__main__":
    main(sys.argv[2:])
