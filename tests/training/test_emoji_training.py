"""The recipes of vlv-emoji, each for a few steps. Together they give one VLV."""

import json

import pytest
import torch
from PIL import Image
from running_train import run

from vlv.cli import main as vlv
from vlv.models.loading import load_autoencoder
from vlv.scenes import world, write_scenes

EMOJI = world("emoji")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    # Enough scenes for the tokenizers to know every word.
    write_scenes(folder / "scenes", 600, split="train", world=EMOJI)
    common = {"dataset": folder / "scenes"}
    starts = {
        "vae": {},
        "teacher": {"vae": folder / "vae"},
        "encoder": {},
        "language": {},
        "autoencode": {
            "encoder": folder / "encoder",
            "decoder": folder / "teacher",
            "caption_head": folder / "language",
        },
        "details": {"model": folder / "autoencode"},
        "caption": {"model": folder / "details"},
    }
    for step, start in starts.items():
        run(f"emoji/{step}", folder / step, **common, **start)
    return folder


@pytest.mark.slow
def test_the_recipes_make_one_small_vlv(outputs):
    assert (outputs / "caption" / "model.safetensors").stat().st_size < 40e6
    model, processor = load_autoencoder(str(outputs / "caption"), "cpu")
    picture, scene = EMOJI.sample_picture("test", 0)
    (rebuilt,) = model.reconstruct(processor(images=picture)["pixel_values"], num_inference_steps=2)
    assert rebuilt.size == (EMOJI.image_size,) * 2
    # The longest caption fits into the lengths of both tokenizers.
    longest = max((EMOJI.sample_scene("train", index).caption for index in range(3000)), key=len)
    positions = model.config.text_encoder_config.max_position_embeddings
    assert len(processor.decoder_tokenizer(longest).input_ids) <= positions == model.config.num_queries
    assert torch.isfinite(model.encode(processor(images=picture)["pixel_values"])).all()


@pytest.mark.slow
def test_a_model_of_one_world_is_not_measured_on_the_other(outputs, capsys):
    arguments = ["--num", "2", "--num_inference_steps", "1", "--world"]
    for model, other in ((str(outputs / "caption"), "shapes"), ("vlv-tiny", "emoji")):
        assert vlv(["evaluate", "--model", model, *arguments, other]) == 2
        (complaint,) = capsys.readouterr().err.splitlines()
        assert f"which is not the size of the world {other}" in complaint


@pytest.mark.slow
def test_the_demo_shows_the_models_own_world(outputs, tmp_path, capsys):
    assert vlv(["demo", "--model", str(outputs / "caption"), "--output", str(tmp_path / "demo")]) == 0
    captions = [
        json.loads(line)["file_name"] for line in (tmp_path / "demo" / "captions.jsonl").read_text().splitlines()
    ]
    assert captions == [
        *(f"scenes/{number:06d}.png" for number in range(8)),
        *(f"unseen-artist/{number:06d}.png" for number in range(4)),
    ]
    for name in captions:
        folder, file = name.split("/")
        picture, _ = EMOJI.sample_picture("artist" if folder == "unseen-artist" else "test", int(file[:6]))
        assert Image.open(tmp_path / "demo" / name).tobytes() == picture.tobytes()
    assert "of 12 captions are exactly right" in capsys.readouterr().out
