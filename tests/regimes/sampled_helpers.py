"""What the tests of regime random share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCKS = "bert.encoder.layer."


def machinery(model: nn.Module) -> list[str]:
    """Everything that regime random has put into a model."""
    found = [n for n, _ in model.named_parameters() if "_sampled" in n]
    found += [n for n, _ in model.named_buffers() if "_sampled" in n]
    for name, m in model.named_modules():
        found += [f"{name}.{attribute}" for attribute in vars(m) if "_petune" in attribute]
        found += [
            f"{name} hook"
            for attribute, hooks in vars(m).items()
            if attribute.endswith(("hooks", "hooks_always_called", "with_kwargs"))
            for hook in hooks
            if "sampled" in str(hooks[hook]) or attribute.endswith("always_called")
        ]
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in model.state_dict().items()}


def masks(model: nn.Module) -> dict[str, Tensor]:
    """For each sampled weight, where its sampled scalars are."""
    buffers = dict(model.named_buffers())
    found = {}
    for name, p in model.named_parameters():
        if f"{name}_sampled_index" in buffers:
            mask = torch.zeros(p.numel(), dtype=torch.bool)
            mask[buffers[f"{name}_sampled_index"].cpu()] = True
            found[name] = mask.view(p.shape)
    return found


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], steps: int = 20) -> None:
    torch.manual_seed(2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
