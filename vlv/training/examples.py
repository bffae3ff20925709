"""
Rows as training samples.

    rows ─ one pass over the images (cache.py) ─► the outputs of frozen parts, on disk
      └──────────────────────────────────┴─► Examples ─► DataLoader ─► the stage's `collate` ─► the model's inputs

Streamed rows skip the pass. They use `Stream` instead of `Examples`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from PIL.Image import Resampling
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from vlv.data.rows import image_digest, row_number


def draw_captions(batch: dict[str, Any]) -> list[str]:
    """One caption for each sample, drawn from its `captions` with its `random`."""
    return draw_pairs(batch)[0]


def draw_pairs(batch: dict[str, Any]) -> tuple[list[str], list[str]]:
    """One caption for each sample, drawn from its `captions` with its `random`, and its prompt, "" for none."""
    drawn = [
        random.integers(len(captions)) for captions, random in zip(batch["captions"], batch["random"], strict=True)
    ]
    captions = [captions[number] for captions, number in zip(batch["captions"], drawn, strict=True)]
    if "prompts" not in batch:
        return captions, [""] * len(captions)
    return captions, [prompts[number] for prompts, number in zip(batch["prompts"], drawn, strict=True)]


class Table(torch.utils.data.Dataset):
    """Tensors of equal length as a dataset. A batch is one indexing operation.

    DataLoader calls `__getitems__` for a whole batch: a dict of tensors (B, ...), from which `collate` makes the
    model's inputs. At thousands of samples a second, reading one by one would cost more than the training step.
    """

    def __init__(self, **columns: torch.Tensor):
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"The columns of a Table have {lengths} rows: they must be equally long.")
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int | slice | list[int]) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self[indices]


class Examples(torch.utils.data.Dataset):
    """The rows of a dataset as training samples: cached tensors, and what is read each time.

    DataLoader calls `__getitems__` for a whole batch: a dict of tensors (B, ...) and of lists of length B. One of the
    lists, `random`, holds a random generator for each sample. Its seed depends only on the seed, the epoch and the
    row, so a resumed run draws the same as an uninterrupted run.

    Args:
        rows: with only the columns that `read` needs.
        read: a row -> a dict of tensors and lists. `None` if nothing is read.
        cached: tensors for each row, in their order: an object whose `cached[indices]` is a dict.
        report: called as `report(row, number, error)` for each row that cannot be read. The row is left out of its
            batch. If no row of a batch can be read, the batch takes the next row.
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
                raise ValueError(f"None of the {count} rows can be used: failures.jsonl says why.")
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
    """The rows of a streamed dataset as training samples (see `Examples`), without end. Each epoch has another order.

    Every process reads its own share of the data, and every worker of a DataLoader its own share of that. A row that
    cannot be read is left out, and `report(row, number, error)` is called.

    Args:
        held_out: the digests of images that are not used for training (see `image_digest`).
        shuffle_buffer_size: how many rows are read ahead; the next row is drawn from them.
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
                    "None of the streamed rows can be trained on: they are unreadable (failures.jsonl says why) or"
                    " held out for evaluation (eval_size)."
                )


def merge(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Single samples -> a batch: tensors are stacked (B, ...), other values become lists of length B."""
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {
        name: torch.stack(values) if isinstance(values[0], torch.Tensor) else values
        for name, values in columns.items()
    }


def squeeze(image: Image.Image, size: int) -> dict[str, torch.Tensor]:
    """An image -> `images`, uint8 (3, size, size), resized to a square as in Florence-2."""
    if image.size != (size, size):
        image = image.resize((size, size), Resampling.BICUBIC)
    return {"images": torch.from_numpy(np.array(image)).permute(2, 0, 1)}


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float32 -1..1, the range of diffusion models."""
    return images.float() / 127.5 - 1


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: Iterable[str], max_length: int) -> torch.Tensor:
    """Token ids (N, max_length), padded on the right with `tokenizer.pad_token_id`.

    Raises:
        ValueError: when a caption is longer than `max_length` tokens.
    """
    ids = tokenizer(list(captions), padding="max_length", max_length=max_length)["input_ids"]
    longest = max(ids, key=len)
    if len(longest) > max_length:
        raise ValueError(f"The caption '{tokenizer.decode(longest)}' is longer than {max_length} tokens.")
    return torch.tensor(ids)


def fixed_noise(count: int, shape: Sequence[int], num_train_timesteps: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Noise and a timestep for each evaluation image. They stay the same, so that evaluation losses can be compared.

    The timesteps are spread evenly over the whole range, in random order.

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
    """Runs `compute` on `inputs` (N, ...) on `device`, in batches. Returns the outputs (N, ...) on the CPU."""
    outputs: list[tuple[torch.Tensor, ...]] = []
    for batch in tqdm(inputs.split(batch_size), desc=description, unit="batch", disable=None):
        outputs.append(tuple(output.cpu() for output in compute(batch.to(device))))
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
