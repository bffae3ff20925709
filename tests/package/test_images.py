"""Finding images on disk, and reading them, leaving out the broken ones."""

import glob
import os
import subprocess
import sys

import pytest
from PIL import Image

from vlv.captioning.sources import open_source
from vlv.images import SUFFIXES, find_images, location_of, name_of, read_images


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


def test_a_named_file_is_read_with_any_suffix(folder):
    (folder / "picture").write_bytes((folder / "b.png").read_bytes())
    ((file, image),) = read_images(find_images([folder / "picture"]), report=pytest.fail)
    assert (file.name, image.size) == ("picture", (4, 3))


def test_names_are_relative_to_what_holds_everything(folder):
    assert _names(folder / "sub", folder / "b.png") == ["sub/c.webp", "sub/deep/d.tif", "b.png"]
    assert _names(folder / "sub" / "c.webp") == ["c.webp"]


def test_each_file_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert _names("b.png", ".", folder / "b.png", "sub/../b.png") == ["b.png", "a.JPG", "sub/c.webp", "sub/deep/d.tif"]


def test_broken_files_are_reported_and_do_not_affect_the_others(folder, tmp_path):
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


# ---- folders -----------------------------------------------------------------------------------------------


def _touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_every_suffix_that_pil_reads_is_found_in_any_case(tmp_path):
    _touch(tmp_path, *(f"a{suffix}" for suffix in SUFFIXES), *(f"B{suffix.upper()}" for suffix in SUFFIXES))
    assert len(_names(tmp_path)) == 2 * len(SUFFIXES)
    assert {".jpe", ".apng", ".mpo", ".ico", ".j2k", ".heic", ".avif", ".jxl"} < set(SUFFIXES)


