"""`PetuneCallback`: tune and patch from inside transformers.Trainer, where only a list of callbacks can be given.

The events of Trainer that matter here (transformers 5): `on_init_end` has the model on its device, before the optimizer
is made and before anything wraps it, so this is where parameters are chosen and fused forwards bound. `on_train_begin`
comes after both; it only serves a model that was made anew (`model_init`) or that an earlier `train()` unpatched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .patch import PatchReport, patch, pattern, unpatch
from .patch.graphs import Lengths
from .regimes import TuneReport, sampled, tune


class PetuneCallback(TrainerCallback):
    """`Trainer(..., callbacks=[pk.PetuneCallback("layernorm")])`: the model trains patched and is unpatched afterwards.

    Args:
        regime: what trains, one of `pk.tune`'s names; None leaves requires_grad as it is (PEFT models, own choices).
            For tune's other arguments call `pk.tune` on the model before it goes to Trainer.
        strict, memory, cuda_graphs: as in `pk.patch`.
        keep: leave the model patched when training ends; without it a patch made before Trainer goes, too.

    Attributes:
        report: PatchReport of the model, None before Trainer was made.
        tuned: TuneReport, None without a regime.

    Raises, from Trainer's own calls:
        PatchError: as `pk.patch` does.
        ValueError: as `pk.tune` does; or `regime` was given with an optimizer that does not hold what it trains.
        RuntimeError: `regime` was given, and the model was made after the callback could choose its parameters; or
            Trainer would use nn.DataParallel (several GPUs in one process).

    A training run that raises leaves the model patched; `pk.unpatch(model)` is then up to the caller.
    """

    def __init__(
        self, regime: str | None = None, strict: bool = False, keep: bool = False, memory: str = "exact",
        cuda_graphs: Lengths = False,
    ) -> None:  # fmt: skip
        self.regime, self.strict, self.keep, self.memory, self.cuda_graphs = regime, strict, keep, memory, cuda_graphs
        self.report: PatchReport | None = None
        self.tuned: TuneReport | None = None
        self._model: nn.Module | None = None

    def on_init_end(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise RuntimeError(
                f"PetuneCallback: Trainer would copy the model to {args.n_gpu} GPUs (nn.DataParallel), and copies run "
                "the first one's fused forwards; start it with torchrun, or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        trained = [(p, p.requires_grad) for p in model.parameters()]
        try:
            if self.regime is not None:
                self.tuned = tune(model, self.regime)
                if optimizer is not None:
                    _check_optimizer(model, optimizer, self.regime)
            self._patch(model)
        except BaseException:  # the model as it was
            if self.tuned is not None:
                sampled.remove(model)
            for p, flag in trained:
                p.requires_grad_(flag)
            raise

    def on_train_begin(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._model is None or not any(module is self._model for module in model.modules()):
            if self.regime is not None:
                raise RuntimeError(
                    f"PetuneCallback: regime={self.regime!r} cannot be set here: the optimizer is made already. "
                    "Give the callback to one Trainer, as Trainer(callbacks=[...]) and not by add_callback; with "
                    "model_init, call pk.tune inside model_init and give no regime"
                )
            self._patch(model)
        elif not any(map(pattern.bound, self._model.modules())):  # an earlier train() has unpatched it, or the caller
            self._patch(self._model)

    def on_train_end(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._model is not None and not self.keep:
            unpatch(self._model)

    def _patch(self, model: nn.Module) -> None:
        self.report = patch(model, strict=self.strict, memory=self.memory, cuda_graphs=self.cuda_graphs)
        self._model = model


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, regime: str) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"PetuneCallback: regime={regime!r} trains what the optimizer given to Trainer does not hold: "
            f"{', '.join(missing[:3])}{more}; call pk.tune before making the optimizer"
        )
