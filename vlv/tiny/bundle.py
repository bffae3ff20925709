"""
Puts a trained checkpoint into the package: `python -m vlv.tiny.bundle OUTPUTS [vlv-tiny | vlv-emoji]`.

OUTPUTS is the folder that `make tiny` or `make emoji` trained into.
"""

import os
import shutil
import sys
from pathlib import Path

from modeling_vlv import CODE_FILES
from vlv import tiny_checkpoint
from vlv.training.recipe import RECIPES

STEPS = ("vae", "teacher", "encoder", "language", "autoencode", "caption")


def bundle(outputs: Path, checkpoint: Path, recipes: str) -> None:
    """
    Makes `checkpoint` the final model of `outputs`, with what is known of its making in `training/`: each step's
    recipe, and the record (settings, seed, commit, versions, loss log) that its run left.

    Raises:
        FileNotFoundError: when a step has not been trained to its end.
    """
    for step in STEPS:
        if not (outputs / step / "training.json").is_file():
            raise FileNotFoundError(f"{outputs / step} holds no finished training: run `make {recipes}` first.")
    root = Path(__file__).resolve().parents[2]
    shutil.rmtree(checkpoint, ignore_errors=True)
    left_behind = ("checkpoint-*", "cache", "samples", "*.py", "training.json", "failures.jsonl")
    shutil.copytree(outputs / "caption", checkpoint, ignore=shutil.ignore_patterns(*left_behind))
    for name in CODE_FILES:  # one copy of the code in the repository; a wheel holds the files themselves
        (checkpoint / name).symlink_to(os.path.relpath(root / name, checkpoint))
    for step in STEPS:
        folder = checkpoint / "training" / step
        folder.mkdir(parents=True)
        shutil.copy(outputs / step / "training.json", folder)
        shutil.copy(RECIPES / recipes / f"{step}.yaml", folder / "recipe.yaml")


if __name__ == "__main__":
    name = sys.argv[2] if len(sys.argv) > 2 else "vlv-tiny"
    bundle(Path(sys.argv[1]), Path(tiny_checkpoint()).with_name(name), name.removeprefix("vlv-"))
