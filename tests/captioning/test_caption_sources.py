"""The sources of pictures for `vlv caption`."""

import io
import os
import pickle
import tarfile

import datasets
import pyarrow.parquet
import pytest
import tiny

from processing_vlv import load_image
from vlv.captioning.settings import RowOptions
from vlv.captioning.sources import open_source


def _bytes(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format=format)
    return file.getvalue()


@pytest.fixture(scope="module")
def images():
    return tiny.images(7)


@pytest.fixture
def folder(images, tmp_path):
    for number, image in enumerate(images):
        path = tmp_path / "photos" / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return tmp_path / "photos"


def _parquet(path, images, **columns):
    rows = datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())
    rows.to_parquet(path)
    return path


def _archive(path, images, name="{:03}.png"):
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            for member, content in ((name.format(number), _bytes(image)), (f"{number:03}.txt", b"a caption")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def _read(source, *part):
    """Names and pixels of a source's pictures."""
    return [(picture.name, load_image(picture.source).tobytes()) for picture in source.pictures(*part)]


def _named(names, images):
    return [(name, image.tobytes()) for name, image in zip(names, images, strict=True)]


NAMES = ["0/0.png", "0/2.png", "0/4.png", "0/6.png", "1/1.png", "1/3.png", "1/5.png"]
ORDER = [0, 2, 4, 6, 1, 3, 5]


def test_folders_patterns_and_lists_find_the_same_files(folder, images, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "list.txt").write_text("\n".join(NAMES) + "\n\n")
    for path in (str(folder), "**/*.png", "?/*.png", "list.txt"):
        source = open_source([path])
        assert _read(source) == _named(NAMES, [images[number] for number in ORDER])
        assert source.total == 7


def test_parquet_with_typed_and_with_plain_columns(images, tmp_path):
    typed = _parquet(tmp_path / "typed.parquet", images, text=list("abcdefg"))
    plain = tmp_path / "plain.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"number": range(7), "image": [_bytes(image) for image in images]}), plain
    )
    for path in (typed, plain):
        source = open_source([str(path)])
        assert _read(source) == _named([f"{path.name}/{number}" for number in range(7)], images)
        assert source.total == 7


def test_columns_can_be_named(images, tmp_path):
    table = {"photo": [_bytes(image) for image in images], "key": [f"key {number}" for number in range(7)]}
    path = tmp_path / "images.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    named = open_source([str(path)], RowOptions(image_column="photo", id_column="key"))
    assert _read(named) == _named([f"key {number}" for number in range(7)], images)
    (picture,) = open_source([str(path)]).pictures()
    assert str(picture.source).startswith("images.parquet: it cannot be read (name the column of the images with")
    assert "photo, key" in str(picture.source)


def test_webdataset(images, tmp_path):
    for number in (0, 1):
        _archive(tmp_path / f"{number}.tar", images[number::2])
    source = open_source([str(tmp_path / "*.tar")])
    names = [f"0.tar/{number:03}.png" for number in range(4)] + [f"1.tar/{number:03}.png" for number in range(3)]
    assert _read(source) == _named(names, images[::2] + images[1::2])
    assert source.total is None


def test_dataset_of_the_hub(images, tmp_path, monkeypatch):
    files = [str(_parquet(tmp_path / f"{number}.parquet", images[number::2])) for number in (0, 1)]
    load_dataset = datasets.load_dataset

    def from_disk(dataset_id, split, streaming):
        assert (dataset_id, split, streaming) == ("ada/pictures", "test", True)
        return load_dataset("parquet", data_files={split: files}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    source = open_source(["ada/pictures"], RowOptions(split="test"))
    names = [f"ada/pictures/test/0/{row}" for row in range(4)] + [f"ada/pictures/test/1/{row}" for row in range(3)]
    assert _read(source) == _named(names, images[::2] + images[1::2])


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 20])
def test_the_parts_together_have_each_picture_once(folder, images, parts, tmp_path):
    """Files, archives and tables together. With more parts than shards, rows are divided."""
    paths = [folder / "0", _archive(tmp_path / "a.tar", images), _parquet(tmp_path / "b.parquet", images)]
    for some in (paths, paths[1:]):
        source = pickle.loads(pickle.dumps(open_source(list(map(str, some)))))
        whole = list(source.pictures())
        dealt = [picture for part in range(parts) for picture in source.pictures(part, parts)]
        assert sorted(dealt, key=lambda picture: picture.order) == whole
        assert len({picture.name for picture in whole}) == len(whole) == (18 if some is paths else 14)


def test_an_unreadable_source_does_not_affect_the_others(folder, images, tmp_path):
    table = _parquet(tmp_path / "photos.parquet", images)
    (tmp_path / "broken.parquet").write_bytes(table.read_bytes()[:1000])
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    cut = _archive(tmp_path / "cut.tar", images)
    cut.write_bytes(cut.read_bytes()[:5000])
    pyarrow.parquet.write_table(pyarrow.table({"image": [None, _bytes(images[0])]}), tmp_path / "gap.parquet")
    names = ["photos", "broken.parquet", "missing.png", "broken.tar", "cut.tar", "gap.parquet", "photos.parquet"]
    read, failed = [], {}
    for picture in open_source([str(tmp_path / name) for name in names]).pictures():
        if isinstance(picture.source, Exception):
            failed[picture.name] = str(picture.source)
        else:
            read.append(picture.name)
    assert failed.pop("gap.parquet/0") == "gap.parquet/0: the row has no image."
    assert failed.keys() == {"broken.parquet", "broken.tar", "cut.tar"}
    assert all(reason.startswith(f"{name}: it cannot be read (") for name, reason in failed.items())
    assert [name for name in read if name.startswith("photos/")] == [f"photos/{name}" for name in NAMES]
    assert [name for name in read if name.startswith("photos.parquet/")] == [
        f"photos.parquet/{row}" for row in range(7)
    ]
    assert "gap.parquet/1" in read


def test_names_in_messages_are_those_of_the_rows(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"no image"]}), tmp_path / "a.parquet")
    (picture,) = open_source([str(tmp_path / "a.parquet")]).pictures()
    with pytest.raises(ValueError, match="^a.parquet/0: "):
        load_image(picture.source)


def test_a_table_whose_name_is_not_utf8_does_not_affect_the_others(images, tmp_path):
    _parquet(tmp_path / "a.parquet", images)
    try:
        (tmp_path / os.fsdecode(b"t\xe9.parquet")).write_bytes(b"no table")
    except OSError:
        pytest.skip("this file system knows UTF-8 only")
    pictures = list(open_source([str(tmp_path / "*.parquet")]).pictures())
    assert len(pictures) == 8 and pictures[-1].name == "t\\xe9.parquet"
    str(pictures[-1].source).encode()


def test_a_table_with_a_pattern_in_its_name(images, tmp_path):
    _parquet(tmp_path / "shard [1].parquet", images)
    source = open_source([str(tmp_path / "shard [1].parquet")])
    assert _read(source) == _named([f"shard [1].parquet/{number}" for number in range(7)], images)
