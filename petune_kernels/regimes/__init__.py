"""Which parameters train: named regimes, found by structure. `tuning.py` has the regimes, `structure.py` finds blocks,
attentions, FFNs and norms, `sampled.py` trains single scalars of a weight, `report.py` is what comes back."""

from petune_kernels.regimes.report import CountRow, CountTable, TuneReport
from petune_kernels.regimes.tuning import counts, regimes, tune

__all__ = ["CountRow", "CountTable", "TuneReport", "counts", "regimes", "tune"]
