"""
The journal of a run: the captions that it has written so far.

A row is a dictionary: `order` (shard and row in the input), `file_name`, and `text` (a list, if several
captions were requested) or `error`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vlv.files import writing_to

Row = dict[str, Any]


def json_line(row: Row) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


class Place(NamedTuple):
    """Where a row lies in the journal."""

    order: tuple[int, ...]
    path: Path
    offset: int


class Journal:
    """
    The captions of an unfinished run: a hidden folder in which each process appends to its own file.

    A row counts once its line is complete, so a run can be killed at any moment without losing earlier rows.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: BinaryIO | None = None
        self._path: str | None = None

    def header(self) -> Row | None:
        """What the run recorded about itself, or `None` if no row has been written."""
        return next((row for _, _, row in self._lines(header=True)), None)

    def append(self, rows: Iterable[Row], header: Row) -> None:
        """Add rows. The first call writes the header before them."""
        with writing_to(self.folder):
            if self._file is None:
                self.folder.mkdir(exist_ok=True)
                handle, self._path = tempfile.mkstemp(dir=self.folder, suffix=".jsonl")
                # Unbuffered: after a write to a full disk fails, closing the file must not try again.
                self._file = os.fdopen(handle, "wb", buffering=0)
                rows = [header, *rows]
            self.check()
            data = b"".join(map(json_line, rows))
            while data:
                data = data[self._file.write(data) :]

    def check(self) -> None:
        """
        Check that the file of this process still exists.

        Raises:
            FileNotFoundError: when it was deleted or moved. The system itself raises no error for writing to it.
        """
        if self._file is None:
            return
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                return
        raise FileNotFoundError(
            f"{self.folder} was deleted or moved while the run was writing to it: its captions are lost. Run it again."
        )

    def settle(self) -> tuple[dict[str, Place], list[Row]]:
        """The places of the captions, by image in the order of the input, and the rows of the failures."""
        captioned, failed, namesakes = {}, {}, []
        for path, offset, row in self._lines():
            name, order = row["file_name"], tuple(row["order"])
            if "error" in row:
                failed[name] = row
            elif name not in captioned:
                captioned[name] = Place(order, path, offset)
            elif order != captioned[name].order:
                namesakes.append({**row, "error": f"{name}: another image has the same name."})
        failures = [row for name, row in failed.items() if name not in captioned] + namesakes
        captioned = dict(sorted(captioned.items(), key=lambda item: item[1].order))
        return captioned, sorted(failures, key=lambda row: row["order"])

    def names(self) -> set[str]:
        """The images that have a caption."""
        return {row["file_name"] for _, _, row in self._lines() if "text" in row}

    def rows(self, places: Iterable[Place]) -> Iterator[Row]:
        """The rows at these places, read one by one: there may be millions."""
        with ExitStack() as stack:
            files = {}
            for _, path, offset in places:
                if path not in files:
                    files[path] = stack.enter_context(path.open("rb"))
                files[path].seek(offset)
                yield json.loads(files[path].readline())

    @contextmanager
    def replacing(self, path: Path) -> Iterator[BinaryIO]:
        """A file that replaces another one atomically when the block ends. Until then it is in the journal."""
        whole = self.folder / "whole"
        with writing_to(path.parent):
            with whole.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, whole)
            whole.replace(path)

    def remove(self) -> None:
        """Delete the journal. The rename comes first, so that a half-deleted folder is never read as a journal."""
        if self._file is not None:
            self._file.close()
        rubbish = self.folder.with_suffix(".done")
        shutil.rmtree(rubbish, ignore_errors=True)
        if self.folder.exists():
            self.folder.replace(rubbish)
            shutil.rmtree(rubbish, ignore_errors=True)

    def _lines(self, header: bool = False) -> Iterator[tuple[Path, int, Row]]:
        for path in sorted(self.folder.glob("*.jsonl")):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    row = {}
                    with suppress(ValueError):  # a line that a kill cut short
                        row = json.loads(line)
                    if row and header != ("file_name" in row):
                        yield path, offset, row
                    offset += len(line)
