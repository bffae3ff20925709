"""The check before the push: in a clean environment, the folder gives the same results as the author's checkpoint."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from processing_vlv import load_image
from vlv.publish import clean_environment
from vlv.publish.samples import Sample

# Largest mean difference of two pictures, in levels of 255: kernels may round differently for another batch size.
TOLERANCE = 1.0


def prove(folder: Path, samples: Sequence[Sample]) -> None:
    """
    Load the repo in `folder` through every documented entry point, offline, in a fresh process that cannot import this
    package, and compare captions and reconstructions with the author's.

    Raises:
        ValueError: when it cannot be loaded, or when the results differ.
    """
    samples = sorted(samples, key=lambda sample: f"{sample.name}.png")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "HF_MODULES_CACHE": f"{scratch}/modules"}
        run = subprocess.run(
            [sys.executable, "-P", clean_environment.__file__, str(folder.resolve()), str(report)],
            capture_output=True,
            text=True,
            cwd=scratch,
            env=environment,
        )
        if run.returncode:
            last_line = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{folder} cannot be loaded without this package, so it is not published: {last_line}")
        expected = [sample.caption for sample in samples]
        for entry_point, captions in json.loads(report.read_text()).items():
            if captions != expected:
                difference = _first_difference(captions, samples)
                raise ValueError(f"{folder} is not published: through {entry_point} it captions {difference}.")
        for sample in samples:
            if sample.reconstruction is not None:
                rebuilt = load_image(Path(scratch) / f"{sample.name}.png")
                difference = np.abs(np.asarray(rebuilt, np.float32) - np.asarray(sample.reconstruction, np.float32))
                if difference.mean() > TOLERANCE:
                    raise ValueError(f"{folder} is not published: it rebuilds {sample.name} differently.")


def _first_difference(captions, samples):
    for caption, sample in zip(captions, samples, strict=True):
        if caption != sample.caption:
            return f"{sample.name} as {caption!r}, where the checkpoint says {sample.caption!r}"
