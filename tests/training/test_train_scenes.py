"""Two commands train a VLV from a folder of images."""

import json
import subprocess
import sys

import pytest

from vlv import bundled_checkpoint
from vlv.cli import main as vlv

HELD_OUT = "--eval_size 40 --eval_on_start true --logging_steps 10 --warmup_steps 10 --save_strategy no"
CLEAN_ENVIRONMENT = """
import sys
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, model.unet is not None, model.caption_head is not None)
"""


@pytest.mark.slow
def test_200_scenes_through_both_stages(tmp_path):
    """The VLV has vlv-tiny's own parts and new queries and projections, so that both stages must learn."""
    scenes, parts, one, two = (str(tmp_path / name) for name in ("scenes", "parts", "one", "two"))
    assert vlv(["scenes", "--num", "200", "--split", "train", "--output", scenes]) == 0
    assert vlv(["export", bundled_checkpoint("vlv-tiny"), "--output", parts]) == 0
    starts = [f"--{name}={parts}/{name}" for name in ("encoder", "decoder", "caption_head")]
    common = ["--dataset", scenes, *HELD_OUT.split()]

    stage1 = ["tiny/autoencode", "--output_dir", one, "--max_steps", "60", *starts, *common]
    assert vlv(["train", *stage1, "--per_device_train_batch_size", "32"]) == 0
    stage2 = ["tiny/caption", "--output_dir", two, "--max_steps", "60", "--model", one, *common]
    assert vlv(["train", *stage2, "--per_device_train_batch_size", "32"]) == 0

    for folder in (one, two):
        record = json.loads((tmp_path / folder / "training.json").read_text())
        start, *_, end = [row["eval_loss"] for row in record["log"] if "eval_loss" in row]
        assert end < start / 2
        assert end < record["evaluation"].get("denoising_loss_with_empty_context", end + 1)
    command = [sys.executable, "-c", CLEAN_ENVIRONMENT, two]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told.split() == ["VLVModel", "True", "True"]
