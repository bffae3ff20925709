"""A folder of images as rows. Every image is read, whatever the names of the files."""

import json
import os

import pytest
import tiny
from datasets import load_dataset

from vlv.cli import main as vlv
from vlv.data.rows import load_rows, open_image, split_tables
from vlv.evaluation.images import EvaluationData

PICTURES = tiny.images(8)


def fill(folder, *names):
    """Writes a different picture for each name."""
    for number, name in enumerate(names):
        path = os.fsencode(folder / name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            PICTURES[number].save(file, format="PNG")
    return folder


def metadata(folder, *rows, name="metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbers(rows):
    """The numbers of the pictures in the rows."""
    known = [picture.tobytes() for picture in PICTURES]
    return [known.index(open_image(row["image"]).tobytes()) for row in rows]


AWKWARD = [
    "steam train.png", "test.png", "dev/eval-1.png", "costs $HOME.png", "a::b.png", "100% [1]*?.png",
    "file:\\odd.png", os.fsdecode(b"caf\xe9\\xe9.png"),
]  # fmt: skip


@pytest.fixture
def awkward(tmp_path):
    try:
        return fill(tmp_path / os.fsdecode(b"f\xf6lder"), *AWKWARD)
    except OSError:
        pytest.skip("this file system knows UTF-8 only")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_images_with_any_file_name_are_read(awkward, streaming):
    rows = load_rows(str(awkward), streaming=streaming)
    assert sorted(numbers(rows)) == list(range(8))


def test_evaluation_reads_the_same_images_by_the_names_of_captions(awkward, tmp_path):
    data = EvaluationData(str(awkward))
    assert sorted(numbers([{"image": data.images[number]} for number in range(8)])) == list(range(8))
    assert "caf\\xe9\\x5cxe9.png" in data.names and "dev/eval-1.png" in data.names
    assert data.fingerprint


def test_a_captioned_folder_can_be_trained_on(tiny_repo, awkward):
    """`vlv caption` writes names into metadata and captions beside images; `load_rows` finds both."""
    settings = ["--model", str(tiny_repo), "--max_new_tokens", "4", "--num_workers", "0"]
    assert vlv(["caption", str(awkward), "--output", str(awkward / "metadata.jsonl"), *settings]) in (0, None)
    written = {row["file_name"]: row["text"] for row in map(json.loads, (awkward / "metadata.jsonl").open())}
    assert len(written) == 8
    rows = load_rows(str(awkward))
    assert sorted(numbers(rows)) == list(range(8))
    assert [row["text"] for row in rows] == list(written.values())
    assert vlv(["caption", str(awkward), "--output", str(awkward / "metadata.jsonl"), "--resume", *settings]) in (
        0,
        None,
    )
    assert [row["text"] for row in load_rows(str(awkward))] == list(written.values())
    (awkward / "metadata.jsonl").unlink()
    assert vlv(["caption", str(awkward), "--output", ".txt", *settings]) in (0, None)
    rows = load_rows(str(awkward))
    names = EvaluationData(str(awkward)).names
    assert {name: row["text"] for name, row in zip(names, rows, strict=True)} == written


# ---- splits ------------------------------------------------------------------------------------------------


def test_subfolders_are_splits_only_if_they_hold_all_images(tmp_path):
    fill(tmp_path / "split", "train/a.png", "train/deep/b.png", "test/c.png", "validation/d.png")
    assert numbers(load_rows(str(tmp_path / "split"))) == [0, 1]
    assert numbers(load_rows(str(tmp_path / "split"), "test")) == [2]
    assert numbers(load_rows(str(tmp_path / "split"), "validation")) == [3]
    with pytest.raises(ValueError, match="has no split 'dev'; its splits are test, train, validation"):
        load_rows(str(tmp_path / "split"), "dev")
    fill(tmp_path / "mixed", "train/a.png", "test/b.png", "c.png")
    assert sorted(numbers(load_rows(str(tmp_path / "mixed")))) == [0, 1, 2]
    with pytest.raises(ValueError, match="has no split 'test'; its splits are train"):
        load_rows(str(tmp_path / "mixed"), "test")
    fill(tmp_path / "alone", "test/a.png")
    assert numbers(load_rows(str(tmp_path / "alone"))) == [0]


def test_splits_with_metadata_above_and_within(tmp_path):
    folder = fill(tmp_path / "photos", "train/a.png", "train/b.png", "test/c.png")
    metadata(folder, {"file_name": "train/b.png", "text": "b"}, {"file_name": "test/c.png", "text": "c"})
    assert [row["text"] for row in load_rows(str(folder))] == ["b"]
    assert [row["text"] for row in load_rows(str(folder), "test")] == ["c"]
    (folder / "metadata.jsonl").unlink()
    metadata(folder / "train", {"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b"})
    metadata(folder / "test", {"file_name": "c.png", "text": "c"})
    assert [row["text"] for row in load_rows(str(folder))] == ["a", "b"]
    assert numbers(load_rows(str(folder), "test")) == [2]


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["a.parquet", "test.parquet"], {"train": 2}),
        (["steam train.tar", "dev.tar"], {"train": 2}),
        (["train.parquet", "test.parquet"], {"train": 1, "test": 1}),
        (["train-0000.tar", "train-0001.tar", "val-0000.tar"], {"train": 2, "val": 1}),
        (["train/a.parquet", "test/b.parquet"], {"train": 1, "test": 1}),
        (["data/long-00000-of-00002.parquet", "data/long-00001-of-00002.parquet"], {"long": 2}),
    ],
)
def test_tables_have_splits_only_if_every_name_is_one(tmp_path, files, splits):
    assert {split: len(found) for split, found in split_tables(tmp_path, files).items()} == splits


