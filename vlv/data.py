"""Images and captions for training: loading through `datasets`, and columns held ready as tensors."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from PIL.Image import Resampling
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from processing_vlv import load_image


def load_rows(dataset: str, split: str | None = None) -> Dataset:
    """Loads one split of an ImageFolder, of a folder of parquet or WebDataset files, or of a Hub id.

    Images stay encoded (`Image(decode=False)`): they are read by `load_image` where they are needed.

    Raises:
        FileNotFoundError: when `dataset` looks like a path and is none.
        ValueError: when it holds no such split.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            splits = load_from_disk(str(path))
        else:
            splits = load_dataset(folder_format(path), data_dir=str(path))
    elif path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {dataset}; name a folder of images or a data set on the Hub.")
    else:
        splits = load_dataset(dataset)

    splits = splits if isinstance(splits, DatasetDict) else DatasetDict(train=splits)
    if split is None and len(splits) > 1 and "train" not in splits:
        raise ValueError(f"{dataset} has the splits {', '.join(splits)}: choose one with train_split.")
    name = split or ("train" if "train" in splits else next(iter(splits)))
    if name not in splits:
        raise ValueError(f"{dataset} has no split '{name}', but {', '.join(splits)}.")
    rows = splits[name]
    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


def folder_format(folder: Path) -> str:
    """The `datasets` builder that reads what lies in a folder."""
    suffixes = {file.suffix for file in folder.rglob("*") if file.suffix in (".parquet", ".tar")}
    return {".parquet": "parquet", ".tar": "webdataset"}.get(next(iter(suffixes), ""), "imagefolder")


def require_column(rows: Dataset, column: str, setting: str) -> None:
    """Raises ValueError, naming the setting that chooses it, when `rows` has no such column."""
    if column not in rows.column_names:
        raise ValueError(
            f"The data set has no column '{column}', but {', '.join(rows.column_names)}: choose one with {setting}."
        )


class Pixels(torch.utils.data.Dataset):
    """The images of a data set, one by one: uint8 (3, size, size), squeezed to a square as Florence-2 does."""

    def __init__(self, rows: Dataset, column: str, size: int):
        self.rows, self.column, self.size = rows, column, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = load_image(self.rows[index][self.column])
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode_images(rows: Dataset, column: str, size: int, description: str = "Reading images") -> torch.Tensor:
    """All images of a data set in memory: uint8 (N, 3, size, size)."""
    workers = min(os.cpu_count() or 1, len(rows) // 1000)
    loader = DataLoader(Pixels(rows, column, size), batch_size=250, num_workers=workers)
    images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    start = 0
    for batch in tqdm(loader, desc=description, unit_scale=250, unit="image", disable=None):
        images[start : start + len(batch)] = batch
        start += len(batch)
    return images


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float32 -1..1, the range of diffusion models."""
    return images.float() / 127.5 - 1


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int) -> torch.Tensor:
    """Token ids (N, max_length), padded on the right with `tokenizer.pad_token_id`.

    Raises:
        ValueError: when a caption is longer than `max_length`, which would cut its end off.
    """
    ids = tokenizer(list(captions), padding="max_length", max_length=max_length)["input_ids"]
    longest = max(ids, key=len)
    if len(longest) > max_length:
        raise ValueError(f"The caption '{tokenizer.decode(longest)}' is longer than {max_length} tokens.")
    return torch.tensor(ids)


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

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = torch.as_tensor(indices)
        return {name: column[rows] for name, column in self.columns.items()}


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


def captions_of(rows: Dataset, column: str) -> Iterator[str]:
    """Every caption in a column that holds one caption or a list of captions per row."""
    for captions in rows[column][:]:
        yield from [captions] if isinstance(captions, str) else captions
