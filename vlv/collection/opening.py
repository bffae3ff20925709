"""What a collection is made from: a folder, a captions file, uploaded files, or a zip of them."""

import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vlv.collection.store import SCORES, Store
from vlv.files import read_json_lines
from vlv.images import is_image_name, list_folder, name_of

MOST_IMAGES = 20_000
MOST_UNPACKED = 8 * 2**30  # bytes; a zip of a few megabytes can hold any number
SIDECAR = ".txt"


def add_path(store: Store, path: str) -> int:
    """
    Add the images of a folder, or of a captions file (.jsonl with `file_name` and `text`), with the captions that
    they have: in that file, in the folder's metadata.jsonl, or in text files beside them. How many are new.

    Raises:
        OSError, ValueError: it is not there, it is neither, or it has too many images; the sentence names it.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        metadata = place / "metadata.jsonl"
        return _add_folder(store, place, _captions(metadata) if metadata.is_file() else {})
    if place.suffix == ".jsonl" and place.is_file():
        captions = _captions(place)
        _check_number(place, len(captions))
        images = [
            {"name": name, "location": os.path.abspath(place.parent / name), **row} for name, row in captions.items()
        ]
        return store.add([{**image, "saved": _sidecar_text(image["location"])} for image in images])
    if not place.exists():
        raise FileNotFoundError(f"There is no folder and no file {path}.")
    raise ValueError(f"{path} is neither a folder nor a captions file (.jsonl): name one of these.")


def _check_number(place: Path, number: int) -> None:
    if number > MOST_IMAGES:
        raise ValueError(
            f"{place} has {number} images, and a collection at most {MOST_IMAGES}: open a part of them, such as a "
            "sub-folder, or caption all of them with vlv caption."
        )


def _captions(file: Path) -> dict[str, dict[str, Any]]:
    """By name: the caption and the scores, where there are any. Of several captions, the first."""
    captions = {}
    for number, _, row in read_json_lines(file):
        name, text = row.get("file_name"), row.get("text")
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(name, str) or not isinstance(text, str | None):
            raise ValueError(f"{file}, line {number}: the row needs file_name and text.")
        captions[name] = {"text": text, **{score: _number(row.get(score)) for score in SCORES}}
    return captions


def _number(value: Any) -> float | None:
    """A score; of several, the first."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _add_folder(store: Store, folder: Path, captions: dict[str, dict[str, Any]]) -> int:
    contents = list_folder(folder)
    if not contents.images:
        raise ValueError(f"{folder}: there are no images in this folder.")
    _check_number(folder, len(contents.images))
    others = set(contents.others)
    images = []
    for path in contents.images:
        location, name = os.path.join(os.path.abspath(folder), path), name_of(path)
        has_text = os.path.splitext(path)[0] + SIDECAR in others
        saved = _sidecar_text(location) if has_text else None
        row = captions.get(name, {})
        text = row.get("text") if row.get("text") is not None else saved
        scores = {score: row.get(score) for score in SCORES}
        images.append({"name": name, "location": location, "text": text, "saved": saved, **scores})
    return store.add(images)


def _sidecar_text(location: str) -> str | None:
    """The caption in the text file beside an image; `None` where there is none, or it is not text."""
    try:
        return Path(os.path.splitext(location)[0] + SIDECAR).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return None


def add_uploads(store: Store, files: list[tuple[str, str]], folder: Path) -> int:
    """
    Take uploaded files into the collection's own folder, and add the images. Zips are unpacked. Text files and a
    metadata.jsonl bring captions along.

    Args:
        files: path and name of each; names may have folders, with forward slashes.
        folder: of the collection's images.

    Raises:
        ValueError: a zip is damaged or too large; the sentence names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path, name in files:
        if name.lower().endswith(".zip"):
            _unpack(path, name, folder)
        else:
            target = folder / _safe(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                _link(path, target)
    return add_path(store, str(folder))


def _link(path: str, target: Path) -> None:
    """The upload itself stays: Gradio gives the same file to whoever uploads the same."""
    try:
        os.link(path, target)
    except OSError:  # another file system
        shutil.copyfile(path, target)


def _safe(name: str) -> PurePosixPath:
    """A name that stays in its folder."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    return PurePosixPath(*(part.replace(":", "_") for part in parts or ["image"]))


def _unpack(path: str, name: str, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = list(_wanted(archive))
            size = sum(entry.file_size for entry in entries)
            if size > MOST_UNPACKED or len(entries) > 2 * MOST_IMAGES:
                raise ValueError(
                    f"{name} holds {len(entries)} files of {size / 1e9:.1f} GB: at most {MOST_IMAGES} images and "
                    f"{MOST_UNPACKED / 1e9:.0f} GB are unpacked; make several zips of it."
                )
            for entry in entries:
                target = folder / _safe(entry.filename)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{name}: the zip cannot be read ({error}); make it again.") from error


def _wanted(archive: zipfile.ZipFile) -> Iterator[zipfile.ZipInfo]:
    """Images and captions; not folders, and not what macOS adds."""
    for entry in archive.infolist():
        path = PurePosixPath(entry.filename)
        hidden = any(part.startswith((".", "__MACOSX")) and part != ".." for part in path.parts)
        is_caption = path.suffix.lower() == SIDECAR or path.name == "metadata.jsonl"
        if not entry.is_dir() and not hidden and (is_image_name(path.name) or is_caption):
            yield entry
