"""What trains and what stays frozen in a real run; killed runs that resume; samples of a run."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from running_train import arguments, losses, run

from modeling_vlv import STAGES
from vlv.training.recipe import read_recipe
from vlv.training.trainer import StageTrainer

AUTOENCODE, CAPTION = "tiny/autoencode", "tiny/caption"


# ---- frozen and trained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "settings", "trained"),
    [
        (AUTOENCODE, {}, STAGES["autoencode"]),
        (CAPTION, {}, STAGES["caption"]),
        (CAPTION, {"train_parts": [*STAGES["caption"], "language_model"]}, (*STAGES["caption"], "language_model")),
        (CAPTION, {"lora_rank": 4}, None),
        (CAPTION, {"train_parts": ["vision_tower", "caption_head"]}, ("vision_tower", "caption_head")),
    ],
    ids=["stage1", "stage2", "stage2-encoder", "lora", "stage2-vision"],
)
def test_five_steps_change_only_what_trains(recipe, settings, trained, tiny_repo, scenes, tmp_path):
    settings = {"dataset": scenes, "model": tiny_repo, "max_steps": 5, "warmup_steps": 0, **settings}
    stage_type, settings, args = read_recipe(arguments(recipe, tmp_path, **settings))
    stage = stage_type(settings, args)
    stage.prepare()
    model = stage.model
    if trained is None:
        expected = {
            n for n, _ in model.named_parameters() if "lora_" in n or n.startswith("prefix_projection.modules")
        }
    else:
        weights = {id(p): n for n, p in model.named_parameters()}
        parts = [part for name, part in model.named_parts() if name in trained]
        parts = [[part] if isinstance(part, torch.nn.Parameter) else part.parameters() for part in parts]
        expected = {weights[id(p)] for part in parts for p in part} - {"encoder.language_model.shared.weight"}
    reached, awake = set(), set()

    def look(module, args, output):
        awake.update(name for name, part in model.named_modules() if part.training)

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
    model.register_forward_hook(look)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    StageTrainer(stage, args).train()

    assert reached == {name for name, p in model.named_parameters() if p.requires_grad} == expected
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed - {"caption_head.lm_head.weight"} == expected  # it is tied to the caption head's embeddings
    teacher = ("text_encoder.", "unet.", "vae.")
    assert awake and not any(name.startswith(teacher) for name in awake)  # training mode would switch dropout on


# ---- killed and resumed ----------------------------------------------------------------------------------------

STEPS = {"max_steps": 24, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 10}


def newest(folder):
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny_repo, scenes):
    """By stage: the output folder of a run that was killed with SIGKILL at a random step, and its settings."""
    running = {}
    for stage, recipe in (("autoencode", AUTOENCODE), ("caption", CAPTION)):
        folder = tmp_path_factory.mktemp(f"killed-{stage}")
        settings = {"dataset": scenes, "model": tiny_repo, **STEPS}
        command = [sys.executable, "-m", "vlv", "train", *arguments(recipe, folder, **settings)]
        log = (folder / "log").open("w")
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, stdout=log, stderr=log)
        running[stage] = (process, folder, settings, random.randint(4, 18))
    runs, deadline = {}, time.time() + 600
    while len(runs) < len(running):
        time.sleep(random.random() / 50)  # some die while they write a checkpoint, and some in a step
        for stage, (process, folder, settings, step) in running.items():
            if stage in runs:
                continue
            assert process.poll() is None and time.time() < deadline, (folder / "log").read_text()[-3000:]
            if newest(folder) >= step:
                process.send_signal(signal.SIGKILL)
                assert process.wait() == -signal.SIGKILL
                runs[stage] = (folder, settings)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "recipe"), [("autoencode", AUTOENCODE), ("caption", CAPTION)])
def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_run(stage, recipe, killed, tmp_path):
    folder, settings = killed[stage]
    resumed = run(recipe, folder, resume=True, **settings)
    unbroken = run(recipe, tmp_path, **settings)
    assert resumed["resumed_from"] in [f"checkpoint-{step}" for step in range(3, 24, 3)]
    assert len(losses(unbroken)) == STEPS["max_steps"]
    assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-6)
    assert resumed["evaluation"]["eval_loss"] == pytest.approx(unbroken["evaluation"]["eval_loss"], abs=1e-6)


# ---- samples ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_evaluation_writes_samples_as_files_and_to_tensorboard(tiny_repo, scenes, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"dataset": scenes, "model": tiny_repo, "eval_strategy": "steps", "eval_steps": 2}
    logs = tmp_path / "logs"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)
    try:
        first = run(AUTOENCODE, tmp_path / "one", report_to="tensorboard", **settings)
        run(CAPTION, tmp_path / "two", report_to="tensorboard", **settings)
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    for step in (2, 4):
        assert Image.open(tmp_path / "one" / "samples" / f"step-{step}.png").width > 1000
        table = (tmp_path / "two" / "samples" / f"step-{step}.md").read_text().splitlines()
        assert table[0] == "| written | true |" and len(table) == 2 + 8
        assert all(" on a " in row.split(" | ")[-1] for row in table[2:])
    reports = [EventAccumulator(str(file)).Reload().Tags() for file in logs.rglob("events.*")]
    assert any("samples" in tags["images"] for tags in reports)
    assert any("samples/text_summary" in tags["tensors"] for tags in reports)
    assert any("train/denoising_loss" in tags["scalars"] for tags in reports)
    for row in first["log"]:
        assert "loss" not in row or row["denoising_loss"] == pytest.approx(row["loss"])
