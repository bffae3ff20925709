"""`vlv train` with wrong input or a full disk: it prints one clear line and exits with a non-zero status."""

import logging
import resource
import shutil
from contextlib import contextmanager

import pytest
import tiny
from running_train import arguments, run
from safetensors.torch import load_file, save_file
from transformers.testing_utils import CaptureLogger

from vlv.cli import main as vlv

AUTOENCODE, CAPTION = "tiny/autoencode", "tiny/caption"


def error_of(capsys, recipe, output_dir, **settings):
    """The one line at the end of a refused run."""
    assert vlv(["train", *arguments(recipe, output_dir, **settings)]) == 2
    told = capsys.readouterr().err
    assert told.count("vlv train: error:") == 1 and "Traceback" not in told
    return told.rpartition("vlv train: error: ")[2].removesuffix("\n")


@pytest.mark.parametrize("recipe", [AUTOENCODE, CAPTION], ids=["stage1", "stage2"])
def test_a_folder_with_no_images(recipe, tiny_repo, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "list.txt").write_text("nothing to see")
    error = error_of(capsys, recipe, tmp_path / "out", dataset=tmp_path / "notes", model=tiny_repo)
    assert error == f"There are no images, no parquet files and no WebDataset tars in {tmp_path / 'notes'}."


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_missing_caption_column(streaming, tiny_repo, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    for number, image in enumerate(tiny.images(12)):
        image.save(tmp_path / "bare" / f"{number}.png")
    error = error_of(
        capsys, CAPTION, tmp_path / "out", dataset=tmp_path / "bare", model=tiny_repo, streaming=streaming
    )
    assert error == "The dataset has no column 'text', only image: choose one with caption_column."


@pytest.mark.parametrize(
    ("recipe", "lacking", "message"),
    [
        (CAPTION, {"caption_config": None}, "has no caption head yet: name a language model with --caption_head."),
        (AUTOENCODE, {"decoder_config": None}, "needs the part vae, which this checkpoint does not have."),
    ],
    ids=["stage2", "stage1"],
)
def test_a_stage_whose_parts_the_checkpoint_lacks(recipe, lacking, message, scenes, tmp_path, capsys):
    tiny.model(**lacking).save_pretrained(tmp_path / "model")
    tiny.processor().save_pretrained(tmp_path / "model")
    error = error_of(capsys, recipe, tmp_path / "out", dataset=scenes, model=tmp_path / "model")
    assert error.startswith(f"{tmp_path / 'model'}") and message in error


def without(weight, source, folder):
    """A copy of a model's folder that lacks one of its weights."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    del weights[weight]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("recipe", [AUTOENCODE, CAPTION], ids=["stage1", "stage2"])
def test_a_model_that_lacks_weights_does_not_train_from_random_ones(recipe, tiny_repo, scenes, tmp_path, capsys):
    broken = without("projection.0.weight", tiny_repo, tmp_path / "broken")
    error = error_of(capsys, recipe, tmp_path / "out", dataset=scenes, model=broken)
    assert error == f"{broken} lacks 1 of the weights that its config asks for: projection.0.weight"


def test_a_caption_head_that_lacks_weights(tiny_repo, tiny_components, scenes, tmp_path, capsys):
    broken = without("model.norm.weight", tiny_components / "caption_head", tmp_path / "broken")
    error = error_of(capsys, CAPTION, tmp_path / "out", dataset=scenes, model=tiny_repo, caption_head=broken)
    assert error == f"{broken} lacks 1 of the weights that its config asks for: model.norm.weight"


@pytest.mark.parametrize("replaced", [False, True], ids=["the_first", "another"])
def test_a_new_caption_head_is_not_told_as_a_fault(replaced, tiny_components, scenes, tmp_path):
    tiny.model(**({} if replaced else {"caption_config": None})).save_pretrained(tmp_path / "model")
    tiny.processor().save_pretrained(tmp_path / "model")
    settings = {"model": tmp_path / "model", "caption_head": tiny_components / "caption_head", "max_steps": 1}
    with CaptureLogger(logging.getLogger("transformers")) as told:
        run(CAPTION, tmp_path / "out", dataset=scenes, **settings)
    assert "MISSING" not in told.out and "corrupted" not in told.out


@pytest.mark.slow
def test_a_resume_folder_of_another_model(tiny_repo, scenes, tmp_path, capsys):
    run(CAPTION, tmp_path, dataset=scenes, model=tiny_repo, max_steps=2)
    error = error_of(capsys, AUTOENCODE, tmp_path, dataset=scenes, model=tiny_repo, resume=True)
    assert error.startswith(f"{tmp_path / 'checkpoint-2'} is a checkpoint of another model")


# ---- a full disk -----------------------------------------------------------------------------------------------


@contextmanager
def room_for(size):
    """Limits the size of files to `size` bytes. This stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_features": True}, "Choose a cache_dir with more room"),
        ({"cache_features": False}, "Files that were saved before are complete."),  # the training checkpoint
        ({"cache_features": False, "save_strategy": "no"}, "Files that were saved before are complete."),  # the model
    ],
    ids=["cache", "checkpoint", "model"],
)
@pytest.mark.slow
def test_a_full_disk_leaves_the_model_from_before(settings, message, tiny_repo, scenes, tmp_path, capsys):
    settings = {"dataset": scenes, "model": tiny_repo, "max_steps": 2, **settings}
    run(CAPTION, tmp_path, **settings)
    for folder in ("cache", "checkpoint-2"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    capsys.readouterr()
    with room_for(20_000):
        error = error_of(capsys, CAPTION, tmp_path, **settings)
    assert message in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
