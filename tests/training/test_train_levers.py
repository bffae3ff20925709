"""Settings that teach for less work: what a run with them leaves, and what it refuses."""

import shutil

import pytest
import torch
from running_train import arguments, run
from safetensors.torch import load_file

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.cli import main as vlv
from vlv.training import muon, vlv_stage
from vlv.training.recipe import read_recipe

AUTOENCODE, CAPTION = "tiny/autoencode", "tiny/caption"
DECAY = 0.3  # less than the average begins with, so that the formula is simple


@pytest.fixture(scope="module")
def levers(tmp_path_factory, tiny_components, scenes):
    """The output folder of a stage 1 with all of them, and a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("levers") / "stage1"
    settings = {name: tiny_components / name for name in ("encoder", "decoder", "caption_head")}
    settings |= {
        "noise_draws": 3,
        "timestep_shift": 3.0,
        "nested_queries": True,
        "encoder_image_size": 16,
        "projection_start": "mean",
        "muon_learning_rate": 1e-3,
    }
    settings |= {"average_decay": DECAY, "save_steps": 1, "save_total_limit": 9, "sample_latents": False}
    run(AUTOENCODE, folder, dataset=scenes, **settings)
    return folder, settings


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


def test_the_model_that_is_left_is_the_average_of_the_steps(levers):
    folder, _ = levers
    steps = [weights(folder / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    final = weights(folder)
    trained = [name for name in steps[0] if not name.startswith("average.")]
    assert "queries" in trained and len(steps[0]) == 2 * len(trained)
    for name in trained:
        mean = steps[0][f"average.{name}"]
        for step in steps[1:]:
            mean = DECAY * mean + (1 - DECAY) * step[name]
        torch.testing.assert_close(final[name], mean)
    assert not torch.equal(final["queries"], steps[-1]["queries"])


@pytest.mark.slow
def test_a_resumed_run_continues_the_average(levers, scenes, tmp_path):
    folder, settings = levers
    run(AUTOENCODE, tmp_path, dataset=scenes, **settings | {"save_steps": 2})
    shutil.rmtree(tmp_path / "checkpoint-4")
    run(AUTOENCODE, tmp_path, dataset=scenes, resume=True, **settings | {"save_steps": 2})
    found, expected = weights(tmp_path), weights(folder)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_what_the_levers_leave_in_the_model(levers):
    folder, _ = levers
    config, processor = VLVModel.from_pretrained(folder).config, VLVProcessor.from_pretrained(folder)
    assert config.noise_draws == 3 and config.timestep_shift == 3 and config.nested_queries
    assert (processor.image_height, processor.image_width, processor.decoder_image_size) == (16, 16, 32)


@pytest.mark.slow
def test_a_shift_of_the_first_steps_only(tiny_repo, scenes, tmp_path):
    """The same as a run with the shift that is stopped, and resumed without it."""
    common = {"dataset": scenes, "model": tiny_repo, "save_steps": 2}
    run(AUTOENCODE, tmp_path / "whole", **common, timestep_shift=5.0, timestep_shift_steps=2)
    run(AUTOENCODE, tmp_path / "parts", **common, timestep_shift=5.0)
    shifted = weights(tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    run(AUTOENCODE, tmp_path / "parts", **common, resume=True)
    found, expected = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert not torch.equal(found["queries"], shifted["queries"])


@pytest.mark.slow
def test_stage_2_learns_nested_queries_and_leaves_an_average(levers, scenes, tmp_path):
    stage1, _ = levers
    run(
        CAPTION, tmp_path, dataset=scenes, model=stage1, nested_queries=True, average_decay=DECAY, save_dtype="float32"
    )
    steps = [weights(tmp_path / f"checkpoint-{step}") for step in (2, 4)]
    name = "prefix_projection.0.weight"
    final = weights(tmp_path)[name]
    torch.testing.assert_close(final, steps[1][f"average.{name}"])
    assert not torch.equal(final, steps[1][name]) and not torch.equal(final, steps[0][f"average.{name}"])
    assert VLVModel.from_pretrained(tmp_path).config.nested_queries


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"timestep_shift": -1}, "timestep_shift is -1.0: give a number above 0; 1 moves no timestep."),
        (
            {"timestep_shift": 3, "timestep_shift_steps": 0},
            "timestep_shift_steps is 0: give at least 1, or leave it out to shift in all steps.",
        ),
        (
            {"timestep_shift_steps": 5},
            "timestep_shift_steps is 5, but timestep_shift is 1, which moves no timestep.",
        ),
        ({"denoising_loss": "huber"}, "denoising_loss is 'huber': choose 'mse' or 'l1'."),
        ({"timestep_density": "beta"}, "timestep_density is 'beta': choose uniform, logit_normal, mode."),
        ({"min_snr_gamma": 0}, "min_snr_gamma is 0.0: give a number above 0, such as 5."),
        ({"context_dropout": 2}, "context_dropout is 2.0: it is a share, between 0 and 1."),
        ({"noise_draws": 0}, "noise_draws is 0: draw at least 1 noise level for each image."),
        ({"average_decay": 1.5}, "average_decay is 1.5: it must be above 0 and below 1."),
        ({"average_decay": 0}, "average_decay is 0: it must be above 0 and below 1."),
        (
            {"encoder_image_size": 20},
            "encoder_image_size is 20, but the encoder reads multiples of 8 pixels, its strides, up to 64, which its"
            " positions reach: choose one of them, such as 16.",
        ),
        ({"muon_learning_rate": 0}, "muon_learning_rate is 0: it must be above 0."),
        ({"encoder_image_size": 72}, "encoder_image_size is 72, but the encoder reads multiples of 8 pixels"),
        ({"encoder_image_size": 0}, "encoder_image_size is 0, but the encoder reads multiples of 8 pixels"),
        ({"crop": "top"}, "crop is 'top': give center, or leave it out."),
        ({"projection_start": "one"}, "projection_start is 'one': give zero or mean."),
        ({"image_size": 33}, "The picture is 33x33 pixels, but"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_sentence(settings, sentence, tiny_repo, scenes, tmp_path, capsys):
    assert vlv(["train", *arguments(AUTOENCODE, tmp_path, dataset=scenes, model=tiny_repo, **settings)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


def test_a_model_takes_the_sizes_and_the_crop_and_replaces_the_parts(tiny_repo, scenes, tmp_path, capsys):
    parts = {"encoder": tiny_repo, "decoder": tiny_repo, "projection_start": "mean"}
    sizes = {"image_size": 64, "encoder_image_size": 16, "crop": "center"}
    argv = arguments(AUTOENCODE, tmp_path, dataset=scenes, model=tiny_repo, **parts, **sizes)
    stage_type, settings, args = read_recipe(argv)
    stage = stage_type(settings, args)
    assert f"encoder, decoder, projection_start: not used, because the training starts from {tiny_repo}." in (
        capsys.readouterr().out
    )
    assert stage.model.config.image_size == stage.processor.decoder_image_size == 64
    assert (stage.processor.image_height, stage.processor.crop) == (16, "center")


def test_muon_is_refused_where_weights_are_sharded(tiny_repo, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(muon, "asks_to_shard", lambda args: True)
    argv = arguments(AUTOENCODE, tmp_path, dataset=scenes, model=tiny_repo, muon_learning_rate=1e-3)
    assert vlv(["train", *argv]) == 2
    assert "muon_learning_rate needs whole matrices, which FSDP and DeepSpeed shard" in capsys.readouterr().err


def test_an_average_of_sharded_weights_is_refused(tiny_repo, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlv_stage, "asks_to_shard", lambda args: True)
    argv = arguments(CAPTION, tmp_path, dataset=scenes, model=tiny_repo, average_decay=0.9)
    assert vlv(["train", *argv]) == 2
    assert "average_decay needs whole weights, which FSDP and DeepSpeed shard" in capsys.readouterr().err
    monkeypatch.undo()
    stage_type, settings, args = read_recipe(argv)
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="which FSDP and DeepSpeed shard"):
        stage_type(settings, args)
