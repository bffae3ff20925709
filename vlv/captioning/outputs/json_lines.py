"""Captions as JSON Lines."""

from collections.abc import Iterable, Iterator

from vlv.captioning.journal import Row, json_line
from vlv.captioning.outputs.base import CaptionFile
from vlv.files import read_json_lines


class JsonLines(CaptionFile):
    """A `.jsonl` file. The lines of an earlier run are kept byte for byte, with all their keys."""

    def names(self) -> set[str]:
        return {name for name, _ in self._lines()}

    def publish(self, rows: Iterable[Row], kept: set[str]) -> list[Row]:
        with self.journal.replacing(self.path) as file:
            if kept:
                file.writelines(line for name, line in self._lines() if name in kept)
            file.writelines(map(self.line, rows))
        return []

    def line(self, row: Row) -> bytes:
        """A row of the journal as a line of the file."""
        return json_line({"file_name": row["file_name"], "text": row["text"]})

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        if not self.exists:
            return
        for number, line, row in read_json_lines(self.path):
            where = f"{self.path}, line {number}"
            for key in ("file_name", "text"):
                if key not in row:
                    raise ValueError(f"{where}: the row has no {key}; add it or delete the line.")
            if not isinstance(row["file_name"], str):
                raise ValueError(f"{where}: file_name is not text; correct it or delete the line.")
            texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{where}: text is neither text nor a list of texts; correct it or delete the line.")
            self.check_text(isinstance(row["text"], list), where)
            yield row["file_name"], line if line.endswith(b"\n") else line + b"\n"