def test_links_to_folders_are_followed_and_no_folder_is_searched_twice(tmp_path):
    _touch(tmp_path, "photos/a.png", "photos/sub/b.png", "elsewhere/c.png", "elsewhere/deep/d.png", "sibling.png")
    for name, target in [
        ("aaa", tmp_path / "elsewhere"),
        ("again", tmp_path / "elsewhere"),
        ("inside", tmp_path / "photos" / "sub"),
        ("itself", tmp_path / "photos"),
        ("sub/up", tmp_path),
        ("circle", tmp_path / "photos" / "circle"),
        ("dead", tmp_path / "gone"),
    ]:
        (tmp_path / "photos" / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "dead.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "photos" / "linked.png").symlink_to(tmp_path / "sibling.png")
    expected = ["a.png", "aaa/c.png", "aaa/deep/d.png", "dead.png", "linked.png", "sub/b.png"]
    assert _names(tmp_path / "photos") == expected
    for pattern in ("**", "**/*.png"):
        assert _names(tmp_path / "photos" / pattern) == expected
    assert _names(tmp_path / "photos" / "**" / "deep") == ["d.png"]
    assert _names(tmp_path / "photos" / "**" / "[bd].png") == ["aaa/deep/d.png", "sub/b.png"]


def test_skipped_files_are_counted(tmp_path, caplog):
    _touch(tmp_path, "a.png", "a.mov", "sub/b.mov", "sub/notes.md", "README", ".hidden.png", ".git/c.png")
    find_images([tmp_path])
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path}: skipped 4 files not named as an image (.mov 2, ")
    assert ".md 1" in said and "no suffix 1" in said and said.endswith("and 2 hidden files and folders.")
    caplog.clear()
    _touch(tmp_path / "pure", "a.png")
    find_images([tmp_path / "pure"])
    assert not caplog.messages


def test_folders_that_may_not_be_entered_are_reported(tmp_path, caplog, monkeypatch):
    _touch(tmp_path, "a.png", "closed/b.png")
    scandir = os.scandir

    def closed(path):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert _names(tmp_path) == ["a.png"]
    assert caplog.messages == [f"{tmp_path}: these folders cannot be entered: closed (Permission denied)."]


def test_only_one_process_of_a_run_prints_it(tmp_path, caplog, monkeypatch):
    _touch(tmp_path, "a.png", "a.mov")
    monkeypatch.setenv("RANK", "1")
    find_images([tmp_path])
    assert not caplog.messages


def test_a_large_folder_takes_little_memory(tmp_path):
    """At most 1 KB per file, so that 200,000 files are listed in less than 200 MB."""
    for number in range(20_000):
        (tmp_path / f"a photo of the year {number:08}.jpg").touch()
    script = """
import resource, sys
from vlv.images import find_images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(find_images([sys.argv[1]])) == 20_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000


# ---- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["plain.png", "café.png", "$HOME.png", "a::b.png", "a\\b.png", " spaces .png", "new\nline.png", "犬/猫.png"],
)
def test_ordinary_names_are_kept_as_they_are(name):
    assert name_of(name) == name == location_of(name)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (b"caf\xe9.png", r"caf\xe9.png"),
        (rb"caf\xe9.png", r"caf\x5cxe9.png"),  # a name with a backslash that looks like an escaped byte
        (rb"caf\x5cxe9.png", r"caf\x5cx5cxe9.png"),
        (b"\xff/\xc3\xa9\xe9\\xe9.png", r"\xff/é\xe9\x5cxe9.png"),
    ],
)
def test_names_that_are_not_utf8_have_one_spelling_and_a_way_back(path, name):
    assert name_of(os.fsdecode(path)) == name
    assert os.fsencode(location_of(name)) == path
    name.encode()


def test_names_that_are_not_utf8_are_listed_and_read(tmp_path):
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
            Image.new("RGB", (3, 2)).save(file, format="PNG")
    except OSError:
        pytest.skip("this file system knows UTF-8 only")
    (tmp_path / "list.txt").write_bytes(os.fsencode(tmp_path) + b"/caf\xe9.png\n")
    for path in (tmp_path, tmp_path / "list.txt", tmp_path / "c*"):
        ((file, image),) = read_images(find_images([path]), pytest.fail)
        assert (file.name, image.size) == ("caf\\xe9.png", (3, 2))


# ---- lists and patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_as_any_editor_saves_them(folder, monkeypatch, encoding, end):
    monkeypatch.chdir(folder)
    os.rename("b.png", "bär\u2028.png")  # a line separator that does not end a line of a list
    (folder / "list.txt").write_bytes(f"  a.JPG{end}bär\u2028.png{end}{end}sub{end}".encode(encoding))
    assert _names("list.txt") == ["a.JPG", "bär\u2028.png", "sub/c.webp", "sub/deep/d.tif"]


def test_paths_that_no_file_can_have_do_not_affect_the_others(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "list.txt").write_text(f"a.JPG\n{'y' * 300}.png\n{'z/' * 5000}\nnul\0.png\nb.png\n")
    problems = []
    read = read_images(find_images(["list.txt"]), problems.append)
    assert [file.name for file, _ in read] == ["a.JPG", "b.png"]
    assert len(problems) == 3 and all("there is no such file" in problem for problem in problems)


def test_captions_beside_images_are_not_lists(folder, monkeypatch, caplog):
    monkeypatch.chdir(folder)
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (folder / name).write_text("a caption\n")
    (folder / "notes.txt").write_text("sub/c.webp\n")  # no image has its name, so it is a list
    shell = sorted(glob.glob("*"))
    for paths in (shell, ["*"]):
        caplog.clear()
        assert sorted(_names(*paths)) == ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tif"]
        assert "Skipped 2 captions (.txt) beside an image of the same name." in caplog.messages
    (folder / "b.txt").write_text("a.JPG\n")
    assert _names("b.txt") == ["a.JPG"]  # a single file is a list


def test_many_missing_files_are_one_short_sentence(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{number}.png\n" for number in range(1000)))
    with pytest.raises(FileNotFoundError, match="2.png: there is no such file. … and 997 more") as caught:
        find_images([tmp_path / "list.txt"])
    assert len(str(caught.value)) < 300


def test_a_path_in_a_folder_that_is_there_is_no_dataset_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match="^photos/cats: there is no such file"):
        open_source(["photos/cats"])
