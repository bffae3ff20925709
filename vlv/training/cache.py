"""Computes the output of frozen parts once for each image of a dataset, and keeps it on disk as memory-mapped Arrow.

A file's name is a hash of all inputs of the computation. A resumed run, a later run or another process with the same
inputs finds the file and computes nothing. With other inputs the name differs, so old results are never read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Array2D, Array3D, Dataset, Features, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments

from vlv.data.rows import open_image
from vlv.reading import read_ahead
from vlv.training.examples import Table, merge

# A file is complete or absent. A killed pass loses only the file that it was writing. Processes divide the files.
ROWS_PER_FILE = 20_000
# A cache smaller than this many bytes is held in memory, where gathering a batch is ten times as fast.
IN_MEMORY = 2**30

Tensors = dict[str, torch.Tensor]


class Images:
    """The images of a dataset as the tensors of `read`, and `unreadable`: why an image could not be read, or ""."""

    def __init__(self, rows: Dataset, column: str, read: Callable[[Image.Image], Tensors]):
        self.rows, self.column, self.read = rows.select_columns([column]), column, read

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, indices: range, batch_size: int, num_workers: int) -> Iterator[dict[str, Any]]:
        """The images with these numbers in batches (B, ...), read by at least one process."""
        items = ((index, self.rows[index][self.column]) for index in indices)
        reads = read_ahead(items, self._read_source, max(1, num_workers), 2 * batch_size)
        while samples := [self._sample(tensors, error) for _, tensors, error in islice(reads, batch_size)]:
            yield merge(samples)

    def _read_source(self, source: Any) -> Tensors:
        return self.read(open_image(source))

    def _sample(self, tensors: Tensors | None, error: str | None) -> dict[str, Any]:
        # A placeholder keeps the shape of the batch. Its result is marked as unreadable and is never used.
        return {**(self.blank() if tensors is None else tensors), "unreadable": error or ""}

    def blank(self) -> Tensors:
        return self.read(Image.new("RGB", (8, 8)))


def compute_once(
    rows: Dataset,
    column: str,
    read: Callable[[Image.Image], Tensors],
    compute: Callable[[Tensors], Tensors],
    key: Sequence[Any],
    folder: Path,
    args: TrainingArguments,
    description: str,
) -> Dataset:
    """
    Reads every image once and computes tensors from it. Results that are already in `folder` are not computed again.

    Args:
        rows: the result has the same order.
        column: the column of the images.
        read: one image -> its tensors.
        compute: a batch of them (B, ...) -> the tensors to keep (B, ...).
        key: what `read` and `compute` depend on, as `content_hash` takes it.

    Returns:
        A memory-mapped dataset of the results of `compute`, and `unreadable`: why an image could not be read, or "".

    Raises:
        OSError: when the disk has no room for the results. Earlier results in `folder` are kept.
    """
    images = Images(rows, column, read)
    files = cache_files(rows, column, key, folder)
    folder = files[0].parent
    missing = [(number * ROWS_PER_FILE, file) for number, file in enumerate(files) if not file.exists()]
    state = PartialState()
    state.wait_for_everyone()  # all have looked before the first one writes
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        blank = compute_blank(images, compute)
        check_room(folder, missing_bytes(len(rows), files, blank), len(rows), blank)
        for start, file in missing[state.process_index :: state.num_processes]:
            batch_size = args.per_device_eval_batch_size
            stop = min(start + ROWS_PER_FILE, len(rows))
            batches = images.batches(range(start, stop), batch_size, args.dataloader_num_workers)
            total = -(-(stop - start) // batch_size)
            progress = tqdm(batches, total=total, desc=description, unit="batch", disable=None)
            write(file, ((compute(batch), batch.pop("unreadable")) for batch in progress), blank)
    state.wait_for_everyone()
    if absent := [file for file in files if not file.exists()]:
        raise FileNotFoundError(f"{absent[0]} does not exist: cache_dir must be a folder that all processes share.")
    return concatenate_datasets([Dataset.from_file(str(file)) for file in files])


def cache_files(rows: Dataset, column: str, key: Sequence[Any], folder: Path) -> list[Path]:
    """The files in `folder`, of `ROWS_PER_FILE` rows each, that `compute_once` reads or writes."""
    folder = folder / content_hash(rows._fingerprint, column, *key)
    return [folder / f"{start:010}.arrow" for start in range(0, len(rows), ROWS_PER_FILE)]


def compute_blank(images: Images, compute: Callable[[Tensors], Tensors]) -> Tensors:
    """The result of `compute` for a blank image, which has the shapes and types of every result."""
    return compute({name: tensor[None] for name, tensor in images.blank().items()})


def missing_bytes(count: int, files: Sequence[Path], blank: Tensors) -> int:
    """The size in bytes of the tensors of all rows whose file does not exist yet."""
    rows = sum(
        min(ROWS_PER_FILE, count - number * ROWS_PER_FILE) for number, file in enumerate(files) if not file.exists()
    )
    return rows * sum(tensor.nbytes for tensor in blank.values())


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write(file: Path, batches: Iterable[tuple[Tensors, list[str]]], blank: Tensors) -> None:
    """Writes one Arrow file atomically."""
    features = Features(
        {name: array_feature(tensor) for name, tensor in blank.items()} | {"unreadable": Value("string")}
    )
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        with ArrowWriter(path=str(unfinished), features=features) as writer:
            for tensors, unreadable in batches:
                arrays = {name: tensor.numpy(force=True) for name, tensor in tensors.items()}
                writer.write_batch({**arrays, "unreadable": unreadable})
            writer.finalize()
        unfinished.replace(file)
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error.strerror or error}. {HINT}") from error
    finally:
        unfinished.unlink(missing_ok=True)


HINT = "Choose a cache_dir with more room, or cache less: --cache_features false, --cache_latents false."


def check_room(folder: Path, size: int, count: int, tensors: Iterable[str]) -> None:
    """Raises OSError when `size` bytes do not fit on the disk, before hours of computation."""
    if size > (free := free_bytes(folder)):
        raise OSError(
            f"The {' and '.join(tensors)} of {count:,} images take {size / 1e9:,.1f} GB, but"
            f" {folder.parent} has {free / 1e9:,.1f} GB free. {HINT}"
        )


def array_feature(tensor: torch.Tensor) -> Array2D | Array3D:
    """How `datasets` describes a batch of matrices (B, N, M) or images (B, C, H, W)."""
    kind = {3: Array2D, 4: Array3D}[tensor.ndim]
    return kind(tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))


def as_tensors(cached: Dataset, dtype: torch.dtype = torch.float32) -> Table | Dataset:
    """The kept tensors, by index. Small ones are held in memory; others are read from the disk batch by batch."""
    cached = cached.remove_columns("unreadable").with_format("torch", dtype=dtype)
    return Table(**cached[:]) if cached.data.nbytes < IN_MEMORY else cached


def content_hash(*parts: Any) -> str:
    """A short hash of the inputs of a computation: of a module its weights, of anything else its JSON."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for name, weight in part.state_dict().items():
                digest.update(f"{name} {tuple(weight.shape)} ".encode())
                digest.update(weight.detach().float().cpu().contiguous().numpy())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
