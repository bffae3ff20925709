"""`vlv search`: images by the words of their captions."""

import json

import pandas
import pytest
from PIL import Image

from vlv.cli import main
from vlv.data.caption_index import CaptionIndex
from vlv.scenes import write_scenes

CAPTIONS = {
    "1.png": "A red square at the left, and a blue circle at the right.",
    "2.png": "A red circle at the left, and a blue square at the right.",
    "3.png": "A blue circle at the left, and a red circle at the right.",
    "4.png": "Two cats sleep on a sofa.",
    "5.png": "A café at night; a cat’s shadow.",
}


def found(query, num=10, captions=None):
    return [it.file_name for it in CaptionIndex((captions or CAPTIONS).items()).search(query, num)]


def test_words_that_stand_together_come_first():
    assert found("a red circle on the left")[0] == "2.png"
    assert found("a blue circle on the left")[0] == "3.png"
    assert found("red square")[0] == "1.png"
    assert found("a red circle and a blue square")[0] == "2.png"
    assert set(found("red, square")) == {"1.png", "2.png", "3.png"}


def test_words_have_other_endings_and_accents():
    assert set(found("cat")) == {"4.png", "5.png"} == set(found("CATS"))
    assert found("sleeping") == ["4.png"]
    assert found("cafe") == ["5.png"] == found("Café")


def test_quoted_words_must_be_there():
    assert set(found('"red circle"')) == {"2.png", "3.png"}
    assert found('"left, and a blue circle"') == ["1.png"]
    assert found('"red circle" left', num=1) == ["2.png"]
    assert found('"red circle" "blue square"') == ["2.png"]
    assert found('"green circle" red') == []


@pytest.mark.parametrize(
    "query", ['a "b', "red AND", "NEAR(red", "text:red", "re*", "red'; DROP TABLE captions", "^-+"]
)
def test_any_text_is_a_query(query):
    try:
        found(query)
    except ValueError as error:
        assert "has no word to search for" in str(error)


def test_an_image_with_several_captions_comes_once():
    index = CaptionIndex([("a", "a dog"), ("a", "a big dog runs"), ("b", "a cat and a dog")])
    assert [it.file_name for it in index.search("dog")] == ["a", "b"]
    assert index.search("dog runs")[0].text == "a big dog runs"
    assert len(index.search("dog", num=1)) == 1


@pytest.fixture
def scenes(tmp_path):
    return write_scenes(tmp_path / "scenes", 60)


def test_files_and_folders(scenes, tmp_path, capsys):
    rows = [json.loads(line) for line in (scenes / "metadata.jsonl").read_text().splitlines()]
    thing = " ".join(rows[7]["text"].split()[1:4])
    pandas.DataFrame(rows).to_parquet(tmp_path / "captions.parquet")
    printed = []
    for source in (scenes, scenes / "metadata.jsonl", tmp_path / "captions.parquet"):
        assert main(["search", thing, str(source), "--num", "5"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    first, *_ = printed[0].splitlines()
    name, text = first.split("\t")
    assert thing in text and {"file_name": name, "text": text}.items() <= rows[int(name[:6])].items()


def test_what_is_found_is_written_and_drawn(scenes, tmp_path, capsys):
    out, sheet = tmp_path / "found.jsonl", tmp_path / "sheets" / "found.png"
    assert main(["search", "red circle", str(scenes), "--output", str(out), "--sheet", str(sheet), "--num", "3"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [f"{row['file_name']}\t{row['text']}" for row in rows] == capsys.readouterr().out.splitlines()
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert Image.open(sheet).width > 3 * 192


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["the", "FOLDER"], "The query 'the' has no word to search for."),
        (["cat", "nowhere.jsonl"], "There is no file of captions nowhere.jsonl."),
        (["cat", "captions.txt"], "must be a .jsonl, .csv or .parquet file with file_name and text"),
        (["cat", "FOLDER", "--num", "0"], "--num is 0; it must be at least 1."),
        (["cat", "FOLDER", "--sheet", "found.pdf"], "--sheet found.pdf must end in .png, .jpg, .webp."),
        (["cat", "FOLDER", "--output", __file__], "must end in .jsonl"),
        (["cat", "FOLDER", "--caption_column", "words"], "no column 'words'"),
    ],
)
def test_wrong_arguments(scenes, capsys, arguments, complaint):
    assert main(["search", *(str(scenes) if it == "FOLDER" else it for it in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert complaint in line


def test_the_captions_are_not_overwritten(scenes, capsys):
    file = scenes / "metadata.jsonl"
    before = file.read_bytes()
    assert main(["search", "circle", str(file), "--output", str(file)]) == 2
    assert "exists already: move or delete it." in capsys.readouterr().err
    assert file.read_bytes() == before


def test_nothing_found_is_said(scenes, capsys, caplog):
    assert main(["search", "elephant", str(scenes)]) == 0
    assert not capsys.readouterr().out and "has these words" in caplog.text
