import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from vlv import cli
from vlv.scenes import (
    SPLIT_NAMES,
    WORLD,
    Scene,
    SceneObject,
    compare,
    draw,
    folder,
    is_novel,
    mirrored_place,
    parse_caption,
    sample_picture,
    sample_scene,
    write_scenes,
)

CIRCLE = SceneObject("large", "red", "circle", "top left")
SQUARE = SceneObject("small", "blue", "square", "top right")
CROSS = SceneObject("small", "green", "cross", "bottom right")


# --- grammar ---


def test_captions_are_spelled_out():
    assert Scene((CIRCLE,), "mint").caption == "a large red circle at the top left on a mint background"
    assert Scene((CIRCLE, SQUARE), "gray").caption == (
        "a large red circle at the top left and a small blue square at the top right on a gray background"
    )
    three = Scene((CIRCLE, SQUARE, CROSS), "white")
    assert three.caption == (
        "a large red circle at the top left, a small blue square at the top right "
        "and a small green cross at the bottom right on a white background"
    )
    assert three.short_captions() == (
        "a large red circle at the top left",
        "a small blue square at the top right",
        "a small green cross at the bottom right",
        "a white background",
    )
    assert three.mirrored().caption == (
        "a small blue square at the top left, a large red circle at the top right "
        "and a small green cross at the bottom left on a white background"
    )


@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_captions_are_parsed_back(split):
    for index in range(300):
        scene = sample_scene(split, index, seed=5)
        assert parse_caption(scene.caption) == scene
        assert scene.mirrored().mirrored() == scene
        assert scene.caption not in scene.short_captions()


def test_every_name_takes_the_article_a():
    for name in (*WORLD.sizes, *WORLD.colours, *WORLD.shapes, *WORLD.backgrounds):
        assert name[0] not in "aeiou"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "does not end in"),
        ("a cat", "does not end in"),
        ("on a mint background", "does not end in"),
        ("a large red circle at the top left on a mint background.", "does not end in"),
        ("A large red circle at the top left on a mint background", "not of the form"),
        ("a large orange circle at the top left on a mint background", "not of the form"),
        ("a large red circle at the top  left on a mint background", "not of the form"),
        ("a large red circle at the top left on a red background", "no background 'red'"),
        ("a large red circle at the top left on a mint background\n", "does not end in"),
        (f"{SQUARE.phrase} and {CIRCLE.phrase} on a mint background", "reading order"),
        (f"{CIRCLE.phrase} and {CIRCLE.phrase} on a mint background", "different places"),
        (f"{CIRCLE.phrase}, {SQUARE.phrase}, {CROSS.phrase} on a mint background", "with commas and 'and'"),
        (f"{CIRCLE.phrase} and {SQUARE.phrase} and {CROSS.phrase} on a mint background", "with commas and 'and'"),
    ],
)
def test_other_texts_are_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_caption(text)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no shape 'cube'.*circle"):
        SceneObject("large", "red", "cube", "top")
    with pytest.raises(ValueError, match="no split 'dev'.*validation"):
        sample_scene("dev", 0)


# --- splits ---


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Scene]]:
    numbers = {"train": 1500, "validation": 500, "test": 500, "novel": 500}
    return {split: [sample_scene(split, index) for index in range(number)] for split, number in numbers.items()}


def test_splits_share_no_scene_nor_its_mirror_image(splits):
    captions = {
        split: {scene.caption for scene in members} | {scene.mirrored().caption for scene in members}
        for split, members in splits.items()
    }
    for split, others in ((a, b) for a in SPLIT_NAMES for b in SPLIT_NAMES if a < b):
        assert captions[split].isdisjoint(captions[others])


def test_novel_combinations_occur_in_no_other_split(splits):
    def combinations(scene):
        return {(item.shape, item.colour, item.place) for item in scene.objects}

    every = {(shape, colour, place) for shape in WORLD.shapes for colour in WORLD.colours for place in WORLD.places}
    novel = {combination for combination in every if is_novel(*combination)}
    assert 0.05 <= len(novel) / len(every) <= 0.15
    assert novel == {(shape, colour, mirrored_place(place)) for shape, colour, place in novel}
    for split in ("train", "validation", "test"):
        assert not any(combinations(scene) & novel for scene in splits[split])
    assert all(combinations(scene) & novel for scene in splits["novel"])
    # All other combinations occur in the train split.
    assert set().union(*map(combinations, splits["train"])) == every - novel


