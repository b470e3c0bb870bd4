"""One of the processes of test_distributed.py: prints a line for every check that this rank has seen to hold.

Gradients of two processes with half a batch each against one process with all of it, dropout off.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import petune_kernels as pk
from petune_kernels.regimes import regimes

from .models import Step, batch, build, step
from .test_families import quiet, worst
from .test_peft import lora


def model_of(family: str, regime: str) -> nn.Module:
    if regime == "lora":
        return lora(family)
    model = quiet(build(family, dropout=False))
    pk.tune(model, regime)
    return model


def two_steps(model: nn.Module, part: dict[str, Any]) -> None:
    """The second step is where DDP complains of parameters that the first left without a gradient."""
    for _ in range(2):
        model.zero_grad()
        model(**part).loss.backward()


def gradients(model: nn.Module) -> Step:
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    return Step(torch.zeros(()), torch.zeros(()), whole)


def check(name: str, model: nn.Module, own: Step) -> None:
    error, where = worst(gradients(model), own)
    assert error < 1e-4, (name, where, error)
    print(f"rank {dist.get_rank()}: {name} holds\n", end="", flush=True)  # in one write: the ranks share stdout


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    cases = [("bert", r) for r in (*regimes(), "lora")] + [("llama", "layernorm"), ("llama", "lora")]
    for family, regime in cases:
        torch.manual_seed(1)
        data = batch(family, B=4)
        part = {k: v[2 * rank : 2 * rank + 2] for k, v in data.items()}
        for when in ("before", "after") if (family, regime) == ("bert", "layernorm") else ("before",):
            model = model_of(family, regime)
            own = step(model, data)
            if when == "before":
                pk.patch(model)
            wrapped = DistributedDataParallel(model)
            if when == "after":
                pk.patch(model)
            two_steps(wrapped, part)
            check(f"ddp {family} {regime} patched {when}", model, own)
    torch.manual_seed(1)
    data = batch("bert", B=4)
    part = {k: v[2 * rank : 2 * rank + 2] for k, v in data.items()}
    for regime, level in itertools.product(("layernorm", "full", "lora"), ("exact", "recompute", "checkpoint")):
        for every in (False, True) if level == "exact" else (False,):
            model = model_of("bert", regime)
            own = step(model, data)
            pk.patch(model, memory=level)
            layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
            for module in [m for layer in layers for m in layer.modules() if type(m) is nn.Linear] if every else layers:
                fully_shard(module)
            fully_shard(model)
            two_steps(model, part)
            check(f"fsdp2 bert {regime} {level} by {'linear' if every else 'layer'}", model, own)
    model = model_of("bert", "full")
    own = step(model, data)
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    try:
        pk.patch(model)
    except pk.PatchError as error:
        assert "DTensor" in str(error) and not any("forward" in m.__dict__ for m in model.modules()), error
    else:
        raise AssertionError("a sharded model cannot be verified, so it must be refused")
    two_steps(model, part)
    check("fsdp2 bert full refused after", model, own)
    dist.barrier()  # neither leaves while the other still works
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
