"""
Pickling tensors as plain bytes. torch passes tensors between processes through shared memory, and where /dev/shm is
small, as in a container, both sides then wait for ever.
"""

import io
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

import torch

SHARED_MEMORY = "/dev/shm"
# How many batches of every worker may lie in shared memory at once, with room to spare.
BATCHES_AT_ONCE = 32


def dump(value: Any, file: IO[bytes]) -> None:
    """As `pickle.dump`; tensors in the value become plain arrays."""
    _Pickler(file, protocol=5).dump(value)


class Batch(dict):
    """Tensors by name, which travel between processes in shared memory only where there is plenty of it."""

    def __reduce__(self):
        size = sum(value.nbytes for value in self.values() if isinstance(value, torch.Tensor))
        if free_shared_memory() >= BATCHES_AT_ONCE * size:
            return Batch, (dict(self),)
        file = io.BytesIO()
        dump(dict(self), file)
        return _load, (file.getvalue(),)

    def __copy__(self):
        return Batch(self)


class Collate:
    """Makes a [`Batch`] of what `collate` returns."""

    def __init__(self, collate: Callable[[Any], dict[str, torch.Tensor]]):
        self.collate = collate

    def __call__(self, samples: Any) -> Batch:
        return Batch(self.collate(samples))


def free_shared_memory() -> int:
    """Bytes that may still be shared, and all there can be where the system has no folder for them."""
    if not os.path.isdir(SHARED_MEMORY):
        return 2**63
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


class _Pickler(pickle.Pickler):
    def reducer_override(self, value):
        if isinstance(value, torch.Tensor):
            with suppress(TypeError):  # of a type that numpy lacks: torch pickles it, which takes longer
                return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def _load(content: bytes) -> Batch:
    return Batch(pickle.loads(content))
