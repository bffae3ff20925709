"""Captions in a file of their own, as `vlv caption` writes them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlv.data.image_folder import read_metadata


def read_caption_file(file: str, column: str = "text") -> Mapping[str, Any]:
    """
    What a .jsonl, .csv or .parquet file has in `column`, by the `file_name` of the image: a caption or a list of them.

    Raises:
        OSError, ValueError: when it cannot be read, or has no captions.
    """
    if Path(file).suffix not in (".jsonl", ".csv", ".parquet"):
        raise ValueError(f"The captions {file} must be a .jsonl, .csv or .parquet file with file_name and {column}.")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"There is no file of captions {file}.")
    captions = {}
    for number, row in enumerate(read_metadata(file), start=1):
        for key in ("file_name", column):
            if key not in row:
                raise ValueError(f"{file}, row {number}: there is no {key}.")
        captions[row["file_name"]] = row[column]
    if not captions:
        raise ValueError(f"{file} holds no captions.")
    return captions
