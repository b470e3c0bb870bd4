"""petune_kernels: fused kernels for parameter-efficient tuning of Hugging Face models.

In use:

    import petune_kernels as pk
    pk.tune(model, "layernorm")     # what trains
    report = pk.patch(model)        # what runs: fused kernels, the same numbers, the same checkpoints
    ...                             # train as before
    pk.unpatch(model)               # the very same modules and methods as before
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import schema  # noqa: F401  (defines the ops before anything uses them)
from .backends import BackendError, backend
from .patch import PatchError, PatchReport, patch, patched, unpatch
from .regimes import TuneReport, tune
from .replicas import ReplicaError, Replicas, replicate

if TYPE_CHECKING:
    from .callback import PetuneCallback

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "PatchError",
    "PatchReport",
    "PetuneCallback",
    "ReplicaError",
    "Replicas",
    "TuneReport",
    "backend",
    "patch",
    "patched",
    "replicate",
    "tune",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name == "PetuneCallback":  # on first use, because it imports transformers, which takes seconds
        from .callback import PetuneCallback

        return PetuneCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