def test_sampling_is_uniform_and_repeatable(splits):
    for split, members in splits.items():
        counts = Counter(len(scene.objects) for scene in members)
        assert counts.keys() == set(range(1, WORLD.max_objects + 1))
        assert all(abs(count / len(members) - 1 / len(counts)) < 0.07 for count in counts.values())
        assert sample_scene(split, 7) == members[7] != sample_scene(split, 7, seed=1)


def test_scenes_are_the_same_in_every_process():
    # Python salts hash() differently in each process; the splits must not depend on it.
    code = "from vlv.scenes import *; print([sample_scene(s, i).caption for s in SPLIT_NAMES for i in range(5)])"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == str([sample_scene(s, i).caption for s in SPLIT_NAMES for i in range(5)])


# --- drawing ---


def object_mask(picture: Image.Image, background: str) -> np.ndarray:
    return np.abs(np.asarray(picture, int) - WORLD.backgrounds[background]).sum(-1) > 30


def test_drawing_follows_the_seed():
    scene = Scene((CIRCLE, SQUARE), "mint")
    assert draw(scene, 3).tobytes() == draw(scene, 3).tobytes()
    assert len({draw(scene, seed).tobytes() for seed in range(200)}) == 200
    assert draw(scene, 3).size == (WORLD.image_size, WORLD.image_size) and draw(scene, 3).mode == "RGB"


@pytest.mark.parametrize("shape", WORLD.shapes)
@pytest.mark.parametrize("size", WORLD.sizes)
def test_objects_have_their_colour_and_stay_in_their_cell(shape, size):
    for seed, place in enumerate(WORLD.places):
        picture = draw(Scene((SceneObject(size, "blue", shape, place),), "white"), seed)
        rows, columns = np.nonzero(object_mask(picture, "white"))
        row, column = divmod(WORLD.places.index(place), WORLD.columns)
        height, width = WORLD.image_size / WORLD.rows, WORLD.image_size / WORLD.columns
        assert rows.min() + 1 > row * height and rows.max() < (row + 1) * height
        assert columns.min() + 1 > column * width and columns.max() < (column + 1) * width
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 1.7 * WORLD.sizes[size] <= extent <= 2 * WORLD.sizes[size] + 2.5
        assert WORLD.colours["blue"] in {colour for _, colour in picture.getcolors(maxcolors=picture.width**2)}


def test_a_mirrored_picture_shows_the_mirrored_scene():
    shapes = WORLD.shapes * len(WORLD.places)
    objects = (SceneObject("large", "black", *them) for them in zip(shapes, WORLD.places, strict=False))
    scene = Scene(tuple(objects), "white")

    def average(scene, mirror):  # over the small random shifts
        pictures = (draw(scene, seed) for seed in range(400))
        return np.mean([ImageOps.mirror(picture) if mirror else picture for picture in pictures], axis=0)

    difference = np.abs(average(scene, mirror=True) - average(scene.mirrored(), mirror=False))
    assert difference.max() < 60 and difference.mean() < 6


@pytest.mark.parametrize(
    ("split", "words", "pixels"),
    [
        ("train", "da3c2a746cb34066", "5b35180ee7412e01"),
        ("validation", "da0362e4629251f3", "ee95ad7fa3c8dec4"),
        ("test", "307753ed2e4f7d59", "16945c53f19ad8b7"),
        ("novel", "067704a7a95d2b04", "043fb0cfb8dde8e9"),
    ],
)
def test_scenes_stay_as_they_were_drawn_for_vlv_tiny(split, words, pixels):
    # vlv-tiny was trained and measured on these scenes. Its numbers would be wrong for other scenes.
    said, drawn = hashlib.sha256(), hashlib.sha256()
    for index in range(200):
        picture, scene = sample_picture(split, index, seed=index % 3)
        drawn.update(picture.tobytes())
        said.update("\n".join((scene.caption, *scene.short_captions())).encode())
    assert (said.hexdigest()[:16], drawn.hexdigest()[:16]) == (words, pixels)


