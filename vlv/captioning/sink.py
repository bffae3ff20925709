"""
Where captions go: a journal while a run lasts, and at its end the file, or the sidecars, that it becomes.

A row is a dictionary: `order` (shard and row in the input), `file_name`, and `text` (a list of them, where several
captions were asked for) or `error`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from vlv.images import ImageFile

Row = dict[str, Any]


class Place(NamedTuple):
    """Where a row lies in the journal."""

    order: list[int]
    path: Path
    offset: int


class Journal:
    """
    What an unfinished run has done so far: a hidden folder, in which every process appends to a file of its own.

    A row counts when its line is whole. So a run can be killed at any moment, and what it had done is still there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file = None

    def header(self) -> Row | None:
        """What the run was told about itself, or `None` where none has written a row."""
        return next((row for _, _, row in self._lines(header=True)), None)

    def append(self, rows: Iterable[Row], header: Row) -> None:
        """Add rows; the first time, behind the header."""
        if self._file is None:
            self.folder.mkdir(exist_ok=True)
            handle, _ = tempfile.mkstemp(dir=self.folder, suffix=".jsonl")
            self._file = os.fdopen(handle, "w", encoding="utf-8")
            rows = [header, *rows]
        self._file.write("".join(_json_line(row) for row in rows))
        self._file.flush()

    def settle(self) -> tuple[dict[str, Place], list[Row]]:
        """Where the captions lie, by image in the order of the input, and the rows of what could not be captioned."""
        captioned, failed, namesakes = {}, {}, []
        for path, offset, row in self._lines():
            name = row["file_name"]
            if "error" in row:
                failed[name] = row
            elif name not in captioned:
                captioned[name] = Place(row["order"], path, offset)
            elif row["order"] != captioned[name].order:
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

    def remove(self) -> None:
        """Forget the run; interrupted in this, nothing half is taken for a journal."""
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


class CaptionFile:
    """A `.jsonl` or `.parquet` file with a row per image: `file_name` and `text`."""

    def __init__(self, path: Path):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file to write to.")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.folder = path, path.parent
        self.journal = Journal(path.with_name(f".{path.name}.partial"))

    def rows(self) -> Iterator[Row]:
        """The rows of an earlier run."""
        if not self.path.exists():
            return
        if self.path.suffix == ".jsonl":
            with self.path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)
        else:
            from pyarrow.parquet import ParquetFile

            with ParquetFile(self.path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()

    def names(self) -> set[str]:
        return {row["file_name"] for row in self.rows()}

    def publish(self, rows: Iterable[Row], kept: set[str]) -> None:
        """Put the rows, behind those of an earlier run that are `kept`, in the file's place."""
        rows = (row for part in ((row for row in self.rows() if row["file_name"] in kept), rows) for row in part)
        rows = ({name: value for name, value in row.items() if name != "order"} for row in rows)
        whole = self.journal.folder / "whole"
        with whole.open("wb") as file:
            (_write_json_lines if self.path.suffix == ".jsonl" else _write_parquet)(rows, file)
            os.fsync(file.fileno())
        whole.replace(self.path)


class Sidecars:
    """A text file beside each image: its name with another suffix; several captions are its lines."""

    def __init__(self, files: Sequence[ImageFile], suffix: str, overwrite: bool):
        self.paths = {file.name: file.path.with_suffix(suffix) for file in files}
        owners = {}
        for file in files:
            path = self.paths[file.name]
            if (owner := owners.setdefault(path, file)) is not file:
                raise ValueError(f"{owner.path} and {file.path} would share the sidecar {path}: rename one of them.")
        self.overwrite = overwrite
        self.folder = Path(os.path.commonpath([file.path.absolute().parent for file in files]))
        self.journal = Journal(self.folder / f".captions{suffix}.partial")

    def names(self) -> set[str]:
        return set() if self.overwrite else {name for name, path in self.paths.items() if path.exists()}

    def publish(self, rows: Iterable[Row], kept: set[str]) -> None:
        whole = self.journal.folder / "whole"
        for row in rows:
            whole.write_text("".join(f"{text}\n" for text in _texts(row)), encoding="utf-8")
            whole.replace(self.paths[row["file_name"]])


class Printer:
    """Prints captions, each behind its image's name and a tab."""

    def __init__(self):
        self.done: set[str] = set()
        self._captioned, self._failures = 0, []

    def add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if "error" in row:
                self._failures.append(row)
                continue
            self._captioned += 1
            for text in _texts(row):
                tqdm.write(f"{row['file_name']}\t{text}")

    def finish(self) -> tuple[int, list[Row]]:
        return self._captioned, self._failures


class Sink:
    """
    Takes the rows of a run, and at the end makes its output of them.

    Args:
        target: what the output is.
        settings: what the captions depend on; an interrupted run is gone on with under the same only.
        resume: go on with an interrupted run, or add to a finished one.

    Raises:
        ValueError: when an interrupted run is in the way, or had other settings.
    """

    def __init__(self, target: CaptionFile | Sidecars, settings: Row, resume: bool):
        self.target, self.journal = target, target.journal
        self.failures = target.folder / "failures.jsonl"
        header = self.journal.header()
        if header is None:
            adds = isinstance(target, Sidecars) or resume
            header = {"settings": settings, "adds": adds}
        elif not resume:
            raise ValueError(
                f"An earlier run was interrupted: go on with it with --resume, or delete {self.journal.folder}."
            )
        elif different := [name for name, value in settings.items() if header["settings"].get(name) != value]:
            before = ", ".join(f"--{name} {header['settings'].get(name)}" for name in different)
            raise ValueError(
                f"The interrupted run had {before}: --resume goes on with the same settings only. "
                f"To start anew, delete {self.journal.folder}."
            )
        self._header = header
        self._kept = target.names() if header["adds"] else set()
        self.done = self._kept | self.journal.names()

    def add(self, rows: Sequence[Row]) -> None:
        self.journal.append(rows, self._header)

    def finish(self) -> tuple[int, list[Row]]:
        """Make the output, whole at once. Returns how many images were captioned, and the rows of those left out."""
        captioned, failures = self.journal.settle()
        if captioned:
            self.target.publish(self.journal.rows(captioned.values()), self._kept - captioned.keys())
        if failures:
            whole = self.journal.folder / "whole"
            with whole.open("w", encoding="utf-8") as file:
                file.writelines(_json_line({name: row[name] for name in ("file_name", "error")}) for row in failures)
            whole.replace(self.failures)
        else:
            self.failures.unlink(missing_ok=True)
        self.journal.remove()
        return len(captioned), failures


def _texts(row: Row) -> list[str]:
    """The captions of a row, each on one line."""
    texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
    return [" ".join(text.split()) for text in texts]


def _json_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write_json_lines(rows, file):
    for row in rows:
        file.write(_json_line(row).encode())


def _write_parquet(rows, file, rows_at_once=10_000):
    from itertools import chain, islice

    import pyarrow
    from pyarrow.parquet import ParquetWriter

    first = next(rows)
    text = pyarrow.list_(pyarrow.string()) if isinstance(first["text"], list) else pyarrow.string()
    schema = pyarrow.schema({"file_name": pyarrow.string(), "text": text})
    rows = chain([first], rows)
    with ParquetWriter(file, schema) as writer:
        while some := list(islice(rows, rows_at_once)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))
