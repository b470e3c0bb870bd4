"""petune_kernels: fused kernels for parameter-efficient tuning of Hugging Face models.

In use:

    import petune_kernels as pk
    pk.tune(model, "layernorm")     # what trains
    report = pk.patch(model)        # what runs: fused kernels, the same numbers, the same checkpoints
    ...                             # train as before
    pk.unpatch(model)               # the very same modules and methods as before
"""

from __future__ import annotations

from . import schema  # noqa: F401  (defines the ops before anything uses them)
from .backends import BackendError, backend
from .patch import PatchError, PatchReport, patch, patched, unpatch
from .regimes import TuneReport, tune

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "PatchError",
    "PatchReport",
    "TuneReport",
    "backend",
    "patch",
    "patched",
    "tune",
    "unpatch",
]
