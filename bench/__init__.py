"""The benchmark: `python -m bench ops | layers | models`. It comes with the repository, not with the wheel."""
