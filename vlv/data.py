"""Data for training: loading rows through `datasets`, and making samples of them.

    rows ─ one pass over the images (vlv/cache.py) ─► what frozen parts make of each, on disk
      └──────────────────────────────────┴─► Examples ─► DataLoader ─► the stage's `collate` ─► the model's inputs

Rows that are streamed skip the pass: `Stream` takes the place of `Examples`.
"""

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from PIL import Image
from PIL.Image import Resampling
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from processing_vlv import load_image
from vlv.image_folder import SPLITS, image_folder
from vlv.images import list_folder, location_of, report_passed_over

# Shards of a data set that lies on disk in one piece and is streamed: enough for many processes and their workers.
STREAM_SHARDS = 64
# `train/a.parquet`, `train.parquet`, `train-0001.tar`, and `any-00000-of-00001.parquet` as `push_to_hub` names it.
SPLIT_OF_TABLE = rf"({'|'.join(SPLITS)})(?:/.*|(?:-\d+)?\.\w+)|(?:data/)?(\w+)-\d{{5}}-of-\d{{5}}\.\w+"


# ---- rows ------------------------------------------------------------------------------------------------------


def load_rows(dataset: str, split: str | None = None, streaming: bool = False) -> Dataset | IterableDataset:
    """Loads one split of a folder of images (see [`image_folder`]), of parquet or WebDataset files, of a folder from
    `save_to_disk`, or of a Hub id.

    Images stay encoded (`Image(decode=False)`): `open_image` reads them where they are needed.

    Raises:
        FileNotFoundError: when `dataset` looks like a path and is none.
        ValueError: when it holds no images, or no such split.
    """
    path = Path(dataset).expanduser()
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        splits = load_from_disk(str(path))
    elif path.is_dir():
        splits = read_folder(path, streaming)
    elif path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {dataset}; name a folder of images or a data set on the Hub.")
    else:
        splits = load_dataset(dataset, streaming=streaming)

    splits = splits if isinstance(splits, dict) else {"train": splits}
    if split is None and len(splits) > 1 and "train" not in splits:
        raise ValueError(f"{dataset} has the splits {', '.join(splits)}: choose one with train_split or eval_split.")
    name = split or ("train" if "train" in splits else next(iter(splits)))
    if name not in splits:
        raise ValueError(f"{dataset} has no split '{name}', but {', '.join(splits)}.")
    rows = splits[name]
    if streaming and isinstance(rows, Dataset):
        rows = rows.to_iterable_dataset(num_shards=min(STREAM_SHARDS, len(rows)))
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def read_folder(folder: Path, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    """The splits of a folder of images, else of parquet files, else of WebDataset tars."""
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
    raise ValueError(f"There are no images in {folder}, and neither parquet files nor WebDataset tars.")


@contextmanager
def reading(dataset: str) -> Iterator[None]:
    """Turns whatever `datasets` raises into one error that names the dataset."""
    try:
        yield
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"There is no folder {dataset}, and no dataset of that name was found on the Hub: {error}"
        ) from error
    except Exception as error:  # it raises an IndexError for an empty metadata.jsonl, for example
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        if isinstance(cause, OSError | ValueError) and dataset in str(cause):
            raise cause from error
        raise ValueError(f"{dataset} cannot be read: {cause or type(cause).__name__}") from error


