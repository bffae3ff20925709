"""The file of scores."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from vlv.captioning.journal import Row, json_line
from vlv.captioning.outputs import JsonLines
from vlv.files import read_json_lines


class ScoreFile(JsonLines):
    """A `.jsonl` file of `file_name`, `text` and the scores. An image with several captions has lists of them."""

    def __init__(self, path: Path):
        if path.suffix != ".jsonl":
            raise ValueError(f"--output {path} must end in .jsonl")
        super().__init__(path)

    def check_text(self, is_list: bool, where: str) -> None:
        """Does nothing: some images may have one caption and others several."""

    def line(self, row: Row) -> bytes:
        return json_line({name: value for name, value in row.items() if name != "order"})

    def rows(self) -> Iterator[Row]:
        """The rows of a finished run, one by one."""
        return (row for _, _, row in read_json_lines(self.path))


def best(rows: Iterable[tuple[str, float]], share: float) -> set[str]:
    """The names of the share of rows, given as name and value, whose values are largest; at least one."""
    ordered = sorted(rows, key=lambda row: row[1], reverse=True)
    return {name for name, _ in ordered[: max(1, round(share * len(ordered)))]}
