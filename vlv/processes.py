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
    The processes of a launcher that caption together; without a launcher, only this process.

    Raises:
        ValueError: when a launcher did not start the requested processes.
    """
    # accelerate has no kind of process for MPS, so MPS counts as a CPU. The processes only wait for each other. gloo
    # can do that on every device, and it reports a lost process at once; NCCL would wait until the timeout.
    cpu = find_device(device).type in ("cpu", "mps")
    backend = {} if cpu or "LOCAL_RANK" not in os.environ else {"backend": "gloo"}
    processes = PartialState(cpu=cpu, timeout=timedelta(days=30), **backend)  # the first waits for the last
    check_launch(processes)
    return processes


def check_launch(processes: PartialState) -> None:
    """Raises ValueError when a launcher did not start the requested processes."""
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    started = int(os.environ.get("WORLD_SIZE", 1))
    if by_accelerate and started == 1 and "LOCAL_RANK" not in os.environ and "MASTER_PORT" in os.environ:
        # accelerate sets a port only when several processes were requested. On a CPU it still starts one.
        raise ValueError(
            "accelerate launch starts one process on a CPU, whatever --num_processes says: use"
            " torchrun --nproc_per_node N instead."
        )
    if started != processes.num_processes:
        raise ValueError(
            f"WORLD_SIZE says {started} processes, but this process finds {processes.num_processes}: start"
            " them with torchrun --nproc_per_node N, or without WORLD_SIZE."
        )


@contextmanager
def working_together() -> Iterator[None]:
    """
    The work of all processes. They leave their group at its end. The libraries' errors about a lost process become one
    OSError that says so.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise OSError(
            "Another process of this run ended before its work was done. Files that were saved before are complete,"
            f" and --resume continues from there. The library says: {error}"
        ) from error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # a thread of it that outlives the interpreter ends in an abort