def split_tables(folder: Path, files: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split: they are one, `train`, unless every one of them is named after its split."""
    named = [re.fullmatch(SPLIT_OF_TABLE, file) for file in files]
    splits = {}
    for file, match in zip(files, named, strict=True):
        split = next(filter(None, match.groups())) if all(named) else "train"
        splits.setdefault(split, []).append(glob.escape(str(folder / file)))
    return splits


def require_column(rows: Dataset | IterableDataset, column: str, setting: str) -> None:
    """Raises ValueError, naming the setting that chooses it, when `rows` has no such column."""
    if rows.column_names is not None and column not in rows.column_names:
        raise ValueError(
            f"The data set has no column '{column}', but {', '.join(rows.column_names)}: choose one with {setting}."
        )


def row_number(rows: Dataset, index: int) -> int:
    """Where a row lies in the dataset as it was loaded, before some of its rows were selected."""
    return index if rows._indices is None else rows._indices.column(0)[index].as_py()


def require_text(rows: Dataset | IterableDataset, column: str) -> None:
    """Raises ValueError when a column of captions is known to hold anything but text, or lists of text."""
    feature = (rows.features or {}).get(column)
    if feature is None:
        return
    feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    kind = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
    # The type null is that of a column without any caption, which is said where captions are missed.
    if kind not in ("string", "large_string", "null"):
        raise ValueError(
            f"The column '{column}' holds {kind}, not text: write each caption as text, in quotes in a metadata.jsonl,"
            " or choose another column with caption_column."
        )


def captions_of(value: str | Sequence[str] | None) -> list[str]:
    """The captions of one image: a row holds one, a list, or none. Empty captions are ignored.

    Raises:
        ValueError: when a caption is not text.
    """
    captions = list(value) if isinstance(value, list | tuple) else [value]
    for caption in captions:
        if caption is not None and not isinstance(caption, str):
            raise ValueError(f"the caption {caption!r} is not text.")
    return [caption for caption in captions if caption and not caption.isspace()]


def read_captions(row: dict[str, Any], column: str) -> dict[str, list[str]]:
    """All `captions` of a row; raises ValueError where there is none."""
    captions = captions_of(row[column])
    if not captions:
        raise ValueError("there is no caption.")
    return {"captions": captions}


def draw_captions(batch: dict[str, Any]) -> list[str]:
    """One of each sample's `captions`, drawn with its `random`."""
    return [
        captions[random.integers(len(captions))]
        for captions, random in zip(batch["captions"], batch["random"], strict=True)
    ]


def open_image(source: Any) -> Image.Image:
    """The image in a row, upright and in RGB; raises OSError or ValueError where it cannot be read."""
    if source is None:
        raise ValueError("there is no image.")
    if isinstance(source, dict) and source["bytes"] is None:
        if "://" not in source["path"]:
            return load_image(local_path(source["path"]))
        with fsspec.open(source["path"], "rb") as file:  # a stream names files where they lie: hf://, zip://, ...
            source = {**source, "bytes": file.read()}
    return load_image(source)


def local_path(path: str) -> str:
    """Where the file lies that a row names: rows of a folder spell it as [`name_of`] does."""
    return path if os.path.exists(path) else location_of(path)


def image_digest(source: Any) -> bytes:
    """Tells the image in a row from all others, without reading it: by its bytes, or by its path."""
    content = source["bytes"] or source["path"].encode() if isinstance(source, dict) else repr(source).encode()
    return hashlib.blake2b(content, digest_size=8).digest()


# ---- samples ---------------------------------------------------------------------------------------------------


class Table(torch.utils.data.Dataset):
    """Tensors of equal length as a data set whose batches are cut out in one indexing each.

    DataLoader asks `__getitems__` for a whole batch: a dict of tensors (B, ...), which `collate` then makes the
    model's input. At thousands of samples a second, going one by one would cost more than the training step.
    """

    def __init__(self, **columns: torch.Tensor):
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"The columns of a Table must be equally long, not {lengths}.")
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int | slice | list[int]) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self[indices]


class Examples(torch.utils.data.Dataset):
    """The rows of a data set as training samples: what was computed of them once, and what is read anew.

    DataLoader asks `__getitems__` for a whole batch, a dict of tensors (B, ...) and lists of B. One of the lists,
    `random`, holds a generator for each sample, seeded with the seed, the epoch and the row alone: with what is drawn
    from them, a resumed run sees what the unbroken one would have seen.

    Args:
        rows: no more columns than `read` needs.
        read: makes of a row a dict of tensors and lists; `None` where there is nothing to read.
        cached: tensors for each row, in their order: anything that gives `cached[indices]` as a dict.
        report: is called as `report(row, number, error)` with each row that cannot be read. The row is left out of its
            batch. A batch without any readable row takes the next one.
    """

    def __init__(
        self,
        rows: Dataset,
        read: Callable[[dict[str, Any]], dict[str, Any]] | None,
        cached: list[Table | Dataset],
        seed: int,
        report: Callable[[dict[str, Any], int, Exception], None],
    ):
        self.rows, self.read, self.cached, self.seed, self.epoch = rows, read, cached, seed, 0
        self.report = report

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> dict[str, Any]:
        if isinstance(index, slice):
            return self.__getitems__(list(range(len(self))[index]))
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        batch = {}
        if self.read is not None:
            samples = self.readable(indices)
            start, count = indices[-1] + 1, len(self)
            for index in range(start, start + count):
                if samples:
                    break
                samples = self.readable([index % count])
            if not samples:
                raise ValueError(f"None of the {count} rows can be used: unreadable.jsonl says why.")
            indices, batch = [index for index, _ in samples], merge([sample for _, sample in samples])
        for source in self.cached:
            batch |= source[indices]
        return {**batch, "random": [np.random.default_rng((self.seed, self.epoch, index)) for index in indices]}

    def readable(self, indices: list[int]) -> list[tuple[int, dict[str, Any]]]:
        """Index and sample of each row that can be read."""
        samples = []
        for index, row in zip(indices, self.rows.__getitems__(indices), strict=True):
            try:
                samples.append((index, self.read(row)))
            except (OSError, ValueError) as error:
                self.report(row, row_number(self.rows, index), error)
        return samples


