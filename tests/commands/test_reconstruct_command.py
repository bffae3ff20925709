"""`vlv reconstruct` as a user runs it."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from modeling_vlv import VLVModel
from vlv.cli import main
from vlv.commands.reconstruct import ReconstructArguments
from vlv.sheets import GAP


def _main(*arguments):
    return main(["reconstruct", *map(str, arguments)])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, image in zip(["a.png", "b.bmp", "sub/c.png"], tiny.images(3, size=(32, 32)), strict=True):
        image.save(folder / name)
    return folder


@pytest.mark.slow
def test_as_a_process(photos, tiny_repo, tiny_model, tmp_path):
    (photos / "text.png").write_text("no image")
    output = tmp_path / "rebuilt"
    command = [sys.executable, "-m", "vlv", "reconstruct", photos, "--output", output, "--model", tiny_repo]
    command += ["--num_inference_steps", "3", "--guidance_scale", "1.5", "--seed", "5", "--batch_size", "2"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert f"vlv reconstruct: left out: {photos / 'text.png'}: " in result.stderr
    assert result.stdout == f"{output / 'contact_sheet.png'}\n"
    written = {path.relative_to(output).as_posix() for path in output.rglob("*.png")}
    assert written == {"a.png", "b.png", "sub/c.png", "contact_sheet.png"}

    # The original is on the left. The model's picture of this image alone is on the right. Both are magnified.
    for name, source in [("a.png", "a.png"), ("b.png", "b.bmp"), ("sub/c.png", "sub/c.png")]:
        original = Image.open(photos / source)
        (rebuilt,) = tiny_model.reconstruct(
            **tiny.processor()(images=original),
            num_inference_steps=3,
            guidance_scale=1.5,
            generator=[torch.Generator().manual_seed(5)],
        )
        sheet = Image.open(output / name)
        width = (sheet.width - GAP) // 2
        for left, expected in ((0, original), (width + GAP, rebuilt)):
            shown = sheet.crop((left, 0, left + width, sheet.height)).resize((32, 32), Image.Resampling.NEAREST)
            assert np.abs(np.asarray(shown, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.slow
def test_the_seed_changes_the_reconstruction(photos, tiny_repo, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        arguments = ["--model", tiny_repo, "--num_inference_steps", 2, "--seed", seed]
        assert _main(photos / "a.png", "--output", tmp_path / name, *arguments) == 0
    one, again, two = ((tmp_path / name / "a.png").read_bytes() for name in ("one", "again", "two"))
    assert one == again != two


def test_images_with_the_same_name_get_different_files(photos, tiny_repo, tmp_path):
    Image.open(photos / "a.png").save(photos / "a.bmp")
    assert _main(photos, "--output", tmp_path / "rebuilt", "--model", tiny_repo, "--num_inference_steps", 1) == 0
    written = {path.name for path in (tmp_path / "rebuilt").glob("*.png")}
    assert written == {"a.bmp.png", "a.png.png", "b.png", "contact_sheet.png"}


def test_wide_and_tall_images_keep_their_proportions(tiny_repo, tmp_path):
    for name, size in (("wide.png", (90, 30)), ("tall.png", (30, 60))):
        tiny.images(1, size=size)[0].save(tmp_path / name)
    output = tmp_path / "rebuilt"
    assert _main(tmp_path, "--output", output, "--model", tiny_repo, "--num_inference_steps", 1) == 0
    for name, proportion in (("wide.png", 3.0), ("tall.png", 0.5)):
        sheet = Image.open(output / name)
        assert (sheet.width - GAP) / 2 / sheet.height == pytest.approx(proportion, rel=0.01)


def test_originals_are_never_overwritten(photos, tiny_repo, capsys):
    before = (photos / "a.png").read_bytes()
    assert _main(photos, "--output", photos, "--model", tiny_repo) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "would overwrite the image" in line
    assert (photos / "a.png").read_bytes() == before


def test_a_name_too_long_for_its_png_does_not_affect_the_others(photos, tiny_repo, tmp_path, capsys):
    long = "n" * 251
    (photos / "a.png").rename(photos / f"{long}.png")
    (photos / f"{long}.bmp").write_bytes((photos / "b.bmp").read_bytes())  # so both PNGs keep the suffix
    assert _main(photos, "--output", tmp_path / "rebuilt", "--model", tiny_repo, "--num_inference_steps", 1) == 0
    assert capsys.readouterr().err.count("its name is too long for") == 2
    assert {path.name for path in (tmp_path / "rebuilt").iterdir()} == {"b.png", "sub", "contact_sheet.png"}


def test_checkpoint_without_a_decoder(photos, tiny_processor, tmp_path, capsys):
    tiny.model(decoder_config=None).save_pretrained(tmp_path / "captioner")
    tiny_processor.save_pretrained(tmp_path / "captioner")
    capsys.readouterr()
    assert _main(photos, "--output", tmp_path / "rebuilt", "--model", tmp_path / "captioner") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "captioner has no diffusion decoder and cannot reconstruct" in line


def test_defaults_are_the_models_own():
    defaults = inspect.signature(VLVModel.reconstruct).parameters
    for name in ("num_inference_steps", "guidance_scale"):
        assert getattr(ReconstructArguments(output=""), name) == defaults[name].default


@pytest.mark.slow
def test_pictures_of_the_leading_queries(photos, tiny_repo, tiny_model, tmp_path, capsys):
    output = tmp_path / "rebuilt"
    assert _main(photos / "a.png", "--output", output, "--model", tiny_repo, "--num_queries", 3) == 0
    embeds = tiny_model.encode(**tiny.processor()(images=Image.open(photos / "a.png")))[:, :3]
    (rebuilt,) = tiny_model.reconstruct(caption_embeds=embeds, generator=[torch.Generator().manual_seed(0)])
    sheet = Image.open(output / "a.png")
    width = (sheet.width - GAP) // 2
    shown = sheet.crop((width + GAP, 0, sheet.width, sheet.height)).resize((32, 32), Image.Resampling.NEAREST)
    assert np.abs(np.asarray(shown, int) - np.asarray(rebuilt, int)).max() <= 1
    for number in (0, 11):
        capsys.readouterr()
        assert _main(photos, "--output", output, "--model", tiny_repo, "--num_queries", number) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.endswith(f"num_queries is {number}, but this checkpoint has 10 queries: choose between 1 and 10.")
