"""Steps inside transformers.Trainer's own loop: loader, clipping, schedule, callbacks and all."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from petune_kernels.studies import measure

from .harness import EAGER

if TYPE_CHECKING:
    from .models import Case

SKIPPED, TURNS = 5, {"cpu": 5, "cuda": 3}


class Clock(TrainerCallback):
    """Seconds a step, from the one after the first `SKIPPED` on."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begun, self.seconds = device, 0.0, 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == SKIPPED:
            self.begun = self._now()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = (self._now() - self.begun) / (state.global_step - SKIPPED)


def times(
    case: Case, names: Sequence[str], steps: int, device: torch.device, layers: int | None = None
) -> dict[str, Any]:
    """Seconds of a step of each provider, in turn, and the speed-up over eager; after a turn that is not counted."""
    from . import models

    built = {name: models.build(case, name, device, layers) for name in names}
    rows = {name: tensor.cpu() for name, tensor in models.random_batch(case, device).items()}
    data = [{name: tensor[i % case.batch] for name, tensor in rows.items()} for i in range(4 * case.batch)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(1 + TURNS[device.type]):
        for name, model in built.items():
            clock = Clock(device)
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
                arguments = TrainingArguments(
                    output_dir=folder, use_cpu=device.type == "cpu", report_to=[], disable_tqdm=True,
                    save_strategy="no", logging_strategy="no", per_device_train_batch_size=case.batch,
                    max_steps=SKIPPED + steps, learning_rate=1e-4, seed=0,
                )  # fmt: skip
                Trainer(model, arguments, train_dataset=data, callbacks=[clock]).train()  # type: ignore[arg-type]
            if turn:
                seconds[name].append(clock.seconds)
    speedup = {name: dataclasses.asdict(measure.paired_ratio(seconds, EAGER, name)) for name in names if name != EAGER}
    found = {name: dataclasses.asdict(measure.Spread.of(values)) for name, values in seconds.items()}
    return {"steps": steps, "seconds": found, "speedup": speedup}