def test_tables_with_patterns_in_their_names(tmp_path):
    rows = load_dataset("imagefolder", data_dir=str(fill(tmp_path / "photos", "a.png")), split="train")
    (tmp_path / "tables [1]").mkdir()
    for name in ("a [2]?.parquet", "b[1]*.parquet"):
        rows.to_parquet(tmp_path / "tables [1]" / name)
    assert len(load_rows(str(tmp_path / "tables [1]"))) == 2


# ---- metadata ----------------------------------------------------------------------------------------------

ROWS = [{"file_name": "b.png", "text": "None"}, {"file_name": "sub/a.png", "text": "1, 2", "source": "own"}]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl of Windows", "csv", "parquet"])
def test_metadata_of_every_kind(tmp_path, kind):
    folder = fill(tmp_path / "photos", "sub/a.png", "b.png")
    if kind.startswith("jsonl"):
        lines = "\r\n\r\n".join(json.dumps(row) for row in ROWS)
        (folder / "metadata.jsonl").write_bytes(lines.encode("utf-16" if "Windows" in kind else "utf-8"))
    else:
        import pandas

        table = pandas.DataFrame(ROWS)
        if kind == "csv":
            table.to_csv(folder / "metadata.csv", index=False, encoding="utf-8-sig")
        else:
            table.to_parquet(folder / "metadata.parquet", index=False)
    rows = load_rows(str(folder))
    assert numbers(rows) == [1, 0]
    assert [(row["text"], row["source"]) for row in rows] == [("None", None), ("1, 2", "own")]


def test_a_column_keeps_its_kind(tmp_path):
    folder = fill(tmp_path / "photos", "a.png", "b.png")
    (folder / "metadata.csv").write_text("file_name,text,year\na.png,10,1999\nb.png,11,\n")
    rows = load_rows(str(folder))
    assert rows.features["text"].dtype == "int64" and rows["year"][:] == [1999, None]


def test_images_that_metadata_lack_are_counted(tmp_path, caplog):
    folder = fill(tmp_path / "photos", "a.png", "b.png", "c.png")
    metadata(folder, {"file_name": "b.png", "text": "b"})
    assert numbers(load_rows(str(folder))) == [1]
    assert caplog.messages == [f"{folder}: skipped 2 images that metadata.jsonl lack."]


def test_a_missing_image_is_left_out_when_it_is_read(tmp_path):
    folder = fill(tmp_path / "photos", "a.png")
    metadata(folder, {"file_name": "a.png", "text": "a"}, {"file_name": "gone.png", "text": "b"})
    rows = load_rows(str(folder))
    with pytest.raises(FileNotFoundError, match=r"gone\.png: there is no such file"):
        open_image(rows[1]["image"])


