"""Settings that make a run faster or smaller; the output of a run, and the contents of its checkpoints."""

import pytest
import torch
from running_train import arguments, losses, run
from safetensors import safe_open
from transformers.utils import is_liger_kernel_available

from modeling_vlv import VLVModel
from vlv.cli import main as vlv
from vlv.training.recipe import read_recipe
from vlv.training.trainer import StageTrainer, last_whole_checkpoint

AUTOENCODE, CAPTION = "tiny/autoencode", "tiny/caption"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_repo, scenes):
    """By recipe: the output folder of a run without these settings, and its record."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        recipe: (folder / name, run(recipe, folder / name, dataset=scenes, model=tiny_repo, logging_steps=1))
        for name, recipe in (("one", AUTOENCODE), ("two", CAPTION))
    }


# ---- speed and memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [AUTOENCODE, CAPTION], ids=["stage1", "stage2"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"bf16": True}, 0.05),
        ({"attn_implementation": "eager"}, 1e-3),
        ({"optim": "adamw_torch"}, 1e-3),
        ({"gradient_checkpointing": True}, 1e-3),
    ],
    ids=["bf16", "eager", "unfused", "checkpointing"],
)
@pytest.mark.slow
def test_speed_settings_do_not_change_the_losses(recipe, settings, tolerance, plain, tiny_repo, scenes, tmp_path):
    record = run(recipe, tmp_path, dataset=scenes, model=tiny_repo, **settings)
    assert losses(record) == pytest.approx(losses(plain[recipe][1]), abs=tolerance)
    for name, value in settings.items():
        assert record["recipe"][name] == value


@pytest.mark.slow
def test_a_compiled_model_has_the_losses_of_the_model(plain, tiny_repo, scenes, tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"}  # this backend needs no C++ compiler
    record = run(CAPTION, tmp_path, dataset=scenes, model=tiny_repo, **settings)
    assert losses(record) == pytest.approx(losses(plain[CAPTION][1]), abs=1e-3)
    assert VLVModel.from_pretrained(tmp_path).caption_head is not None  # names of weights are the model's own


@pytest.mark.slow
def test_the_encoder_has_its_own_learning_rate(tiny_repo, scenes, tmp_path):
    trains = ["prefix_projection", "queries", "language_model"]
    common = {
        "dataset": scenes,
        "model": tiny_repo,
        "train_parts": trains,
        "save_dtype": "float32",
        "logging_steps": 1,
    }
    before = VLVModel.from_pretrained(tiny_repo)
    run(CAPTION, tmp_path / "still", encoder_learning_rate=0, **common)
    still = VLVModel.from_pretrained(tmp_path / "still")
    assert not torch.equal(still.queries, before.queries)
    for name, weight in still.encoder.named_parameters():
        assert torch.equal(weight, before.encoder.get_parameter(name)), name
    alike = run(CAPTION, tmp_path / "alike", encoder_learning_rate=0.001, learning_rate=0.001, **common)
    usual = run(CAPTION, tmp_path / "usual", learning_rate=0.001, **common)
    assert losses(alike) == pytest.approx(losses(usual), abs=1e-4)


def test_a_learning_rate_for_frozen_parts_is_refused(tiny_repo, scenes, tmp_path, capsys):
    argv = arguments(CAPTION, tmp_path, dataset=scenes, model=tiny_repo, encoder_learning_rate=0.0001)
    assert vlv(["train", *argv]) == 2
    assert "encoder_learning_rate is set, but no part of Florence-2 trains, only" in capsys.readouterr().err


@pytest.mark.skipif(is_liger_kernel_available(), reason="liger-kernel is installed")
def test_a_setting_without_its_package_is_refused(tiny_repo, scenes, tmp_path, capsys):
    argv = arguments(CAPTION, tmp_path, dataset=scenes, model=tiny_repo, use_liger_kernel=True)
    assert vlv(["train", *argv]) == 2
    assert "needs the package liger-kernel, which is not installed" in capsys.readouterr().err


# ---- the output of a run ---------------------------------------------------------------------------------------


def test_the_overview_is_printed_before_the_first_step(tiny_repo, tiny_model, scenes, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(StageTrainer, "train", interrupted)
    assert vlv(["train", *arguments(AUTOENCODE, tmp_path, dataset=scenes, model=tiny_repo)]) == 130
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: [int(number.replace(",", "")) for number in line[1:3]] for line in lines if line[-1:] == ["MiB"]}
    for name, part in tiny_model.named_parts():
        count = part.numel() if name == "queries" else sum(weight.numel() for weight in part.parameters())
        assert sum(rows[name]) == count, name
    trained = {name for name, (trains, frozen) in rows.items() if trains}
    assert trained == {"queries", "projection", "language_model", "all"}
    assert sum(rows["all"]) == sum(weight.numel() for weight in tiny_model.parameters())


@pytest.mark.slow
def test_progress_bar_shows_the_parts_of_the_loss(tiny_repo, scenes, tmp_path, capsys):
    run(CAPTION, tmp_path, dataset=scenes, model=tiny_repo, max_steps=2)
    assert ", caption_loss=" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_losses_of_stage_1_can_be_compared(tiny_repo, scenes, tmp_path):
    settings = {"learning_rate": 0, "eval_strategy": "steps", "eval_steps": 2}
    record = run(AUTOENCODE, tmp_path, dataset=scenes, model=tiny_repo, **settings)
    found = [row["eval_loss"] for row in record["log"] if "eval_loss" in row]
    assert len(found) == 3 and found == pytest.approx([found[0]] * 3, abs=1e-7)
    assert len({row["loss"] for row in record["log"] if "loss" in row}) == 4  # training draws new noise each time


def test_evaluation_gathers_no_logits(tiny_repo, scenes, tmp_path):
    stage_type, settings, args = read_recipe(arguments(CAPTION, tmp_path, dataset=scenes, model=tiny_repo))
    stage = stage_type(settings, args)
    stage.prepare()
    trainer = StageTrainer(stage, args)
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation")
    assert output.predictions is None and output.metrics["eval_loss"] > 0


# ---- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [(AUTOENCODE, {"queries", "projection", "encoder"}), (CAPTION, {"prefix_projection", "caption_head"})],
    ids=["stage1", "stage2"],
)
def test_training_checkpoints_hold_only_what_trains(recipe, parts, plain):
    folder, _ = plain[recipe]
    with safe_open(folder / "checkpoint-4" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {name.split(".")[0] for name in names} == parts
    model = VLVModel.from_pretrained(folder).set_stage(recipe.split("/")[-1].removesuffix(".yaml"))
    assert names == {name for name, weight in model.named_parameters() if weight.requires_grad}
    rest = {path.name for path in (folder / "checkpoint-4").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= rest


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
@pytest.mark.slow
def test_an_incomplete_checkpoint_is_ignored(name, tiny_repo, scenes, tmp_path):
    settings = {"dataset": scenes, "model": tiny_repo}
    unbroken = run(CAPTION, tmp_path, **settings)
    cut = tmp_path / "checkpoint-4" / name
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"
    resumed = run(CAPTION, tmp_path, resume=True, **settings)
    assert resumed["resumed_from"] == "checkpoint-2"
    assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-6)
