"""The benchmark: `python -m bench --help` lists its commands. It comes with the repository, not with the wheel."""
