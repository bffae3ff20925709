import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn.functional import log_softmax

import vlv
from vlv.scenes import WORLD, Scene, SceneObject, draw, sample_picture
from vlv.scenes.reader import ReadingLessons, SceneReader, SceneReaderConfig, degrade, measure, scene_reader, to_pixels
from vlv.scenes.reader import main as train


@pytest.fixture(scope="module")
def pictures() -> tuple[list[Image.Image], list[Scene]]:
    images, truths = zip(
        *(sample_picture(split, i, 9) for split in ("test", "novel") for i in range(100)), strict=True
    )
    return list(images), list(truths)


def test_it_reads_drawings(pictures):
    images, truths = pictures
    assert scene_reader().read(images) == truths


def test_it_reads_mirrored_drawings(pictures):
    images, truths = pictures
    assert scene_reader().read([ImageOps.mirror(image) for image in images]) == [it.mirrored() for it in truths]


def test_it_knows_the_world_by_name():
    config = scene_reader().config
    assert (config.image_size, config.grid) == (WORLD.image_size, [WORLD.columns, WORLD.rows])
    assert (config.world, config.places) == ("shapes", list(WORLD.places))
    assert config.backgrounds == list(WORLD.backgrounds)
    assert config.attributes == [
        ["shape", list(WORLD.shapes)],
        ["colour", list(WORLD.colours)],
        ["size", list(WORLD.sizes)],
    ]


def test_it_reads_scenes_of_no_split():
    objects = (
        SceneObject("large", colour, "cross", place)
        for colour, place in zip(WORLD.colours, WORLD.places, strict=False)
    )
    crowd, empty = Scene(tuple(objects), "white"), Scene((), "mint")
    assert scene_reader().read([draw(crowd, 0), draw(empty, 0)]) == [crowd, empty]
    assert scene_reader().read([]) == []


def test_mode_size_and_batch_change_nothing(pictures):
    images, truths = (them[:10] for them in pictures)
    reader = scene_reader()
    assert reader.read(images, batch_size=3) == truths
    assert reader.read([image.convert("RGBA") for image in images]) == truths
    assert reader.read([image.resize((256, 256), Image.Resampling.BICUBIC) for image in images]) == truths


@pytest.mark.slow
def test_its_recorded_accuracy_can_be_measured_again():
    recorded = json.loads((Path(vlv.__file__).parent / "checkpoints/scene-reader/accuracy.json").read_text())
    assert measure(scene_reader(), "test") == recorded["test"]
    assert recorded["test"]["scenes"] == 1000
    assert recorded["test"]["objects_right"] / recorded["test"]["objects"] >= 0.999


def test_loss_is_the_sum_of_mean_cross_entropies(monkeypatch):
    scenes = [sample_picture("train", i, 0, count)[1] for i, count in enumerate((1, 2, 4, 0))]
    monkeypatch.setattr(WORLD, "sample_picture", lambda split, index, *_: (draw(scenes[index], 0), scenes[index]))
    torch.manual_seed(0)
    config = SceneReaderConfig.of(WORLD)
    reader = SceneReader(config).eval()
    lessons = ReadingLessons(config, WORLD, num=4, seed=0)
    batch = {name: torch.stack([lessons[i][name] for i in range(4)]) for name in lessons[0]}
    output = reader(**batch)
    logits = dict(zip((name for name, _ in config.attributes), output.attribute_logits, strict=True))

    losses = {"shape": [], "colour": [], "size": [], "background": []}
    for i, scene in enumerate(scenes):
        objects = {item.place: item for item in scene.objects}
        for p, place in enumerate(WORLD.places):
            item = objects.get(place)
            shape = 1 + WORLD.shapes.index(item.shape) if item else 0
            losses["shape"].append(-log_softmax(logits["shape"][i, p], -1)[shape])
            if item:
                colour, size = list(WORLD.colours).index(item.colour), list(WORLD.sizes).index(item.size)
                losses["colour"].append(-log_softmax(logits["colour"][i, p], -1)[colour])
                losses["size"].append(-log_softmax(logits["size"][i, p], -1)[size])
        background = list(WORLD.backgrounds).index(scene.background)
        losses["background"].append(-log_softmax(output.background_logits[i], -1)[background])
    by_hand = sum(torch.stack(values).mean() for values in losses.values())
    torch.testing.assert_close(output.loss, by_hand)


def test_degrading_keeps_the_picture(pictures):
    images, truths = (them[:50] for them in pictures)
    degraded = [degrade(image, np.random.default_rng(i)) for i, image in enumerate(images)]
    assert all(a.tobytes() != b.tobytes() and a.size == b.size for a, b in zip(images, degraded, strict=True))
    found = scene_reader().read(degraded)
    assert sum(a == b for a, b in zip(found, truths, strict=True)) >= 47


def test_other_shapes_of_pixels_are_refused():
    size = WORLD.image_size
    with pytest.raises(ValueError, match=rf"pixel_values must be \(batch, 3, {size}, {size}\), not \(1, 3, 9, 9\)"):
        SceneReader(SceneReaderConfig.of(WORLD))(torch.zeros(1, 3, 9, 9))


@pytest.mark.slow
def test_it_can_be_trained_again_from_nothing(tmp_path, capsys):
    train(["--output_dir", str(tmp_path), "--max_steps", "3", "--per_device_train_batch_size", "4"])
    accuracy = json.loads((tmp_path / "accuracy.json").read_text())
    assert json.dumps(accuracy, indent=2) in capsys.readouterr().out
    trained = SceneReader.from_pretrained(tmp_path)
    assert trained.dtype == torch.float16
    assert (tmp_path / "model.safetensors").stat().st_size < 1.5e6
    assert accuracy["novel"]["scenes"] == 1000


def test_pixels_span_the_range():
    picture = Image.new("RGB", (2, 1))
    picture.putpixel((1, 0), (255, 0, 255))
    assert to_pixels(picture).tolist() == [[[-1, 1]], [[-1, -1]], [[-1, 1]]]
