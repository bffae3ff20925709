"""A collection in a database: its images, their captions, and every change of them."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    number INTEGER PRIMARY KEY,
    name TEXT UNIQUE NOT NULL,        -- `file_name` of metadata.jsonl: relative, with forward slashes
    location TEXT NOT NULL,           -- the file
    text TEXT NOT NULL DEFAULT '',    -- the caption; empty before there is one
    saved TEXT,                       -- the caption that is in the text file beside the image, as far as is known
    error TEXT,                       -- why it could not be captioned
    score REAL,
    keep INTEGER NOT NULL DEFAULT 1,  -- 0: it is skipped when the collection is saved
    version INTEGER NOT NULL DEFAULT 0,
    explained REAL,                   -- these two are written by `vlv score`
    likelihood REAL
);
CREATE TABLE IF NOT EXISTS changes (batch INTEGER NOT NULL, number INTEGER NOT NULL, before TEXT NOT NULL, after TEXT);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
SHOWN = {
    "all": "1",
    "without caption": "text = ''",
    "with caption": "text != ''",
    "skipped": "keep = 0",
    "failed": "error IS NOT NULL",
}
SCORES = ("score", "explained", "likelihood")  # what captions come with; a larger one is better
WORST = {f"worst {name} first": f"{name} IS NULL, {name}, number" for name in SCORES}
ORDERS = {"as added": "number", **WORST, "by name": "name"}
COLUMNS = f"number, name, location, text, error, keep, version, {', '.join(SCORES)}"


@dataclass(frozen=True)
class Row:
    """An image of a collection."""

    number: int
    name: str
    location: str
    text: str
    error: str | None
    keep: int
    version: int  # grows with each change of the caption
    score: float | None
    explained: float | None
    likelihood: float | None


class Store:
    """
    The database of a collection. Every change is on disk when the method returns, all of it or nothing. Any number of
    threads, windows and processes may use it at once.

    Args:
        path: the database, which is made if need be.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._connection() as database:
            database.executescript(SCHEMA)
            # A collection from before `vlv score` lacks its columns.
            there = {column for _, column, *_ in database.execute("PRAGMA table_info(images)")}
            for name in SCORES:
                if name not in there:
                    database.execute(f"ALTER TABLE images ADD COLUMN {name} REAL")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction: SQLite's own are bound to the thread that made them."""
        database = sqlite3.connect(self.path, timeout=60, isolation_level="IMMEDIATE")
        try:
            database.execute("PRAGMA journal_mode = WAL")
            with database:
                yield database
        finally:
            database.close()

    # ---- images --------------------------------------------------------------------------------------------

    def add(self, images: Iterable[dict[str, Any]]) -> int:
        """
        Add images: `name` and `location`, and `text`, `saved` and scores where there are any. Of an image that is
        there already only the scores are taken over, if its caption is still the one that was scored. Returns how many
        are new.
        """
        empty = {"text": "", "saved": None, **dict.fromkeys(SCORES)}
        rows = [{**empty, **{k: v for k, v in image.items() if v is not None}} for image in images]
        with self._connection() as database:
            before = database.total_changes
            database.executemany(
                f"INSERT OR IGNORE INTO images (name, location, text, saved, {', '.join(SCORES)}) "
                f"VALUES (:name, :location, :text, :saved, {', '.join(f':{name}' for name in SCORES)})",
                rows,
            )
            new = database.total_changes - before
            changed = ", ".join(f"{name} = coalesce(:{name}, {name})" for name in SCORES)
            scored = [row for row in rows if any(row[name] is not None for name in SCORES)]
            database.executemany(f"UPDATE images SET {changed} WHERE name = :name AND text = :text", scored)
            return new

    def row(self, number: int) -> Row:
        """Raises ValueError where there is no such image."""
        with self._connection() as database:
            found = database.execute(f"SELECT {COLUMNS} FROM images WHERE number = ?", (number,)).fetchone()
        if found is None:
            raise ValueError(f"The collection has no image number {number}: load the page again.")
        return Row(*found)

    def rows(
        self, search: str = "", show: str = "all", order: str = "as added", first: int = 0, count: int = -1
    ) -> tuple[list[Row], int]:
        """
        Some rows, and how many there are in all.

        Args:
            search: text that the caption or the name holds, in upper or lower case.
            show, order: of `SHOWN` and `ORDERS`.
        """
        where = f"({SHOWN[show]}) AND (instr(lower(text), lower(:search)) OR instr(lower(name), lower(:search)))"
        values = {"search": search, "first": first, "count": count}
        with self._connection() as database:
            (total,) = database.execute(f"SELECT count(*) FROM images WHERE {where}", values).fetchone()
            found = database.execute(
                f"SELECT {COLUMNS} FROM images WHERE {where} ORDER BY {ORDERS[order]} LIMIT :count OFFSET :first",
                values,
            ).fetchall()
        return [Row(*each) for each in found], total

    def counts(self) -> dict[str, int]:
        """How many images there are, and of each kind."""
        kinds = {**SHOWN, **{f"with {name}": f"{name} IS NOT NULL" for name in SCORES}}
        sums = ", ".join(f"coalesce(sum({condition}), 0)" for condition in kinds.values())
        with self._connection() as database:
            return dict(zip(kinds, database.execute(f"SELECT {sums} FROM images").fetchone(), strict=True))

    def set_keep(self, number: int, keep: bool) -> None:
        with self._connection() as database:
            database.execute("UPDATE images SET keep = ? WHERE number = ?", (int(keep), number))

    # ---- captions ------------------------------------------------------------------------------------------

    def write(self, captions: Iterable[tuple[str, str | None, str | None]]) -> None:
        """
        What a run has made: name, caption and error of images. A caption that somebody has written in the meantime
        stays.
        """
        with self._connection() as database:
            for name, text, error in captions:
                database.execute(
                    "UPDATE images SET text = coalesce(:text, text), error = :error, version = version + 1 "
                    "WHERE name = :name AND text = ''",
                    {"name": name, "text": text, "error": error},
                )

    def edit(self, number: int, text: str, version: int) -> Row | None:
        """
        Change a caption.

        Args:
            version: of the row that the change is made to.

        Returns:
            The row as it is now; `None` when it has changed since that version, in another window for instance. Then
            nothing is done.
        """
        with self._connection() as database:
            changed = database.execute(
                "UPDATE images SET text = ?, version = version + 1 WHERE number = ? AND version = ?",
                (text, number, version),
            ).rowcount
        return self.row(number) if changed else None

    def change_all(self, change: Callable[[str], str], search: str = "", show: str = "all") -> int:
        """Change all captions that there are, among the rows of [`rows`]; how many have become different."""
        found, _ = self.rows(search, show)
        with self._connection() as database:
            (batch,) = database.execute("SELECT coalesce(max(batch), 0) + 1 FROM changes").fetchone()
            count = 0
            for row in found:
                # Read again: this transaction keeps other windows out.
                (before,) = database.execute("SELECT text FROM images WHERE number = ?", (row.number,)).fetchone()
                after = change(before) if before else before
                if after == before:
                    continue
                count += 1
                values = {"batch": batch, "number": row.number, "before": before, "after": after}
                database.execute("INSERT INTO changes VALUES (:batch, :number, :before, :after)", values)
                database.execute(
                    "UPDATE images SET text = :after, version = version + 1 WHERE number = :number", values
                )
        return count

    def undo(self) -> int:
        """Take back the last [`change_all`]; captions that were edited after it stay. How many were taken back."""
        with self._connection() as database:
            (batch,) = database.execute("SELECT max(batch) FROM changes").fetchone()
            count = database.execute(
                "UPDATE images SET text = changes.before, version = version + 1 FROM changes "
                "WHERE changes.batch = ? AND changes.number = images.number AND changes.after = images.text",
                (batch,),
            ).rowcount
            database.execute("DELETE FROM changes WHERE batch = ?", (batch,))
        return max(count, 0)

    # ---- saving --------------------------------------------------------------------------------------------

    def kept(self) -> list[tuple[str, str, str, str | None]]:
        """Name, location, caption and known text file of the images that are saved: kept, and with a caption."""
        with self._connection() as database:
            return database.execute(
                "SELECT name, location, text, saved FROM images WHERE keep AND text != '' ORDER BY number"
            ).fetchall()

    def mark_saved(self, saved: Sequence[tuple[str, str]]) -> None:
        """Names and captions that are in the text files beside the images now."""
        with self._connection() as database:
            database.executemany("UPDATE images SET saved = ? WHERE name = ?", [(text, name) for name, text in saved])

    def fact(self, name: str) -> str | None:
        with self._connection() as database:
            found = database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return found and found[0]

    def set_fact(self, name: str, value: str) -> None:
        with self._connection() as database:
            database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
