"""Batches that fit into memory."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from vlv.captioning.memory import free_memory, memory_in_use, peak_memory

# An automatic batch starts small and grows up to a largest size, as long as memory allows.
FIRST_BATCH = 4
LARGEST_BATCH = {"cpu": 64}
LARGEST_ON_ACCELERATOR = 256
SHARE_OF_MEMORY = 0.8

Result = TypeVar("Result")


def largest_batch(device_type: str) -> int:
    """How far an automatic batch may grow on such a device."""
    return LARGEST_BATCH.get(device_type, LARGEST_ON_ACCELERATOR)


class Batches:
    """
    What works on images in batches inherits it.

    Args:
        device: where the work is done.
        batch_size: images at once; `None` starts small and grows as far as free memory allows. A batch that does not
            fit into memory is halved until it does.
        hint: how a user makes the work smaller; the end of the sentence for an image that does not fit.
    """

    def __init__(self, device: torch.device, batch_size: int | None, hint: str):
        self.device, self.hint = device, hint
        self.largest = batch_size or largest_batch(device.type)
        self.batch_size = batch_size or FIRST_BATCH

    def in_batches(self, work: Callable[..., list[Result]], *columns: Sequence[Any]) -> list[Result]:
        """
        The results of all images.

        Args:
            work: called with a batch of each column; it returns one result for each image.
            columns: what the work needs of each image; all are equally long.

        Raises:
            ValueError: when not even one image fits into memory.
        """
        results: list[Result] = []
        while len(results) < len(columns[0]):
            batch = slice(len(results), len(results) + self.batch_size)
            before = memory_in_use(self.device)
            done = _try(work, [column[batch] for column in columns])
            if done is None:
                self._shrink(len(columns[0][batch]))
            else:
                results += done
                self._grow(len(done), peak_memory(self.device) - before)
        return results

    def _shrink(self, failed):
        clear_device_cache(garbage_collection=True)
        if failed == 1:
            raise ValueError(f"Not even one image at a time fits into memory: {self.hint}.")
        self.batch_size = self.largest = failed // 2

    def _grow(self, images, used):
        if images == self.batch_size < self.largest:
            fitting = int(SHARE_OF_MEMORY * free_memory(self.device) * images / max(used, 1))
            self.batch_size = max(self.batch_size, min(2 * self.batch_size, self.largest, fitting))


def _try(work, columns):
    """The results, or `None` when there was not enough memory."""
    try:
        return work(*columns)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
    return None  # here, outside of `except`, the memory of the failed attempt is free again
