"""`accelerate launch -m vlv.train`: two processes on the CPU, with gloo."""

import json
import os
import subprocess
import sys

import pytest
import torch
from training import arguments, losses, run

from modeling_vlv import VLVModel

CAPTION = "recipes/tiny/caption.yaml"
# An epoch of plain gradient descent: what changes in the weights is the sum of its gradients.
ONE_EPOCH = {
    "max_steps": -1,
    "num_train_epochs": 1,
    "optim": "sgd",
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "save_dtype": "float32",
}


def launch(config, processes, recipe, output_dir, **settings):
    """As `run`, through `accelerate launch`."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"recipes/accelerate/{config}.yaml",
    ]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0", "-m", "vlv.train"]
    done = subprocess.run(
        [*launcher, *arguments(recipe, output_dir, **settings)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output_dir / "training.json").read_text())


@pytest.mark.slow
def test_two_processes_average_to_the_gradients_of_one_on_the_same_batches(tiny_repo, scenes, tmp_path):
    """32 scenes in batches of 6: 5 steps, each of different scenes on both sides, for else the losses would differ."""
    settings = {"dataset": scenes, "model": tiny_repo, **ONE_EPOCH}
    one = run(CAPTION, tmp_path / "one", **settings, per_device_train_batch_size=6)
    two = launch("ddp", 2, CAPTION, tmp_path / "two", **settings, per_device_train_batch_size=3)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["steps"] == two["steps"] == 5
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)

    before, alone, together = (
        dict(VLVModel.from_pretrained(folder, dtype=torch.float32).named_parameters())
        for folder in (tiny_repo, tmp_path / "one", tmp_path / "two")
    )
    gradients = {
        name: weight - before[name] for name, weight in alone.items() if not torch.equal(weight, before[name])
    }
    assert {name.split(".")[0] for name in gradients} == {"prefix_projection", "caption_head"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(together[name] - before[name], gradient, atol=2e-6, rtol=1e-3, msg=name)
