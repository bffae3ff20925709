"""What the Collection tab asks for: wrong requests get a sentence."""

from types import SimpleNamespace

import pytest
import tiny

pytest.importorskip("gradio")

from vlv.collection.service import Service  # noqa: E402

NOBODY = "0" * 32


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    studio = SimpleNamespace(files=None, model=None, processor=None)
    return lambda is_local: Service(studio, is_local)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    tiny.images(1)[0].save(tmp_path / "pictures" / "a.png")
    return tmp_path / "pictures"


def test_folders_are_opened_on_this_machine_only(make, folder):
    assert "upload the files in place of a path" in make(False).open_path({"path": str(folder)})["error"]
    opened = make(True).open_path({"path": str(folder)})
    assert opened["counts"]["all"] == 1
    assert make(True).open_path({"path": str(folder)})["id"] == opened["id"]


@pytest.mark.parametrize(
    "method, request_, sentence",
    [
        ("about", {"id": NOBODY}, "The collection is not there any more: open it again."),
        ("about", {"id": "../../etc"}, "This is not the id of a collection: open it again."),
        ("about", {"id": None}, "This is not the id of a collection: open it again."),
        ("add_files", {"files": [["/etc/passwd", "passwd.png"]]}, "passwd.png: the server does not have this picture"),
        ("add_files", {"files": [["../../etc/passwd", "x.png"]]}, "x.png: the server does not have this picture"),
    ],
)
def test_what_is_out_of_reach(make, method, request_, sentence):
    assert sentence in getattr(make(True), method)(request_)["error"]


@pytest.mark.parametrize(
    "method, request_, sentence",
    [
        ("rows", {"show": "x"}, "Show must be one of all"),
        ("edit", {"number": 7, "text": "x", "version": 0}, "The collection has no image number 7"),
        ("replace", {"find": "", "by": "x"}, "Find is empty"),
        ("add_words", {}, "There is nothing to add"),
        ("caption", {"max_new_tokens": "many", "num_beams": 1}, "Longest caption is many: give a whole number"),
        ("save", {"kind": "zip"}, "There is nothing to save"),
    ],
)
def test_wrong_requests(make, folder, method, request_, sentence):
    service = make(True)
    id = service.open_path({"path": str(folder)})["id"]
    assert sentence in getattr(service, method)({"id": id, **request_})["error"]


def test_a_folders_collection_is_deleted_without_its_images(make, folder):
    service = make(True)
    id = service.open_path({"path": str(folder)})["id"]
    service.remove({"id": id})
    assert (folder / "a.png").is_file()
    assert "not there any more" in service.about({"id": id})["error"]


@pytest.mark.parametrize("kind", ["folder", "captions file"])
def test_too_many_images_are_no_collection(make, folder, monkeypatch, kind):
    """They are refused, because a part of them would look like all of them."""
    monkeypatch.setattr("vlv.collection.opening.MOST_IMAGES", 1)
    tiny.images(1)[0].save(folder / "b.png")
    path = folder
    if kind == "captions file":
        path = folder / "captions.jsonl"
        path.write_text("".join(f'{{"file_name": "{name}.png", "text": "{name}"}}\n' for name in "ab"))
    error = make(True).open_path({"path": str(path)})["error"]
    assert error.startswith(f"{path} has 2 images, and a collection at most 1: open a part of them")
