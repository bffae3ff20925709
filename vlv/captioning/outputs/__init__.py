"""The output formats of `vlv caption`: one class in one file for each format."""

from collections.abc import Sequence
from pathlib import Path

from vlv.captioning.outputs.base import CaptionFile, Output
from vlv.captioning.outputs.json_lines import JsonLines
from vlv.captioning.outputs.parquet import Parquet
from vlv.captioning.outputs.sidecars import EXISTING, Sidecars
from vlv.images import ImageFile

# The class for each suffix of --output. A suffix alone that is not listed here means sidecars.
FORMATS: dict[str, type[CaptionFile]] = {".jsonl": JsonLines, ".parquet": Parquet}


def is_suffix(name: str) -> bool:
    """Whether `--output` is a suffix alone, which means sidecars."""
    return name.startswith(".") and name[1:].isalnum() and name not in FORMATS


def open_output(name: str, files: Sequence[ImageFile] | None, several: bool, existing: str) -> Output:
    """
    The output that `--output` names.

    Args:
        files: the images, or `None` if some are rows of tables.
        several: each image gets a list of captions.
        existing: what happens to sidecars that already exist.

    Raises:
        OSError, ValueError: when it cannot be written. Nothing has been changed.
    """
    if not is_suffix(name):
        return FORMATS[Path(name).suffix](Path(name), several)
    if files is None:
        raise ValueError(
            f"--output {name} needs image files: a row of a table has no place for a text file beside it."
        )
    return Sidecars(files, name, several, existing)


__all__ = [
    "EXISTING",
    "FORMATS",
    "CaptionFile",
    "JsonLines",
    "Output",
    "Parquet",
    "Sidecars",
    "is_suffix",
    "open_output",
]
