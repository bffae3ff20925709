"""Loads rows of images and captions through `datasets`: from folders, tables, archives and the Hub."""

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import fsspec
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from PIL import Image

from processing_vlv import load_image
from prompts_vlv import as_prompt
from vlv.data.image_folder import SPLITS, image_folder
from vlv.images import list_folder, location_of, report_passed_over

# Shards of a streamed dataset that is on disk in one piece: enough for many processes and their workers.
STREAM_SHARDS = 64
# `train/a.parquet`, `train.parquet`, `train-0001.tar`, and `any-00000-of-00001.parquet` as `push_to_hub` names it.
SPLIT_OF_TABLE = rf"({'|'.join(SPLITS)})(?:/.*|(?:-\d+)?\.\w+)|(?:data/)?(\w+)-\d{{5}}-of-\d{{5}}\.\w+"


def load_rows(dataset: str, split: str | None = None, streaming: bool = False) -> Dataset | IterableDataset:
    """Loads one split of a folder of images (see [`image_folder`]), of parquet or WebDataset files, of a folder from
    `save_to_disk`, or of a Hub id.

    Images stay encoded (`Image(decode=False)`). `open_image` decodes them when they are needed.

    Raises:
        FileNotFoundError: when `dataset` looks like a path and does not exist.
        ValueError: when it holds no images, or no such split.
    """
    path = Path(dataset).expanduser()
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        splits = load_from_disk(str(path))
    elif path.is_dir():
        splits = read_folder(path, streaming)
    elif path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {dataset}; name a folder of images or a dataset on the Hub.")
    else:
        splits = load_dataset(dataset, streaming=streaming)

    splits = splits if isinstance(splits, dict) else {"train": splits}
    if split is None and len(splits) > 1 and "train" not in splits:
        raise ValueError(f"{dataset} has the splits {', '.join(splits)}: choose one with train_split or eval_split.")
    name = split or ("train" if "train" in splits else next(iter(splits)))
    if name not in splits:
        raise ValueError(f"{dataset} has no split '{name}'; its splits are {', '.join(splits)}.")
    rows = splits[name]
    if streaming and isinstance(rows, Dataset):
        rows = rows.to_iterable_dataset(num_shards=min(STREAM_SHARDS, len(rows)))
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def read_folder(folder: Path, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    """The splits of a folder of images, of parquet files, or of WebDataset tars, whichever is found first."""
    contents = list_folder(folder)
    if contents.images:
        splits, used = image_folder(str(folder), contents)
        report_passed_over(folder, contents, used)
        return splits
    for suffix, builder in ((".parquet", "parquet"), (".tar", "webdataset")):
        if files := [file for file in contents.others if file.lower().endswith(suffix)]:
            report_passed_over(folder, contents, len(files))
            return load_dataset(builder, data_files=split_tables(folder, files), streaming=streaming)
    report_passed_over(folder, contents)
    raise ValueError(f"There are no images, no parquet files and no WebDataset tars in {folder}.")


@contextmanager
def reading(dataset: str) -> Iterator[None]:
    """Turns any error of `datasets` into one error that names the dataset."""
    try:
        yield
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"There is no folder {dataset}, and no dataset of that name was found on the Hub: {error}"
        ) from error
    except Exception as error:  # for example, an empty metadata.jsonl raises an IndexError
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        if isinstance(cause, OSError | ValueError) and dataset in str(cause):
            raise cause from error
        raise ValueError(f"{dataset} cannot be read: {cause or type(cause).__name__}") from error


