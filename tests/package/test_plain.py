"""Batches pass between processes without shared memory when there is little of it."""

import copy
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch.utils.data import DataLoader

from vlv import plain
from vlv.plain import Batch, Collate


def _collate(samples):
    return {"pixels": torch.stack(samples), "names": [str(sample.sum()) for sample in samples]}


@pytest.mark.parametrize("free", [0, 2**40])
def test_batches_of_a_worker(monkeypatch, free):
    monkeypatch.setattr(plain, "free_shared_memory", lambda: free)
    samples = [torch.full((2, 3), number, dtype=torch.uint8) for number in range(4)]
    batches = list(DataLoader(samples, batch_size=2, num_workers=1, collate_fn=Collate(_collate)))
    assert [batch["pixels"].is_shared() for batch in batches] == [free > 0] * 2
    for batch, first in zip(batches, (0, 2), strict=True):
        expected = _collate(samples[first : first + 2])
        assert isinstance(batch, Batch) and batch["names"] == expected["names"]
        assert torch.equal(batch["pixels"], expected["pixels"])


def test_every_type_of_tensor_travels(monkeypatch):
    monkeypatch.setattr(plain, "free_shared_memory", lambda: 0)
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    batch = Batch({str(kind): torch.ones(3, 2, dtype=kind).T for kind in kinds})
    for arrived in (ForkingPickler.loads(ForkingPickler.dumps(batch)), copy.copy(batch)):
        assert arrived.keys() == batch.keys()
        assert all(
            torch.equal(arrived[name], value) and arrived[name].dtype == value.dtype for name, value in batch.items()
        )
