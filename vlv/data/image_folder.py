"""A folder of images as rows for `datasets`: each image, with its metadata or the text file beside it."""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator
from typing import Any

import pandas
import pyarrow
from datasets import Dataset, DatasetInfo, Features, Image
from pyarrow import parquet

from vlv.images import Folder, location_of, name_of, read_text, say

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# A folder has splits when all of its images lie in sub-folders of these names. No other name has a meaning.
SPLITS = ("train", "validation", "val", "test")
SPLIT_FOLDERS = tuple(f"{split}/" for split in SPLITS)

Row = dict[str, Any]


def image_folder(folder: str, contents: Folder) -> tuple[dict[str, Dataset], int]:
    """
    The rows of each split: `image`, undecoded, and the columns of the metadata. `datasets` calls such a folder an
    ImageFolder, but here the file names of images do not affect the splits.

    If the metadata have no captions, the `.txt` files beside the images become the column `text`. Each line of them is
    a caption, as `vlv caption --output .txt` writes them.

    Returns:
        The splits, and how many of the folder's other files were used. There is one split, `train`, unless the
        folder's sub-folders are splits.

    Raises:
        ValueError: for metadata that cannot be read; the sentence names the file and the line.
    """
    metadata = [name for name in contents.others if os.path.basename(name) in METADATA]
    if len({os.path.splitext(name)[1] for name in metadata}) > 1:
        raise ValueError(f"{name_of(folder)} has {' and '.join(map(name_of, metadata))}: keep one of them.")
    rows = list(_rows_of_metadata(folder, metadata, contents.images))
    if metadata:
        listed = {row["image"] for row in rows}
        if unlisted := sum(image not in listed for image in contents.images):
            say(f"{name_of(folder)}: skipped {unlisted:,} images that {', '.join(map(name_of, metadata))} lack.")
    else:
        rows = [{"image": image} for image in contents.images]
    used = len(metadata)
    if not any("text" in row for row in rows):
        used += _add_captions(folder, rows, contents.others)
    splits: dict[str, list[Row]] = {}
    has_splits = all(row["image"].startswith(SPLIT_FOLDERS) for row in rows)
    for row in rows:
        splits.setdefault(row["image"].partition("/")[0] if has_splits else "train", []).append(row)
    return {split: _table(folder, rows) for split, rows in splits.items()}, used


def _rows_of_metadata(folder: str, metadata: list[str], images: list[str]) -> Iterator[Row]:
    """The rows of all metadata files, each with its `image`, relative to the folder."""
    known = {name_of(image): image for image in images}
    # Letters with accents have two spellings in Unicode, and copying between systems may change the spelling.
    composed = {unicodedata.normalize("NFC", name): image for name, image in known.items() if not name.isascii()}
    for file in metadata:
        path = os.path.join(folder, file)
        for number, row in enumerate(read_metadata(path), start=1):
            try:
                inside = _inside(folder, os.path.dirname(file), row.pop("file_name", None))
            except ValueError as error:
                raise ValueError(f"{name_of(path)}, row {number}: {error}") from error
            image = known.get(inside) or composed.get(unicodedata.normalize("NFC", inside)) or location_of(inside)
            yield {"image": image} | {column: value for column, value in row.items() if column != "image"}


def _inside(folder: str, above: str, file_name: Any) -> str:
    """The path below `folder` of an image that metadata in its sub-folder `above` call `file_name`."""
    if not isinstance(file_name, str) or not file_name:
        raise ValueError("there is no file_name, the path of the image below the folder of this file.")
    inside = os.path.join(name_of(above), file_name)
    if os.path.isabs(file_name):
        inside = os.path.relpath(os.path.realpath(file_name), os.path.realpath(folder))
    inside = os.path.normpath(inside).replace(os.sep, "/")
    if inside.split("/")[0] == os.pardir:
        raise ValueError(f"{file_name} is outside of {name_of(folder)}: give a path below the folder of this file.")
    return inside


def read_metadata(path: str) -> list[Row]:
    """The rows of a .jsonl, .csv or .parquet file; raises ValueError if it cannot be read."""
    try:
        if path.endswith(".jsonl"):
            return list(_read_json_lines(path))
        if path.endswith(".parquet"):
            return parquet.read_table(path).to_pylist()
        # Only an empty field is a missing value, because a caption may be the word "None".
        table = pandas.read_csv(path, keep_default_na=False, na_values=[""], encoding="utf-8-sig")
        return table.astype(object).where(table.notna(), None).to_dict("records")
    except (ValueError, pyarrow.ArrowException) as error:
        name = name_of(path)
        reason = " ".join(str(error).split())
        raise ValueError(reason if reason.startswith(name) else f"{name} cannot be read: {reason}") from error


def _read_json_lines(path: str) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name_of(path)}, line {number}: this is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{name_of(path)}, line {number}: this is not a JSON object.")
        yield row


def _add_captions(folder: str, rows: list[Row], others: list[str]) -> int:
    """Add the captions from the text files beside the images to the rows. Returns how many such files there are."""
    files = {name for name in others if name.endswith(".txt")}
    beside = {row["image"]: os.path.splitext(row["image"])[0] + ".txt" for row in rows}
    if not files.intersection(beside.values()):
        return 0
    for row in rows:
        file = beside[row["image"]]
        row["text"] = _captions(os.path.join(folder, file)) if file in files else []
    several = any(len(row["text"]) > 1 for row in rows)
    for row in rows:
        row["text"] = row["text"] if several else next(iter(row["text"]), None)
    return len(files.intersection(beside.values()))


def _captions(path: str) -> list[str]:
    text = read_text(path)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name_of(path)}: this caption is not UTF-8 text: save it as UTF-8.") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def _table(folder: str, rows: list[Row]) -> Dataset:
    root = os.path.abspath(folder)
    # The paths in a table are text too; `open_image` turns them back into paths.
    paths = [name_of(os.path.join(root, row["image"])) for row in rows]
    empty = pyarrow.nulls(len(rows), pyarrow.binary())
    columns = {"image": pyarrow.StructArray.from_arrays([empty, pyarrow.array(paths)], ["bytes", "path"])}
    for column in dict.fromkeys(column for row in rows for column in row if column != "image"):
        try:
            columns[column] = pyarrow.array([row.get(column) for row in rows])
        except (pyarrow.ArrowException, UnicodeEncodeError) as error:
            raise ValueError(
                f"The metadata in {name_of(folder)} hold values of different kinds in the column {column}: write all "
                f"of them as one kind ({' '.join(str(error).split())})."
            ) from error
    table = pyarrow.table(columns)
    features = Features.from_arrow_schema(table.schema) | {"image": Image(decode=False)}
    return Dataset(table, DatasetInfo(features=Features(features)), fingerprint=_fingerprint(table, root, rows))


def _fingerprint(table: pyarrow.Table, root: str, rows: list[Row]) -> str:
    """Changes with the rows and with any image, so that cached results of other images are not used."""
    digest = hashlib.blake2b(digest_size=8)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    digest.update(sink.getvalue())
    for row in rows:
        try:
            status = os.stat(os.path.join(root, row["image"]))
            digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
        except OSError:
            digest.update(b"- ")
    return digest.hexdigest()
