"""What a run leaves out of its data, and why."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class LeftOut:
    """
    `failures.jsonl` in the output folder: a line for every row left out, with its `file_name`, or its number in the
    dataset where it has none, and the `error`. `vlv caption` writes the same rows.

    Args:
        image_column: holds the images, which know their files.
        roots: folders that files are named from.
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
        """Relative to the folder that it was found in, with forward slashes."""
        for root in map(os.path.abspath, self.roots):
            if os.path.isabs(path) and os.path.commonpath([root, path]) == root:
                return Path(os.path.relpath(path, root)).as_posix()
        return path

    def clear(self) -> None:
        """Forgets an earlier run."""
        self.file.unlink(missing_ok=True)

    def summary(self) -> str | None:
        """One sentence, or `None` where nothing was left out."""
        if not self.file.exists():
            return None
        lines = dict.fromkeys(self.file.read_text(encoding="utf-8").splitlines())  # a stream meets a row in each epoch
        self.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return f"{len(lines)} unusable rows were left out; {self.file} names them and says why."
