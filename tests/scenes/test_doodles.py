"""Pictures to fine-tune on, which belong to no world."""

import json

import numpy as np
import pytest
from PIL import Image

from vlv.cli import main
from vlv.scenes.doodles import CRAYONS, PAPER, SUBJECTS, Doodle, Doodles, draw

SEEDS = range(6)


def test_the_same_numbers_give_the_same_picture():
    (first, doodle), (again, same) = (Doodles().sample_picture("train", 5, seed=1) for _ in range(2))
    assert doodle == same and first.tobytes() == again.tobytes()
    assert first.size == (64, 64) and first.mode == "RGB"
    assert Doodles().sample_picture("train", 6, seed=1)[0].tobytes() != first.tobytes()


def test_no_caption_is_in_both_splits():
    train, test = (
        {Doodles().sample_picture(split, index)[1].caption for index in range(150)} for split in ("train", "test")
    )
    assert len(test) > 50 and not train & test


def test_captions_name_what_is_drawn_from_left_to_right():
    doodle = Doodle((("orange", "kite"), ("blue", "fir tree")))
    assert doodle.caption == "a crayon drawing of an orange kite beside a blue fir tree"
    pixels = np.asarray(draw(doodle, np.random.default_rng(0))).astype(int)
    for half, colour in ((pixels[:, :32], "orange"), (pixels[:, 32:], "blue")):
        distance = {name: np.abs(half - rgb).sum(-1).min() for name, rgb in CRAYONS.items()}
        assert min(distance, key=distance.get) == colour


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_is_drawn_whole(name):
    for seed in SEEDS:
        pixels = np.asarray(draw(Doodle((("red", name),)), np.random.default_rng(seed))).astype(int)
        drawn = np.abs(pixels - PAPER).sum(-1) > 60
        assert drawn.sum() > 150
        assert not (drawn[0].any() or drawn[-1].any() or drawn[:, 0].any() or drawn[:, -1].any())


def test_the_command_draws_them(tmp_path, capsys):
    folder = tmp_path / "mine"
    assert main(["scenes", "--world", "doodles", "--split", "train", "--num", "3", "--output", str(folder)]) == 0
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        picture, doodle = Doodles().sample_picture("train", number)
        assert row["text"] == doodle.caption and row["short"] == list(doodle.short_captions())
        assert Image.open(folder / row["file_name"]).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--split", "novel"], "There is no split 'novel'; the splits are: train, test."),
        (["--prompts", "true"], "Prompts are drawn for the worlds shapes and emoji, not for doodles."),
        (["--max_objects", "3"], "--max_objects is for the worlds shapes and emoji; doodles have one or two things."),
        (["--varied", "0.5"], "--varied is for --world emoji; the world doodles has no artists."),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, complaint):
    assert main(["scenes", "--world", "doodles", "--output", str(tmp_path / "mine"), *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
