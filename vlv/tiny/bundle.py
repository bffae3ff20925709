"""
Copies a trained checkpoint into the package:
`python -m vlv.tiny.bundle OUTPUTS [vlv-tiny | vlv-tiny-prompts | vlv-emoji]`.

OUTPUTS is the folder that `make tiny`, `make tiny-prompts` or `make emoji` wrote.
"""

import os
import shutil
import sys
from pathlib import Path

from modeling_vlv import CODE_FILES, VLVForConditionalGeneration
from processing_vlv import VLVProcessor
from vlv import bundled_checkpoint
from vlv.training.recipe import RECIPES

# The recipes of each checkpoint: their folder, and the steps in their order.
RECIPES_OF = {
    "vlv-tiny": ("tiny", ("vae", "teacher", "encoder", "language", "autoencode", "caption")),
    "vlv-tiny-prompts": ("tiny", ("prompts",)),
    "vlv-emoji": ("emoji", ("vae", "teacher", "encoder", "language", "autoencode", "details", "caption")),
}


def bundle(outputs: Path, checkpoint: Path) -> None:
    """
    Copies the final model of `outputs`, that of the last step, to `checkpoint`, whose name says which steps there are.
    Its folder `training/` gets the recipe of each step and the record of its run (settings, seed, commit, versions,
    loss log), in which `outputs` is called "outputs". A README.md of `checkpoint` stays.

    Raises:
        FileNotFoundError: when the training of a step is not finished.
    """
    recipes, steps = RECIPES_OF[checkpoint.name]
    for step in steps:
        if not (outputs / step / "training.json").is_file():
            raise FileNotFoundError(f"{outputs / step} holds no finished training: run `make {recipes}` first.")
    root = Path(__file__).resolve().parents[2]
    readme = checkpoint / "README.md"
    words = readme.read_text(encoding="utf-8") if readme.exists() else None
    shutil.rmtree(checkpoint, ignore_errors=True)
    if checkpoint.name == "vlv-tiny-prompts":  # what draws pictures is in vlv-tiny
        VLVForConditionalGeneration.from_pretrained(outputs / steps[-1], dtype="auto").save_pretrained(checkpoint)
        VLVProcessor.from_pretrained(outputs / steps[-1]).save_pretrained(checkpoint)
    else:
        left_behind = ("checkpoint-*", "cache", "samples", "*.py", "training.json", "failures.jsonl")
        shutil.copytree(outputs / steps[-1], checkpoint, ignore=shutil.ignore_patterns(*left_behind))
    if words is not None:
        readme.write_text(words, encoding="utf-8")
    (checkpoint / "chat_template.jinja").unlink(missing_ok=True)  # the code has the template
    for name in CODE_FILES:  # links, so that the repository has one copy of the code; a wheel has copies
        (checkpoint / name).unlink(missing_ok=True)
        (checkpoint / name).symlink_to(os.path.relpath(root / name, checkpoint))
    for step in steps:
        folder = checkpoint / "training" / step
        folder.mkdir(parents=True)
        record = (outputs / step / "training.json").read_text(encoding="utf-8")
        (folder / "training.json").write_text(record.replace(str(outputs.resolve()), "outputs"), encoding="utf-8")
        shutil.copy(RECIPES / recipes / f"{step}.yaml", folder / "recipe.yaml")


if __name__ == "__main__":
    name = sys.argv[2] if len(sys.argv) > 2 else "vlv-tiny"
    bundle(Path(sys.argv[1]), Path(bundled_checkpoint()).with_name(name))
