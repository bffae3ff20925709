"""Captions as parquet."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from vlv.captioning.journal import Row
from vlv.captioning.outputs.base import CaptionFile

if TYPE_CHECKING:  # importing it takes a quarter of a second, and --help does not need it
    from pyarrow import Schema, Table
    from pyarrow.parquet import ParquetFile

ROWS_AT_ONCE = 10_000


class Parquet(CaptionFile):
    """A `.parquet` file. The rows of an earlier run are kept. In new rows, any other columns are empty."""

    def names(self) -> set[str]:
        if not self.exists:
            return set()
        with self._open() as file:
            batches = file.iter_batches(columns=["file_name", "text"])
            rows = (row for batch in batches for row in batch.to_pylist())
            names = set()
            for number, row in enumerate(rows, start=1):
                if missing := [key for key, value in row.items() if value is None]:
                    raise ValueError(
                        f"{self.path}, row {number}: {missing[0]} is empty; fill it in or delete the row."
                    )
                names.add(row["file_name"])
        return names

    def publish(self, rows: Iterable[Row], kept: set[str]) -> list[Row]:
        from pyarrow import Table
        from pyarrow.parquet import ParquetWriter

        rows = ({"file_name": row["file_name"], "text": row["text"]} for row in rows)
        with self.journal.replacing(self.path) as file, ParquetWriter(file, schema := self._schema(kept)) as writer:
            for table in self._kept(kept, schema):
                writer.write_table(table)
            while some := list(islice(rows, ROWS_AT_ONCE)):
                writer.write_table(Table.from_pylist(some, schema=schema))
        return []

    def _schema(self, kept: set[str]) -> "Schema":
        import pyarrow

        if kept:
            with self._open() as file:
                before = file.schema_arrow
            return pyarrow.schema([field.with_nullable(True) for field in before], before.metadata)
        text = pyarrow.list_(pyarrow.string()) if self.several else pyarrow.string()
        return pyarrow.schema({"file_name": pyarrow.string(), "text": text})

    def _kept(self, kept: set[str], schema: "Schema") -> "Iterator[Table]":
        import pyarrow

        if not kept:
            return
        with self._open() as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                mask = pyarrow.array([name in kept for name in batch["file_name"].to_pylist()])
                yield pyarrow.Table.from_batches([pyarrow.record_batch(batch.columns, schema)]).filter(mask)

    @contextmanager
    def _open(self) -> "Iterator[ParquetFile]":
        """The file of an earlier run, checked."""
        from pyarrow import ArrowException, types
        from pyarrow.parquet import ParquetFile

        try:
            file = ParquetFile(self.path)
        except ArrowException as error:
            raise ValueError(f"{self.path} is not a complete parquet file: {error}") from None
        with file:
            schema = file.schema_arrow
            for name in ("file_name", "text"):
                if name not in schema.names:
                    raise ValueError(
                        f"{self.path} has no column {name}: replace it with --overwrite, or choose another --output."
                    )
            kind = schema.field("text").type
            self.check_text(types.is_list(kind) or types.is_large_list(kind), str(self.path))
            yield file
