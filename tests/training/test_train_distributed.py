"""`accelerate launch -m vlv.train`: two processes on the CPU, with gloo, under DDP and under FSDP2."""

import json
import os
import subprocess
import sys

import pytest
import torch
from running_train import arguments, losses, run

from modeling_vlv import VLVForConditionalGeneration, VLVModel
from vlv import bundled_checkpoint
from vlv.cli import main
from vlv.models.loading import load_autoencoder

CAPTION, AUTOENCODE = "tiny/caption", "tiny/autoencode"
# An epoch of plain gradient descent. The change of the weights is the sum of its gradients.
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


def launch(config, processes, recipe, output_dir, program=("-m", "vlv.train"), environment=None, **settings):
    """As `run`, but through `accelerate launch`. Returns the finished process."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"vlv/training/accelerate/{config}.yaml",
    ]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0", *program]
    return subprocess.run(
        [*launcher, *arguments(recipe, output_dir, **settings)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def train(kind, recipe, output_dir, killed_at_step=None, **settings):
    """One training in two processes; one can be killed. Returns its training.json, or the output of a failed run."""
    environment = {"SHARD_ON_CPU": str(int(kind == "fsdp2"))}
    if killed_at_step is not None:
        environment["KILLED_AT_STEP"] = str(killed_at_step)
    done = launch(kind, 2, recipe, output_dir, ["tests/launched.py"], environment, **settings)
    if killed_at_step is not None:
        assert done.returncode != 0
        return done.stderr
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((output_dir / "training.json").read_text())
    assert record["processes"] == 2
    assert record["distributed"] == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[kind]
    return record


def evaluations(record):
    return {row["step"]: row["eval_loss"] for row in record["log"] if "eval_loss" in row}


@pytest.mark.slow
def test_two_processes_average_to_the_gradients_of_one_on_the_same_batches(tiny_repo, scenes, tmp_path):
    """32 scenes in batches of 6 give 5 steps. The processes must not repeat scenes, or the losses would differ."""
    settings = {"dataset": scenes, "model": tiny_repo, **ONE_EPOCH}
    one = run(CAPTION, tmp_path / "one", **settings, per_device_train_batch_size=6)
    two = train("ddp", CAPTION, tmp_path / "two", **settings, per_device_train_batch_size=3)
    assert one["processes"] == 1
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        (CAPTION, {"gradient_checkpointing_parts": ["encoder", "caption_head"], "dataloader_num_workers": 1}),
        (CAPTION, {"lora_rank": 4, "lora_dropout": 0.1, "train_parts": ["caption_head", "language_model"]}),
        (AUTOENCODE, {"gradient_checkpointing_parts": ["unet"], "encoder_learning_rate": 1e-4}),
        (AUTOENCODE, {"muon_learning_rate": 1e-3}),
    ],
    ids=["caption", "lora", "autoencode", "muon"],
)
def test_a_killed_and_resumed_run_has_the_losses_of_an_uninterrupted_run(
    recipe, settings, tiny_repo, scenes, tmp_path
):
    """
    Evaluation with samples, a checkpoint, a kill, the remaining steps and the final model, with FSDP2 and with DDP.
    Both are compared with an uninterrupted run with DDP. Muon needs DDP.
    """
    kinds = ("ddp",) if "muon_learning_rate" in settings else ("fsdp2", "ddp")
    settings |= {"dataset": scenes, "model": tiny_repo, "save_dtype": "float32", "save_total_limit": 3}
    settings |= {"eval_strategy": "steps", "eval_steps": 2}
    unbroken = train("ddp", recipe, tmp_path / "unbroken", **settings)
    expected = VLVModel.from_pretrained(tmp_path / "unbroken", dtype=torch.float32)
    samples = {file.name for file in (tmp_path / "unbroken" / "samples").iterdir()}
    assert len(samples) == 2  # after steps 2 and 4

    for kind in kinds:
        output = tmp_path / kind
        train(kind, recipe, output, killed_at_step=3, **settings)
        assert {file.name for file in (output / "checkpoint-2").iterdir()} >= {"rng_state_0.pth", "rng_state_1.pth"}
        record = train(kind, recipe, output, resume=True, **settings)
        assert record["resumed_from"] == "checkpoint-2"
        assert losses(record) == pytest.approx(losses(unbroken), abs=1e-4)
        assert evaluations(record) == pytest.approx(evaluations(unbroken), abs=1e-4)
        assert record["evaluation"].keys() == unbroken["evaluation"].keys()
        assert {file.name for file in (output / "samples").iterdir()} == samples

        # Checkpoints hold what trains and the optimizer, but no frozen weights.
        sizes = {
            folder: (tmp_path / folder / "checkpoint-4" / "model.safetensors").stat().st_size
            for folder in ("unbroken", kind)
        }
        assert sizes[kind] == sizes["unbroken"]
        assert not list((output / "checkpoint-4").glob("*fsdp*"))

        actual = VLVModel.from_pretrained(output, dtype=torch.float32)
        for (name, weight), other in zip(actual.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(weight, other, atol=2e-4, rtol=1e-3, msg=name)
        assert main(["caption", str(scenes / "000000.png"), "--model", str(output)]) == 0
        if recipe == AUTOENCODE:
            model, processor = load_autoencoder(str(output))
            image = model.reconstruct(**processor(images=str(scenes / "000000.png")), num_inference_steps=2)[0]
            assert image.size == (32, 32)


@pytest.mark.slow
def test_launches_that_accelerate_cannot_do_on_a_cpu_are_refused(tiny_repo, scenes, tmp_path):
    settings = {"dataset": scenes, "model": tiny_repo}
    sharded = launch("fsdp2", 2, CAPTION, tmp_path, **settings)
    assert sharded.returncode != 0 and "cli.py" not in sharded.stderr  # the launcher's traceback only
    assert "vlv train: error: FSDP shards a model over several GPUs" in sharded.stderr
    assert not (tmp_path / "training.json").exists()


def test_bundled_checkpoint_names_only_layers_that_it_has():
    """FSDP and device_map find the layers by these names. A name without a layer ends an FSDP run before step 1."""
    for kind in (VLVModel, VLVForConditionalGeneration):
        model = kind.from_pretrained(bundled_checkpoint("vlv-tiny"))
        names = {type(module).__name__ for module in model.modules()}
        assert "Qwen2DecoderLayer" in model._no_split_modules and model._no_split_modules <= names