# --- folders ---


def test_a_folder_of_scenes_is_an_imagefolder(tmp_path):
    write_scenes(tmp_path / "scenes", 8, seed=2, split="validation")
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "scenes"), split="train")
    assert rows.column_names == ["image", "text", "short"] and len(rows) == 8
    for index, row in enumerate(rows):
        picture, scene = sample_picture("validation", index, seed=2)
        assert row["image"].tobytes() == picture.tobytes()
        assert row["text"] == scene.caption and tuple(row["short"]) == scene.short_captions()


def test_many_processes_write_the_same_folder(tmp_path, monkeypatch):
    write_scenes(tmp_path / "one", 7)
    monkeypatch.setattr(folder, "_CHUNK", 2)
    write_scenes(tmp_path / "many", 7)
    assert not multiprocessing.active_children()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


def test_an_interrupted_folder_has_no_metadata_and_can_be_written_again(tmp_path, monkeypatch):
    write_scenes(tmp_path, 6)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_write_chunk", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_scenes(tmp_path, 4)
    assert not (tmp_path / "metadata.jsonl").exists()
    write_scenes(tmp_path, 3)
    names = [json.loads(line)["file_name"] for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert names == sorted(path.name for path in tmp_path.glob("*.png")) == ["000000.png", "000001.png", "000002.png"]


def test_the_command_draws(tmp_path):
    settings = ["--world", "shapes", "--num", "3", "--split", "novel", "--seed", "4"]
    command = [sys.executable, "-m", "vlv", "scenes", *settings, "--output", str(tmp_path / "scenes")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "3 novel scenes" in done.stdout
    first = json.loads((tmp_path / "scenes" / "metadata.jsonl").read_text().splitlines()[0])
    assert first["text"] == sample_scene("novel", 0, seed=4).caption


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--output", "own"], "not empty"),
        (["--output", "own/000000.png"], "is a file"),
        (["--output", "new", "--num", "0"], "at least 1"),
        (["--output", "new", "--split", "dev"], "validation"),
        (["--output", "new", "--seed", "-1"], "--seed is -1; it must be between 0 and"),
        ([], "--output"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "own" / "000000.png"
    picture.parent.mkdir()
    picture.write_bytes(b"mine")
    try:
        status = cli.main(["scenes", *arguments])
    except SystemExit as stop:
        status = stop.code
    complaints = capsys.readouterr().err.splitlines()
    assert status == 2 and len(complaints) == 1 and complaint in complaints[0]
    assert picture.read_bytes() == b"mine" and not (tmp_path / "new").exists()


# --- scoring ---


def test_comparison_counts_by_place():
    truth = Scene((CIRCLE, SQUARE, CROSS), "mint")
    assert compare(truth, truth) == Counter(
        scenes=1,
        objects=3,
        exact=1,
        background_right=1,
        objects_right=3,
        extra_objects=0,
        **dict.fromkeys(("shape_right", "colour_right", "size_right", "place_right"), 3),
    )
    # The circle has another colour, the square is elsewhere, the cross is right.
    predicted = Scene(
        (
            SceneObject("large", "pink", "circle", "top left"),
            SceneObject("small", "blue", "square", "bottom left"),
            CROSS,
        ),
        "gray",
    )
    counts = compare(predicted, truth)
    assert (counts["exact"], counts["background_right"], counts["objects_right"], counts["extra_objects"]) == (
        0,
        0,
        1,
        1,
    )
    assert [counts[f"{name}_right"] for name in ("place", "shape", "size", "colour")] == [2, 2, 2, 1]
    nothing = compare(None, truth)
    assert (nothing["scenes"], nothing["objects"]) == (1, 3) and sum(nothing.values()) == 4
    assert compare(Scene((), "mint"), truth)["background_right"] == 1
