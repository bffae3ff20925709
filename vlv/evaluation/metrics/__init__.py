"""
Metrics as local modules of the `evaluate` library: `evaluate.load("vlv/evaluation/metrics/overlap.py")` reads one
without asking the Hub.

Each is one file with one class. `compute` returns a list if a score is one number per image, so that its standard
error can be computed, and one number if the score is of the whole set.
"""

from pathlib import Path
from typing import Any

import evaluate


def compute(name: str, **inputs: Any) -> dict[str, float | list[float]]:
    """The scores of the metric in `NAME.py`, by name. `inputs` are the arguments of its `_compute`."""
    metric = evaluate.load(str(Path(__file__).with_name(f"{name}.py")))
    return metric.compute(**inputs)
