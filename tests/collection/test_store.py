"""A collection: what it is made from, how its captions change, and what is saved."""

import json
import sqlite3
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny

from vlv.collection.opening import add_path, add_uploads
from vlv.collection.saving import save_metadata, save_text_files, save_zip
from vlv.collection.store import Store
from vlv.collection.words import adding, replacing


@pytest.fixture
def folder(tmp_path):
    """Four images, one of them in a sub-folder, one with a text file."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for name, image in zip(("a.png", "b.png", "c.png", "inner/d.png"), tiny.images(4), strict=True):
        image.save(folder / name)
    (folder / "b.txt").write_text("a blue cat\n")
    return folder


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "collection.sqlite")


def captions(store):
    return {row.name: row.text for row in store.rows()[0]}


def write_all(store, text="a red dog"):
    store.write((row.name, text, None) for row in store.rows()[0])


def test_a_folder_brings_its_captions_along(store, folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "a green bird", "score": 0.25}\n')
    assert add_path(store, str(folder)) == 4
    assert captions(store) == {"a.png": "", "b.png": "a blue cat", "c.png": "a green bird", "inner/d.png": ""}
    assert add_path(store, str(folder)) == 0  # again
    counts = store.counts()
    assert (counts["all"], counts["with caption"], counts["without caption"], counts["with score"]) == (4, 2, 2, 1)


def test_a_captions_file(store, folder, tmp_path):
    rows = [{"file_name": "pictures/a.png", "text": "one"}, {"file_name": "pictures/b.png", "text": ["two", "three"]}]
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert add_path(store, str(file)) == 2
    assert captions(store) == {"pictures/a.png": "one", "pictures/b.png": "two"}
    assert store.row(1).location == str(folder / "a.png")


def test_the_scores_of_vlv_score(store, folder):
    add_path(store, str(folder))
    assert {row.explained for row in store.rows()[0]} == {None}
    rows = [
        {"file_name": "b.png", "text": "a blue cat", "explained": 0.5, "likelihood": -0.1},
        {"file_name": "c.png", "text": ["one", "two"], "explained": [0.25, 0.9], "likelihood": [-2.0, -1.0]},
        {"file_name": "a.png", "text": "a caption that it no longer has", "explained": 0.1, "likelihood": -3.0},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    assert add_path(store, str(folder)) == 0  # the images are there already, and one has scores now
    assert (store.counts()["with explained"], store.counts()["with score"]) == (1, 0)
    other = Store(store.path.with_name("other.sqlite"))
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert add_path(other, str(folder / "scores.jsonl")) == 3
    assert [row.name for row in other.rows(order="worst explained first")[0]] == ["a.png", "c.png", "b.png"]
    assert [row.likelihood for row in other.rows(order="worst likelihood first")[0]] == [-3.0, -2.0, -0.1]


def test_a_collection_from_before_the_scores_opens(tmp_path):
    path = tmp_path / "collection.sqlite"
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE images (number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, location TEXT NOT NULL, text "
            "TEXT NOT NULL DEFAULT '', saved TEXT, error TEXT, score REAL, keep INTEGER NOT NULL DEFAULT 1, version "
            "INTEGER NOT NULL DEFAULT 0)"
        )
        database.execute("INSERT INTO images (name, location, text, score) VALUES ('a.png', 'a.png', 'one', 0.5)")
    (row,), _ = Store(path).rows()
    assert (row.text, row.score, row.explained) == ("one", 0.5, None)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("nothing", None, "There is no folder and no file"),
        ("notes.md", "x", "neither a folder nor a captions file"),
        ("wrong.jsonl", '{"text": "x"}\n', "wrong.jsonl, line 1: the row needs file_name and text."),
        ("broken.jsonl", "{\n", "broken.jsonl, line 1: the line is not valid JSON"),
    ],
)
def test_what_is_no_collection_is_named(store, tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((OSError, ValueError), match=sentence):
        add_path(store, str(tmp_path / name))


def test_uploads_and_zips(store, folder, tmp_path):
    """Names stay in the folder of the collection, whatever a zip says."""
    archive = tmp_path / "upload.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(folder / "a.png", "set/a.png")
        file.writestr("set/a.txt", "a red dog")
        file.write(folder / "c.png", "../../outside.png")
        file.write(folder / "c.png", "__MACOSX/._a.png")
        file.writestr("program.exe", "x")
    target = tmp_path / "home" / "images"
    count = add_uploads(store, [(str(archive), "set.zip"), (str(folder / "b.png"), "b.png")], target)
    assert count == 3
    assert captions(store) == {"b.png": "", "outside.png": "", "set/a.png": "a red dog"}
    assert (target / "outside.png").is_file() and (folder / "b.png").is_file()
    assert {file.suffix for file in (tmp_path / "home").rglob("*.*")} == {".png", ".txt"}


def test_a_damaged_zip_is_named(store, tmp_path):
    (tmp_path / "x").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match="^set.zip: the zip cannot be read"):
        add_uploads(store, [(str(tmp_path / "x"), "set.zip")], tmp_path / "images")


def test_an_edit_of_an_older_version_does_not_overwrite(store, folder):
    """Two windows: the second one has not seen the change of the first."""
    add_path(store, str(folder))
    seen = store.row(1)
    assert store.edit(1, "first window", seen.version).text == "first window"
    assert store.edit(1, "second window", seen.version) is None
    assert store.row(1).text == "first window"


def test_a_run_does_not_overwrite_what_was_typed_meanwhile(store, folder):
    add_path(store, str(folder))
    store.edit(1, "typed", store.row(1).version)
    write_all(store, "from the model")
    assert captions(store) == {
        "a.png": "typed",
        "b.png": "a blue cat",
        "c.png": "from the model",
        "inner/d.png": "from the model",
    }


def test_search_show_order_and_pages(store, tmp_path):
    store.add(
        {
            "name": f"{number:03}.png",
            "location": "x",
            "text": f"caption {number}",
            "score": -number if number else None,
        }
        for number in range(100)
    )
    rows, total = store.rows(search="CAPTION 9")
    assert total == 11 and {row.text for row in rows} == {
        "caption 9",
        *(f"caption {number}" for number in range(90, 100)),
    }
    rows, total = store.rows(order="worst score first", first=0, count=2)
    assert total == 100 and [row.name for row in rows] == ["099.png", "098.png"]
    assert store.rows(order="worst score first", first=99)[0][0].name == "000.png"  # without a score
    store.set_keep(5, False)
    assert [row.number for row in store.rows(show="skipped")[0]] == [5]
    # As text, not as a pattern.
    assert store.rows(search="%")[1] == 0


def test_find_and_replace_over_all_and_its_undo(store, folder):
    add_path(store, str(folder))
    write_all(store)
    assert store.change_all(replacing("dog", "wolf")) == 3
    assert captions(store)["a.png"] == "a red wolf" and captions(store)["b.png"] == "a blue cat"
    store.edit(1, "by hand", store.row(1).version)
    assert store.undo() == 2  # what was edited since stays
    assert captions(store) == {
        "a.png": "by hand",
        "b.png": "a blue cat",
        "c.png": "a red dog",
        "inner/d.png": "a red dog",
    }
    assert store.undo() == 0
    with pytest.raises(ValueError, match="Find is empty"):
        replacing("", "x")


def test_words_around_captions():
    change = adding("A photo of", ", high quality", "ohwx, zwx")
    once = "ohwx, zwx, A photo of a dog, high quality"
    assert change("a dog") == once
    assert change(once) != "" and adding(triggers="ohwx")(once) == once
    assert adding(behind="at night")("a dog") == "a dog at night"
    with pytest.raises(ValueError, match="nothing to add"):
        adding(" ", "", ",")


def test_text_files_are_saved_beside_the_images(store, folder):
    add_path(store, str(folder))
    write_all(store)
    store.set_keep(3, False)
    saved = save_text_files(store)
    assert saved.count == 3 and saved.left_out == []
    texts = {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*.txt")}
    assert texts == {"a.txt": "a red dog\n", "b.txt": "a blue cat\n", "inner/d.txt": "a red dog\n"}
    assert not list(folder.rglob(".*"))


def test_a_text_file_that_another_program_changed_is_left_alone(store, folder):
    add_path(store, str(folder))
    store.edit(2, "mine", store.row(2).version)
    (folder / "b.txt").write_text("theirs\n")
    saved = save_text_files(store)
    assert saved.count == 0 and "b.txt was changed by another program" in saved.sentence
    assert (folder / "b.txt").read_text() == "theirs\n"


def test_metadata_keeps_what_it_does_not_know(store, folder):
    rows = [{"file_name": "a.png", "text": "old", "licence": "cc0"}, {"file_name": "elsewhere.png", "text": "other"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    add_path(store, str(folder))
    store.edit(1, "new", store.row(1).version)
    assert save_metadata(store, folder / "metadata.jsonl").count == 2
    saved = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert saved == [
        {"file_name": "a.png", "text": "new", "licence": "cc0"},
        {"file_name": "elsewhere.png", "text": "other"},
        {"file_name": "b.png", "text": "a blue cat"},
    ]


def test_a_zip_is_an_image_folder(store, folder, tmp_path):
    from datasets import load_dataset

    add_path(store, str(folder))
    write_all(store)
    (folder / "c.png").unlink()
    saved = save_zip(store, tmp_path / "out" / "captions.zip")
    assert saved.count == 3 and "c.png: the image is not there any more" in saved.sentence
    with zipfile.ZipFile(tmp_path / "out" / "captions.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "inner" / "d.txt").read_text() == "a red dog\n"
    dataset = load_dataset("imagefolder", data_dir=str(tmp_path / "unpacked"), split="train")
    assert sorted(dataset["text"]) == ["a blue cat", "a red dog", "a red dog"]


def test_many_windows_at_once_lose_nothing(store):
    store.add({"name": f"{number}.png", "location": "x", "text": "x"} for number in range(20))

    def window(letter):
        for number in range(1, 21):
            while True:
                row = store.row(number)
                if store.edit(number, row.text + letter, row.version) is not None:
                    break

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(window, "abcd"))
    # An edit that was written over another one would have lost its letter.
    assert all(sorted(row.text) == list("abcdx") for row in store.rows()[0])
