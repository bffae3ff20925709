"""`vlv train`: recipes, the six stages on a few drawn scenes, training checkpoints."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from running_train import arguments, losses, run
from transformers import AutoModel, AutoTokenizer, Florence2ForConditionalGeneration, Qwen2ForCausalLM

from modeling_vlv import VLVModel
from vlv.cli import main as vlv
from vlv.training.trainer import last_whole_checkpoint

SLOW = pytest.mark.slow


@pytest.fixture(scope="session")
def parts(tmp_path_factory, scenes):
    """The folder with the four trained parts, each in its own library's format."""
    folder = tmp_path_factory.mktemp("parts")
    for stage in ("vae", "teacher", "encoder", "language"):
        extra = {"vae": folder / "vae"} if stage == "teacher" else {}
        run(f"tiny/{stage}", folder / stage, dataset=scenes, **extra)
    return folder


# ---- the parts -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parts_load_in_their_own_libraries(parts):
    vae = AutoencoderKL.from_pretrained(parts / "vae")
    assert vae.config.scaling_factor == 1.0
    pipeline = StableDiffusionPipeline.from_pretrained(parts / "teacher", safety_checker=None)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    for trained, saved in zip(vae.state_dict().values(), pipeline.vae.state_dict().values(), strict=True):
        assert torch.equal(trained, saved)
    Florence2ForConditionalGeneration.from_pretrained(parts / "encoder")
    Qwen2ForCausalLM.from_pretrained(parts / "language")
    for folder in ("teacher/tokenizer", "encoder", "language"):
        tokenizer = AutoTokenizer.from_pretrained(parts / folder)
        for text in ("a small red circle at the top left", "Ünïcode, 3×4!"):
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
        assert len(tokenizer(" circle", add_special_tokens=False).input_ids) == 1


def test_latents_have_unit_variance(parts, scenes):
    vae = AutoencoderKL.from_pretrained(parts / "vae")
    pixels = np.stack([np.array(Image.open(file)) for file in sorted(scenes.glob("*.png"))])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode()
    assert latents.mean((0, 2, 3)).abs().max() < 0.2
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.2


def test_folding_statistics_keeps_reconstructions():
    from vlv.tiny.vae import fold_latent_statistics, tiny_vae

    vae = tiny_vae(16, [16, 32, 64], latent_channels=4).eval()
    pixels = torch.randn(3, 3, 16, 16)
    mean, std = torch.tensor([0.3, -1.0, 0.1, 2.0]), torch.tensor([0.5, 2.0, 1.5, 0.2])
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        decoded = vae.decode(before.mean).sample
        fold_latent_statistics(vae, mean, std)
        after = vae.encode(pixels).latent_dist
        shape = (1, 4, 1, 1)
        torch.testing.assert_close(
            after.mean, (before.mean - mean.view(shape)) / std.view(shape), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(after.std, before.std / std.view(shape), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-4)


def test_record_of_a_run(parts):
    record = json.loads((parts / "teacher" / "training.json").read_text())
    assert record["recipe"]["stage"] == "teacher" and record["steps"] == 4
    assert set(losses(record)) == {1, 2, 3, 4}
    assert {"eval_loss", "denoising_loss", "denoising_loss_without_caption"} <= record["evaluation"].keys()
    assert {"torch", "transformers", "diffusers"} <= record["versions"].keys()


# ---- stopping and resuming -----------------------------------------------------------------------------------------


def test_a_resumed_run_adds_its_seconds(parts, scenes, tmp_path):
    """A checkpoint of an earlier version has no seconds."""
    found = {}
    for name in ("new", "old"):
        shutil.copytree(parts / "language" / "checkpoint-2", tmp_path / name / "checkpoint-2")
        file = tmp_path / name / "checkpoint-2" / "trainer_state.json"
        state = json.loads(file.read_text())
        clock = state["stateful_callbacks"].pop("Clock")
        if name == "new":
            clock["attributes"]["seconds"] += 1000
            state["stateful_callbacks"]["Clock"] = clock
        file.write_text(json.dumps(state))
        found[name] = run("tiny/language", tmp_path / name, dataset=scenes, resume=True)["seconds"]
    assert found["new"] > 1000 and 0 < found["old"] < 1000


@pytest.mark.parametrize("stage", ["language", *(pytest.param(stage, marks=SLOW) for stage in ("encoder", "teacher"))])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_run(stage, parts, scenes, tmp_path):
    settings = {"dataset": scenes, "save_total_limit": 3, **({"vae": parts / "vae"} if stage == "teacher" else {})}
    unbroken = losses(json.loads((parts / stage / "training.json").read_text()))
    run(f"tiny/{stage}", tmp_path, **settings)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = run(f"tiny/{stage}", tmp_path, resume=True, **settings)
    assert resumed["resumed_from"] == "checkpoint-2"
    for step in (3, 4):
        assert losses(resumed)[step] == pytest.approx(unbroken[step], abs=1e-6)


def test_an_incomplete_checkpoint_is_ignored(parts, tmp_path):
    for step in (2, 4):
        shutil.copytree(parts / "language" / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-4"
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(tmp_path) is None


def test_checkpoint_of_another_model_is_refused(parts, scenes, tmp_path, capsys):
    shutil.copytree(parts / "encoder" / "checkpoint-4", tmp_path / "checkpoint-4")
    argv = arguments("tiny/language", tmp_path, dataset=scenes, resume=True)
    assert vlv(["train", *argv]) == 2
    assert "checkpoint of another model" in capsys.readouterr().err


# ---- the two stages of a VLV -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_stages_from_the_parts(parts, scenes, tmp_path):
    starts = {"encoder": parts / "encoder", "decoder": parts / "teacher", "caption_head": parts / "language"}
    first = run("tiny/autoencode", tmp_path / "one", dataset=scenes, **starts)
    assert {"eval_loss", "denoising_loss", "denoising_loss_with_empty_context"} <= first["evaluation"].keys()
    assert first["evaluation"]["eval_loss"] == pytest.approx(first["evaluation"]["denoising_loss"], abs=1e-4)

    second = run("tiny/caption", tmp_path / "two", dataset=scenes, model=tmp_path / "one")
    assert {"eval_loss", "exact_captions", "ended"} <= second["evaluation"].keys()

    one = dict(VLVModel.from_pretrained(tmp_path / "one", dtype=torch.float32).named_parameters())
    two = AutoModel.from_pretrained(tmp_path / "two", trust_remote_code=True)
    assert two.dtype == torch.float16
    changed = {
        name.split(".")[0] for name, tensor in two.named_parameters() if not torch.equal(one[name].half(), tensor)
    }
    assert changed == {"prefix_projection", "caption_head"}


# ---- wrong input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("stage: caption\nlearning_rat: 1\n", [], "did you mean 'learning_rate'?"),
        ("stage: capton\n", [], "There is no stage 'capton'"),
        ("- 1\n", [], "must be a YAML mapping"),
        ("stage: language\n", ["--max_step", "3"], "did you mean --max_steps?"),
        ("stage: language\n", [], "--dataset"),
        ("stage: language\n", ["--dataset", "./nowhere"], "There is no folder ./nowhere"),
        ("stage: teacher\n", [], "--vae"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(text, argv, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    try:
        status = vlv(["train", str(recipe), "--output_dir", str(tmp_path / "out"), *argv])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1


def test_missing_column_is_named(scenes, tmp_path, capsys):
    argv = arguments("tiny/language", tmp_path, dataset=scenes, caption_column="caption")
    assert vlv(["train", *argv]) == 2
    assert "no column 'caption', only image, text, short" in capsys.readouterr().err