def test_absolute_paths_and_both_spellings_of_accents(tmp_path):
    folder = fill(tmp_path / "photos", "a.png", "cafe\u0301.png")
    (tmp_path / "link").symlink_to(folder)
    metadata(
        folder,
        {"file_name": str(folder / "a.png"), "text": "a"},
        {"file_name": str(tmp_path / "link" / "a.png"), "text": "b"},
        {"file_name": "caf\u00e9.png", "text": "c"},
        {"file_name": "./sub/../a.png", "text": "d"},
    )
    assert numbers(load_rows(str(folder))) == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "a.png"}\n{"file_name":', r"metadata\.jsonl, line 2: this is not JSON"),
        ('"a.png"\n', r"metadata\.jsonl, line 1: this is not a JSON object"),
        ('{"text": "a"}\n', r"metadata\.jsonl, row 1: there is no file_name"),
        ('{"file_name": 3}\n', r"metadata\.jsonl, row 1: there is no file_name"),
        ('{"file_name": "../b.png"}\n', r"metadata\.jsonl, row 1: \.\./b\.png is outside of .*photos"),
        ('{"file_name": "/etc/b.png"}\n', r"metadata\.jsonl, row 1: /etc/b\.png is outside of .*photos"),
        (
            '{"file_name": "a.png", "text": 1}\n{"file_name": "a.png", "text": "b"}\n',
            "different kinds in the column text",
        ),
    ],
)
def test_metadata_that_cannot_be_read_are_one_sentence(tmp_path, content, message):
    folder = fill(tmp_path / "photos", "a.png")
    (folder / "metadata.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(str(folder))
    assert "\n" not in str(caught.value)


def test_two_kinds_of_metadata_are_refused(tmp_path):
    folder = fill(tmp_path / "photos", "a.png")
    metadata(folder, {"file_name": "a.png", "text": "a"})
    (folder / "metadata.csv").write_text("file_name,text\na.png,b\n")
    with pytest.raises(ValueError, match=r"photos has metadata\.csv and metadata\.jsonl: keep one"):
        load_rows(str(folder))


# ---- captions in text files --------------------------------------------------------------------------------


def test_text_files_beside_images_are_captions(tmp_path, caplog):
    folder = fill(tmp_path / "photos", "a.png", "sub/b.JPG", "c.d.png", "none.png", "empty.png")
    (folder / "a.txt").write_text("a red circle\n")
    (folder / "sub" / "b.txt").write_bytes("\ufeffein blauer Würfel\r\n".encode())
    (folder / "c.d.txt").write_bytes("one".encode("utf-16"))
    (folder / "empty.txt").write_text("\n")
    (folder / "notes.txt").write_text("nothing")
    captions = {os.path.basename(row["image"]["path"]): row["text"] for row in load_rows(str(folder))}
    assert captions == {
        "a.png": "a red circle", "b.JPG": "ein blauer Würfel", "c.d.png": "one", "none.png": None, "empty.png": None
    }  # fmt: skip
    assert caplog.messages[-1].startswith(f"{folder}: skipped 1 file not named as an image")
    (folder / "a.txt").write_text("a red circle\n\nsomething round\n")
    captions = {os.path.basename(row["image"]["path"]): row["text"] for row in load_rows(str(folder))}
    assert captions["a.png"] == ["a red circle", "something round"]
    assert captions["c.d.png"] == ["one"] and captions["none.png"] == []


def test_a_caption_that_is_not_text_is_named(tmp_path):
    folder = fill(tmp_path / "photos", "a.png")
    (folder / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: this caption is not UTF-8 text: save it as UTF-8"):
        load_rows(str(folder))


def test_metadata_with_captions_come_before_text_files(tmp_path):
    folder = fill(tmp_path / "photos", "a.png")
    (folder / "a.txt").write_text("from the file")
    metadata(folder, {"file_name": "a.png", "source": "own"})
    assert load_rows(str(folder))[0]["text"] == "from the file"
    metadata(folder, {"file_name": "a.png", "text": "from the metadata"})
    assert load_rows(str(folder))[0]["text"] == "from the metadata"


# ---- fingerprints ------------------------------------------------------------------------------------------


def test_fingerprints_depend_on_images_and_metadata(tmp_path):
    folder = fill(tmp_path / "photos", "a.png", "b.png")
    metadata(folder, {"file_name": "a.png", "text": "a"})
    first = load_rows(str(folder))._fingerprint
    assert load_rows(str(folder))._fingerprint == first
    PICTURES[5].save(folder / "a.png")
    second = load_rows(str(folder))._fingerprint
    metadata(folder, {"file_name": "a.png", "text": "another"})
    assert len({first, second, load_rows(str(folder))._fingerprint}) == 3
