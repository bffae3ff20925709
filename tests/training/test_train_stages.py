"""The stages that a recipe can name, and the overview before a run."""

import json
import textwrap

import pytest
from running_train import arguments, run

from vlv.cli import main
from vlv.publish.card import _trainings
from vlv.tiny.vae import tiny_vae
from vlv.training.recipe import read_recipe, recipe_names
from vlv.training.registry import STAGE_CLASSES, stage_class


@pytest.mark.parametrize("recipe", ["tiny/vae", "tiny/encoder", "tiny/language", "tiny/autoencode", "tiny/caption"])
def test_the_overview_is_printed_before_an_image_is_read(recipe, scenes, tiny_repo, tmp_path, monkeypatch, capsys):
    class Stop(Exception):
        pass

    def stop(self):
        raise Stop

    model = {"model": tiny_repo} if recipe in ("tiny/autoencode", "tiny/caption") else {}
    stage_type, _, _ = read_recipe(arguments(recipe, tmp_path, dataset=scenes, **model))
    monkeypatch.setattr(stage_type, "prepare", stop)
    monkeypatch.setattr("vlv.data.rows.load_image", lambda *_: pytest.fail("An image was read."))
    with pytest.raises(Stop):
        run(recipe, tmp_path, dataset=scenes, **model)
    out = capsys.readouterr().out
    assert "trains" in out and "frozen" in out and "gradients" in out


