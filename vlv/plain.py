"""
Pickles tensors as plain bytes. torch passes tensors between processes through shared memory. If /dev/shm is small, as
in a container, both processes then wait for ever.
"""

import io
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

import torch

SHARED_MEMORY = "/dev/shm"
# More batches than all workers together have in shared memory at once.
BATCHES_AT_ONCE = 32


def dump(value: Any, file: IO[bytes]) -> None:
    """As `pickle.dump`; tensors in the value become plain arrays."""
    _Pickler(file, protocol=5).dump(value)


class Batch(dict):
    """Tensors by name. They pass between processes through shared memory only if there is enough of it."""

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
    """Free bytes of shared memory; without limit if the system has no folder for it."""
    if not os.path.isdir(SHARED_MEMORY):
        return 2**63
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


class _Pickler(pickle.Pickler):
    def reducer_override(self, value):
        if isinstance(value, torch.Tensor):
            with suppress(TypeError):  # numpy lacks some dtypes; torch pickles those, which takes longer
                return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def _load(content: bytes) -> Batch:
    return Batch(pickle.loads(content))
