"""The rows that a run leaves out, and why."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class LeftOut:
    """
    `failures.jsonl` in the output folder: a line for every row left out, with its `file_name` and the `error`. A row
    without a file has its number in the dataset instead. `vlv caption` writes the same rows.

    Args:
        image_column: the column of the images, which hold the paths of their files.
        roots: the folders that file names are relative to.
    """

    def __init__(self, output_dir: Path, image_column: str, roots: Sequence[str] = ()):
        self.file, self.image_column, self.roots = output_dir / "failures.jsonl", image_column, roots

    def add(self, row: dict[str, Any], number: int, reason: Exception | str) -> None:
        image = row.get(self.image_column)
        path = image.get("path") if isinstance(image, dict) else None
        entry = {"file_name": self.name(path)} if path else {"row": number}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "error": str(reason)}, ensure_ascii=False) + "\n")

    def name(self, path: str) -> str:
        """The path relative to its root, with forward slashes."""
        for root in map(os.path.abspath, self.roots):
            if os.path.isabs(path) and os.path.commonpath([root, path]) == root:
                return Path(os.path.relpath(path, root)).as_posix()
        return path

    def clear(self) -> None:
        """Deletes the file of an earlier run."""
        self.file.unlink(missing_ok=True)

    def summary(self) -> str | None:
        """One sentence, or `None` if nothing was left out."""
        if not self.file.exists():
            return None
        lines = dict.fromkeys(self.file.read_text(encoding="utf-8").splitlines())  # a stream repeats them each epoch
        self.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return f"{len(lines)} unusable rows were left out; {self.file} names them and says why."