class Stream(torch.utils.data.IterableDataset):
    """The rows of a streamed data set as training samples (see `Examples`), without end: epoch after epoch, each in an
    order of its own.

    Every process reads its own share of the data, and every worker of a DataLoader its own share of that. What cannot
    be read is told to `report(row, number, error)` and left out.

    Args:
        held_out: the digests of images that are not to be trained on (see `image_digest`).
        shuffle_buffer_size: how many rows ahead the next one is drawn from.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        rows: IterableDataset,
        read: Callable[[dict[str, Any]], dict[str, Any]],
        report: Callable[[dict[str, Any], int, Exception], None],
        image_column: str,
        held_out: Set[bytes],
        seed: int,
        shuffle_buffer_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer_size)
        self.rows = split_dataset_by_node(rows, rank, world_size)
        self.read, self.report, self.image_column, self.held_out = read, report, image_column, held_out
        self.seed, self.rank = seed, rank

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        share = (self.rank, 0 if worker is None else worker.id)
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            number, found = -1, False
            for number, row in enumerate(self.rows):
                if self.held_out and image_digest(row[self.image_column]) in self.held_out:
                    continue
                try:
                    sample = self.read(row)
                except (OSError, ValueError) as error:
                    self.report(row, number, error)
                    continue
                found = True
                yield {**sample, "random": np.random.default_rng((self.seed, epoch, *share, number))}
            if number < 0 and worker is not None:
                return  # there are more workers than shards of the data
            if not found:
                raise ValueError(
                    "None of the streamed rows can be trained on: they are unreadable (unreadable.jsonl says why) or"
                    " held out for evaluation (eval_size)."
                )


def merge(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples one by one to a batch: tensors stacked (B, ...), the rest in lists of B."""
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {
        name: torch.stack(values) if isinstance(values[0], torch.Tensor) else values
        for name, values in columns.items()
    }


# ---- tensors ---------------------------------------------------------------------------------------------------


def squeeze(image: Image.Image, size: int) -> dict[str, torch.Tensor]:
    """An image as `images`, uint8 (3, size, size), squeezed to a square as Florence-2 does."""
    if image.size != (size, size):
        image = image.resize((size, size), Resampling.BICUBIC)
    return {"images": torch.from_numpy(np.array(image)).permute(2, 0, 1)}


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float32 -1..1, the range of diffusion models."""
    return images.float() / 127.5 - 1


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: Iterable[str], max_length: int) -> torch.Tensor:
    """Token ids (N, max_length), padded on the right with `tokenizer.pad_token_id`.

    Raises:
        ValueError: when a caption is longer than `max_length`, which would cut its end off.
    """
    ids = tokenizer(list(captions), padding="max_length", max_length=max_length)["input_ids"]
    longest = max(ids, key=len)
    if len(longest) > max_length:
        raise ValueError(f"The caption '{tokenizer.decode(longest)}' is longer than {max_length} tokens.")
    return torch.tensor(ids)


def fixed_noise(count: int, shape: Sequence[int], num_train_timesteps: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """One noise and one timestep per evaluation image, so that evaluation losses can be compared with each other.

    Timesteps are spread evenly over the whole range, in random order.

    Returns:
        noise (count, *shape) and timesteps (count,), int64.
    """
    generator = torch.Generator().manual_seed(seed)
    timesteps = (torch.arange(count) + 0.5) / count * num_train_timesteps
    return {
        "noise": torch.randn(count, *shape, generator=generator),
        "timesteps": timesteps.long()[torch.randperm(count, generator=generator)],
    }


@torch.inference_mode()
def in_batches(
    compute: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    inputs: torch.Tensor,
    device: torch.device,
    batch_size: int = 500,
    description: str = "Computing",
) -> tuple[torch.Tensor, ...]:
    """Runs `compute` on `inputs` (N, ...) a batch at a time on `device`; returns its outputs (N, ...) on the CPU."""
    outputs: list[tuple[torch.Tensor, ...]] = []
    for batch in tqdm(inputs.split(batch_size), desc=description, unit="batch", disable=None):
        outputs.append(tuple(output.cpu() for output in compute(batch.to(device))))
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
