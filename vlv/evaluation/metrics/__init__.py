"""
Metrics as local modules of the `evaluate` library: `evaluate.load("vlv/evaluation/metrics/overlap.py")` reads one
without asking the Hub.

Each is one file with one class. `compute` returns a list where a score is one number per image, so that its spread is
known, and a number where it belongs to the whole set.
"""

from pathlib import Path
from typing import Any

import evaluate


def compute(name: str, **inputs: Any) -> dict[str, float | list[float]]:
    """The scores of the metric in `NAME.py`, by name; `inputs` are what its `_compute` takes."""
    metric = evaluate.load(str(Path(__file__).with_name(f"{name}.py")))
    return metric.compute(**inputs)
