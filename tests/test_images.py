"""Finding images on disk, and reading them past the broken ones."""

import os

import pytest
from PIL import Image

from vlv.images import find_images, read_images


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for number, name in enumerate(["b.png", "a.JPG", "sub/c.webp", "sub/deep/d.tif", ".hidden/e.png", "._a.jpg"]):
        image = Image.new("RGB", (4 + number, 3))
        image.save(folder / name, format=Image.registered_extensions()[os.path.splitext(name)[1].lower()])
    (folder / "notes.txt").write_text("no image")
    return folder


def _names(*paths):
    return [file.name for file in find_images(paths)]


def test_folder_is_searched_and_sorted(folder):
    assert _names(folder) == ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tif"]


def test_named_file_is_taken_whatever_its_name(folder):
    (folder / "picture").write_bytes((folder / "b.png").read_bytes())
    ((file, image),) = read_images(find_images([folder / "picture"]), report=pytest.fail)
    assert (file.name, image.size) == ("picture", (4, 3))


def test_names_are_relative_to_what_holds_everything(folder):
    assert _names(folder / "sub", folder / "b.png") == ["sub/c.webp", "sub/deep/d.tif", "b.png"]
    assert _names(folder / "sub" / "c.webp") == ["c.webp"]


def test_each_file_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert _names("b.png", ".", folder / "b.png", "sub/../b.png") == ["b.png", "a.JPG", "sub/c.webp", "sub/deep/d.tif"]


def test_broken_files_are_reported_and_cost_the_others_nothing(folder, tmp_path):
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    whole = folder / "whole.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(whole)
    (folder / "cut.png").write_bytes(whole.read_bytes()[:2000])
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    problems = []
    read = read_images(find_images([folder, folder / "missing.png", nothing]), problems.append)
    assert [file.path.name for file, _ in read] == ["a.JPG", "b.png", "c.webp", "d.tif", "whole.png"]
    broken = [folder / "cut.png", folder / "empty.png", folder / "text.png", folder / "missing.png", nothing]
    for path, problem in zip(broken, problems, strict=True):
        assert problem.startswith(f"left out: {path}: ")


def test_nothing_readable_is_an_error(folder):
    for name in ("x.png", "y.png"):
        (folder / name).write_text("no image")
    problems = []
    with pytest.raises(ValueError, match="None of the images"):
        list(read_images(find_images([folder / "x.png", folder / "y.png"]), problems.append))
    assert len(problems) == 2


def test_no_file_at_all_is_an_error_before_anything_is_read(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="missing.png: there is no such file.*nothing: there are no images"):
        find_images([tmp_path / "missing.png", tmp_path / "nothing"])
