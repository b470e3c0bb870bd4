"""How well: studies that train, measure and compare models through the public API.

`demo.py` is the main job; `measure.py` (cost of a step), `machine.py` (what a result was made with), `data.py`,
`cache.py` and `train.py` serve every study.
"""
