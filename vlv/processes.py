"""The processes of `torchrun` or `accelerate launch` that do one command's work together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState

from vlv.models.loading import find_device


def join_processes(device: str) -> PartialState:
    """
    The processes that caption together, each on a device of its own kind; alone, this process.

    Raises:
        ValueError: when a launcher did not start what it was asked for.
    """
    # What has no kind of process of its own in accelerate counts as a CPU. Processes only wait for each other: gloo
    # can do that everywhere, and tells at once when one of them is lost, where NCCL would wait until the timeout.
    cpu = find_device(device).type in ("cpu", "mps")
    backend = {} if cpu or "LOCAL_RANK" not in os.environ else {"backend": "gloo"}
    processes = PartialState(cpu=cpu, timeout=timedelta(days=30), **backend)  # the first waits for the last
    check_launch(processes)
    return processes


def check_launch(processes: PartialState) -> None:
    """Raises ValueError when a launcher did not start what it was asked for."""
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    started = int(os.environ.get("WORLD_SIZE", 1))
    if by_accelerate and started == 1 and "LOCAL_RANK" not in os.environ and "MASTER_PORT" in os.environ:
        # It was asked for several: only then does it name a port, but on a CPU it starts one.
        raise ValueError(
            "accelerate launch starts one process on a CPU, whatever --num_processes says: use"
            " torchrun --nproc_per_node N in its place."
        )
    if started != processes.num_processes:
        raise ValueError(
            f"WORLD_SIZE says that there are {started} processes, but this one finds {processes.num_processes}: start"
            " them with torchrun --nproc_per_node N, or without WORLD_SIZE."
        )


@contextmanager
def said_when_lost() -> Iterator[None]:
    """Turns what libraries raise when another process is lost into one OSError that says so."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise OSError(
            "Another process of this run has ended before its work was done; what was saved before is whole, and"
            f" --resume continues from there. The library says: {error}"
        ) from error
