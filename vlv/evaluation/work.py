"""Keeps what an evaluation has made beside its results, so that an interrupted run can continue."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from vlv import __version__
from vlv.files import read_json_lines
from vlv.provenance import digest


class Work:
    """
    A folder with a subfolder `KIND-HASH` for each kind of thing and its settings, which are in its `settings.json`.
    With other settings, another model or other images, another subfolder is used.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def rows(
        self, kind: str, settings: dict[str, Any], total: int, make: Callable[[int], Iterator[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """
        `total` rows of `KIND-HASH/KIND.jsonl`.

        Args:
            make: a number -> the rows from this number on. It is called for the rows that do not exist yet.
        """
        file = self._place(kind, settings) / f"{kind}.jsonl"
        rows = []
        if file.exists():
            _drop_torn_line(file)
            rows = [row for _, _, row in read_json_lines(file)]
        if len(rows) < total:
            with file.open("a", encoding="utf-8") as output:
                for row in _progress(make(len(rows)), kind, len(rows), total):
                    output.write(json.dumps(row, ensure_ascii=False) + "\n")
                    output.flush()
                    rows.append(row)
        return rows

    def pictures(
        self, kind: str, settings: dict[str, Any], total: int, make: Callable[[int], Iterator[Image.Image]]
    ) -> list[str]:
        """The PNG files of `total` pictures, `KIND-HASH/00000000.png` and so on. `make` is as in [`Work.rows`]."""
        folder = self._place(kind, settings)
        files = [folder / f"{number:08}.png" for number in range(total)]
        done = next((number for number, file in enumerate(files) if not file.exists()), total)
        if done < total:
            pictures = _progress(make(done), kind, done, total)
            for file, picture in zip(files[done:], pictures, strict=True):
                unfinished = file.with_suffix(".part")
                picture.save(unfinished, format="png")
                unfinished.replace(file)
        return [str(file) for file in files]

    def _place(self, kind: str, settings: dict[str, Any]) -> Path:
        settings = {**settings, "vlv": __version__}
        folder = self.folder / f"{kind}-{digest(settings)}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return folder


def _drop_torn_line(file: Path) -> None:
    """Remove the last line of a file if it is incomplete, because the run was interrupted while writing it."""
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def _progress(items: Iterable[Any], kind: str, done: int, total: int) -> Iterable[Any]:
    return tqdm(items, desc=kind.replace("_", " ").capitalize(), initial=done, total=total, unit="image")