def split_tables(folder: Path, files: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split. There is one split, `train`, unless every file is named after its split."""
    named = [re.fullmatch(SPLIT_OF_TABLE, file) for file in files]
    splits: dict[str, list[str]] = {}
    for file, match in zip(files, named, strict=True):
        split = next(filter(None, match.groups())) if all(named) else "train"
        splits.setdefault(split, []).append(glob.escape(str(folder / file)))
    return splits


def require_column(rows: Dataset | IterableDataset, column: str, setting: str) -> None:
    """Raises ValueError, naming the setting that chooses it, when `rows` has no such column."""
    if rows.column_names is not None and column not in rows.column_names:
        raise ValueError(
            f"The dataset has no column '{column}', only {', '.join(rows.column_names)}: choose one with {setting}."
        )


def row_number(rows: Dataset, index: int) -> int:
    """The number of a row in the dataset as it was loaded, before some of its rows were selected."""
    return index if rows._indices is None else rows._indices.column(0)[index].as_py()


def require_text(rows: Dataset | IterableDataset, column: str, setting: str = "caption_column") -> None:
    """
    Raises ValueError when the type of a column of captions or prompts, which `setting` chooses, is neither text nor
    lists of text.
    """
    feature = (rows.features or {}).get(column)
    if feature is None:
        return
    feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    kind = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
    # A column without any caption has the type null; the error for that is raised later.
    if kind not in ("string", "large_string", "null"):
        raise ValueError(
            f"The column '{column}' holds {kind}, not text: write each {setting.partition('_')[0]} as text, in quotes"
            f" in a metadata.jsonl, or choose another column with {setting}."
        )


def captions_of(value: str | Sequence[str] | None) -> list[str]:
    """The captions of one image: a row holds one, a list, or none. Empty captions are ignored.

    Raises:
        ValueError: when a caption is not text.
    """
    captions: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    for caption in captions:
        if caption is not None and not isinstance(caption, str):
            raise ValueError(f"the caption {caption!r} is not text.")
    return [caption for caption in captions if caption and not caption.isspace()]


def pairs_of(captions: Any, prompts: Any) -> list[tuple[str, str]]:
    """
    The captions of one image, each with its prompt, or "" where it has none. Empty captions are ignored.

    Args:
        captions: one, a list, or none.
        prompts: one for all captions; a list as long as that of the captions; a list of prompts that all ask for one
            caption; or none.

    Raises:
        ValueError: when one is not text, or the lists do not fit.
    """
    captions = list(captions) if isinstance(captions, list | tuple) else [captions]
    prompts = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
    if len(captions) == 1:
        captions *= max(1, len(prompts))
    if len(prompts) <= 1:
        prompts = (prompts or [None]) * len(captions)
    if len(prompts) != len(captions):
        raise ValueError(f"there are {len(captions)} captions, but {len(prompts)} prompts: give each its own.")
    return [
        (text, as_prompt(prompt))
        for given, prompt in zip(captions, prompts, strict=True)
        for text in captions_of(given)
    ]


def read_captions(row: dict[str, Any], column: str, prompt_column: str | None = None) -> dict[str, list[str]]:
    """All `captions` of a row, and with a column of prompts the `prompts` of each; raises ValueError for none."""
    pairs = pairs_of(row[column], row.get(prompt_column))
    if not pairs:
        raise ValueError("there is no caption.")
    captions = {"captions": [caption for caption, _ in pairs]}
    return captions if prompt_column is None else {**captions, "prompts": [prompt for _, prompt in pairs]}


def open_image(source: Any) -> Image.Image:
    """The image in a row, upright and in RGB; raises OSError or ValueError if it cannot be read."""
    if source is None:
        raise ValueError("there is no image.")
    if isinstance(source, dict) and source["bytes"] is None:
        if "://" not in source["path"]:
            return load_image(local_path(source["path"]))
        with fsspec.open(source["path"], "rb") as file:  # the paths of a stream are URLs: hf://, zip://, ...
            source = {**source, "bytes": file.read()}
    return load_image(source)


def local_path(path: str) -> str:
    """The path on disk of a file that a row names. Rows of a folder have names as [`name_of`] gives them."""
    return path if os.path.exists(path) else location_of(path)


def image_digest(source: Any) -> bytes:
    """An identifier of the image in a row, from its bytes or its path; the image is not decoded."""
    content = source["bytes"] or source["path"].encode() if isinstance(source, dict) else repr(source).encode()
    return hashlib.blake2b(content, digest_size=8).digest()