@pytest.mark.parametrize(
    ("recipe", "settings", "sentence"),
    [
        ("tiny/vae", {"train_sampling_strategy": "group_by_length"}, "group_by_length: the samples of stage 'vae'"),
        (
            "tiny/autoencode",
            {"muon_learning_rate": 1e-3, "train_parts": "queries"},
            "muon_learning_rate is set, but no matrix of a layer trains, only queries.",
        ),
    ],
)
def test_what_could_not_train_is_refused_before_an_image_is_read(
    recipe, settings, sentence, scenes, tiny_repo, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("vlv.data.rows.load_image", lambda *_: pytest.fail("An image was read."))
    model = {"model": tiny_repo} if recipe == "tiny/autoencode" else {}
    assert main(["train", *arguments(recipe, tmp_path, dataset=scenes, **model, **settings)]) == 2
    assert f"vlv train: error: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "settings", "sentence"),
    [
        ("encoder", {"image_size": 33}, "image_size is 33: give multiples of 8."),
        ("encoder", {"image_size": 12}, "image_size is 12: give multiples of 8."),
        ("encoder", {"image_size": 0}, "image_size is 0: give at least 1."),
        ("encoder", {"image_size": 128}, "image_size is 128, but the encoder reads multiples of 8 pixels"),
        ("encoder", {"image_size": 88}, "image_size is 88: the image and the task_prompt make 1"),
        ("encoder", {"vision_widths": 64}, "There are 1 vision_widths and 2 vision_strides"),
        ("encoder", {"vision_widths": [60, 100]}, "vision_widths is 60 100: give multiples of 32."),
        ("encoder", {"vision_strides": [4, 0]}, "vision_strides is 4 0: give at least 1."),
        ("encoder", {"width": 30}, "width is 30: give multiples of 4."),
        ("encoder", {"max_length": 0}, "max_length is 0: give at least 1."),
        ("vae", {"image_size": 30}, "image_size is 30: give multiples of 4."),
        ("vae", {"widths": [16, 20]}, "widths is 16 20: give multiples of 8."),
        ("teacher", {"unet_widths": [64, 40]}, "unet_widths is 64 40: give multiples of 16."),
        ("teacher", {"max_length": -1}, "max_length is -1: give at least 1."),
        ("flow_teacher", {"width": 40}, "width is 40: give multiples of 32."),
        ("flow_teacher", {"text_width": 12}, "text_width is 12: give multiples of 8."),
        ("language", {"hidden_size": 20}, "hidden_size is 20: give multiples of 8."),
        ("language", {"max_length": 0}, "max_length is 0: give at least 1."),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_an_image_is_read(
    stage, settings, sentence, scenes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("vlv.data.rows.load_image", lambda *_: pytest.fail("An image was read."))
    assert main(["train", *arguments(f"tiny/{stage}", tmp_path, dataset=scenes, **settings)]) == 2
    error = capsys.readouterr().err
    assert f"vlv train: error: {sentence}" in error and "Traceback" not in error


def test_a_patch_of_the_flow_teacher_must_divide_the_latents(scenes, tmp_path, capsys):
    tiny_vae(32, [16, 32, 64], latent_channels=4).save_pretrained(tmp_path / "vae")
    argv = arguments("tiny/flow_teacher", tmp_path, dataset=scenes, vae=tmp_path / "vae", patch_size=3)
    assert main(["train", *argv]) == 2
    assert "error: patch_size is 3, which does not divide the side of the VAE's latents, 8." in capsys.readouterr().err


@pytest.fixture
def own_stage(tmp_path, monkeypatch):
    """A user's module with a stage, and a recipe for it."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            from vlv.training.caption import CaptionStage

            class Shouting(CaptionStage):
                def collate(self, batch):
                    print("SHOUTING", flush=True)
                    return super().collate(batch)

            def function():
                pass
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: mine:Shouting\nmax_steps: 1\nper_device_train_batch_size: 4\neval_size: 4\n")
    return recipe


def test_a_users_own_stage(own_stage, scenes, tiny_repo, tmp_path, capsys):
    settings = ["--dataset", str(scenes), "--model", str(tiny_repo), "--output_dir", str(tmp_path / "out")]
    assert main(["train", str(own_stage), *settings]) == 0
    assert "SHOUTING" in capsys.readouterr().out
    assert (tmp_path / "out" / "training.json").is_file()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("captions", "There is no stage 'captions'; a recipe's stage is one of vae, teacher"),
        ("nowhere.to_be:Found", "The stage 'nowhere.to_be:Found' cannot be imported: No module named 'nowhere'"),
        (5, "There is no stage '5'"),
        (":Shouting", "The stage ':Shouting' cannot be imported: name a class as package.module:Class"),
        ("mine:", "The stage 'mine:' cannot be imported: name a class as package.module:Class"),
        ("mine:Whispering", "The stage 'mine:Whispering' cannot be imported: module 'mine' has no attribute"),
        ("mine:function", "The stage 'mine:function' is not a subclass of vlv.training.stage.Stage"),
    ],
)
def test_a_name_that_is_not_a_stage_is_refused(own_stage, name, sentence):
    with pytest.raises(ValueError) as error:
        stage_class(name)
    assert str(error.value).startswith(sentence)


def test_each_stage_of_the_package_is_found():
    assert {stage_class(name).__name__ for name in STAGE_CLASSES} == {
        *("VAEStage", "TeacherStage", "FlowTeacherStage", "EncoderStage", "LanguageStage"),
        *("AutoencodeStage", "CaptionStage"),
    }


def test_a_recipe_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"finetune-caption", "paper-stage1", "paper-stage2", "tiny/vae"} <= set(recipe_names())
    stage_type, _, args = read_recipe(["finetune-caption", "--output_dir", "out"])
    assert stage_type is stage_class("caption")
    (tmp_path / "finetune-caption").write_text(
        "stage: language\noutput_dir: mine\n"
    )  # a file of that name has priority
    stage_type, _, args = read_recipe(["finetune-caption"])
    assert stage_type is stage_class("language") and args.output_dir == "mine"


@pytest.mark.parametrize("name", ["finetune-captions", "recipes/finetune-caption.yaml"])
def test_a_misspelt_recipe_names_the_nearest(name, capsys):
    assert main(["train", name]) == 2
    assert f"There is no recipe {name}" in (error := capsys.readouterr().err)
    assert "did you mean finetune-caption?" in error


def test_help_before_a_recipe_is_chosen(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    assert "finetune-caption" in text and "autoencode" in text and "vlv train RECIPE --help" in text
    assert main(["train"]) == 2
    assert main(["train", "--max_steps", "3"]) == 2
    assert "The recipe comes first" in capsys.readouterr().err


def test_a_configuration_of_accelerate_by_its_name(monkeypatch, capsys):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.multi_gpu_launcher", launched.append)
    argv = ["ddp", "--num_processes", "2", "tiny/caption", "--output_dir", "out", "--max_steps", "3"]
    main(["train", "--accelerate_config", *argv])
    (args,) = launched
    assert args.num_processes == 2 and args.module and args.training_script == "vlv.train"
    assert args.training_script_args == ["tiny/caption", "--output_dir", "out", "--max_steps", "3"]
    assert main(["train", "--accelerate_config", "ddb", "tiny/caption"]) == 2
    assert "the package has ddp, deepspeed_zero2, fsdp2" in capsys.readouterr().err
    assert main(["train", "--accelerate_config", "ddp"]) == 2
    assert "name a recipe after it" in capsys.readouterr().err


def test_the_card_lists_a_training_after_those_that_it_starts_from(tmp_path):
    recipes = {
        "a": {"stage": "caption", "model": "runs/one", "output_dir": "runs/two"},
        "b": {"stage": "own_stages:OwnStage", "encoder": "runs/zero", "output_dir": "runs/one"},
        "c": {"stage": "encoder", "output_dir": "runs/zero"},
    }
    for name, recipe in recipes.items():
        folder = tmp_path / "training" / name
        folder.mkdir(parents=True)
        (folder / "training.json").write_text(json.dumps({"recipe": recipe}))
    assert [record["recipe"]["output_dir"] for record in _trainings(tmp_path)] == ["runs/zero", "runs/one", "runs/two"]
