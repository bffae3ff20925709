"""The world of drawn things: its grammar, splits, drawings and artwork, and the command that draws it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlv import cli
from vlv.scenes import world, write_scenes
from vlv.scenes.artwork import load_artwork
from vlv.scenes.emoji import UNSEEN_ARTIST, EmojiScene, EmojiWorld, Thing, is_novel

EMOJI = world("emoji")
NAMES, ARTISTS = EMOJI.artwork.names, tuple(EMOJI.artwork.artists)
SCISSORS = Thing("large", "pair of scissors", "bottom right")


@pytest.fixture
def artwork(tmp_path):
    """Artwork of one artist: three things in a sheet of two columns. Each thing is a square in its own grey."""
    folder = tmp_path / "artwork"
    folder.mkdir()
    sheet = np.zeros((16, 16, 4), np.uint8)
    for number, (y, x) in enumerate([(0, 0), (0, 8), (8, 0)]):
        sheet[y : y + 8, x : x + 8] = (*[80 * number] * 3, 255)
    Image.fromarray(sheet).save(folder / "ada.png")
    names = [{"text": name} for name in ("stone", "loaf", "pair of socks")]
    index = {"tile": 8, "columns": 2, "names": names, "artists": {"ada": "public domain"}}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


# --- grammar ---


def test_a_caption_is_parsed_back():
    scene = EmojiScene((Thing("small", "apple", "top left"), SCISSORS), "mint")
    text = "a small apple at the top left and a large pair of scissors at the bottom right on a mint background"
    assert scene.caption == text and EMOJI.parse_caption(text) == scene
    assert scene.short_captions() == (*(item.phrase for item in scene.objects), "a mint background")
    for split in EMOJI.splits:
        for index in range(200):
            scene = EMOJI.sample_scene(split, index)
            assert EMOJI.parse_caption(scene.caption) == scene
            assert EMOJI.parse_caption(scene.mirrored().caption).mirrored() == scene


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("an apple", "does not end in 'on a <colour> background'"),
        ("a small red circle at the top left on a mint background", "'a <size> <name> at the <place>'"),
        ("a small apple at the middle on a mint background", "'a <size> <name> at the <place>'"),
        ("a small apple at the top left on a white background", "no background 'white'"),
        ("a small apple at the top right and a small owl at the top left on a mint background", "reading order"),
    ],
)
def test_other_texts_are_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        EMOJI.parse_caption(text)


# --- splits ---


@pytest.fixture(scope="module")
def splits():
    numbers = {"train": 3000, "validation": 400, "test": 400, "novel": 400, "artist": 400}
    return {split: [EMOJI.sample_scene(split, index) for index in range(number)] for split, number in numbers.items()}


def test_splits_share_no_scene_nor_its_mirror_image(splits):
    captions = {
        split: {scene.caption for scene in members} | {scene.mirrored().caption for scene in members}
        for split, members in splits.items()
    }
    captions["test"] |= captions.pop("artist")  # the same scenes, drawn by another artist
    for split, others in ((a, b) for a in captions for b in captions if a < b):
        assert captions[split].isdisjoint(captions[others])


def test_novel_combinations_occur_in_no_other_split(splits):
    every = {(name, place) for name in NAMES for place in EMOJI.places}
    novel = {combination for combination in every if is_novel(*combination)}
    assert 0.05 <= len(novel) / len(every) <= 0.2

    def combinations(scene):
        return {(item.name, item.place) for item in scene.objects}

    for split, members in splits.items():
        for scene in members:
            for shown in (scene, scene.mirrored()):
                assert bool(combinations(shown) & novel) == (split == "novel")
    # Each thing occurs somewhere, so that only its place is new.
    assert {name for name, _ in every - novel} == set(NAMES)
    assert set().union(*map(combinations, splits["train"])) == every - novel


@pytest.mark.slow
def test_only_one_artist_draws_the_split_artist():
    assert len(ARTISTS) == 4 and EMOJI.artists_of("artist") == (UNSEEN_ARTIST,)
    for split in ("train", "validation", "test", "novel"):
        assert set(EMOJI.artists_of(split)) == set(ARTISTS) - {UNSEEN_ARTIST}
    # Each picture of a split is drawn by one of the split's artists, and by no other artist.
    for split in ("train", "artist"):
        for index in range(20):
            picture, scene = EMOJI.sample_picture(split, index)
            key = (*EMOJI.key(split, index, 0), 1)
            by = [artist for artist in ARTISTS if EMOJI.draw(scene, key, artist).tobytes() == picture.tobytes()]
            assert len(by) == 1 and by[0] in EMOJI.artists_of(split)


def test_scenes_with_more_objects_are_drawn_on_request():
    crowded = world("emoji", max_objects=4)
    scenes = [crowded.sample_scene("train", index) for index in range(60)]
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    assert all(EMOJI.parse_caption(scene.caption) == scene for scene in scenes)


# --- drawing ---


def test_things_stay_in_their_cell_and_large_ones_are_larger():
    for name in NAMES[::8]:
        areas = {}
        for size in EMOJI.sizes:
            for seed, place in enumerate(EMOJI.places):
                picture = np.asarray(EMOJI.draw(EmojiScene((Thing(size, name, place),), "navy"), seed), int)
                shown = np.abs(picture - EMOJI.backgrounds["navy"]).sum(-1) > 30
                row, column = divmod(seed, 2)
                cell = shown[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
                assert cell.sum() == shown.sum() > 20
                areas.setdefault(size, []).append(cell.sum())
        assert max(areas["small"]) < min(areas["large"])


def test_a_drawing_is_the_artists_tile(artwork):
    drawn = EmojiWorld(load_artwork(artwork))
    for number, name in enumerate(drawn.artwork.names):
        picture = drawn.draw(EmojiScene((Thing("large", name, "bottom left"),), "mint"), 0, "ada")
        assert np.allclose(picture.getpixel((16, 48)), 80 * number, atol=1)
        assert picture.getpixel((2, 2)) == EMOJI.backgrounds["mint"]


def test_a_mirrored_picture_shows_the_mirrored_scene():
    scene = EmojiScene((SCISSORS,), "rose")

    def average(scene, mirror):  # over the small random shifts
        pictures = (EMOJI.draw(scene, seed) for seed in range(200))
        return np.mean([ImageOps.mirror(picture) if mirror else picture for picture in pictures], axis=0)

    assert np.abs(average(scene, mirror=True) - average(scene.mirrored(), mirror=False)).mean() < 2


def test_varied_pictures_show_the_same_scenes():
    varied = world("emoji", varied=1.0)
    for index in range(30):
        plain, scene = EMOJI.sample_picture("train", index)
        picture, same = varied.sample_picture("train", index)
        assert same == scene and picture.tobytes() != plain.tobytes()
        assert picture.tobytes() == varied.sample_picture("train", index)[0].tobytes()
        # Where nothing is drawn, the colour is that of the background, except for grain.
        assert np.median(np.abs(np.asarray(picture, int) - EMOJI.backgrounds[scene.background])) <= 4


# --- folders and the command ---


def test_a_folder_says_what_it_shows(tmp_path):
    folder = write_scenes(tmp_path / "scenes", 3, split="artist", world=EMOJI)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        picture, scene = EMOJI.sample_picture("artist", index)
        assert (row["text"], row["short"]) == (scene.caption, list(scene.short_captions()))
        assert Image.open(folder / row["file_name"]).tobytes() == picture.tobytes()


def test_the_command_draws_from_another_folder(artwork, tmp_path):
    arguments = [
        "--world",
        "emoji",
        "--artwork",
        artwork,
        "--artists",
        "ada",
        "--num",
        "4",
        "--output",
        tmp_path / "out",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "vlv", "scenes", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0 and "4 test scenes" in done.stdout, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert all(any(name in row["text"] for name in ("stone", "loaf", "pair of socks")) for row in rows)


def _spoil(folder, what):
    index = json.loads((folder / "index.json").read_text())
    if what == "no index":
        (folder / "index.json").unlink()
        return
    if what == "small sheet":
        Image.new("RGBA", (16, 12)).save(folder / "ada.png")
    elif what == "no sheet":
        (folder / "ada.png").unlink()
    elif what == "not an image":
        (folder / "ada.png").write_bytes(b"no")
    elif what == "large sheet":
        Image.new("1", (20000, 10000)).save(folder / "ada.png")
    elif what == "no name":
        index["names"][1] = {"icon": "loaf"}
    elif what == "and":
        index["names"][1]["text"] = "bread and butter"
    elif what == "twice":
        index["names"][1]["text"] = "stone"
    elif what == "tile":
        index["tile"] = "8"
    elif what == "no artists":
        del index["artists"]
    (folder / "index.json").write_text("[1" if what == "broken" else json.dumps(index))


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("no index", "holds no index.json"),
        ("broken", "is not a JSON object"),
        ("small sheet", "ada.png is 16x12 pixels, too small for the 3 things of its index, which need 16x16"),
        ("no sheet", "there is no sheet"),
        ("large sheet", "ada.png is larger than 179 million pixels"),
        ("not an image", "ada.png cannot be read as an image"),
        ("no name", "the thing number 1 has no name"),
        ("and", "without commas or 'and'"),
        ("twice", "two things are called 'stone'"),
        ("tile", "tile must be a whole number above 0"),
        ("no artists", "lacks 'artists'"),
    ],
)
def test_bad_artwork_is_refused_in_one_line(what, complaint, artwork, tmp_path, capsys):
    _spoil(artwork, what)
    assert complaint in _refusal(capsys, "--world", "emoji", "--artwork", artwork, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--artists", "rembrandt"], f"no artist 'rembrandt' in this artwork; its artists are: {', '.join(ARTISTS)}"),
        (["--artwork", "nowhere"], "There is no artwork folder nowhere"),
        (["--max_objects", "5"], "a scene has 1 to 4 objects"),
        (["--varied", "2"], "between 0 and 1, not 2"),
        (["--world", "shapes", "--artists", "noto"], "--artists is for --world emoji"),
        (["--world", "shapes", "--split", "artist"], "no split 'artist'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, complaint, tmp_path, capsys):
    assert complaint in _refusal(capsys, "--world", "emoji", *arguments, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("names", "arguments", "complaint"),
    [
        (["robot"], ["--split", "novel"], "The split 'novel' of this world has no scene with 1 object:"),
        (
            ["crab", "bee"],
            ["--split", "train", "--max_objects", "4"],
            "no scene with 3 objects: choose another split, at most 2 objects (max_objects), or artwork of more",
        ),
    ],
)
def test_a_split_without_scenes_is_refused(names, arguments, complaint, tmp_path, capsys):
    index = {"tile": 8, "columns": 2, "names": [{"text": name} for name in names], "artists": {"ada": "public domain"}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    Image.new("RGBA", (16, 8)).save(tmp_path / "ada.png")
    folder = write_scenes(tmp_path / "scenes", 2, world=EMOJI)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    capsys.readouterr()  # the progress of drawing
    assert complaint in _refusal(capsys, "--artwork", tmp_path, "--output", folder, *arguments)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def _refusal(capsys, *arguments) -> str:
    try:
        status = cli.main(["scenes", *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    complaints = capsys.readouterr().err.splitlines()
    assert status == 2 and len(complaints) == 1
    return complaints[0]


def test_artwork_without_the_unseen_artist_has_no_split_of_that_name(artwork, tmp_path, capsys):
    arguments = ["--world", "emoji", "--artwork", artwork, "--split", "artist", "--output", tmp_path / "new"]
    complaint = "The split 'artist' of this artwork has no artist; choose one of ada."
    assert complaint in _refusal(capsys, *arguments)
