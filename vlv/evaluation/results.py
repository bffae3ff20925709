"""The results of an evaluation: values with their errors, and everything needed to measure them again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vlv.files import atomic_writer
from vlv.provenance import git_commit


@dataclass(frozen=True)
class Measurement:
    """
    Args:
        value: the metric.
        n: how many objects, captions or images it is measured on; the metric's name says which.
        standard_error: of `value`, with images as the independent units. 0 if all images agree; `None` if it is not
            defined: for a score of the whole set, or of one image.
    """

    value: float
    n: int
    standard_error: float | None

    @classmethod
    def share(cls, right: np.ndarray, total: np.ndarray | None = None) -> "Measurement":
        """
        The share of things that are right. Of the `total` things in each image, `right` are right; both have the shape
        (images,). Without `total`, each image is one thing.

        Raises:
            ValueError: when there is nothing to measure.
        """
        right = np.asarray(right, dtype=float)
        total = np.ones_like(right) if total is None else np.asarray(total, dtype=float)
        if total.sum() == 0:
            raise ValueError("There is nothing to measure: the dataset holds no images, or no objects in them.")
        value = right.sum() / total.sum()
        residuals = right - value * total  # for the error of a ratio of sums, with each image as one draw
        error = float(np.sqrt(np.square(residuals).sum()) / total.sum()) if len(right) > 1 else None
        return cls(float(value), int(total.sum()), error)

    @classmethod
    def of(cls, score: float | Sequence[float], n: int) -> "Measurement":
        """A metric's score for `n` images: one number for each of them, or one for the whole set."""
        return cls(float(score), n, None) if isinstance(score, float) else cls.share(score)


def write_results(
    file: Path, metrics: Mapping[str, Measurement], settings: Mapping[str, Any], libraries: Sequence[str] = ()
) -> None:
    """
    Writes `results.json`: one object per metric, and the commit, versions and settings of the measurement.

    Args:
        libraries: packages whose versions are recorded too.
    """
    record = {
        "metrics": {name: asdict(measurement) for name, measurement in metrics.items()},
        **settings,
        "commit": git_commit(),
        "versions": {name: version(name) for name in ("vlv", "torch", "transformers", "diffusers", *libraries)},
    }
    with atomic_writer(file) as output:
        output.write(json.dumps(record, indent=2) + "\n")
