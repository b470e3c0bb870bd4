"""How well: studies that train, measure and compare models through the public API.

`demo.py` is the main job; `measure.py` (cost of a step), `machine.py` (what a result was made with), `data.py`,
`cache.py` and `train.py` serve every study. `report.py` and `footprint.py` predict what a step keeps.

The protocols: `tasks.py`, `sources.py` and `splits.py` (data), `study.py` (a TOML file and its runs), `methods.py`,
`recipe.py` and `single.py` (one run), `packed.py` (many at once), `runner.py` and `store.py` (carrying it out, results
on disk), `statistics.py`, `cells.py`, `layouts.py`, `pictures.py` and `analysis.py` (what came out), `commands.py` (the
command line).
"""
