"""Copies images whose captions fit into a new folder, to train on."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from vlv.captioning.journal import Row
from vlv.captioning.sources import Pictures
from vlv.files import atomic_folder, writing_to
from vlv.images import location_of


def keep(source: Pictures, rows: Iterable[Row], names: set[str], folder: Path) -> int:
    """
    Write an ImageFolder: the images, byte for byte, and metadata.jsonl with their rows. Returns how many there are.

    Args:
        rows: with `file_name`, `text` and the scores.
        names: of the images to keep.

    Raises:
        OSError: the folder exists already, or cannot be written.
    """
    files: dict[str, str] = {}
    with atomic_folder(folder) as unfinished, writing_to(unfinished.parent):
        for picture in source.pictures():
            if picture.name in names and picture.name not in files:
                files[picture.name] = _copy(picture.name, picture.source, unfinished)
        with (unfinished / "metadata.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                if row["file_name"] in files:
                    file.write(json.dumps({**row, "file_name": files[row["file_name"]]}, ensure_ascii=False) + "\n")
    return len(files)


def _copy(name: str, source: Path | Mapping[str, Any], folder: Path) -> str:
    """Copies an image below `folder`. Returns its `file_name` there."""
    if isinstance(source, Path):
        target = folder / location_of(name).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(os.path.realpath(source), target)
        except OSError:  # another file system
            shutil.copyfile(source, target)
        return name.lstrip("/")
    content = source["bytes"]
    with Image.open(BytesIO(content)) as image:
        suffix = f".{(image.format or 'png').lower()}"
    named = name if Path(name).suffix.lower() == suffix else f"{name}{suffix}"
    target = folder / named
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return named
